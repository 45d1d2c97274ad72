"""Seeing attention run, whoever wrote it: a mode for torch functions that is active while one module runs.

Under the mode every call into torch that Python makes on this thread passes by, so that three kinds of attention show:

* ``F.scaled_dot_product_attention`` and ``flex_attention``: one call with everything in its arguments. An active mode
  also turns off the fused forwards of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, which end here too;
* attention in Python code (Hugging Face's eager functions, nanoGPT, ``need_weights=True``): ``handwritten`` follows it;
* flash-attention's own operators, whose scores nobody can see: an error that names the way out.

Nothing is patched. The stack of modes belongs to the thread, and outside the module there is no mode. ``torch.compile``
traces through all of this; hence tensors are compared by ``is``, and a function is recognised by one look-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..errors import CaptureError
from ..keeping import KeptRecord
from .calls import AttentionCall, aside, running_module
from .handwritten import LOOKS, Handwritten


class AttentionRecorder:
    """Sees the attention calls made between ``start()`` and ``stop()`` on the thread that called ``start()``.

    ``start`` belongs in a forward pre-hook, ``stop`` in a forward hook with ``always_call=True``. Pairs may nest, those
    of one recorder (a module that calls itself) and those of several; each open pair sees every call. One recorder
    serves one thread at a time.
    """

    def __init__(self) -> None:
        self._watches: list[_Watch] = []

    def start(self) -> None:
        watch = _Watch()
        self._watches.append(watch)
        TorchFunctionMode.__enter__(watch)  # type: ignore[no-untyped-call]

    def stop(self) -> list[AttentionCall]:
        """The calls since the matching ``start``, in order; none without one. Nothing stays active.

        Safe after an exception, also where pairs were left in the wrong order.
        """
        if not self._watches:
            return []
        watch = self._watches.pop()
        if torch.compiler.is_compiling():
            TorchFunctionMode.__exit__(watch, None, None, None)  # type: ignore[no-untyped-call]
        else:
            _leave(watch)
        return watch.finish()


def _leave(watch: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, also from under modes that were left there."""
    stack = _stack()
    if watch not in stack:
        return
    position = stack.index(watch)
    for _ in stack[position:]:
        TorchFunctionMode.__exit__(watch, None, None, None)  # type: ignore[no-untyped-call]
    for mode in stack[position + 1 :]:
        TorchFunctionMode.__enter__(mode)  # type: ignore[no-untyped-call]


def _stack() -> list[TorchFunctionMode]:
    """This thread's modes, the innermost last."""
    stack: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return stack


class _Watch(TorchFunctionMode):
    """The mode itself: passes every call on unchanged and keeps what it needs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall | KeptRecord] = []
        self.handwritten = Handwritten([], [], [], [], [])
        self.merged_heads: int | None = None  # while nn.MultiheadAttention runs
        self.finished = False  # and yet on the stack, of a thread that stop() could not reach

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        whole = _WHOLE_ATTENTIONS.get(func)
        if whole is not None and not self.finished:
            return whole(self, func, args, kwargs)
        if type(func) in _OPERATORS:
            _refuse_flash(func)
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            func = torch.unflatten  # dynamo cannot trace the super() in the method
        result = func(*args, **kwargs)
        look = LOOKS.get(func)
        if look is not None and not self.finished:
            call = look(self.handwritten, args, kwargs, result)
            if call is not None:
                self.record(call)
        elif self.handwritten.maps and isinstance(result, Tensor):
            self.handwritten.follow(func, args, kwargs, result)
        return result

    def record(self, call: AttentionCall) -> None:
        if self.merged_heads is not None and call.scores is not None:
            call = _split_heads(call, call.scores, self.merged_heads)
        # The module may yet overwrite its query or its scores, to save memory.
        self.calls.append(call if torch.compiler.is_compiling() else KeptRecord.of(call))
        self.handwritten.forget()

    def finish(self) -> list[AttentionCall]:
        self.finished = True
        self.handwritten.forget()
        calls, self.calls = self.calls, []
        return [_as_seen(call) if isinstance(call, KeptRecord) else call for call in calls]


def _as_seen(kept: KeptRecord) -> AttentionCall:
    call: AttentionCall | None = kept.read()
    return replace(kept.record, overwritten=True) if call is None else call


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
    key, value = seen.before_repetition(key), seen.before_repetition(value)
    if query.ndim < 4:
        query, key, value = (_with_heads(tensor) for tensor in (query, key, value))
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        mask=attn_mask,
        is_causal=is_causal,
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
    )


def _with_heads(tensor: Tensor) -> Tensor:
    """Attention on (batch, length, width), or on (length, width), has one head."""
    return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor[None, None]


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
    watches = [watch, *(mode for mode in _stack() if isinstance(mode, _Watch))]
    for each in watches:
        each.merged_heads = args[4]
    try:
        with watch:  # the attention inside passes by as well
            return _multi_head_body(*args, **kwargs)
    finally:
        for each in watches:
            each.merged_heads = None


# F.multi_head_attention_forward first of all hands itself to an active mode, each time. The same code without that
# question can run under the mode. (torch.overrides.redispatch_function is for this, but new in 2.13.)
_multi_head_body = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _split_heads(call: AttentionCall, scores: Tensor, heads: int) -> AttentionCall:
    """With ``need_weights=True`` torch merges batch and heads, and multiplies the query by the scale beforehand."""
    query, key, value, scores = (
        tensor.reshape(-1, heads, *tensor.shape[-2:]) for tensor in (call.query, call.key, call.value, scores)
    )
    with aside():
        query = query * math.sqrt(query.shape[-1])
    return replace(call, query=query, key=key, value=value, scores=scores)


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
        and isinstance(running_module(), (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    ):
        raise CaptureError(_NESTED)
    return func(*args)


_NESTED = (
    "the attention runs on a nested tensor here, which has no (batch, heads, queries, keys) map. nn.TransformerEncoder "
    "makes one of a padded batch in eval mode: build it with enable_nested_tensor=False, or call "
    "torch.backends.mha.set_fastpath_enabled(False)."
)

_OPERATORS = frozenset({OpOverload, OpOverloadPacket})


def _refuse_flash(func: Any) -> None:
    name = str(func)
    if ("flash_attn" in name or "flash_attention" in name) and not name.startswith("aten."):
        raise CaptureError(
            f"the attention in {type(running_module()).__name__} runs in the kernel {name!r}, which shows neither "
            "scores nor probabilities. Choose one that does: model.set_attn_implementation('sdpa')."
        )
