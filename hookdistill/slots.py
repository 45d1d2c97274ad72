"""One tensor that was asked for, kept as it was when its module returned it, whatever is written over it later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .addresses import Address, Segment
from .errors import CaptureError
from .paths import Found


class Kept(NamedTuple):
    """A captured tensor: the reference itself with its version, and a copy-on-write twin beside it.

    The twin costs no memory until somebody writes. Reading gives the reference if nobody wrote, so that nothing downstream
    (a compiled or Triton kernel that asks for the address) forces the copy; else the twin.
    """

    tensor: Tensor
    version: int | None
    twin: Tensor | None


def keep(tensor: Tensor) -> Kept:
    """Keep ``tensor`` as it is now."""
    if is_compiling():
        return Kept(tensor.clone(), None, None)  # part of the graph, where a copy that nothing needs is fused away
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return Kept(tensor, *((None, tensor.clone()) if tensor.is_inference() else (tensor._version, None)))
    try:
        twin = torch._lazy_clone(tensor)
    except RuntimeError:  # memory that torch did not allocate itself (numpy, shared memory), functorch wrappers
        twin = tensor.clone() if tensor.is_inference() else None
    return Kept(tensor, None if tensor.is_inference() else tensor._version, twin)


def read(kept: Kept) -> Tensor | None:
    """The tensor as it was when it was kept; ``None`` if it was overwritten and could not be twinned."""
    tensor, version, twin = kept
    if version is None:
        return tensor if twin is None else twin
    return tensor if tensor._version == version else twin


class Slot:
    """What one forward has offered for one address on one module.

    ``kept`` is the tensor, or the last few where the call counts from the end, or all of them for ``@*``.
    """

    __slots__ = ("address", "calls", "detach", "failure", "found", "kept", "plain")

    def __init__(self, found: Found, address: Address, *, detach: bool) -> None:
        self.found = found
        self.address = address
        self.detach = detach
        # The usual case has a short way through the hook: the bare output, no call index, not detached.
        self.plain = address.selector.word == "output" and not address.selector.steps and address.call is None and not detach
        self.reset()

    def reset(self) -> None:
        """Forget the last forward."""
        self.calls = 0
        self.failure: str | None = None
        call = self.address.call
        self.kept: Kept | deque[Kept] | None = None
        if call == "*" or (call is not None and call < 0):
            self.kept = deque(maxlen=None if call == "*" else -call)

    def offer(self, take: Callable[[], Tensor]) -> bool:
        """Count one call of the module and keep its tensor if it is the one; whether the slot needs no further call."""
        number, wanted = self.calls, self.address.call
        self.calls = number + 1
        if wanted is None and number:
            self.kept = None  # which of the calls is meant is not known: an error on look-up
            return False
        if isinstance(wanted, int) and wanted >= 0 and wanted != number:
            return False
        try:
            tensor = take()
        except CaptureError as error:
            self.failure = str(error)
            return True
        kept = keep(tensor.detach() if self.detach else tensor)
        if isinstance(self.kept, deque):
            self.kept.append(kept)
            return False
        self.kept = kept
        return True

    def value(self) -> Tensor | list[Tensor]:
        """The tensor, or the list of tensors for ``@*``.

        Raises:
            CaptureError: the calls that there were do not give it.
        """
        call, kept = self.address.call, self.kept
        if self.failure:
            raise CaptureError(f"capture {self.name!r}: {self.failure}.")
        if call is None and self.calls > 1:
            raise CaptureError(
                f"capture {self.name!r}: the module ran {self.calls} times in one forward. Choose a call: {self.name}@0 to "
                f"{self.name}@{self.calls - 1}, {self.name}@-1 for the last, or {self.name}@* for the list of all."
            )
        if isinstance(kept, deque):
            if call == "*":
                return [self._read(each) for each in kept]
            kept = kept[0] if len(kept) == kept.maxlen else None
        if kept is None:
            ran = "once" if self.calls == 1 else f"{self.calls} times"
            raise CaptureError(f"capture {self.name!r}: the module ran {ran} in this forward, so there is no call {call}.")
        tensor = self._read(kept)
        if not isinstance(self.kept, deque):
            self.kept = kept._replace(twin=None) if tensor is kept.tensor else kept
        return tensor

    @property
    def name(self) -> str:
        """The address with its full path."""
        segments = tuple(map(Segment, self.found.path.split("."))) if self.found.path else ()
        return str(Address(segments, self.address.selector, self.address.call))

    def _read(self, kept: Kept) -> Tensor:
        tensor = read(kept)
        if tensor is None:
            kind = f"{type(kept.tensor).__name__} of layout {kept.tensor.layout}"
            raise CaptureError(
                f"capture {self.name!r}: the tensor was changed in place after the module returned it, and a {kind} cannot be "
                "copied on write. Make the op that follows out of place (ReLU(inplace=False), x = x + y)."
            )
        return tensor
