"""A capture that stays on a model for many steps and records only when told to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from .addresses import Address
from .batches import Inputs
from .capture import Capture, Captured
from .paths import is_compiled


class Recorder:
    """Standing hooks on one model. They stay on between steps, because a compiled model sees none that come late.

    With ``stop`` a forward ends after the last tensor that is needed, wherever that can be known beforehand.
    """

    def __init__(self, model: nn.Module, addresses: Iterable[Address], *, stop: bool = False) -> None:
        self.model = model
        addresses = list(dict.fromkeys(addresses))
        counted_from_the_end = any(each.call == "*" or (each.call or 0) < 0 for each in addresses)
        self.capture = Capture(model, addresses, stop=stop and not counted_from_the_end and not is_compiled(model))
        self.captured = self.capture.open()
        self.capture.pause()

    def run(self, inputs: Inputs, *, whole: bool = False) -> Captured:
        """Call the model, to its end if ``whole``, and give what was captured, until `clear`."""
        with self.capture.recording(whole=whole):
            self.model(*inputs.args, **inputs.kwargs)
        return self.captured

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
