"""The evaluators that come with hookdistill: held-out losses, fidelity to the teacher, and any metric of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .distiller import Distiller
from .engine import Compared, at_step, features_at
from .errors import MatchError, TrainerError
from .evaluation import Evaluation, Evaluator, Measurement, OnDevice, measure
from .loading import rows_of
from .losses.reduction import fit_mask
from .matches import Match
from .precision import product
from .running import teaching, undisturbed

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class StudentMetric:
    """An evaluator from a function ``(student, eval_loader) -> number``, as in ``StudentMetric("accuracy", accuracy)``.

    Under several processes each one goes through the whole loader, so that any metric is right; `ExampleMetric` divides it.

    Args:
        name: of the metric.
        function: gets the student in eval mode, under ``no_grad``.
        teacher: whether to measure the teacher too, once, where there is one: the level to reach.
    """

    name: str
    function: Callable[[nn.Module, Iterable[Any]], float]
    teacher: bool = True

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``."""
        return {self.name: self.function(evaluation.student, _loader(evaluation, f"StudentMetric({self.name!r})"))}

    def of_teacher(self, evaluation: Evaluation, /) -> dict[str, float]:
        """The same of the teacher."""
        teacher = evaluation.distiller.teacher
        if not self.teacher or not isinstance(teacher, nn.Module):
            return {}
        with teaching(teacher):
            return {self.name: self.function(teacher, _loader(evaluation, f"StudentMetric({self.name!r})"))}


@dataclass(frozen=True, slots=True)
class ExampleMetric:
    """An evaluator that averages a value of each example: ``function(output, batch)`` gives a tensor with one per example.

        ExampleMetric("accuracy", lambda output, batch: output.argmax(-1) == batch["labels"])

    ``output`` is what the student returns for the batch. The mean is over all examples, those of all processes, each once.

    Args:
        name: of the metric.
        function: its tensor may have any shape, and several batches need not agree in it.
        teacher: whether to measure the teacher too, once, where there is one: the level to reach.
    """

    name: str
    function: Callable[[Any, Any], Tensor]
    teacher: bool = True

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``, or no example in it."""
        return {self.name: self._mean(evaluation, evaluation.distiller.run_student)}

    def of_teacher(self, evaluation: Evaluation, /) -> dict[str, float]:
        """The same of the teacher."""
        if not self.teacher or not isinstance(evaluation.distiller.teacher, nn.Module):
            return {}
        return {self.name: self._mean(evaluation, evaluation.distiller.run_teacher)}

    def _mean(self, evaluation: Evaluation, run: Callable[[Any], Any]) -> float:
        _loader(evaluation, f"ExampleMetric({self.name!r})")
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, counts in evaluation.share():
            values = self.function(run(batch), batch)
            if not isinstance(values, Tensor):
                raise TrainerError(
                    f"the function of ExampleMetric({self.name!r}) returned {type(values).__name__}, not a tensor of one value "
                    "per example"
                )
            if counts:
                sums += torch.tensor([float(values.double().sum()), values.numel()], dtype=torch.float64)
        total, count = evaluation.summed(sums).tolist()
        if not count:
            raise _no_batch(evaluation)
        return float(total / count)


@dataclass(frozen=True, slots=True)
class HeldOutLosses:
    """An evaluator: ``eval/loss``, the total, and ``eval/loss/<part>`` for each part, on the ``eval_loader``.

    A part is the mean over all valid positions of all batches, of all processes, each once. (For losses that couple the
    examples of a batch, and for masks that are addresses in the student, it is the mean over batches, by their number of
    examples.)
    """

    prefix: str = "eval/"

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``, or no batch in it."""
        _loader(evaluation, "HeldOutLosses()")
        distiller = evaluation.distiller
        terms = distiller.loss.terms
        sums = torch.zeros(3, len(terms), dtype=torch.float64)
        for batch, counts in evaluation.share():
            parts = distiller(batch, step=evaluation.step).parts
            if counts:
                positions = _positions(distiller, batch)
                weight = torch.tensor([positions.get(name, 1.0) for name in terms], dtype=torch.float64)
                value = torch.stack([parts[name] for name in terms]).double().cpu()
                # A part without a valid position is 0, and would still spoil the sum if it were not finite.
                sums[0] += torch.where(weight > 0, weight * value, 0.0)
                sums[1] += weight
                sums[2] += 1
        values, weights, batches = evaluation.summed(sums)
        if not bool(batches.any()):
            raise _no_batch(evaluation)
        is_sum = torch.tensor([term.loss_args.get("reduction", "mean") != "mean" for term in terms.values()])
        means = (values / torch.where(is_sum, 1.0, weights.clamp_min(1e-300))).tolist()
        by_name = dict(zip(terms, means, strict=True))
        total = sum(at_step("weight", term.weight, evaluation.step) * by_name[name] for name, term in terms.items())
        return {f"{self.prefix}loss": total, **{f"{self.prefix}loss/{name}": mean for name, mean in by_name.items()}}


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An evaluator: how near the student's tensors are to the teacher's on the ``eval_loader``, match by match.

    For matches of logits ``fidelity/<match>/agreement``, the share of positions where both have the same first choice, and
    ``fidelity/<match>/kl``, KL(teacher ‖ student) in nats at temperature 1. For matches of features ``fidelity/<match>/cka``,
    linear CKA (Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019, section 3) over valid
    positions; it needs no equal widths, and no adapter is between. Matches of other kinds are left out.

    Args:
        positions: for CKA, at most this many of each process, the first that come.
    """

    prefix: str = "fidelity/"
    positions: int = 4096

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``, or no match to measure."""
        _loader(evaluation, "Fidelity()")
        distiller = evaluation.distiller
        kinds = {name: _KINDS[term.spec.compares] for name, term in distiller.loss.terms.items() if _is_measured(term)}
        if not kinds:
            raise TrainerError("Fidelity() compares logits and features with a teacher's, and no match does; leave it out")
        found: dict[str, _Agreement | _Cka] = {}
        for batch, counts in evaluation.share():
            compared = distiller.compared(batch, kinds)
            for name, kind in kinds.items():
                if name not in found:
                    found[name] = kind(features_at(distiller.loss.terms[name], compared[name].student), self.positions)
                found[name].add(compared[name], counts=counts)
        if not found:
            raise _no_batch(evaluation)
        metrics = {name: measured.metrics(evaluation) for name, measured in found.items()}
        return {f"{self.prefix}{name}/{which}": value for name, values in metrics.items() for which, value in values.items()}


