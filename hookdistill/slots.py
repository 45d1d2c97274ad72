"""One tensor that was asked for, kept as it was when its module returned it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .addresses import Address, Segment
from .errors import CaptureError
from .keeping import Kept, KeptRecord, handed_over, keep, read
from .paths import Found

Consumer = Callable[["Slot", Any], bool]
"""Gets a tensor as soon as it comes, before anything can overwrite it, and says whether it is done with it."""


class Slot:
    """What one forward has offered for one address on one module.

    ``kept`` is the tensor, or the last few where the call counts from the end, or all of them for ``@*``.
    """

    __slots__ = (
        *("address", "asked", "calls", "detach", "failure", "found", "given", "gradless", "kept", "marked", "plain", "several"),
    )

    def __init__(self, found: Found, address: Address, *, detach: bool) -> None:
        self.found = found
        self.address = address
        self.detach = detach
        # The usual case has a short way through the hook: the bare output, no call index, not detached.
        self.plain = address.selector.word == "output" and not address.selector.steps and address.call is None and not detach
        call = address.call
        self.several = call == "*" or (call is not None and call < 0)
        self.reset()

    def reset(self) -> None:
        """Forget the last forward. `Session.begin` does the usual part of this itself, where the slot is not ``marked``."""
        self.marked = self.several
        self.calls = 0
        self.failure: str | None = None
        self.asked = False
        self.given = False
        """Its tensor went to a consumer, and is not kept."""
        self.gradless = False
        """Made under the no_grad of a reentrant checkpoint, whose own outputs get their gradient only later."""
        self.kept: Kept | KeptRecord | deque[Kept] | None = None
        if self.several:
            self.kept = deque(maxlen=None if self.address.call == "*" else -int(self.address.call))  # type: ignore[arg-type]

    def fail(self, why: str) -> None:
        """Nothing true can be handed over of this forward."""
        self.failure, self.marked = why, True

    def offer(self, take: Callable[[], Any], consumer: Consumer | None = None) -> bool:
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
            self.fail(str(error))
            return True
        if consumer is not None and not self.several and consumer(self, tensor):
            self.given = self.marked = True
            return True
        if not isinstance(tensor, Tensor):
            self.kept = KeptRecord.of(tensor)
            return True
        kept = keep(tensor.detach() if self.detach else tensor)
        if isinstance(self.kept, deque):
            self.kept.append(kept)
            return False
        self.kept = kept
        return True

    def value(self, *, running: bool = False) -> Any:
        """The tensor, or the list of tensors for ``@*``; or the record that was offered instead of one.

        While the forward is still ``running``, a tensor that is handed over may yet be overwritten by the model: then the
        twin is what is given.

        Raises:
            CaptureError: the calls that there were do not give it.
        """
        kept = self._chosen()
        if isinstance(kept, KeptRecord):
            record = self._true_record(kept)
            if not running:
                self.kept = KeptRecord(record, {name: handed_over(getattr(record, name)) for name in kept.tensors})
            return record
        if isinstance(kept, list):
            return [self._true(each) for each in kept]
        if running and kept[2] is not None:
            return kept[2]
        tensor = self._true(kept)
        if tensor is kept[0] and kept[2] is not None and not isinstance(self.kept, deque):
            self.kept = handed_over(tensor)
        return tensor

    def check(self) -> None:
        """Raise what `value` would raise, and hand nothing over."""
        kept = self._chosen()
        if isinstance(kept, KeptRecord):
            self._true_record(kept)
            return
        for each in kept if isinstance(kept, list) else [kept]:
            self._true(each)

    def check_calls(self) -> None:
        """Raise if it is not clear which of several calls is meant."""
        if self.address.call is None and self.calls > 1:
            raise CaptureError(
                f"capture {self.name!r}: the module ran {self.calls} times in one forward. Choose a call: {self.name}@0 to "
                f"{self.name}@{self.calls - 1}, {self.name}@-1 for the last, or {self.name}@* for the list of all."
            )

    @property
    def name(self) -> str:
        """The address with its full path."""
        segments = tuple(map(Segment, self.found.path.split("."))) if self.found.path else ()
        return str(Address(segments, self.address.selector, self.address.call))

    def _chosen(self) -> Kept | KeptRecord | list[Kept]:
        call, kept = self.address.call, self.kept
        if self.failure:
            raise CaptureError(f"capture {self.name!r}: {self.failure}.")
        self.check_calls()
        if isinstance(kept, deque):
            if call == "*":
                return list(kept)
            kept = kept[0] if len(kept) == kept.maxlen else None
        if kept is None and self.given:
            raise CaptureError(f"capture {self.name!r}: the tensor was handed over as soon as it came, and is not kept.")
        if kept is None:
            ran = "once" if self.calls == 1 else f"{self.calls} times"
            raise CaptureError(f"capture {self.name!r}: the module ran {ran} in this forward, so there is no call {call}.")
        return kept

    def _true_record(self, kept: KeptRecord) -> Any:
        record = kept.read()
        if record is None:
            gone = next(tensor for tensor in kept.tensors.values() if read(tensor) is None)
            raise CaptureError(f"capture {self.name!r}: {_overwritten(gone[0])}.")
        for name in kept.tensors:
            self._check_gradient(getattr(record, name))
        return record

    def _true(self, kept: Kept) -> Tensor:
        tensor = read(kept)
        if tensor is None:
            raise CaptureError(f"capture {self.name!r}: {_overwritten(kept[0])}.")
        self._check_gradient(tensor)
        return tensor

    def _check_gradient(self, tensor: Tensor) -> None:
        if self.gradless and not tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex()):
            raise CaptureError(f"capture {self.name!r}: {_NO_GRADIENT}.")


def _overwritten(tensor: Tensor) -> str:
    kind = type(tensor).__name__ if tensor.layout is torch.strided else f"{type(tensor).__name__} of layout {tensor.layout}"
    return (
        f"the {kind} was changed in place after the module returned it, or after it was looked up, and no copy of it could be "
        "kept. Make the op that follows out of place (ReLU(inplace=False), x = x + y), or look it up and clone() it first"
    )


_NO_GRADIENT = (
    "the tensor carries no gradient, because it was made inside a checkpointed segment with use_reentrant=True, whose forward "
    "runs under no_grad. A loss on it would train nothing. Use use_reentrant=False, capture the output of the whole segment, "
    "or pass detach=True if no gradient is wanted"
)
