"""The evaluators that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..addresses import parse
from ..batches import model_inputs, pick
from ..capture import Capture
from ..errors import RecipeError
from ..evaluation import Evaluation, Evaluator
from ..evaluators import Fidelity, HeldOutLosses
from .importing import call
from .schema import Evaluator as Spec

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class Accuracy:
    """An evaluator: ``accuracy``, the share of labels that the student's largest logit names; -100 is passed over.

    Args:
        logits: address in the student, classes last.
        labels: item of the batch, a class for each position of the logits.
    """

    logits: str = ":logits"
    labels: str = "labels"

    def __call__(self, evaluation: Evaluation, /) -> dict[str, float]:
        """Raises a `RecipeError` when there is nothing to measure on."""
        right, counted = count_right(evaluation.student, evaluation.loader or (), self.logits, self.labels, evaluation.device)
        both = torch.tensor([right, counted], dtype=torch.float64, device=evaluation.device).float()
        total = evaluation.accelerator.reduce(both, "sum").tolist()
        if not total[1]:
            raise RecipeError(f"accuracy: no label {self.labels!r} in the rows that are measured on")
        return {"accuracy": total[0] / total[1]}


def count_right(student: nn.Module, batches: Iterable[Any], logits: str, labels: str, device: torch.device) -> tuple[int, int]:
    """How many labels are right, and how many there are."""
    right, counted = torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long)
    address = parse(logits)
    for batch in batches:
        inputs = model_inputs(student, batch, targets=[labels], masks=[]).to(device)
        with Capture(student, [address]) as captured, torch.no_grad():
            student(*inputs.args, **inputs.kwargs)
        found = next(iter(next(iter(captured.values())).values())).argmax(-1)
        expected = pick(batch, labels).to(found.device)
        valid = expected != _IGNORED
        right, counted = right + (found == expected)[valid].sum().cpu(), counted + valid.sum().cpu()
    return int(right), int(counted)


def build_evaluator(spec: Spec, folder: Path) -> Evaluator:
    """The evaluator.

    Raises:
        RecipeError: the factory gives none.
    """
    if spec.factory is not None:
        made = call(spec.factory, folder, spec.arguments)
        if not callable(made):
            raise RecipeError(f"{spec.factory} gave a {type(made).__name__}; an evaluator is called with an Evaluation")
        return made  # type: ignore[no-any-return]
    if spec.metric == "accuracy":
        return Accuracy(spec.logits, spec.labels)
    return HeldOutLosses() if spec.metric == "losses" else Fidelity()
