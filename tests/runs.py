"""Tiny trainings: pairs of models that learn in milliseconds, and the same spelled out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

from hookdistill import Distiller, HookDistillError, Match, Trainer, TrainerError
from pairs import flags, gradients, hooks, same, state

LOGITS = Match("2", "2", name="logits")
HIDDEN = Match("0", "0", name="hidden")
DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


def model(width: int, seed: int) -> nn.Sequential:
    """6 inputs, one hidden layer, 3 outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def distiller(*matches: Match) -> Distiller:
    """A teacher of width 8 and a student of width 5."""
    return Distiller(model(8, seed=1), model(5, seed=2), list(matches) or [LOGITS])


def noisy(*matches: Match) -> Distiller:
    """With a student that draws random numbers in training."""
    made = distiller(*matches)
    made.student[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    return made


def loader(batch_size: int = 4, rows: int = 24, *, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
    """`DATA` in batches."""
    return DataLoader(TensorDataset(DATA[:rows]), batch_size, shuffle=shuffle, **options)


def sgd(lr: float = 0.1, **options: Any) -> Any:
    """What makes SGD."""
    return lambda parameters: SGD(parameters, lr=lr, **options)


def constant(optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """What makes a schedule that changes nothing."""
    return ConstantLR(optimizer, factor=1.0)


def trainer(made: Distiller, batches: Any = None, **settings: Any) -> Trainer:
    """One pass of SGD at a constant rate, without a bar, unless the settings say otherwise."""
    settings = {"progress": False, **settings}
    if not {"lr", "adapter_lr", "weight_decay"} & {*settings}:
        settings.setdefault("optimizer", sgd())
    if "warmup" not in settings:
        settings.setdefault("scheduler", constant)
    if "max_steps" not in settings:
        settings.setdefault("epochs", 1)
    return Trainer(made, loader() if batches is None else batches, **settings)


def trained(made: Distiller, batches: Any = None, **settings: Any) -> list[Tensor]:
    """The student's state after a `trainer` has run."""
    trainer(made, batches, **settings).train()
    return state(made.student)


def by_hand(batches: Sequence[Sequence[Tensor]], *, lr: float = 0.1, clip: float | None = None) -> list[Tensor]:
    """The student's state after SGD on the loss spelled out; each item is the list of batches of one step."""
    made = distiller()
    parameters = list(made.student.parameters())
    for group in batches:
        x = torch.cat(list(group))
        found = gradients(made.student, F.mse_loss(made.student(x), made.teacher(x).detach()))
        norm = torch.cat([each.flatten() for each in found]).norm()
        scale = 1.0 if clip is None else min(1.0, clip / float(norm))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= lr * scale * gradient
    return state(made.student)


def close(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Whether they agree up to rounding."""
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(left, right, strict=True))


class Calls:
    """An evaluator that keeps what it was given, and gives ``score``, one value after the other."""

    def __init__(self, *values: float) -> None:
        self.values, self.seen = list(values), []

    def __call__(self, evaluation: Any) -> dict[str, float]:
        self.seen.append(evaluation)
        return {"score": self.values.pop(0) if self.values else 0.0}

    @property
    def steps(self) -> list[int]:
        """At which steps it was called."""
        return [evaluation.step for evaluation in self.seen]


def refused(
    message: str, made: Distiller | None = None, batches: Any = None, *, error: Any = TrainerError, **settings: Any
) -> None:
    """The settings are an error, at the latest before the first optimizer step, and the student is as before."""
    made = made or distiller()
    before, modes = state(made.student), flags(made.student, made.teacher)
    if not {"epochs", "max_steps"} & set(settings):
        settings["epochs"] = 1
    with pytest.raises(error, match=message) as caught:
        Trainer(made, loader() if batches is None else batches, progress=False, **settings).train()
    assert isinstance(caught.value, HookDistillError)
    assert same(state(made.student), before)
    assert flags(made.student, made.teacher) == modes
    assert hooks(made.student, made.teacher) == 0
