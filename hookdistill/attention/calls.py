"""One attention that ran, and the maps that follow from it.

Letters: B batch, H query heads, G key and value heads (H, or fewer if heads are grouped), Q queries, K keys, D width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def running_module() -> nn.Module | None:
    """The innermost module on the stack: the first argument of the nearest function that has one there.

    None while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            return first
        frame = frame.f_back
    return None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One scaled-dot-product attention, as the model ran it.

    Tensors are the model's own, attached to its graph. Maps are to be made of them right after the module's forward:
    under the same autocast, and before anything is overwritten.
    """

    query: Tensor  # (B, H, Q, D), after rotary embedding
    key: Tensor  # (B, G, K, D)
    value: Tensor  # (B, G, K, value width)
    mask: Tensor | None = None  # bool, True where a query may attend, or additive; broadcasts to (B, H, Q, K)
    is_causal: bool = False  # aligned to the upper left, as in F.scaled_dot_product_attention
    scale: float = 1.0
    score_mod: Callable[..., Tensor] | None = None  # flex_attention's, applied to the scaled scores
    mask_mod: Callable[..., Tensor] | None = None  # flex_attention's
    scores: Tensor | None = None  # (B, H, Q, K) as the model's own Python code computed them: the four above are in it
    logits: Tensor | None = None  # what softmax then saw, where that is wider: (B, H, Q, K + attention sinks)
    overwritten: bool = False  # the tensors are no longer those that the attention saw
    module: nn.Module | None = field(default_factory=running_module)  # the one that ran this attention


def attention_scores(call: AttentionCall) -> Tensor:
    """(B, H, Q, K): what goes into softmax, mask added, grouped heads repeated; what a boolean mask hides is -inf."""
    if call.scores is not None:
        return call.scores
    with aside():
        scores = call.query @ _per_query_head(call.key, call.query).transpose(-2, -1) * call.scale
        if call.score_mod is not None:
            scores = _apply_score_mod(call.score_mod, scores)
        return _masked(scores, call)


def attention_probabilities(call: AttentionCall) -> Tensor:
    """(B, H, Q, K): softmax of the scores, before dropout, in the query's dtype; computed in float32 at least.

    A query that may attend to no key gets a row of zeros with zero gradient, whatever the model makes of it.
    """
    scores = attention_scores(call)
    logits = scores if call.logits is None else call.logits
    lost = scores.detach().amax(-1, keepdim=True) <= _never(call.query.dtype, scores.dtype)
    with aside():
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # The inner fill keeps softmax away from rows of -inf: 0 · NaN in its backward would be NaN.
        probabilities = wide.masked_fill(lost, 0.0).softmax(-1).masked_fill(lost, 0.0)
        return probabilities[..., : scores.shape[-1]].to(call.query.dtype)


MAP_WORDS = ("attention", "attention_scores")
"""The selectors that name a map."""


def map_of(call: AttentionCall, word: str) -> Tensor:
    """The map that one of `MAP_WORDS` names."""
    return attention_probabilities(call) if word == "attention" else attention_scores(call)


def hidden_at(call: AttentionCall) -> float:
    """The score at and below which a key counts as hidden from a query."""
    return _never(call.query.dtype)


def aside() -> AbstractContextManager[Any]:
    """For computations beside the model's own, maybe inside a checkpointed segment that must not notice them.

    ``torch.utils.checkpoint`` counts the tensors that a segment saves, and fails when its recomputation saves others.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_itself, _itself)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _never(*dtypes: torch.dtype) -> float:
    """The score at and below which a key counts as hidden: models write -inf, the dtype's minimum, -1e9, -1e30 …"""
    return -3e4 if torch.float16 in dtypes else -1e8


def _per_query_head(heads: Tensor, query: Tensor) -> Tensor:
    if heads.ndim < 3 or heads.shape[-3] in (1, query.shape[-3]):
        return heads
    return heads.repeat_interleave(query.shape[-3] // heads.shape[-3], dim=-3)


def _masked(scores: Tensor, call: AttentionCall) -> Tensor:
    mask = call.mask
    if call.mask_mod is not None:
        mask = _dense_mask(call.mask_mod, scores)
    elif call.is_causal:
        mask = _lower_triangle(scores, diagonal=0)
    elif type(mask).__name__ == "CausalBias":  # importing its module would import torch._dynamo
        lower_right = getattr(mask, "variant").name == "LOWER_RIGHT"  # noqa: B009
        mask = _lower_triangle(scores, diagonal=scores.shape[-1] - scores.shape[-2] if lower_right else 0)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _lower_triangle(scores: Tensor, *, diagonal: int) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(diagonal)


def _dense_mask(mask_mod: Callable[..., Tensor], scores: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, queries, keys = scores.shape
    return create_mask(mask_mod, batch, heads, queries, keys, device=scores.device)


def _apply_score_mod(score_mod: Callable[..., Tensor], scores: Tensor) -> Tensor:
    """What flex_attention does to each score: ``score_mod(score, batch, head, query, key)``."""
    # score_mod indexes tensors with the five scalars; under vmap that needs the mode flex_attention itself uses.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    mapped: Callable[..., Any] = score_mod
    for position in (3, 2, 1, 0):
        index_dims = tuple(0 if index == position else None for index in range(4))
        mapped = torch.vmap(mapped, in_dims=(0, *index_dims))
    indices = (torch.arange(size, device=scores.device) for size in scores.shape)
    with TransformGetItemToIndex():
        modified: Tensor = mapped(scores, *indices)
    return modified
