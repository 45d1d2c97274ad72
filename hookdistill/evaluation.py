"""What is measured during a training, and how the student is saved; the evaluators that come with hookdistill are beside."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .distiller import Distiller
from .errors import TrainerError, did_you_mean, listing
from .export import save_student, write_student, write_weights, writing
from .files import write_folder, write_into
from .loading import divided, is_divisible
from .sharding import is_sharded, whole_state

if TYPE_CHECKING:
    from accelerate import Accelerator

ADAPTERS = "adapters.safetensors"
LOSS_MODULES = "loss_modules.safetensors"
_END: Any = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an `Evaluator` gets: the models in eval mode, under ``no_grad``, and the place in the training.

    What an evaluator draws from random numbers does not change the training.
    """

    student: nn.Module
    """The student itself, without wrappers and without autocast."""
    distiller: Distiller
    """Also the way to the teacher; ``distiller(batch, step=step)`` gives the losses in the precision of the training."""
    loader: Iterable[Any] | None
    """The ``eval_loader``, its batches on `device`. Every process gets all of a DataLoader; see `share`."""
    device: torch.device
    accelerator: Accelerator
    step: int
    """Optimizer steps done; 0 before the first."""
    epoch: int
    """The pass over the train loader, counted from 1; 0 before the first step."""

    def share(self) -> Iterator[tuple[Any, bool]]:
        """The ``eval_loader`` divided among the processes: pairs of a batch and whether it counts.

        Together the processes get each batch once. All get equally many, because a sharded model has to run in all at the same
        time: one that has none left gets an old batch again, which does not count.
        """
        assert self.loader is not None
        if self.accelerator.num_processes == 1:
            yield from ((batch, True) for batch in self.loader)
            return
        batches, last = iter(_divided(self.loader, self.accelerator)), _END
        while True:
            batch = next(batches, _END)
            here = torch.tensor(float(batch is not _END), device=self.device)
            if not float(self.accelerator.reduce(here, "sum")):
                return
            if batch is _END and last is _END:
                last = next(iter(self.loader))
            last = last if batch is _END else batch
            yield last, batch is not _END

    def summed(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes; every process has to ask."""
        if self.accelerator.num_processes == 1:
            return values
        summed: Tensor = self.accelerator.reduce(values.to(self.device), "sum")
        return summed.to(values.device)

    def save_student(self, path: str | os.PathLike[str]) -> None:
        """Write the student to the folder ``path``, and its adapters beside it.

        Every process calls this, and the first one writes.
        """
        save(self.distiller, path, first=self.accelerator.is_main_process)


class Evaluator(Protocol):
    """Decides what is measured, and when and how the student is saved: any callable from an `Evaluation` to metrics by name.

    Saving goes by ``evaluation.save_student(path)``, apart from the best and the last student that the `Trainer` saves.
    Under several processes it is called in each; what counts is what it returns in the first.

    One that has a method ``of_teacher(evaluation)`` is asked by it once for the metrics of the teacher.
    """

    def __call__(self, evaluation: Evaluation, /) -> Mapping[str, float]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The metrics of all evaluators at one point of the training."""

    step: int
    epoch: int
    metrics: Mapping[str, float]

    def beats(self, best: Measurement | None, name: str, *, higher: bool | None, by: float = 0.0) -> bool:
        """Whether the metric ``name`` is better here than in ``best``, and by more than ``by``; NaN never is.

        Args:
            higher: whether more is better. Default: unless the metric is a ``loss`` or ``kl``, between slashes.

        Raises:
            TrainerError: there is no such metric.
        """
        if name not in self.metrics:
            hint = did_you_mean(name, self.metrics)
            raise TrainerError(f"best={name!r} is none of the metrics.{hint} The evaluators give {listing(self.metrics)}")
        value = self.metrics[name]
        if best is None:
            return not math.isnan(value)
        before = best.metrics[name]
        return value > before + by if more_is_better(name, higher) else value < before - by


def more_is_better(name: str, higher: bool | None) -> bool:
    """What the user says, else: unless the metric is a loss."""
    return not {"loss", "kl"} & {*name.split("/")} if higher is None else higher


def measure(evaluators: Sequence[Evaluator], evaluation: Evaluation) -> Measurement:
    """Call every evaluator; of several processes, all get what the first one has measured.

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
    if evaluation.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        metrics = broadcast_object_list([metrics])[0]
    return Measurement(step=evaluation.step, epoch=evaluation.epoch, metrics=metrics)


def save(distiller: Distiller, path: str | os.PathLike[str], *, first: bool = True, replace: bool = False) -> None:
    """Write the student to the folder ``path``, and beside it, where they have a state, adapters and modules of losses.

    They are `ADAPTERS` and `LOSS_MODULES`.

    Args:
        first: whether this process writes; for a sharded student every process calls this all the same.
        replace: let the folder take the place of whatever was there, as one; else its files take their places one by one.

    Raises:
        ExportError: the disk is full, or the folder cannot be written.
    """
    beside = {ADAPTERS: whole_state(distiller.adapters), LOSS_MODULES: whole_state(distiller.loss.loss_modules)}

    def write_beside(folder: Path) -> None:
        for name, weights in beside.items():
            if weights:
                write_weights(weights, folder / name)

    if not replace:
        if first or is_sharded(distiller.student):
            save_student(distiller.student, path)
        if first:
            with writing(path):
                write_into(path, write_beside)
                for name in [name for name, weights in beside.items() if not weights]:
                    (Path(path) / name).unlink(missing_ok=True)  # those of an earlier run do not belong to this student
        return
    state = whole_state(distiller.student) if is_sharded(distiller.student) else None

    def write(folder: Path) -> None:
        write_student(distiller.student, folder, state)
        write_beside(folder)

    if first:
        with writing(path):
            write_folder(Path(path), write)


@dataclass(frozen=True, slots=True)
class OnDevice:
    """The batches of a loader, moved to a device."""

    loader: Iterable[Any]
    device: torch.device

    def __iter__(self) -> Iterator[Any]:
        from accelerate.utils import send_to_device

        for batch in self.loader:
            yield send_to_device(batch, self.device, non_blocking=True)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]


def _divided(loader: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    """Every n-th batch of a DataLoader; of another iterable, everything, since that is this process's own."""
    if isinstance(loader, OnDevice):
        return OnDevice(_divided(loader.loader, accelerator), loader.device)
    if not is_divisible(loader):
        return loader
    rank, world = accelerator.process_index, accelerator.num_processes
    share = divided(loader, rank, world)
    return itertools.islice(loader, rank, None, world) if share is None else share


def _number(evaluator: Evaluator, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TrainerError(
            f"the evaluator {_name(evaluator)} returned {name!r} = {value!r:.80}, which is no number: {error}"
        ) from error


def _name(evaluator: object) -> str:
    return getattr(evaluator, "__name__", type(evaluator).__name__)
