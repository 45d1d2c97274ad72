"""What is measured during training, and when and how the student is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from .distiller import Distiller
from .export import save_student


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an `Evaluator` is given. All models are in eval mode, and nothing records gradients."""

    distiller: Distiller
    student: nn.Module
    loader: Any
    """The trainer's ``eval_loader``, whose batches come on ``device``; ``None`` where none was given."""
    device: torch.device
    step: int
    """Optimizer steps done."""
    epoch: float
    """Passes over the training data done."""

    def save_student(self, path: str | os.PathLike[str]) -> None:
        """Write the student as it is now to the folder ``path``."""
        save_student(self.student, path)


class Evaluator(Protocol):
    """Decides what is measured, and, if it likes, when and how the student is saved: any callable of this form."""

    def __call__(self, evaluation: Evaluation) -> Mapping[str, float]:
        """Measure; the numbers go to the log under their names, and ``Trainer(best=name)`` can choose by one of them."""


@dataclass(frozen=True, slots=True)
class StudentMetric:
    """An evaluator from a function of the student and the evaluation data: ``function(student, loader) -> float``."""

    name: str
    function: Callable[[nn.Module, Any], float]

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        return {self.name: float(self.function(evaluation.student, evaluation.loader))}


@dataclass(frozen=True, slots=True)
class HeldOutLosses:
    """The distillation losses on the evaluation data: the mean over its batches of ``loss`` (the total) and of each part."""

    prefix: str = "eval/"

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        sums: dict[str, torch.Tensor] = {}
        count = 0
        for batch in evaluation.loader:
            losses = evaluation.distiller(batch, step=evaluation.step)
            count += 1
            for name, value in {"loss": losses.total, **losses.parts}.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        return {f"{self.prefix}{name}": float(value) / count for name, value in sums.items()}
