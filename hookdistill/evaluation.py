"""What is measured during training, and how the student is saved."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .distiller import Distiller
from .errors import TrainerError, did_you_mean, listing
from .export import save_weights, write_whole

if TYPE_CHECKING:
    from accelerate import Accelerator

ADAPTERS = "adapters.safetensors"
LOSS_MODULES = "loss_modules.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an `Evaluator` gets: the models in eval mode, under ``no_grad``, and the place in the training.

    What an evaluator draws from torch's random numbers does not change the training.
    """

    student: nn.Module
    """The student itself, without wrappers and without autocast."""
    distiller: Distiller
    """Also the way to the teacher; ``distiller(batch, step=step)`` gives the losses in the precision of the training."""
    loader: Iterable[Any] | None
    """The ``eval_loader``; a DataLoader's batches come on `device`, and under several processes are this one's share."""
    device: torch.device
    accelerator: Accelerator
    step: int
    """Optimizer steps done; 0 before the first."""
    epoch: int
    """The pass over the train loader, counted from 1; 0 before the first step."""

    def save_student(self, path: str | os.PathLike[str]) -> None:
        """Write the student to the folder ``path``, and its adapters beside it; of several processes, the first one writes."""
        if self.accelerator.is_main_process:
            save(self.distiller, path)


class Evaluator(Protocol):
    """Decides what is measured, and when and how the student is saved: any callable from an `Evaluation` to metrics by name.

    Saving goes by ``evaluation.save_student(path)``, apart from the best and the last student that the `Trainer` saves.
    Under several processes it is called in each, and gathers by ``evaluation.accelerator``.
    """

    def __call__(self, evaluation: Evaluation, /) -> Mapping[str, float]: ...


@dataclass(frozen=True, slots=True)
class StudentMetric:
    """An evaluator from a function ``(student, eval_loader) -> number``, as in ``StudentMetric("accuracy", accuracy)``."""

    name: str
    function: Callable[[nn.Module, Iterable[Any]], float]

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``."""
        return {self.name: self.function(evaluation.student, _loader(evaluation, f"StudentMetric({self.name!r})"))}


@dataclass(frozen=True, slots=True)
class HeldOutLosses:
    """An evaluator: ``eval/loss``, the total, and ``eval/loss/<part>`` for each part, on the ``eval_loader``.

    Means over batches: all batches weigh the same, whatever their size.
    """

    prefix: str = "eval/"

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``, or no batch in it."""
        names: list[str] = []
        values = []
        for batch in _loader(evaluation, "HeldOutLosses()"):
            losses = evaluation.distiller(batch, step=evaluation.step)
            names = ["loss", *(f"loss/{part}" for part in losses.parts)]
            values.append(torch.stack([losses.total, *losses.parts.values()]).float())
        if not values:
            raise TrainerError(
                f"eval_loader gave no batch at step {evaluation.step}. It is read at every evaluation, so it must be a "
                "DataLoader, a list or the like with something in it; a generator can be read only once"
            )
        means = evaluation.accelerator.reduce(torch.stack(values).mean(0), "mean").tolist()
        return {f"{self.prefix}{name}": mean for name, mean in zip(names, means, strict=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The metrics of all evaluators at one point of the training."""

    step: int
    epoch: int
    metrics: Mapping[str, float]

    def beats(self, best: Measurement | None, name: str, *, higher: bool | None) -> bool:
        """Whether the metric ``name`` is better here than in ``best``; NaN never is.

        Args:
            higher: whether more is better; ``None``: unless ``name`` says ``loss``, between slashes.

        Raises:
            TrainerError: there is no such metric.
        """
        if name not in self.metrics:
            hint = did_you_mean(name, self.metrics)
            raise TrainerError(f"best={name!r} is none of the metrics.{hint} The evaluators give {listing(self.metrics)}")
        value = self.metrics[name]
        if best is None:
            return not math.isnan(value)
        higher = "loss" not in name.split("/") if higher is None else higher
        return value > best.metrics[name] if higher else value < best.metrics[name]


def measure(evaluators: Sequence[Evaluator], evaluation: Evaluation) -> Measurement:
    """Call every evaluator.

    Raises:
        TrainerError: one returns something else than numbers by name, or a name that another has returned.
    """
    metrics: dict[str, float] = {}
    for evaluator in evaluators:
        found = evaluator(evaluation)
        if not isinstance(found, Mapping):
            raise TrainerError(
                f"the evaluator {_name(evaluator)} returned {type(found).__name__}, not a mapping of names to numbers. "
                "A function (student, loader) -> number becomes an evaluator by StudentMetric(name, function)"
            )
        for name, value in found.items():
            if name in metrics:
                raise TrainerError(f"two evaluators measure {name!r}, the second is {_name(evaluator)}; rename one")
            metrics[name] = _number(evaluator, name, value)
    return Measurement(step=evaluation.step, epoch=evaluation.epoch, metrics=metrics)


def save(distiller: Distiller, path: str | os.PathLike[str]) -> None:
    """Write the student to the folder ``path``, and beside it, where they have a state, adapters and modules of losses.

    They are `ADAPTERS` and `LOSS_MODULES`.
    """
    distiller.export(path)
    for modules, name in ((distiller.adapters, ADAPTERS), (distiller.loss.loss_modules, LOSS_MODULES)):
        if modules.state_dict():
            write_whole(path, partial(_write_modules, modules, name))
        else:
            (Path(path) / name).unlink(missing_ok=True)  # those of an earlier run do not belong to this student


def _write_modules(modules: nn.Module, name: str, folder: Path) -> None:
    save_weights(modules, folder / name)


def _loader(evaluation: Evaluation, asked_by: str) -> Iterable[Any]:
    if evaluation.loader is None:
        raise TrainerError(f"{asked_by} measures on held-out batches, but there are none; give the Trainer an eval_loader=")
    return evaluation.loader


def _number(evaluator: Evaluator, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TrainerError(
            f"the evaluator {_name(evaluator)} returned {name!r} = {value!r:.80}, which is no number: {error}"
        ) from error


def _name(evaluator: object) -> str:
    return getattr(evaluator, "__name__", type(evaluator).__name__)
