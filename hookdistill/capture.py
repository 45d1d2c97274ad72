"""Hooks go on, tensors are collected, hooks come off: ``{layer: {output: tensor}}``.

A capture is made of three kinds of object. A `_Slot` is one tensor that was asked for. A hook (`_OutputHook`,
`_InputHook`) sits on one module and offers each call to that module's slots. The `_Session` sits on the model itself:
it knows where one forward ends and the next begins, so that nothing of an earlier forward is ever handed over.
All state lives here, none on the user's modules.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils.hooks import RemovableHandle

from .addresses import Address, parse
from .diagnosis import in_reentrant_checkpoint, is_running, outermost_running, why_never_called
from .errors import CaptureError, CaptureKeyError, did_you_mean, listing
from .paths import Found, forward_signature, module_paths, resolve, unwrap
from .selection import Parameters, select_input, select_output

_graph_task_id = torch._C._current_graph_task_id
_get_ident = threading.get_ident


class Capture:
    """A context that collects the tensors which addresses name, each time the model runs inside it.

        with Capture(model, ["encoder.layer.3", ":logits"]) as captured:
            model(**batch)
        captured["encoder.layer.3"]["output"]

    Entering gives a mapping ``{layer: {output: tensor}}``, `Captured`. Each outermost forward replaces what the last one
    left. A look-up of a tensor that the last forward did not produce is an error, and so is leaving the context with one.

    Args:
        model: any module; wrappers (DDP, FSDP, ``torch.compile``) are seen through.
        addresses: what to collect, see `hookdistill.addresses`; one string stands for a list of one.
        stop: end the forward as soon as the last address has been seen; the model call then returns ``None``. An address
            without a call index is then content with the first call of its module.
        detach: hand the tensors over detached from the graph.

    Raises:
        AddressError: an address does not parse or names nothing; raised before any hook is placed.
        CaptureError: the model cannot be captured from.
    """

    def __init__(
        self, model: nn.Module, addresses: Iterable[str | Address], *, stop: bool = False, detach: bool = False
    ) -> None:
        _check_model(model)
        self.model = model
        self.addresses = [
            each if isinstance(each, Address) else parse(each)
            for each in ([addresses] if isinstance(addresses, str) else addresses)
        ]
        self.stop = stop
        self.detach = detach
        self._session: _Session | None = None
        if stop:
            _check_stop(model, self.addresses)
        _requests(model, self.addresses)  # a wrong path is an error now, before any hook is placed

    def __enter__(self) -> Captured:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        session = self._session
        self.close()
        if kind is None and session is not None:
            session.check_complete()

    def open(self) -> Captured:
        """Put the hooks on, as entering the context does."""
        if self._session is not None:
            raise CaptureError("this Capture is already open; make a second one to nest it")
        session = _Session(self.model, stop=self.stop)
        slots: dict[tuple[str, str], _Slot] = {}
        spellings: dict[str, list[str]] = {}
        by_module: dict[int, tuple[Found, list[_Slot]]] = {}
        for found, address in _requests(self.model, self.addresses):
            slot = _Slot(found, address, session, detach=self.detach)
            slot = slots.setdefault((found.path, address.key), slot)
            spelled = spellings.setdefault(address.path, [])
            if found.path not in spelled:
                spelled.append(found.path)
            module_slots = by_module.setdefault(id(found.module), (found, []))[1]
            if slot not in module_slots:
                module_slots.append(slot)
        session.slots = list(slots.values())
        try:
            session.attach()
            for found, module_slots in by_module.values():
                session.place_hooks(found, module_slots)
        except BaseException:
            session.detach()
            raise
        self._session = session
        return Captured(session, slots, spellings)

    def close(self) -> None:
        """Take the hooks off; closing twice does nothing."""
        session, self._session = self._session, None
        if session is not None:
            session.detach()

    def pause(self) -> None:
        """Let forwards pass unrecorded until `recording`."""
        if self._session is not None:
            self._session.recording = False

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what runs inside, on this thread, and nothing after it."""
        session = self._session
        if session is None:
            raise CaptureError("this Capture is not open")
        session.recording, session.thread = True, _get_ident()
        try:
            yield
        finally:
            session.recording = False


