"""From captures and batch to the tensors that an entry of the config names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..addresses import Address, parse
from ..attention import MAP_WORDS, AttentionCall, map_of
from ..batches import contents, has_item, pick
from ..errors import AddressError, BatchError, MatchError, listing
from ..fused.head import Head
from ..inputs import Source
from .blame import user_code

Captures = Mapping[str, Mapping[str, Tensor]]
"""``{layer: {output: tensor}}``: a `Captured`, or a dictionary written by hand."""


def captures_of(captures: Any, teacher: str | None) -> Any:
    """Those of the teacher of that name; all there is where it has none.

    Raises:
        MatchError: there are none of that name.
    """
    if teacher is None:
        return captures
    if not isinstance(captures, Mapping) or teacher not in captures:
        there = listing(captures) if isinstance(captures, Mapping) else f"a {type(captures).__name__}"
        raise MatchError(f"there are no captures of the teacher {teacher!r}; the teacher captures have {there}")
    return captures[teacher]


def captured(captures: Any, address: Address, side: str) -> Tensor:
    """The tensor at ``address``; ``side`` is whose captures they are, for the message.

    Raises:
        MatchError: there is no such tensor.
    """
    if not isinstance(captures, Mapping):
        raise MatchError(f"the {side} captures must be {{layer: {{output: tensor}}}}, got {type(captures).__name__}")
    if address.path not in captures:
        raise MatchError(f"the {side} captures have no layer {address.path!r}; they have {listing(captures)}")
    layer = captures[address.path]
    if not isinstance(layer, Mapping):
        kind = type(layer).__name__
        raise MatchError(f"layer {address.path!r} of the {side} captures must be {{output: tensor}}, got a {kind}")
    if address.key not in layer:
        raise MatchError(f"layer {address.path!r} of the {side} captures has no {address.key!r}; it has {listing(layer)}")
    tensor = layer[address.key]
    if not isinstance(tensor, Tensor):
        raise MatchError(f"{str(address)!r} of the {side} captures is no tensor but a {type(tensor).__name__}")
    return tensor


def attention_call(captures: Any, address: Address) -> AttentionCall | None:
    """What the map at ``address`` is to be made of, where the captures hold that rather than the map."""
    ask = getattr(captures, "attention_call", None)
    return None if ask is None or address.selector.word not in MAP_WORDS else ask(address.path, address.key)


def head_at(captures: Any, address: Address) -> Head | None:
    """The head that makes the logits at ``address``, where the captures hold that rather than the logits."""
    ask = getattr(captures, "head", None)
    return None if ask is None else ask(address)


class Passing(Mapping[str, Mapping[str, Any]]):
    """The captures of a teacher that still runs: the one tensor that comes by."""

    def __init__(self, address: Address, value: Tensor | AttentionCall | Head) -> None:
        self.address, self.value = address, value

    def head(self, address: Address) -> Head | None:
        return self.value if isinstance(self.value, Head) else None

    def attention_call(self, layer: str, output: str) -> AttentionCall | None:
        return self.value if isinstance(self.value, AttentionCall) else None

    def __getitem__(self, layer: str) -> Mapping[str, Any]:
        if layer != self.address.path:
            raise KeyError(layer)
        value = map_of(self.value, self.address.selector.word) if isinstance(self.value, AttentionCall) else self.value
        return {self.address.key: value}

    def __iter__(self) -> Iterator[str]:
        return iter([self.address.path])

    def __len__(self) -> int:
        return 1


def sourced(what: str, source: Source, batch: Any, student_captures: Captures) -> Tensor:
    """A mask or target: an item of the batch, a function of it, or a tensor of the student.

    Raises:
        BatchError: it is none of these, or no tensor.
    """
    if callable(source):
        with user_code(f"the function {what}= of the batch"):
            found = source(batch)
    elif batch is not None and has_item(batch, source):
        found = pick(batch, source)
    elif isinstance(source, str) and (address := _captured_address(source, student_captures)) is not None:
        found = captured(student_captures, address, "student")
    else:
        has = "there is no batch" if batch is None else f"the batch has {contents(batch)}"
        raise BatchError(f"{what}={source!r} is neither in the batch nor a captured address of the student; {has}")
    if not isinstance(found, Tensor):
        raise BatchError(f"{what}={source!r} gives no tensor but a {type(found).__name__}")
    return found


def _captured_address(source: str, captures: Captures) -> Address | None:
    try:
        address = parse(source)
    except AddressError:
        return None
    return address if address.path in captures else None
