"""The hooks of one capture, and the rule of what belongs to one forward.

A hook sits on each captured module and offers every call to that module's slots. A root hook on the model itself tells where
one forward ends and the next begins, so that nothing of an earlier forward is ever handed over. All state lives here, none on
the user's modules; a copy or pickle of the model gets hooks that do nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from .addresses import ATTENTION_WORDS
from .attention import AttentionCall, AttentionRecorder, attention_probabilities, attention_scores
from .diagnosis import in_reentrant_checkpoint, is_running, outermost_running, why_never_called
from .errors import CaptureError, listing
from .paths import Found, forward_signature, module_paths, unwrap
from .selection import Parameters, select_input, select_output
from .slots import Slot, keep

_graph_task_id = torch._C._current_graph_task_id
_thread_id = threading.get_ident


class Stop(BaseException):
    """Unwinds a forward that has nothing left to give. No ``Exception``, so that no model swallows it."""

    def __init__(self, session: Session) -> None:
        self.session = session


class Session:
    """The hooks of one capture while they are on, and the state of the running or last forward."""

    def __init__(self, model: nn.Module, slots: Sequence[Slot], *, stop: bool) -> None:
        self.model = model
        self.slots = slots
        self.stop = stop
        self.thread = _thread_id()
        self.recording = True
        self.depth = 0
        self.state = "no forward"
        self.reported = False
        self.grad = False
        self.remaining = 0
        self.partial: int | None = None
        self.hooks: list[_Hook] = []
        self.roots: dict[int, _Root] = {}
        self.restore: Callable[[], None] | None = None

    def attach(self) -> None:
        """Put every hook on; none if one cannot be placed."""
        try:
            self.roots[id(self.model)] = _Root(self, self.model)
            for slots in _by_module(self.slots):
                words = {slot.address.selector.word for slot in slots}
                kinds = [_InputHook] * ("input" in words) + [_AttentionHook] * bool(words & {*ATTENTION_WORDS})
                for kind in (*kinds, *[_OutputHook] * ("output" in words)):
                    self.hooks.append(kind(self, slots))
            if self.stop:
                self.restore = _catch_stop(self.model, self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off."""
        for hook in (*self.hooks, *self.roots.values()):
            hook.remove()
        self.hooks, self.roots = [], {}
        if self.restore is not None:
            self.restore()
            self.restore = None

    def begin(self) -> None:
        """A new outermost forward: nothing of the last one is left."""
        self.state = "running"
        self.reported = False
        self.grad = torch.is_grad_enabled()
        self.remaining = len(self.slots)
        for slot in self.slots:
            slot.reset()
        if not is_compiling():
            for hook in (*self.hooks, *self.roots.values()):
                hook.last_in_line()

    def end(self, *, failed: bool = False) -> None:
        """The outermost forward is over."""
        self.depth = 0
        self.state = "failed" if failed else "complete"
        if failed:
            for slot in self.slots:
                slot.reset()

    def clear(self) -> None:
        """Let every tensor go."""
        self.state = "cleared"
        for slot in self.slots:
            slot.reset()

    def concerns(self) -> bool:
        """Whether what runs now is a forward of this capture: not paused, this thread's, no recomputation in backward."""
        return self.recording and _thread_id() == self.thread and _graph_task_id() == -1

    def inner_call(self) -> None:
        """A captured module runs although the model itself was not called: find out whose forward this is."""
        frame, module = outermost_running(self.model)
        if id(module) not in self.roots:
            self.roots[id(module)] = _Root(self, module)
        if self.partial != frame:
            self.begin()
            self.state, self.partial = "complete", frame

    def satisfied(self, slot: Slot, *, root: bool) -> None:
        """``slot`` needs no further call; ends the forward if it was the last and the capture wants that."""
        if self.grad and not slot.detach and not torch.is_grad_enabled() and in_reentrant_checkpoint():
            slot.kept, slot.failure = None, _NO_GRADIENT
        self.remaining -= 1
        if self.stop and not self.remaining and not root and self.depth:
            raise Stop(self)

    def value(self, slot: Slot) -> Tensor | list[Tensor]:
        """What the last forward gave for ``slot``.

        Raises:
            CaptureError: it gave nothing, or nothing that can be handed over truthfully.
        """
        self.reported = True
        if self.state == "cleared":
            raise CaptureError(f"capture {slot.name!r}: the tensors of the last forward were cleared.")
        if self.state == "failed":
            raise CaptureError(f"capture {slot.name!r}: the last forward raised an exception; nothing of it is kept.")
        if self.state == "no forward":
            kind = type(unwrap(self.model)).__name__
            why = why_never_called(self.model, Found("", self.model), self.thread)
            raise CaptureError(f"capture {slot.name!r}: no forward of {kind} was seen since the capture was opened. {why}")
        if not slot.calls:
            raise CaptureError(f"capture {slot.name!r}: {why_never_called(self.model, slot.found, self.thread)}")
        return slot.value()

    def check_complete(self) -> None:
        """Raise for a tensor that the last forward did not produce, unless a look-up has raised already."""
        if self.state == "complete" and not self.reported:
            for slot in self.slots:
                self.value(slot)


