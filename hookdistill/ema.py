"""Exponential moving averages of a student's weights: a better student at the end, or a teacher that follows it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TrainerError
from .paths import unwrap
from .sharding import whole


class EMA:
    """An average of the student's weights in a model of its own, for ``Trainer(ema=…)``.

        ema = EMA(student, decay=0.999)
        distiller = Distiller(ema.model, student, matches)  # the student is taught by its own average
        Trainer(distiller, loader, epochs=3, ema=ema).train()

    As a teacher it is that of Tarvainen and Valpola, *Mean teachers are better role models*, 2017. Not as a teacher, it is what
    evaluators see and what is saved, as it is with ``Trainer(ema=0.999)``, which needs no model of its own.

    Args:
        student: copied as it is.
        decay: how much of the average stays at every step.
        warmup: let the decay rise from 0.1 as (1 + step) / (10 + step) until ``decay`` is reached, so that the average forgets
            the first weights soon.
    """

    def __init__(self, student: nn.Module, decay: float = 0.999, *, warmup: bool = True) -> None:
        self.model: nn.Module = copy.deepcopy(unwrap(student)).eval().requires_grad_(False)
        self.average = Average(self.model, decay=decay, warmup=warmup, copied=False)

    def update(self, student: nn.Module, step: int) -> None:
        """Take in the student's weights after optimizer step ``step``, counted from 0."""
        self.average.update(student, step)


class Average:
    """The averaged tensors of a model: of its parameters the average, of its buffers the last value.

    Args:
        copied: keep the average in tensors apart; otherwise in those of the model itself.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool, copied: bool = True) -> None:
        if isinstance(decay, bool) or not 0 < decay < 1:
            raise TrainerError(f"the decay of an average is a number between 0 and 1, such as 0.999; got {decay!r}")
        self.decay, self.warmup = decay, warmup
        tensors = _tensors(model)
        self.tensors = {name: each.detach().clone() if copied else each for name, each in tensors.items()}
        self.averaged = {name for name, _ in model.named_parameters() if tensors[name].is_floating_point()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the weights of ``model`` after optimizer step ``step``, counted from 0.

        Raises:
            TrainerError: the model is of another make.
        """
        now = _tensors(unwrap(model))
        if now.keys() != self.tensors.keys():
            raise TrainerError("the average was made from a model with other parameters than the student; use EMA(student)")
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        same = {name: _alike(now[name].detach(), mean) for name, mean in self.tensors.items()}
        torch._foreach_lerp_(
            [mean for name, mean in self.tensors.items() if name in self.averaged],
            [same[name] for name in self.tensors if name in self.averaged],
            1 - decay,
        )
        for name, mean in self.tensors.items():
            if name not in self.averaged:
                mean.copy_(same[name])

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again afterwards."""
        self.swap(model)
        try:
            yield
        finally:
            self.swap(model)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the values of the average and of ``model``."""
        now = _tensors(unwrap(model))
        for name, mean in self.tensors.items():
            kept = now[name].detach().clone()
            now[name].copy_(mean)
            mean.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by name."""
        return dict(self.tensors)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for name, mean in self.tensors.items():
            mean.copy_(state[name])


def average_for(ema: float | EMA | None, student: nn.Module) -> Average | None:
    """What ``Trainer(ema=…)`` means for a student."""
    if ema is None:
        return None
    return ema.average if isinstance(ema, EMA) else Average(unwrap(student), decay=ema, warmup=True)


def teaches(ema: float | EMA | None, teachers: Sequence[nn.Module]) -> bool:
    """Whether the average is one of the teachers."""
    return isinstance(ema, EMA) and any(teacher is ema.model for teacher in teachers)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _alike(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor as a whole where the other is: a sharded student may have a teacher that is not."""
    tensor = tensor if hasattr(other, "full_tensor") else whole(tensor)
    return tensor.to(other.device, other.dtype, non_blocking=True)
