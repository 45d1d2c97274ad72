"""The evaluators that come with hookdistill: held-out losses, fidelity to the teacher, and any metric of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .engine import at_step
from .errors import TrainerError
from .evaluation import Evaluation


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
    examples of a batch it is the mean over batches, by their number of examples.)
    """

    prefix: str = "eval/"

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``, or no batch in it."""
        _loader(evaluation, "HeldOutLosses()")
        distiller = evaluation.distiller
        terms = distiller.loss.terms
        sums = torch.zeros(2, len(terms), dtype=torch.float64)
        for batch, counts in evaluation.share():
            parts = distiller(batch, step=evaluation.step).parts
            if counts:
                weights = distiller.counts(batch)
                weight = torch.stack([weights[name].double().cpu() for name in terms])
                value = torch.stack([parts[name] for name in terms]).double().cpu()
                # A part without a valid position is 0, and would still spoil the sum if it were not finite.
                sums += torch.stack([torch.where(weight > 0, weight * value, 0.0), weight])
        values, weights = evaluation.summed(sums)
        if not bool((weights > 0).any()):
            raise _no_batch(evaluation)
        means = dict(zip(terms, (values / weights.clamp_min(1e-300)).tolist(), strict=True))
        total = sum(at_step("weight", term.weight, evaluation.step) * means[name] for name, term in terms.items())
        return {
            f"{self.prefix}loss": total,
            **{f"{self.prefix}loss/{name}": mean for name, mean in means.items()},
        }


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An evaluator: how near the student's tensors are to the teacher's on the ``eval_loader``, match by match.

    For matches of logits ``fidelity/<match>/agreement``, the share of positions where both have the same first choice, and
    ``fidelity/<match>/kl``, KL(teacher ‖ student) in nats at temperature 1. For matches of features ``fidelity/<match>/cka``,
    linear CKA (Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019, section 3) over all valid
    positions of all processes; it needs no equal widths, and no adapter is between. Matches of other kinds are left out.
    """

    prefix: str = "fidelity/"

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `TrainerError` when there is no ``eval_loader``, or no match to measure."""
        _loader(evaluation, "Fidelity()")
        found: dict[str, _Agreement | _Cka] = {}
        for batch, counts in evaluation.share():
            for name, (student, teacher, mask) in evaluation.distiller.compared(batch).items():
                kind = _fidelity_kind(evaluation.distiller.loss.terms[name].spec.compares)
                if counts and kind is not None:
                    found.setdefault(name, kind()).add(student, teacher, mask)
        metrics: dict[str, float] = {}
        for name in evaluation.distiller.loss.terms:
            kind = _fidelity_kind(evaluation.distiller.loss.terms[name].spec.compares)
            if kind is not None and evaluation.distiller.loss.terms[name].teacher_address is not None:
                values = found.get(name, kind()).metrics(evaluation)
                metrics |= {f"{self.prefix}{name}/{which}": value for which, value in values.items()}
        if not metrics:
            raise TrainerError("Fidelity() compares logits and features with a teacher's, and no match does; leave it out")
        return metrics