def _by_module(slots: Sequence[Slot]) -> list[list[Slot]]:
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.found.module), []).append(slot)
    return list(groups.values())


def _catch_stop(model: nn.Module, session: Session) -> Callable[[], None]:
    """Let calls of ``model`` return ``None`` when they are stopped; gives back what undoes it.

    The attribute is the one that ``Module.compile()`` uses: ``__call__`` goes through it, and torch leaves it out of
    copies and pickles of the module.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Stop as stop:
            if stop.session is not session:
                raise
            session.end()
            return None

    model._compiled_call_impl = call
    return lambda: model.__dict__.pop("_compiled_call_impl", None)


class _Inert:
    """What is left of a hook in a copy of the model: it does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


class _Guarded:
    """A hook of one session. It does not travel: copies and pickles of the model get an inert one."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __deepcopy__(self, _: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return (_Inert, ())


class _Root:
    """Takes calls of a module for forwards of the model: a hook in front, and one behind every other hook."""

    def __init__(self, session: Session, module: nn.Module) -> None:
        self.begins = module.register_forward_pre_hook(_ForwardBegins(session))
        self.ends = module.register_forward_hook(_ForwardEnds(session), always_call=True)
        self.line: Any = module._forward_hooks

    def last_in_line(self) -> None:
        self.line.move_to_end(self.ends.id)

    def remove(self) -> None:
        self.begins.remove()
        self.ends.remove()


class _ForwardBegins(_Guarded):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        session = self.session
        if is_compiling():
            session.begin()
        elif session.concerns():
            if session.depth and not is_running(session.roots, besides=module):
                session.depth = 0  # the last forward was left by something that is no Exception
            if not session.depth:
                session.begin()
            session.depth += 1


class _ForwardEnds(_Guarded):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = self.session
        if is_compiling():
            session.end()
        elif session.depth and session.concerns():
            session.depth -= 1
            if not session.depth:
                session.end(failed=output is None and _is_raising(module))


def _is_raising(module: nn.Module) -> bool:
    """Whether ``module``'s call is being left by an exception (then torch calls our hook while it handles that)."""
    trace = getattr(sys.exc_info()[1], "__traceback__", None)
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        trace = trace.tb_next
    return False


class _Hook(_Guarded):
    """A hook on one captured module, kept behind every other hook of that module."""

    words: tuple[str, ...]

    def __init__(self, session: Session, slots: Sequence[Slot]) -> None:
        super().__init__(session)
        self.slots = [slot for slot in slots if slot.address.selector.word in self.words]
        found = self.slots[0].found
        self.root = found.module is session.model
        self.handles: list[tuple[RemovableHandle, Any]] = []
        self.place(found.module)

    def place(self, module: nn.Module) -> None:
        """Register on ``module`` and note the handles, each with the line it stands in."""
        raise AssertionError("each kind of hook places itself")

    def last_in_line(self) -> None:
        """Move behind hooks that the user has added since, so that the value seen is the one the model uses."""
        for handle, line in self.handles:
            line.move_to_end(handle.id)

    def remove(self) -> None:
        for handle, _ in self.handles:
            handle.remove()

    def offer(self, slot: Slot, take: Callable[[], Tensor]) -> None:
        if slot.offer(take):
            self.session.satisfied(slot, root=self.root)


