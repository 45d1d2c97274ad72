"""The hooks of one capture, and the rule of what belongs to one forward.

A hook sits on each captured module and offers every call to that module's slots. A root hook on the model itself tells where
one forward ends and the next begins, so that nothing of an earlier forward is ever handed over. All state lives here, none on
the user's modules; a copy or pickle of the model gets hooks that do nothing.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from .addresses import ATTENTION_WORDS
from .attention import MAP_WORDS, AttentionCall, AttentionRecorder, map_of
from .diagnosis import in_reentrant_checkpoint, is_running, outermost_running, replaced, why_never_called
from .direct_call import DirectCall, called_in, called_module
from .errors import CaptureError, listing
from .keeping import keep, twin_of
from .paths import CallWrapper, Found, forward_signature, module_paths, unwrap
from .selection import Parameters, select_input, select_output
from .slots import Consumer, Slot

_graph_task_id = torch._C._current_graph_task_id
_thread_id = threading.get_ident
_is_grad_enabled = torch.is_grad_enabled


class Stop(BaseException):
    """Unwinds a forward that has nothing left to give. No ``Exception``, so that no model swallows it."""

    def __init__(self, session: Session) -> None:
        self.session = session


class Session:
    """The hooks of one capture while they are on, and the state of the running or last forward."""

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        *,
        stop: bool,
        consumer: Consumer | None = None,
        keeps_calls: bool = False,
    ) -> None:
        self.model = model
        self.slots = slots
        self.stop = stop
        self.consumer = consumer
        self.keeps_calls = keeps_calls
        """Attention is kept as query, key and mask, and a map is made of them when it is asked for."""
        self.depth = 0
        self.state = "no forward"
        self.grad = False
        self.remaining = 0
        self.partial: tuple[int, int] | None = None
        self.from_model = False
        self.hooks: list[_Hook] = []
        self.roots: dict[int, _Root] = {}
        self.newest_hook = -1
        self.unsettled = False
        """A hook stood too early in the last forward, or may have been left watching."""
        self.here = threading.local()  # what a compiled hook can ask instead of the thread's number
        self.record()

    def attach(self) -> None:
        """Put every hook on; none if one cannot be placed."""
        if isinstance(self.model, torch.jit.ScriptModule):
            kind = type(self.model).__name__
            raise CaptureError(
                f"the model is a {kind}, which takes no hooks. Capture from the model before scripting or tracing."
            )
        try:
            self.roots[id(self.model)] = _Root(self, self.model)
            for slots in _by_module(self.slots):
                words = {slot.address.selector.word for slot in slots}
                kinds: tuple[type[_Hook], ...] = (_InputHook, _AttentionHook, _OutputHook)
                self.hooks += [kind(self, slots) for kind in kinds if words & {*kind.words}]
            self.roots[id(self.model)].prepare()
            if self.stop:
                _CatchesStop.of(self.model).sessions.append(self)
            _open.add(self)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off."""
        _open.discard(self)
        for slot in self.slots:
            if slot.failure is None and (became := replaced(self.model, slot.found)):
                slot.fail(became)
        for hook in self.hooks:
            hook.remove()
        for root in self.roots.values():
            root.remove()
        self.hooks, self.roots = [], {}
        _CatchesStop.release(self.model, self)

    def record(self) -> None:
        """Record what runs on the calling thread from now on."""
        self.thread = self.recorded_thread = _thread_id()
        if not getattr(self.here, "active", False):
            self.here = threading.local()
            self.here.active = True
        self.recording = True
        self.depth = 0

    def pause(self) -> None:
        """Let forwards pass unrecorded."""
        self.recording = False
        self.recorded_thread = 0

    def begin(self, module: nn.Module) -> None:
        """A new outermost forward, a call of ``module``: nothing of the last one is left."""
        self.state = "running"
        self.partial = None
        self.remaining = len(self.slots)
        self.grad = _is_grad_enabled()
        for slot in self.slots:
            slot.calls, slot.kept = 0, None
            if slot.marked:
                slot.reset()
        if not is_dynamo_compiling():
            # A checkpoint around the whole model has turned gradients off before the model could see them.
            self.grad = self.grad or in_reentrant_checkpoint()
            if self.unsettled or self.newest_hook != RemovableHandle.next_id:
                self.prepare(module)

    def prepare(self, module: nn.Module) -> None:
        """Move our hooks behind those that were placed since; torch numbers hooks, so nearly always there is nothing to do."""
        for hook in self.hooks:
            hook.prepare(module)
        for root in self.roots.values():
            root.prepare()
        self.newest_hook = RemovableHandle.next_id
        self.unsettled = any(hook.late or isinstance(hook, _AttentionHook) for hook in self.hooks)

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
        if is_dynamo_compiling():
            return self.recording and getattr(self.here, "active", False)
        return _thread_id() == self.recorded_thread and _graph_task_id() == -1

    def inner_call(self) -> None:
        """A captured module runs although the model itself was not called: find out whose forward this is."""
        frame, module = outermost_running(self.model)
        if id(module) not in self.roots:
            self.roots[id(module)] = _Root(self, module)
        call = (frame, id(module))  # the next call of this module comes through its root: no mistaking one frame for another
        if self.partial != call:
            self.begin(module)
            self.state, self.partial = "complete", call

    def satisfied(self) -> None:
        """A slot needs no further call."""
        self.remaining -= 1
        if self.stop:
            self.maybe_stop()

    def maybe_stop(self) -> None:
        """End the forward if no slot needs a further call."""
        if not self.remaining and not is_dynamo_compiling() and _may_stop(self):
            raise Stop(self)

    def value(self, slot: Slot) -> Tensor | list[Tensor]:
        """What the last forward gave for ``slot``.

        Raises:
            CaptureError: it gave nothing, or nothing that can be handed over truthfully.
        """
        value = self.raw_value(slot)
        return map_of(value, slot.address.selector.word) if isinstance(value, AttentionCall) else value

    def raw_value(self, slot: Slot) -> Any:
        """The same, but attention that is kept as its query and key is given as these."""
        slot.asked = slot.marked = True
        self.check(slot)
        return slot.value(running=self.state == "running")

    def check(self, slot: Slot) -> None:
        """Raise if the last forward did not come to ``slot``."""
        if self.state == "cleared":
            raise CaptureError(f"capture {slot.name!r}: the tensors of the last forward were cleared.")
        if self.state == "failed":
            raise CaptureError(f"capture {slot.name!r}: the last forward raised an exception; nothing of it is kept.")
        if self.state == "no forward":
            kind = type(unwrap(self.model)).__name__
            why = why_never_called(self.model, Found("", self.model), self.thread)
            raise CaptureError(f"capture {slot.name!r}: no forward of {kind} was seen since the capture was opened. {why}")
        if self.hooks and (became := replaced(self.model, slot.found)):
            raise CaptureError(f"capture {slot.name!r}: {became}.")
        if not slot.calls:
            if self.state == "running":
                raise CaptureError(f"capture {slot.name!r}: the module has not run yet in this forward.")
            cause: str = slot.failure or why_never_called(self.model, slot.found, self.thread)
            raise CaptureError(f"capture {slot.name!r}: {cause}")

    def check_complete(self) -> None:
        """Raise for a tensor that the last forward did not produce and that nobody has asked for since."""
        if self.state == "complete":
            for slot in self.slots:
                if not slot.asked:
                    self.check(slot)
                    slot.check()


