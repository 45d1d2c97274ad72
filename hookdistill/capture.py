"""Hooks go on, tensors are collected, hooks come off: ``{layer: {output: tensor}}``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType

from torch import Tensor, nn

from .addresses import Address, parse
from .attention import AttentionCall
from .errors import AddressError, CaptureError, CaptureKeyError, did_you_mean, listing
from .paths import Found, is_compiled, module_paths, resolve, unwrap
from .session import Session
from .slots import Consumer, Slot


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
        listed = [addresses] if isinstance(addresses, (str, Address)) else addresses
        self.addresses = [each if isinstance(each, Address) else parse(each) for each in listed]
        self.stop = stop
        self.detach = detach
        self._session: Session | None = None
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

    def open(self, consumer: Consumer | None = None, *, keeps_calls: bool = False) -> Captured:
        """Put the hooks on, as entering the context does.

        Args:
            consumer: gets each tensor before it is kept.
            keeps_calls: keep an attention as its query, key and mask, see `Captured.attention_call`.
        """
        if self._session is not None:
            raise CaptureError("this Capture is already open; make a second one to nest it")
        slots: dict[tuple[str, str], Slot] = {}
        spellings: dict[str, dict[str, None]] = {}
        for found, address in _requests(self.model, self.addresses):
            slots.setdefault((found.path, address.key), Slot(found, address, detach=self.detach))
            spellings.setdefault(address.path, {})[found.path] = None
        session = Session(self.model, list(slots.values()), stop=self.stop, consumer=consumer, keeps_calls=keeps_calls)
        session.attach()
        self._session = session
        return Captured(session, {spelling: list(paths) for spelling, paths in spellings.items()})

    def close(self) -> None:
        """Take the hooks off; closing twice does nothing."""
        session, self._session = self._session, None
        if session is not None:
            session.detach()

    def pause(self) -> None:
        """Let forwards pass unrecorded until `recording`."""
        if self._session is not None:
            self._session.pause()

    @contextlib.contextmanager
    def recording(self, *, whole: bool = False) -> Iterator[None]:
        """Record what runs inside, on this thread, and nothing after it; ``whole`` suspends ``stop=True``."""
        session = self._session
        if session is None:
            raise CaptureError("this Capture is not open")
        session.record()
        session.stop = self.stop and not whole
        try:
            yield
        finally:
            session.pause()


class Captured(Mapping[str, Mapping[str, Tensor]]):
    """What a capture collected: ``{layer: {output: tensor}}``.

    Layers are module paths as ``named_modules()`` prints them; the spelling of the request (``encoder.layer.-1``) is
    accepted too. The tensors live as long as this mapping, or until `clear`.
    """

    def __init__(self, session: Session, spellings: Mapping[str, list[str]]) -> None:
        self._session = session
        self._spellings = spellings
        self._layers: dict[str, _Layer] = {}
        for slot in session.slots:
            self._layers.setdefault(slot.found.path, _Layer(session, slot.found.path)).slots[slot.address.key] = slot

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        if layer in self._layers:
            return self._layers[layer]
        spelled = self._spellings.get(layer, [])
        if len(spelled) == 1:
            return self._layers[spelled[0]]
        if spelled:
            raise CaptureKeyError(f"{layer!r} names {len(spelled)} layers; look up one of {listing(spelled)}")
        hint = did_you_mean(layer, self._layers) if isinstance(layer, str) else ""
        raise CaptureKeyError(f"{layer!r} was not asked for.{hint} Captured are {listing(self._layers)}.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def attention_call(self, layer: str, output: str) -> AttentionCall | None:
        """Query, key and mask of an attention whose map was asked for; ``None`` where the map itself is what was kept.

        Raises:
            CaptureError: the last forward did not give it.
        """
        slot = self._layers[layer].slots.get(output) if layer in self._layers else None
        value = None if slot is None else self._session.raw_value(slot)
        return value if isinstance(value, AttentionCall) else None

    def clear(self) -> None:
        """Let every tensor go."""
        self._session.clear()

    def __repr__(self) -> str:
        return f"Captured({ {path: list(layer) for path, layer in self._layers.items()} })"


class _Layer(Mapping[str, Tensor]):
    """The captured tensors of one module, by selector."""

    def __init__(self, session: Session, path: str) -> None:
        self.session = session
        self.path = path
        self.slots: dict[str, Slot] = {}

    def __getitem__(self, key: str) -> Tensor:
        slot = self.slots.get(key) or self.slots.get(_canonical_key(key))
        if slot is None:
            raise CaptureKeyError(f"{key!r} of {self.path!r} was not asked for; captured are {listing(self.slots)}.")
        return self.session.value(slot)  # type: ignore[return-value]  # @* is documented to give a list

    def __contains__(self, key: object) -> bool:
        return key in self.slots  # not by looking it up: a missing tensor is an error, not an absent key

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)


def _canonical_key(key: str) -> str:
    try:
        return parse(f":{key}").key
    except AddressError:
        return key


def _requests(model: nn.Module, addresses: list[Address]) -> list[tuple[Found, Address]]:
    return [(found, address) for address in addresses for found in resolve(model, address)]


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CaptureError(f"Capture needs a torch.nn.Module, got {type(model).__name__}: {model!r:.80}")
    for path, module in module_paths(model).items():
        if isinstance(module, nn.DataParallel):
            where = f"{path!r} is" if path else "the model is"
            raise CaptureError(
                f"{where} a DataParallel, whose replicas run in threads of their own, so that a captured tensor would be that "
                "of one replica. Use DistributedDataParallel, or capture from its .module."
            )


def _check_stop(model: nn.Module, addresses: list[Address]) -> None:
    open_ended = [str(each) for each in addresses if each.call == "*" or (each.call is not None and each.call < 0)]
    if open_ended:
        raise CaptureError(
            f"stop=True cannot tell which call is the last one, as {listing(open_ended)} would need. "
            "Number the call from the front (@0, @1, …) or leave stop out."
        )
    if is_compiled(model):
        raise CaptureError(
            f"stop=True cannot end the forward of a compiled model ({type(unwrap(model)).__name__}). "
            "Capture from the model before torch.compile, or leave stop out."
        )
