"""Questions that are asked only when something looks wrong: who is running, and why did a hook not fire?"""

from __future__ import annotations

import sys
import threading
from collections.abc import Container, Iterator
from types import FrameType

import torch
from torch import nn

from .direct_call import called_in
from .paths import Found, is_compiled, module_at, module_paths, unwrap


def _running() -> Iterator[tuple[FrameType, nn.Module]]:
    """The module calls on this thread's stack, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    passed_on = None
    while frame is not None:
        module = called_in(frame)
        if module is not None and module is not passed_on:
            yield frame, module
        passed_on = module  # a direct call may leave it to torch's, in the frame just inside
        frame = frame.f_back


def outermost_running(model: nn.Module) -> tuple[int, nn.Module]:
    """The outermost call of any module under ``model`` on this thread: an identity of the call, and the module."""
    members = {id(module) for module in model.modules()}
    calls = [(id(frame), module) for frame, module in _running() if id(module) in members]
    return calls[-1] if calls else (0, model)


def is_running(roots: Container[int], *, besides: nn.Module) -> bool:
    """Whether one of ``roots`` (ids of modules) is on this thread's stack, not counting the innermost call of ``besides``."""
    calls = [module for _, module in _running() if id(module) in roots]
    return len(calls) > (1 if besides in calls[:1] else 0)


def in_reentrant_checkpoint() -> bool:
    """Whether the code runs inside the forward of a ``use_reentrant=True`` checkpoint."""
    if torch._C._is_fwd_grad_enabled():  # which it is not inside the forward of any autograd.Function
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_filename.replace("\\", "/").endswith("torch/utils/checkpoint.py"):
            return True
        frame = frame.f_back
    return False


def why_never_called(model: nn.Module, found: Found, thread: int) -> str:
    """A sentence that says why the hook on ``found`` did not fire, as far as one can tell, and the way out."""
    module = unwrap(found.module)
    kind = type(module).__name__
    if thread != threading.get_ident():
        return (
            f"{kind} was not called on the thread that opened the capture. A capture sees the forwards of its own thread; "
            "open it on the thread that runs the model."
        )
    for cause in (_script, _compiled, _fused_parent, _tied):
        if sentence := cause(model, found, module):
            return f"{kind} was never called. {sentence}"
    if found.path:
        return (
            f"{kind} was never called in this forward. Either the branch that uses it was not taken, or its .forward() or "
            "its weights were used directly, which hooks cannot see. hookdistill sees calls of the form module(…)."
        )
    return f"Call the model as model(…): {kind}.forward(…) called directly cannot be seen by hooks."


def replaced(model: nn.Module, found: Found) -> str | None:
    """What became of the module at the path of ``found`` since the capture was opened, if it is another one now."""
    now = module_at(model, found.path)
    if now is found.module or (now is not None and unwrap(now) is unwrap(found.module)):
        return None
    became = f"is a {type(now).__name__} now" if now is not None else "is gone"
    return f"the module at {found.path!r} was replaced after the capture was opened: it {became}. Open the capture again"


def _script(model: nn.Module, found: Found, module: nn.Module) -> str:
    paths = module_paths(model)
    above = [found.path.rsplit(".", cut)[0] for cut in range(1, found.path.count(".") + 1)] + [""]
    if any(isinstance(paths.get(path), torch.jit.ScriptModule) for path in above):
        return "It lies inside a ScriptModule, whose inner calls run outside Python. Capture from the model before scripting."
    return ""


def _compiled(model: nn.Module, found: Found, module: nn.Module) -> str:
    if is_compiled(model):
        return (
            "The model is compiled, and hooks that come after its first compiled call are ignored. Open the capture "
            "before the first call, or call torch.compiler.reset() after opening it. Blocks that are compiled one by one "
            "share their compiled code: capture inside all of them or none, the blocks themselves, or set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False."
        )
    return ""


def _fused_parent(model: nn.Module, found: Found, module: nn.Module) -> str:
    parent_path = found.path.rpartition(".")[0]
    parent = unwrap(module_paths(model).get(parent_path, module))
    if isinstance(parent, nn.MultiheadAttention):
        return (
            f"nn.MultiheadAttention hands its weights to a fused kernel instead of calling it. Capture {parent_path!r}, "
            "whose output is the projected attention output."
        )
    return ""


def _tied(model: nn.Module, found: Found, module: nn.Module) -> str:
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    for path, other in module_paths(model).items():
        if other is not found.module and own & {id(parameter) for parameter in other.parameters(recurse=False)}:
            return (
                f"It shares a weight with {path!r}; the model seems to use that weight directly. "
                "Capture what the model returns instead, such as ':logits'."
            )
    return ""