_open: weakref.WeakSet[Session] = weakref.WeakSet()


def _may_stop(session: Session) -> bool:
    """Whether the running forward can end here: it is a call of the model itself, and no other capture waits for more."""
    if not session.depth or not session.from_model or not _CatchesStop.stands(session.model):
        return False
    here = [each for each in _open if each is not session and each.depth and each.recorded_thread == session.recorded_thread]
    return all(each.stop and each.model is session.model and each.remaining <= 0 for each in here)


def _by_module(slots: Sequence[Slot]) -> list[list[Slot]]:
    groups: dict[int, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(id(slot.found.module), []).append(slot)
    return list(groups.values())


class _CatchesStop(CallWrapper):
    """Lets calls of a model return ``None`` when they are stopped.

    Stands in the attribute that ``Module.compile()`` uses: ``__call__`` goes through it, and torch leaves it out of copies and
    pickles of the module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = weakref.ref(model)
        self.sessions: list[Session] = []

    @staticmethod
    def of(model: nn.Module) -> _CatchesStop:
        """The one that stands on ``model``, put there if there is none."""
        if not _CatchesStop.stands(model):
            model._compiled_call_impl = _CatchesStop(model)
        found = model._compiled_call_impl
        assert isinstance(found, _CatchesStop)
        return found

    @staticmethod
    def stands(model: nn.Module) -> bool:
        """Whether there is one; a later ``Module.compile()`` has put something else in its place."""
        return isinstance(model._compiled_call_impl, _CatchesStop)

    @staticmethod
    def release(model: nn.Module, session: Session) -> None:
        """Let go of ``session``; the last one takes the attribute away."""
        catcher = model._compiled_call_impl
        if isinstance(catcher, _CatchesStop) and session in catcher.sessions:
            catcher.sessions.remove(session)
            if not catcher.sessions:
                del model._compiled_call_impl

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        assert model is not None
        if not is_dynamo_compiling() and all(_thread_id() != session.recorded_thread for session in self.sessions):
            return called_module()._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        try:
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        except Stop as stop:
            if stop.session.model is not model:
                raise
            for session in self.sessions:
                if session.depth and session.recorded_thread == stop.session.recorded_thread:
                    session.end()
            return None


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


def is_own(hook: Any) -> bool:
    """Whether a hook on a module is one of a capture's, which change nothing."""
    return isinstance(hook, (_Guarded, _Inert))


def _overtaken(line: Mapping[int, Any], own: int, session: Session | None = None) -> bool:
    """Whether a hook that is not ours stands behind hook ``own`` in ``line``, so that it may change what ``own`` has seen.

    Hooks of other captures change nothing; those of ``session`` count where it is given.
    """
    for number in reversed(line):
        if number == own:
            return False
        if not isinstance(line[number], _Guarded) or line[number].session is session:
            return True
    return False


def _move_to_end(line: dict[int, Any], number: int) -> None:
    """Not ``OrderedDict.move_to_end``: it leaves the order of the dict beneath, by which dynamo in torch 2.11 numbers hooks."""
    line[number] = line.pop(number)


class _Root:
    """Takes calls of a module for forwards of the model: a hook in front, and one behind every other hook."""

    def __init__(self, session: Session, module: nn.Module) -> None:
        self.session = session
        begins, ends = _ForwardBegins(session), _ForwardEnds(session)
        self.begins = module.register_forward_pre_hook(begins)
        self.ends = module.register_forward_hook(ends, always_call=True)
        self.line: Any = module._forward_hooks
        self.number = self.ends.id
        self.direct = None if session.stop else DirectCall(module, ends, session, begins).place()

    def prepare(self) -> None:
        if _overtaken(self.line, self.number, self.session):
            _move_to_end(self.line, self.number)

    def remove(self) -> None:
        self.begins.remove()
        self.ends.remove()
        if self.direct is not None:
            self.direct.remove()
            self.direct = None


class _ForwardBegins(_Guarded):
    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        session = self.session
        if not session.concerns():
            return
        if session.depth and not is_dynamo_compiling() and not is_running(session.roots, besides=module):
            session.depth = 0  # the last forward was left by something that is no Exception
        if not session.depth:
            session.begin(module)
            session.from_model = module is session.model
        session.depth += 1


class _ForwardEnds(_Guarded):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = self.session
        if session.depth and session.concerns():
            session.depth -= 1
            if not session.depth:
                session.end(failed=output is None and not is_dynamo_compiling() and _is_raising(module))


def _is_raising(module: nn.Module) -> bool:
    """Whether ``module``'s call is being left by an exception (then torch calls our hook while it handles that)."""
    trace = getattr(sys.exc_info()[1], "__traceback__", None)
    while trace is not None:
        if called_in(trace.tb_frame) is module:
            return True
        trace = trace.tb_next
    return False


class _Hook(_Guarded):
    """A hook on one captured module, kept behind every other hook of that module."""

    words: tuple[str, ...]
    in_front = False
    """Runs before the module."""

    def __init__(self, session: Session, slots: Sequence[Slot]) -> None:
        super().__init__(session)
        self.slots = [slot for slot in slots if slot.address.selector.word in self.words]
        self.handles: list[tuple[RemovableHandle, Any]] = []
        self.module = self.slots[0].found.module
        self.late = False
        try:
            self.place(self.module)
        except RuntimeError as error:  # a ScriptModule takes no hooks
            self.remove()
            raise CaptureError(
                f"capture {self.slots[0].name!r}: no hook can be placed on this {type(self.module).__name__} "
                f"({error}). Capture from the model before scripting or tracing."
            ) from error
        handle, line = self.handles[-1]
        self.own = (line, handle.id)  # not the handle: torch.compile cannot represent one

    def place(self, module: nn.Module) -> None:
        """Register on ``module`` and note the handles, each with the line it stands in; the last one is that of the hook
        that takes the value."""
        raise AssertionError("each kind of hook places itself")

    def prepare(self, begun: nn.Module) -> None:
        """Before a forward: move behind hooks that the user has added since, to see the value that the model uses.

        For the hooks in front of ``begun``, the module whose call begins the forward, that holds from the next call on: torch
        has made its list of them already.
        """
        self.late = False
        for handle, line in self.handles:
            if _overtaken(line, handle.id):
                _move_to_end(line, handle.id)
                self.late = self.in_front and self.module is begun

    def remove(self) -> None:
        for handle, _ in self.handles:
            handle.remove()

    def offer(self, slot: Slot, take: Callable[[], Any]) -> None:
        session = self.session
        if session.grad and not slot.detach and not _is_grad_enabled() and not is_dynamo_compiling():
            slot.gradless = slot.gradless or in_reentrant_checkpoint()
            slot.marked = slot.marked or slot.gradless
        if slot.offer(take, session.consumer):
            session.satisfied()

    def hears(self) -> bool:
        """Whether this call of the module is one to record; finds out whose forward it is where that is not known yet."""
        session = self.session
        if not session.concerns():
            return False
        if is_dynamo_compiling():
            return not self.is_too_early()
        if session.depth and not self.in_front:
            return True
        too_early = self.is_too_early()  # asked first: once a forward begins the hook stands last
        if not session.depth:
            session.inner_call()
        if too_early:
            self.fail()
        return not too_early

    def is_too_early(self) -> bool:
        """Whether a hook behind this one may yet change the value, in this call.

        Asked where `prepare` comes too late or not at all: of hooks on the module that begins the forward, whose order torch
        has read already, and in compiled code.
        """
        if not self.late and not _overtaken(*self.own):
            return False
        if is_dynamo_compiling():
            self.fail()
        return True

    def fail(self) -> None:
        for slot in self.slots:
            slot.calls += 1
            slot.fail(_OVERTAKEN)


class _OutputHook(_Hook):
    words = ("output",)
    direct: DirectCall | None = None

    def place(self, module: nn.Module) -> None:
        short = len(self.slots) == 1 and self.slots[0].plain and self.session.consumer is None
        self.only = self.slots[0] if short else None
        self.handles = [(module.register_forward_hook(self), module._forward_hooks)]
        if module is not self.session.model:  # that one has the hooks of the root besides
            self.direct = DirectCall(module, self, self.session).place()

    def remove(self) -> None:
        super().remove()
        if self.direct is not None:
            self.direct.remove()
            self.direct = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = self.session
        slot = self.only
        if session.depth and not is_dynamo_compiling():
            # What hears(), offer() and keep() do, without the calls: this runs at every captured module of every forward.
            if _thread_id() != session.recorded_thread or _graph_task_id() != -1:
                return
            first = output[0] if type(output) is tuple and output else output
            if slot is not None and not slot.calls and type(first) is Tensor and (not session.grad or _is_grad_enabled()):
                slot.calls = 1
                try:
                    slot.kept = (first, None, twin_of(first))
                except RuntimeError:
                    slot.kept = keep(first)
                session.remaining -= 1
                if session.stop:
                    session.maybe_stop()
                return
        elif not self.hears():
            return
        for slot in self.slots:
            self.offer(slot, partial(select_output, output, slot.address.selector))


class _InputHook(_Hook):
    words = ("input",)
    in_front = True

    def place(self, module: nn.Module) -> None:
        self.names = Parameters.of(forward_signature(module))
        self.handles = [(module.register_forward_pre_hook(self, with_kwargs=True), module._forward_pre_hooks)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # Without kwargs: another thread's call, in the moment before torch has noted that this hook takes them.
        if kwargs is None or not self.hears():
            return
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
        if self.hears():
            self.watching += 1
            self.recorder.start()

    def is_too_early(self) -> bool:
        return False  # what others do to inputs or outputs is no matter here

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.watching or not self.hears():
            return
        self.watching -= 1
        calls = self.recorder.stop()
        if output is None and not is_dynamo_compiling() and _is_raising(module):
            return
        for slot in self.slots:
            self.offer(slot, partial(_attention_tensor, calls, slot, self.session))

    def prepare(self, begun: nn.Module) -> None:
        super().prepare(begun)
        self.unwind()

    def remove(self) -> None:
        super().remove()
        self.unwind()

    def unwind(self) -> None:
        while self.watching:  # the module was left by something that is no Exception
            self.watching -= 1
            self.recorder.stop()


class _Starts(_Guarded):
    def __init__(self, session: Session, hook: _AttentionHook) -> None:
        super().__init__(session)
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.hook.start()


def _attention_tensor(calls: Sequence[AttentionCall], slot: Slot, session: Session) -> Tensor | AttentionCall:
    word, kind = slot.address.selector.word, type(unwrap(slot.found.module)).__name__
    if not calls:
        raise CaptureError(
            f"no attention was seen inside {kind}: neither scaled_dot_product_attention nor a softmax between two matrix "
            "products ran in it. Name the module that computes attention; its query, key and value are also outputs of modules"
        )
    if len(calls) > 1:
        paths = {id(module): path for path, module in module_paths(session.model).items()}
        inner = [paths.get(id(call.module), type(call.module).__name__) for call in calls]
        raise CaptureError(
            f"{len(calls)} attentions ran inside {kind}. Name one of the modules they ran in: {listing(dict.fromkeys(inner))}"
        )
    if calls[0].overwritten:
        raise CaptureError(
            f"what the attention inside {kind} was computed from was changed in place before {kind} returned, and no copy of "
            "it could be kept. Make that op out of place"
        )
    if word not in MAP_WORDS:
        tensor: Tensor = getattr(calls[0], word)
        return tensor
    later = session.keeps_calls and not slot.several and not slot.detach and not is_dynamo_compiling()
    if later and calls[0].scores is None:
        return replace(calls[0], value=calls[0].query)  # a map needs no value
    return map_of(calls[0], word)


_OVERTAKEN = (
    "a hook that was registered on this module after the capture was opened runs behind that of the capture and may change the "
    "value. Register other hooks first; without torch.compile it is enough to run the forward once more"
)
