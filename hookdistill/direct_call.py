"""Calls of a module whose only hook is a capture's, without the detour that torch takes as soon as there is any hook."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
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

    With hooks on it ``Module._call_impl`` takes some microseconds, more than a capture. This calls ``forward`` and then the
    hook, wherever ``_call_impl`` would do just that, and leaves everything else to it. The hook stays registered: it is what
    others see, and what torch.compile finds, and who takes this attribute away.
    """

    __slots__ = ("before", "before_backward", "behind", "behind_backward", "hook", "module", "session")

    def __init__(self, module: nn.Module, hook: Callable[[nn.Module, Any, Any], None], session: Recording) -> None:
        self.module, self.hook, self.session = module, hook, session
        self.before, self.behind = module._forward_pre_hooks, module._forward_hooks
        self.before_backward, self.behind_backward = module._backward_pre_hooks, module._backward_hooks

    @staticmethod
    def place(module: nn.Module, hook: Callable[[nn.Module, Any, Any], None], session: Recording) -> DirectCall | None:
        """Put one on ``module``, where the call is torch's own and nothing else stands."""
        own = type(module)._call_impl is not nn.Module._call_impl or "_call_impl" in module.__dict__
        if own or module._compiled_call_impl is not None:
            return None
        placed = DirectCall(module, hook, session)
        module._compiled_call_impl = placed
        return placed

    def remove(self) -> None:
        """Take it away, if it is still there."""
        if self.module._compiled_call_impl is self:
            del self.module._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if get_ident() != self.session.recorded_thread:
            return called_module()._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        if (
            len(self.behind) != 1
            or self.before
            or self.behind_backward
            or self.before_backward
            or _any_after
            or _any_before
            or _any_backward
            or _any_before_backward
            or _is_tracing()
        ):
            return self.module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        output = self.module.forward(*args, **kwargs)
        self.hook(self.module, args, output)
        return output


DIRECT = DirectCall.__call__.__code__
"""What runs in the frame of a direct call, in place of ``Module._call_impl``."""


def called_module() -> nn.Module:
    """The module whose ``__call__`` has come to the `CallWrapper` that asks: in other threads this can be a replica of
    ``DataParallel``, to which the attributes of its original were copied."""
    module = sys._getframe(2).f_locals["self"]
    assert isinstance(module, nn.Module)
    return module
