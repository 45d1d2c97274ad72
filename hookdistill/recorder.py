"""A capture that stays on a model for many steps and records only when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .addresses import Address
from .batches import Inputs
from .capture import Capture, Captured
from .paths import is_compiled
from .slots import Slot

Receiver = Callable[[Address, Tensor], bool]
"""Gets a tensor as soon as its module returns, and says whether it is done with it."""


class Recorder:
    """Standing hooks on one model. They stay on between steps, because a compiled model sees none that come late.

    With ``stop`` a forward ends after the last tensor that is needed, wherever that can be known beforehand.
    """

    def __init__(self, model: nn.Module, addresses: Iterable[Address], *, stop: bool = False, hands_over: bool = False) -> None:
        self.model = model
        addresses = list(dict.fromkeys(addresses))
        counted_from_the_end = any(each.call == "*" or (each.call or 0) < 0 for each in addresses)
        compiled = is_compiled(model)
        self.capture = Capture(model, addresses, stop=stop and not counted_from_the_end and not compiled)
        self.receiver: Receiver | None = None
        self.given: list[Slot] = []
        self.captured = self.capture.open(self._offered if hands_over and not compiled else None)
        self.capture.pause()

    def run(self, inputs: Inputs, *, whole: bool = False, receiver: Receiver | None = None) -> Captured:
        """Call the model, to its end if ``whole``, and give what was captured, until `clear`.

        Args:
            receiver: is offered each tensor first, if the recorder was made with ``hands_over``; what it takes is not kept.

        Raises:
            CaptureError: it was given the tensor of a module that then ran again.
        """
        self.receiver = receiver
        try:
            with self.capture.recording(whole=whole):
                self.model(*inputs.args, **inputs.kwargs)
            for slot in self.given:
                slot.check_calls()
        finally:
            self.receiver = None
            self.given.clear()
        return self.captured

    def _offered(self, slot: Slot, tensor: Tensor) -> bool:
        taken = self.receiver is not None and self.receiver(slot.address, tensor)
        if taken:
            self.given.append(slot)
        return taken

    def clear(self) -> None:
        """Let every tensor go."""
        self.captured.clear()

    def close(self) -> None:
        """Take the hooks off."""
        self.capture.close()


@dataclass(frozen=True, slots=True)
class Recorders:
    """The recorders of one distiller: of its student, and of each teacher by name."""

    student: Recorder
    teachers: Mapping[str | None, Recorder]

    def clear(self) -> None:
        """Let every tensor go."""
        for recorder in (self.student, *self.teachers.values()):
            recorder.clear()

    def close(self) -> None:
        """Take the hooks off all models."""
        for recorder in (self.student, *self.teachers.values()):
            recorder.close()