class Captured(Mapping[str, Mapping[str, Tensor]]):
    """What a capture collected: ``{layer: {output: tensor}}``.

    Layers are module paths as ``named_modules()`` prints them; the spelling of the request (``encoder.layer.-1``) is
    accepted too. The tensors live as long as this mapping, or until `clear`.
    """

    def __init__(self, session: _Session, slots: dict[tuple[str, str], _Slot], spellings: dict[str, list[str]]) -> None:
        self._session = session
        self._layers: dict[str, _Layer] = {}
        self._spellings = spellings
        for (path, _), slot in slots.items():
            self._layers.setdefault(path, _Layer(path)).slots[slot.address.key] = slot

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        if layer in self._layers:
            return self._layers[layer]
        spelled = self._spellings.get(layer, [])
        if len(spelled) == 1:
            return self._layers[spelled[0]]
        if spelled:
            raise CaptureKeyError(f"{layer!r} names {len(spelled)} layers; look up one of {listing(spelled)}")
        raise CaptureKeyError(
            f"{layer!r} was not asked for.{did_you_mean(layer, self._layers)} Captured are {listing(self._layers)}."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def clear(self) -> None:
        """Let every tensor go."""
        self._session.clear()

    def __repr__(self) -> str:
        return f"Captured({ {path: list(layer) for path, layer in self._layers.items()} })"


class _Layer(Mapping[str, Tensor]):
    """The captured tensors of one module, by selector."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.slots: dict[str, _Slot] = {}

    def __getitem__(self, key: str) -> Tensor:
        slot = self.slots.get(key) or self.slots.get(_canonical_key(key))
        if slot is None:
            raise CaptureKeyError(f"{key!r} of {self.path!r} was not asked for; captured are {listing(self.slots)}.")
        tensor: Tensor = slot.value()
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def _canonical_key(key: str) -> str:
    try:
        return parse(f":{key}").key
    except ValueError:
        return key


class _Slot:
    """One tensor that was asked for, and what the running or last forward has offered for it."""

    __slots__ = ("address", "calls", "detach", "failure", "found", "kept", "session")

    def __init__(self, found: Found, address: Address, session: _Session, *, detach: bool) -> None:
        self.found = found
        self.address = address
        self.session = session
        self.detach = detach
        self.reset()

    def reset(self) -> None:
        self.calls = 0
        self.failure: str | None = None
        call = self.address.call
        self.kept: _Kept | deque[_Kept] | None = None
        if call == "*" or (isinstance(call, int) and call < 0):
            self.kept = deque(maxlen=None if call == "*" else -int(call))

    def offer(self, take: Callable[[], Tensor]) -> bool:
        """Count one call of the module and keep its tensor if it is the wanted one; whether it was the last one needed."""
        number, wanted = self.calls, self.address.call
        self.calls = number + 1
        if wanted is None and number:
            self.kept = None  # which call is meant is not known: an error on look-up
            return False
        if isinstance(wanted, int) and wanted >= 0 and wanted != number:
            return False
        try:
            kept = _Kept(take(), detach=self.detach)
        except CaptureError as error:
            self.failure = str(error)
            return True
        if not kept.trains and self.session.grad and not self.detach and in_reentrant_checkpoint():
            self.failure = _no_gradient_message(self)
        if isinstance(self.kept, deque):
            self.kept.append(kept)
            return False
        self.kept = kept
        return True

    def value(self) -> Any:
        """The tensor, or the list of tensors for ``@*``.

        Raises:
            CaptureError: the last forward did not produce it, or not so that it can be handed over truthfully.
        """
        self.session.check_readable(self)
        name, call = f"capture {_name(self)!r}", self.address.call
        if self.failure:
            raise CaptureError(f"{name}: {self.failure}.")
        if not self.calls:
            raise CaptureError(f"{name}: {why_never_called(self.session.model, self.found, self.session.thread)}")
        if call is None and self.calls > 1:
            raise CaptureError(
                f"{name}: the module ran {self.calls} times in one forward. Choose a call: {_name(self)}@0 to "
                f"{_name(self)}@{self.calls - 1}, {_name(self)}@-1 for the last, or {_name(self)}@* for the list of all."
            )
        if isinstance(self.kept, deque):
            if call == "*":
                return [each.read(name) for each in self.kept]
            if len(self.kept) == -int(call):  # type: ignore[arg-type]
                return self.kept[0].read(name)
        elif self.kept is not None:
            return self.kept.read(name)
        ran = "once" if self.calls == 1 else f"{self.calls} times"
        raise CaptureError(f"{name}: the module ran {ran} in this forward, so there is no call {call}.")


class _Kept:
    """A tensor as it was when its module returned it, whatever is written over it later.

    The reference itself is kept together with its version; beside it a copy-on-write twin, which costs no memory until
    somebody writes. Read: the reference if nobody wrote, so that nothing downstream forces the copy, else the twin.
    """

    __slots__ = ("tensor", "trains", "twin", "version")

    def __init__(self, tensor: Tensor, *, detach: bool) -> None:
        if detach:
            tensor = tensor.detach()
        self.tensor = tensor
        self.trains = tensor.requires_grad or not tensor.is_floating_point()
        self.version = None if tensor.is_inference() else tensor._version
        self.twin = _copy_on_write(tensor)

    def read(self, name: str) -> Tensor:
        if self.version is not None and self.tensor._version == self.version:
            self.twin = None
            return self.tensor
        if self.twin is not None:
            return self.twin
        if self.version is None:
            return self.tensor  # an inference tensor of a kind that cannot be twinned was cloned below
        raise CaptureError(
            f"{name}: the tensor was changed in place after the module returned it, and a {type(self.tensor).__name__} "
            f"of layout {self.tensor.layout} cannot be copied lazily. Make the op that follows out of place "
            "(ReLU(inplace=False), x = x + y)."
        )


def _copy_on_write(tensor: Tensor) -> Tensor | None:
    if type(tensor) is Tensor and tensor.layout is torch.strided:
        try:
            return torch._lazy_clone(tensor)
        except (RuntimeError, NotImplementedError):
            pass  # memory that torch did not allocate itself (numpy, shared memory), functorch wrappers
    return tensor.clone() if tensor.is_inference() else None


class _Session:
    """Knows when a forward of the model begins and ends, and places and removes every hook of one capture."""

    def __init__(self, model: nn.Module, *, stop: bool) -> None:
        self.model = model
        self.stop = stop
        self.slots: list[_Slot] = []
        self.hooks: list[_Hook] = []
        self.thread = _get_ident()
        self.recording = True
        self.depth = 0
        self.state = "no forward"
        self.grad = False
        self.remaining = 0
        self.reported = False
        self.partial: int | None = None
        self.roots: dict[int, _Root] = {}
        self.restore: Callable[[], None] | None = None

    def attach(self) -> None:
        self.watch(self.model)
        if self.stop:
            self.restore = _catch_stop(self.model, self)

    def watch(self, module: nn.Module) -> None:
        """Take calls of ``module`` for forwards of the model, when nothing above it runs."""
        self.roots[id(module)] = _Root(self, module)

    def place_hooks(self, found: Found, slots: list[_Slot]) -> None:
        inputs = [slot for slot in slots if slot.address.selector.word == "input"]
        outputs = [slot for slot in slots if slot.address.selector.word == "output"]
        if inputs:
            self.hooks.append(_InputHook(self, found.module, inputs))
        if outputs:
            self.hooks.append(_OutputHook(self, found.module, outputs))

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for root in self.roots.values():
            root.remove()
        self.hooks, self.roots = [], {}
        if self.restore is not None:
            self.restore()
            self.restore = None

    def begin(self) -> None:
        self.state = "running"
        self.reported = False
        self.grad = torch.is_grad_enabled()
        self.remaining = len(self.slots)
        for slot in self.slots:
            slot.reset()
        for hook in self.hooks:
            hook.last_in_line()
        for root in self.roots.values():
            root.last_in_line()

    def end(self, *, failed: bool = False) -> None:
        self.depth = 0
        self.state = "failed" if failed else "complete"
        if failed:
            for slot in self.slots:
                slot.reset()

    def clear(self) -> None:
        self.state = "cleared"
        for slot in self.slots:
            slot.reset()

    def admits(self) -> bool:
        """Whether a hook that fires now belongs to a forward of this capture."""
        if not self.recording or _get_ident() != self.thread or _graph_task_id() != -1:
            return False  # paused, another thread's forward, or a recomputation during backward
        if not self.depth:
            self.inner_call()
        return True

    def inner_call(self) -> None:
        """A captured module runs although the model itself was not called: find out whose forward this is."""
        frame, module = outermost_running(self.model)
        if id(module) not in self.roots:
            self.watch(module)
        elif self.partial == frame:
            return
        if self.partial != frame:
            self.begin()
            self.state, self.partial = "complete", frame

    def satisfied(self, root: bool) -> None:
        self.remaining -= 1
        if self.stop and not self.remaining and not root and self.depth:
            raise _Stop(self)

    def check_readable(self, slot: _Slot) -> None:
        if self.state == "cleared":
            raise CaptureError(f"capture {_name(slot)!r}: the tensors of the last forward were cleared.")
        self.reported = True
        if self.state == "no forward":
            raise CaptureError(
                f"capture {_name(slot)!r}: no forward of {type(unwrap(self.model)).__name__} was seen inside this context. "
                + why_never_called(self.model, Found("", self.model), self.thread)
            )
        if self.state == "failed":
            raise CaptureError(f"capture {_name(slot)!r}: the last forward raised an exception; nothing of it is kept.")

    def check_complete(self) -> None:
        """The error for a tensor that the last forward did not produce, unless a look-up has already raised it."""
        if self.state in ("complete", "running") and not self.reported:
            for slot in self.slots:
                slot.value()
            self.reported = False


class _Stop(BaseException):
    """Unwinds a forward that has nothing left to give. No ``Exception``, so that no model swallows it."""

    def __init__(self, session: _Session) -> None:
        self.session = session


def _catch_stop(model: nn.Module, session: _Session) -> Callable[[], None]:
    """Let calls of ``model`` return ``None`` when they are stopped; gives back what undoes it.

    The attribute is the one that ``Module.compile()`` uses: ``__call__`` goes through it, and torch leaves it out of
    copies and pickles of the module.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return model._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        except _Stop as stop:
            if stop.session is not session:
                raise
            session.end()
            return None

    before = model.__dict__.get("_compiled_call_impl")
    model._compiled_call_impl = call

    def restore() -> None:
        if before is None:
            model.__dict__.pop("_compiled_call_impl", None)
        else:
            model._compiled_call_impl = before

    return restore


class _Inert:
    """What is left of a hook in a copy of the model: it does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


class _Guarded:
    """A hook that does not travel: copies and pickles of the model get an inert one."""

    def __init__(self, session: _Session) -> None:
        self.session = session

    def __deepcopy__(self, _: dict[int, Any]) -> _Inert:
        return _Inert()

    def __reduce__(self) -> tuple[type[_Inert], tuple[()]]:
        return (_Inert, ())


class _Root:
    """The two hooks that tell when a forward begins and, behind every other hook, when it ends."""

    def __init__(self, session: _Session, module: nn.Module) -> None:
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
        elif session.recording and _get_ident() == session.thread and _graph_task_id() == -1:
            if session.depth and not is_running(session.model, session.roots, besides=module):
                session.depth = 0  # the last forward was left by something that is no Exception
            if not session.depth:
                session.begin()
            session.depth += 1


class _ForwardEnds(_Guarded):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = self.session
        if is_compiling():
            session.end()
        elif session.depth and _get_ident() == session.thread and _graph_task_id() == -1:
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

    def __init__(self, session: _Session, module: nn.Module, slots: list[_Slot]) -> None:
        super().__init__(session)
        self.slots = slots
        self.root = module is session.model
        self.handle, self.line = self.register(module)

    def register(self, module: nn.Module) -> tuple[RemovableHandle, Any]:
        raise AssertionError("a hook registers itself")

    def last_in_line(self) -> None:
        """Move behind hooks that the user has added since, so that the value seen is the one the model uses."""
        if self.handle.id in self.line:
            self.line.move_to_end(self.handle.id)

    def remove(self) -> None:
        self.handle.remove()


class _OutputHook(_Hook):
    def register(self, module: nn.Module) -> tuple[RemovableHandle, Any]:
        return module.register_forward_hook(self), module._forward_hooks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        session = self.session
        if not is_compiling() and not session.admits():
            return
        for slot in self.slots:
            if slot.offer(lambda slot=slot: select_output(output, slot.address.selector)):  # type: ignore[misc]
                session.satisfied(self.root)


class _InputHook(_Hook):
    def register(self, module: nn.Module) -> tuple[RemovableHandle, Any]:
        self.names = Parameters.of(forward_signature(module))
        return module.register_forward_pre_hook(self, with_kwargs=True), module._forward_pre_hooks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        session = self.session
        if not is_compiling() and not session.admits():
            return
        for slot in self.slots:
            if slot.offer(lambda slot=slot: select_input(args, kwargs, slot.address.selector, self.names)):  # type: ignore[misc]
                session.satisfied(self.root)


def _requests(model: nn.Module, addresses: list[Address]) -> list[tuple[Found, Address]]:
    return [(found, address) for address in addresses for found in resolve(model, address)]


def _name(slot: _Slot) -> str:
    return str(Address(parse(slot.found.path).segments, slot.address.selector, slot.address.call))


def _no_gradient_message(slot: _Slot) -> str:
    return (
        "the tensor carries no gradient, because it was made inside a checkpointed segment with use_reentrant=True, "
        "whose forward runs under no_grad. A loss on it would train nothing. Use use_reentrant=False, capture the "
        "output of the whole segment, or pass detach=True if no gradient is wanted"
    )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"Capture needs a torch.nn.Module, got {type(model).__name__}: {model!r:.80}")
    for path, module in module_paths(model).items():
        if isinstance(module, nn.DataParallel):
            where = f"{path!r} is" if path else "the model is"
            raise CaptureError(
                f"{where} a DataParallel, whose replicas run in threads of their own and whose captured tensors would be "
                "those of one replica. Use DistributedDataParallel, or capture from its .module."
            )


def _check_stop(model: nn.Module, addresses: list[Address]) -> None:
    open_ended = [str(each) for each in addresses if each.call == "*" or (isinstance(each.call, int) and each.call < 0)]
    if open_ended:
        raise CaptureError(
            f"stop=True cannot tell which call is the last one, as {listing(open_ended)} would need. "
            "Number the call from the front (@0, @1, …) or leave stop out."
        )
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise CaptureError(
            f"stop=True cannot end the forward of a compiled model ({type(unwrap(model)).__name__}). "
            "Capture from the model before torch.compile, or leave stop out."
        )
