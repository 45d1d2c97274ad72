"""Further tensors of a loss: which keyword gets what from where."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .addresses import Address, parse
from .batches import BatchKey
from .errors import MatchError, did_you_mean, listing

Source = BatchKey | Callable[[Any], Tensor]
"""A key or index of the batch, an address in the student, or a function of the batch."""

_OWN = {"mask": "mask=", "temperature": "temperature=", "reduction": "an argument of its own", "dim": "an argument of its own"}


@dataclass(frozen=True, slots=True)
class Input:
    """One keyword of a loss, and where its tensor comes from; or its tensors, where ``several``."""

    name: str
    sources: tuple[Source, ...] | tuple[Address, ...]
    several: bool

    @property
    def of_teacher(self) -> bool:
        """Whether the sources are addresses in the teacher: what the name of the keyword says."""
        return self.name.startswith("teacher")

    def __str__(self) -> str:
        shown = [getattr(source, "__name__", str(source)) for source in self.sources]
        return f"{self.name}=[{', '.join(shown)}]" if self.several else f"{self.name}={shown[0]}"


def read_inputs(given: object, *, loss: str, keywords: Collection[str], anything: bool) -> tuple[Input, ...]:
    """``inputs=`` of a match, checked against the keywords of its loss.

    Args:
        keywords: those of the loss and of its state.
        anything: the loss takes any keyword.

    Raises:
        MatchError: it is no mapping, names no keyword of the loss, or a source is none.
        AddressError: an address in the teacher does not parse.
    """
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        raise MatchError(f"inputs= maps arguments of the loss to where their tensors are, got {type(given).__name__}")
    return tuple(_read(name, where, loss, keywords, anything) for name, where in given.items())


def _read(name: object, where: object, loss: str, keywords: Collection[str], anything: bool) -> Input:
    if not isinstance(name, str) or name in _OWN:
        way_out = f"; it is given as {_OWN[name]}" if isinstance(name, str) else ""
        raise MatchError(f"inputs= cannot hold {name!r}{way_out}")
    if name not in keywords and not anything:
        names = [each for each in keywords if each not in _OWN]
        raise MatchError(
            f"inputs= names {name!r}, which is no argument of the loss {loss!r}.{did_you_mean(name, names)} It takes "
            f"{listing(names)}"
        )
    several = isinstance(where, (list, tuple))
    sources = tuple(where) if isinstance(where, (list, tuple)) else (where,)
    if not name.startswith("teacher"):
        for source in sources:
            if isinstance(source, bool) or not (isinstance(source, (str, int)) or callable(source)):
                raise MatchError(
                    f"inputs[{name!r}] is a key or index of the batch, an address in the student, a function of the batch, or "
                    f"a list of these; got {type(source).__name__}"
                )
        return Input(name, sources, several)
    return Input(name, tuple(_teacher_address(name, source) for source in sources), several)


def _teacher_address(name: str, source: object) -> Address:
    if not isinstance(source, str):
        raise MatchError(
            f"inputs[{name!r}] is an address in the teacher, as its name says, or a list of them; got {type(source).__name__}"
        )
    address = parse(source)
    if address.several or address.call == "*":
        raise MatchError(f"inputs[{name!r}] names several tensors with {source!r}; name one, or a list of single ones")
    return address
