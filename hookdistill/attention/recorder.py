"""Seeing attention run, whoever wrote it and without replacing anything: a mode for torch functions, active while a module runs.

Under the mode every call into torch that Python makes on this thread passes by, so three kinds of attention can be seen:

* ``F.scaled_dot_product_attention`` and ``flex_attention``: one call with everything in its arguments. An active mode also
  turns off the fused forwards of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, which end here too;
* attention in Python code (Hugging Face's eager functions, nanoGPT, ``need_weights=True``), which ``handwritten`` follows;
* flash-attention's own operators, whose scores nobody can see: an error that names the way out.

The stack of modes belongs to the thread, nothing is patched, and outside the module there is no mode. ``torch.compile`` traces
through all of this; hence tensors are compared by ``is``, and a call is recognised by one look-up in a dictionary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..errors import CaptureError
from .calls import AttentionCall
from .handwritten import Handwritten


class AttentionRecorder:
    """Sees the attention calls made between ``start()`` and ``stop()`` on the thread that called ``start()``.

    ``start`` belongs in a forward pre-hook, ``stop`` in a forward hook with ``always_call=True``. Pairs may nest, those of one
    recorder (a module that calls itself) and those of several; each open pair sees every call. One recorder serves one
    thread at a time.
    """

    def __init__(self) -> None:
        self._watches: list[_Watch] = []

    def start(self) -> None:
        watch = _Watch()
        self._watches.append(watch)
        watch.__enter__()

    def stop(self) -> list[AttentionCall]:
        """The calls since the matching ``start``, in order; none without one. Nothing stays active.

        Safe after an exception, also where pairs were left in the wrong order.
        """
        if not self._watches:
            return []
        watch = self._watches.pop()
        if torch.compiler.is_compiling():
            watch.__exit__(None, None, None)
        else:
            _leave(watch)
        return watch.finish()


def _leave(watch: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, also from under modes that were left there."""
    stack = _get_current_function_mode_stack()
    if watch not in stack:
        return
    position = stack.index(watch)
    for _ in stack[position:]:
        TorchFunctionMode.__exit__(watch, None, None, None)
    for mode in stack[position + 1 :]:
        TorchFunctionMode.__enter__(mode)


class _Watch(TorchFunctionMode):
    """The mode itself: passes every call on unchanged and keeps what it needs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self.handwritten = Handwritten()
        self.finished = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.finished:  # still on the stack of a thread that stop() could not reach
            return func(*args, **kwargs)
        whole = _WHOLE_ATTENTIONS.get(func)
        if whole is not None:
            return whole(self, func, args, kwargs)
        if type(func) in _OPERATORS:
            _refuse_flash(func)
        if func is Tensor.unflatten:
            func = torch.unflatten
        result = func(*args, **kwargs)
        call = self.handwritten.see(func, args, kwargs, result)
        if call is not None:
            self.record(call)
        return result

    def record(self, call: AttentionCall) -> None:
        self.calls.append(call if torch.compiler.is_compiling() else replace(call, module=_running_module()))
        self.handwritten.forget()

    def finish(self) -> list[AttentionCall]:
        self.finished = True
        self.handwritten.forget()
        calls, self.calls = self.calls, []
        return calls


def _running_module() -> nn.Module | None:
    """The innermost module on the stack: the first argument of the nearest function that has one there."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(first, nn.Module):
            return first
        frame = frame.f_back
    return None


def _scaled_dot_product(watch: _Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    watch.record(_scaled_dot_product_call(watch.handwritten, *args, **kwargs))
    return result


def _scaled_dot_product_call(
    seen: Handwritten,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    if query.is_nested:
        raise CaptureError(_NESTED)
    if attn_mask is not None and attn_mask.ndim == query.ndim == 3:
        attn_mask = attn_mask.unsqueeze(1)
    unpacked = seen.before_packing(query)
    if unpacked is not None:
        query = unpacked
        if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], -1, 1, attn_mask.shape[-1])
    return AttentionCall(
        query=_with_heads(query),
        key=_with_heads(seen.before_repetition(key)),
        value=_with_heads(seen.before_repetition(value)),
        mask=attn_mask,
        is_causal=is_causal,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
    )


def _with_heads(tensor: Tensor) -> Tensor:
    """Attention on (batch, length, width) has one head."""
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor


def _flex(watch: _Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    query, key, value, score_mod, block_mask, scale = args[:6]
    seen = watch.handwritten
    watch.record(
        AttentionCall(
            query=query,
            key=seen.before_repetition(key),
            value=seen.before_repetition(value),
            scale=scale,
            score_mod=score_mod,
            mask_mod=block_mask[-1],
        )
    )
    return result


def _multi_head(watch: _Watch, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    earlier = len(watch.calls)
    with watch:  # the attention inside passes by as well
        result = _multi_head_body(*args, **kwargs)
    heads = args[4]
    watch.calls[earlier:] = [_split_heads(call, heads) for call in watch.calls[earlier:]]
    return result


# torch.nn.functional.multi_head_attention_forward hands itself to an active mode before it does anything else, every time.
# The same code without that question can run under the mode. (From torch 2.13 on: torch.overrides.redispatch_function.)
_multi_head_body = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _split_heads(call: AttentionCall, heads: int) -> AttentionCall:
    """With ``need_weights=True`` torch merges batch and heads, and multiplies the query by the scale beforehand."""
    if call.scores is None:
        return call
    query, key, value, scores = (
        tensor.squeeze(1).unflatten(0, (-1, heads)) for tensor in (call.query, call.key, call.value, call.scores)
    )
    return replace(call, query=query * math.sqrt(query.shape[-1]), key=key, value=value, scores=scores)


_WHOLE_ATTENTIONS: dict[Any, Callable[[_Watch, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    F.scaled_dot_product_attention: _scaled_dot_product,
    F.multi_head_attention_forward: _multi_head,
    torch.ops.higher_order.flex_attention: _flex,
    Tensor.dim: lambda watch, func, args, kwargs: _refuse_nested(func, args),
}


def _refuse_nested(func: Any, args: tuple[Any, ...]) -> Any:
    """``dim()`` is the first thing that torch's attention modules ask; they cannot go on under a mode."""
    if (
        not torch.compiler.is_compiling()
        and args[0].is_nested
        and isinstance(_running_module(), (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    ):
        raise CaptureError(_NESTED)
    return func(*args)


_NESTED = (
    "the attention runs on a nested tensor here, which has no (batch, heads, queries, keys) map. nn.TransformerEncoder makes "
    "one of a padded batch in eval mode: build it with enable_nested_tensor=False, or call "
    "torch.backends.mha.set_fastpath_enabled(False)."
)

_OPERATORS = frozenset({OpOverload, OpOverloadPacket})


def _refuse_flash(func: Any) -> None:
    name = str(func)
    if "flash_attn" in name or "flash_attention" in name:
        raise CaptureError(
            f"the attention in {type(_running_module()).__name__} runs in the kernel {name!r}, which shows neither scores nor "
            "probabilities. Choose one that does: model.set_attn_implementation('sdpa')."
        )
