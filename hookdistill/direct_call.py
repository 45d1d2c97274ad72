"""Calls of a module whose only hooks are a capture's, without the detour that torch takes as soon as there is any hook."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as _torch

from .paths import CallWrapper

_is_tracing = torch._C._get_tracing_state
_any_before, _any_after = _torch._global_forward_pre_hooks, _torch._global_forward_hooks
_any_backward, _any_before_backward = _torch._global_backward_hooks, _torch._global_backward_pre_hooks


class Recording(Protocol):
    """What a direct call has to know of a capture."""

    recorded_thread: int


class DirectCall(CallWrapper):
    """Stands in the attribute of one module that ``Module.compile()`` uses, which ``__call__`` goes through.

    With hooks on it ``Module._call_impl`` takes some microseconds, more than a capture. This calls ``forward`` and the hooks,
    wherever ``_call_impl`` would do just that, and leaves everything else to it. The hooks stay registered: they are what
    others see, and what torch.compile finds, and who takes this attribute away.

    Args:
        module: the one to call.
        hook: the only one behind it.
        session: of the capture that both belong to.
        before: the only one in front of it; then ``hook`` is called after an exception too.
    """

    __slots__ = ("back", "backward", "before", "front", "hook", "module", "session")

    def __init__(
        self,
        module: nn.Module,
        hook: Callable[[nn.Module, Any, Any], None],
        session: Recording,
        before: Callable[[nn.Module, Any], None] | None = None,
    ) -> None:
        self.module, self.hook, self.session, self.before = module, hook, session, before
        self.front, self.back = module._forward_pre_hooks, module._forward_hooks
        self.backward = (module._backward_pre_hooks, module._backward_hooks)

    def place(self) -> DirectCall | None:
        """Put it on its module, where the call is torch's own and nothing else stands; ``None`` elsewhere."""
        module = self.module
        own = type(module)._call_impl is not nn.Module._call_impl or "_call_impl" in module.__dict__
        if own or module._compiled_call_impl is not None:
            return None
        module._compiled_call_impl = self
        return self

    def remove(self) -> None:
        """Take it away, if it is still there."""
        if self.module._compiled_call_impl is self:
            del self.module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if get_ident() != self.session.recorded_thread:
            return called_module()._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        module, before = self.module, self.before
        before_backward, behind_backward = self.backward
        if (
            len(self.back) != 1
            or len(self.front) != (before is not None)
            or behind_backward
            or before_backward
            or _any_after
            or _any_before
            or _any_backward
            or _any_before_backward
            or _is_tracing()
        ):
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if before is None:
            output = module.forward(*args, **kwargs)
        else:
            before(module, args)
            try:
                output = module.forward(*args, **kwargs)
            except Exception:
                self.hook(module, args, None)
                raise
        self.hook(module, args, output)
        return output


_DIRECT = DirectCall.__call__.__code__


def called_in(frame: FrameType) -> nn.Module | None:
    """The module that the frame is a call of, torch's way or directly."""
    caller = frame.f_locals.get("self") if frame.f_code is _DIRECT or frame.f_code.co_name == "_call_impl" else None
    if isinstance(caller, DirectCall):
        return caller.module
    return caller if isinstance(caller, nn.Module) else None


def called_module() -> nn.Module:
    """The module whose ``__call__`` has come to the `CallWrapper` that asks: in other threads this can be a replica of
    ``DataParallel``, to which the attributes of its original were copied."""
    module = sys._getframe(2).f_locals["self"]
    assert isinstance(module, nn.Module)
    return module
