"""A capture that stays on a model for many steps and records only when told to."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from .addresses import Address
from .batches import Inputs
from .capture import Capture, Captured

Name = TypeVar("Name")


class Recorder:
    """Standing hooks on one model. They stay on between steps, because a compiled model sees none that come late."""

    def __init__(self, model: nn.Module, addresses: Iterable[Address]) -> None:
        self.model = model
        self.capture = Capture(model, dict.fromkeys(addresses))
        self.captured = self.capture.open()
        self.capture.pause()

    def run(self, inputs: Inputs) -> Captured:
        """Call the model and give what was captured, until `clear`."""
        with self.capture.recording():
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


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for all modules of the models; afterwards each is in the mode it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def teaching(model: nn.Module) -> Iterator[None]:
    """A teacher's forward: eval mode, no gradients."""
    with evaluating(model), torch.no_grad():
        yield
    if torch.is_autocast_enabled() or torch.is_autocast_cpu_enabled():
        # A weight that was cast under no_grad stays in autocast's cache without a gradient; a student that shares it
        # with its teacher would silently not train it.
        torch.clear_autocast_cache()


def device_of(model: nn.Module, otherwise: torch.device | None = None) -> torch.device:
    """Where the model's first parameter or buffer lies; for a model without any, ``otherwise`` or the CPU."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return otherwise or torch.device("cpu")