def evaluate(
    distiller: Distiller, loader: Iterable[Any], evaluators: Sequence[Evaluator] = (), *, accelerator: Accelerator | None = None
) -> Measurement:
    """Measure a student outside of a training, as the `Trainer` would; both models are left as they were.

    Args:
        distiller: its models are moved to the accelerator's device. Where adapters are needed, they exist already.
        evaluators: default `HeldOutLosses`.
        accelerator: default a new one.

    Raises:
        TrainerError: an evaluator returns something else than numbers by name, or the loader gives no batch.
    """
    from accelerate import Accelerator

    accelerator = Accelerator() if accelerator is None else accelerator
    distiller.to(accelerator.device)
    with undisturbed(distiller):
        evaluation = Evaluation(
            student=distiller.student,
            distiller=distiller,
            loader=OnDevice(loader, accelerator.device),
            device=accelerator.device,
            accelerator=accelerator,
            step=0,
            epoch=0,
        )
        try:
            return measure(evaluators or [HeldOutLosses()], evaluation)
        finally:
            distiller.close()


class _Agreement:
    """Sums over positions of logits."""

    def __init__(self, dim: int, positions: int) -> None:
        self.dim = dim
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, tensors: Compared, *, counts: bool) -> None:
        student, teacher = (each.movedim(self.dim, -1) for each in (tensors.student, tensors.other))
        if student.shape != teacher.shape or not counts:
            return
        valid = _valid(tensors.mask, student)
        agree = (student.argmax(-1) == teacher.argmax(-1))[valid]
        ours, theirs = (F.log_softmax(each[valid].double(), -1) for each in (student, teacher))
        divergence = F.kl_div(ours, theirs, log_target=True, reduction="sum")
        self.sums += torch.stack([agree.sum().double(), divergence, torch.tensor(float(agree.numel()))]).cpu()

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        agree, divergence, count = evaluation.summed(self.sums).tolist()
        return {"agreement": agree / count, "kl": divergence / count} if count else {}


class _Cka:
    """Linear CKA from the first positions that are valid."""

    def __init__(self, dim: int, positions: int) -> None:
        self.dim, self.wanted = dim, positions
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.widths = (0, 0)

    def add(self, tensors: Compared, *, counts: bool) -> None:
        student, teacher = (each.movedim(self.dim, -1) for each in (tensors.student, tensors.other))
        self.widths = (student.shape[-1], teacher.shape[-1])
        if not counts or self.wanted <= 0 or student.shape[:-1] != teacher.shape[:-1]:
            return
        valid = _valid(tensors.mask, student)
        self.pairs.append((student[valid][: self.wanted].double().cpu(), teacher[valid][: self.wanted].double().cpu()))
        self.wanted -= len(self.pairs[-1][0])

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        empty = tuple(torch.zeros(0, width, dtype=torch.float64) for width in self.widths)
        x, y = (torch.cat([pair[side] for pair in [*self.pairs, empty]]) for side in (0, 1))
        count = evaluation.summed(torch.tensor(float(len(x)), dtype=torch.float64)).clamp_min(1)
        x, y = (each - evaluation.summed(each.sum(0)) / count for each in (x, y))
        cross, ours, theirs = (evaluation.summed(product(a.T, b)).norm() for a, b in ((x, y), (x, x), (y, y)))
        return {"cka": float(cross.square() / (ours * theirs))} if float(ours * theirs) > 0 else {}


_KINDS: dict[str, type[_Agreement] | type[_Cka]] = {"logits": _Agreement, "features": _Cka}


def _positions(distiller: Distiller, batch: Any) -> dict[str, float]:
    """For each match that is a mean, how much the batch counts."""
    try:
        return {name: float(count) for name, count in distiller.counts(batch).items()}
    except MatchError:  # a mask that only a forward knows
        return dict.fromkeys(distiller.loss.terms, float(max(1, rows_of(batch))))


def _is_measured(term: Match) -> bool:
    return term.spec.compares in _KINDS and term.teacher_address is not None


def _valid(mask: Tensor | None, values: Tensor) -> Tensor:
    positions = values.shape[:-1]
    return torch.ones(positions, dtype=torch.bool, device=values.device) if mask is None else fit_mask(mask, positions)


def _loader(evaluation: Evaluation, asked_by: str) -> Iterable[Any]:
    if evaluation.loader is None:
        raise TrainerError(f"{asked_by} measures on held-out batches, but there are none; give the Trainer an eval_loader=")
    return evaluation.loader


def _no_batch(evaluation: Evaluation) -> TrainerError:
    return TrainerError(
        f"eval_loader gave no batch at step {evaluation.step}. It is read at every evaluation, so it must be a DataLoader, a "
        "list or the like with something in it; a generator can be read only once"
    )