class _OutputHook(_Hook):
    words = ("output",)

    def place(self, module: nn.Module) -> None:
        self.only = self.slots[0] if len(self.slots) == 1 and self.slots[0].plain else None
        self.handles = [(module.register_forward_hook(self), module._forward_hooks)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = self.session
        if not is_compiling():
            if not session.concerns():
                return
            if not session.depth:
                session.inner_call()
        slot = self.only
        if slot is not None and not slot.calls and type(output) is Tensor:
            slot.calls = 1
            slot.kept = keep(output)
            session.satisfied(slot, root=self.root)
            return
        for slot in self.slots:
            self.offer(slot, partial(select_output, output, slot.address.selector))


class _InputHook(_Hook):
    words = ("input",)

    def place(self, module: nn.Module) -> None:
        self.names = Parameters.of(forward_signature(module))
        self.handles = [(module.register_forward_pre_hook(self, with_kwargs=True), module._forward_pre_hooks)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = self.session
        if not is_compiling():
            if not session.concerns():
                return
            if not session.depth:
                session.inner_call()
        for slot in self.slots:
            self.offer(slot, partial(select_input, args, kwargs, slot.address.selector, self.names))


class _AttentionHook(_Hook):
    """Watches the attention that runs between a hook in front of the module and one behind it."""

    words = ATTENTION_WORDS

    def place(self, module: nn.Module) -> None:
        self.recorder = AttentionRecorder()
        self.watching = 0
        before = module.register_forward_pre_hook(_Starts(self.session, self))
        after = module.register_forward_hook(self, always_call=True)
        self.handles = [(before, module._forward_pre_hooks), (after, module._forward_hooks)]

    def start(self) -> None:
        if is_compiling() or self.session.concerns():
            self.watching += 1
            self.recorder.start()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.watching:
            return
        self.watching -= 1
        calls = self.recorder.stop()
        session = self.session
        if not is_compiling() and not session.depth:
            session.inner_call()
        if output is None and not is_compiling() and _is_raising(module):
            return
        for slot in self.slots:
            self.offer(slot, partial(_attention_tensor, calls, slot, session.model))

    def remove(self) -> None:
        super().remove()
        while self.watching:  # the module was left by something that is no Exception
            self.watching -= 1
            self.recorder.stop()


class _Starts(_Guarded):
    def __init__(self, session: Session, hook: _AttentionHook) -> None:
        super().__init__(session)
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.hook.start()


def _attention_tensor(calls: Sequence[AttentionCall], slot: Slot, model: nn.Module) -> Tensor:
    word, kind = slot.address.selector.word, type(unwrap(slot.found.module)).__name__
    if not calls:
        raise CaptureError(
            f"no attention was seen inside {kind}: neither scaled_dot_product_attention nor a softmax between two matrix "
            "products ran in it. Name the module that computes attention; its query, key and value are also outputs of modules"
        )
    if len(calls) > 1:
        paths = {id(module): path for path, module in module_paths(model).items()}
        inner = [paths.get(id(call.module), type(call.module).__name__) for call in calls]
        raise CaptureError(
            f"{len(calls)} attentions ran inside {kind}. Name one of the modules they ran in: {listing(dict.fromkeys(inner))}"
        )
    if word == "attention":
        return attention_probabilities(calls[0])
    if word == "attention_scores":
        return attention_scores(calls[0])
    tensor: Tensor = getattr(calls[0], word)
    return tensor


_NO_GRADIENT = (
    "the tensor carries no gradient, because it was made inside a checkpointed segment with use_reentrant=True, whose forward "
    "runs under no_grad. A loss on it would train nothing. Use use_reentrant=False, capture the output of the whole segment, "
    "or pass detach=True if no gradient is wanted"
)
