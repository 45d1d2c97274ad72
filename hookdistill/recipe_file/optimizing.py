"""The optimizer and the learning rate's course that a recipe names, as what a `Trainer` takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer as TorchOptimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from ..errors import RecipeError
from .importing import check_arguments
from .schema import Optimizer, Scheduler


def optimizer(spec: Optimizer, *, lr: float) -> Callable[[list[nn.Parameter]], TorchOptimizer]:
    """What makes the optimizer; matrices are decayed, biases and norms are not.

    Raises:
        RecipeError: the class takes no such argument, or refuses its value.
    """
    kind = getattr(torch.optim, spec.name)
    check_arguments(kind, spec.arguments, f"torch.optim.{spec.name}", given=("params", "lr", "weight_decay"))

    options = {"lr": lr, **_tuples(spec.arguments)}
    try:
        kind([nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"torch.optim.{spec.name} refuses {spec.arguments}: {error}") from error

    def make(parameters: list[nn.Parameter]) -> TorchOptimizer:
        decayed = {"params": [each for each in parameters if each.dim() > 1], "weight_decay": spec.weight_decay}
        others = {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0}
        made: TorchOptimizer = kind([group for group in (decayed, others) if group["params"]], **options)
        return made

    return make


def scheduler(spec: Scheduler) -> Callable[[TorchOptimizer, int], LRScheduler]:
    """What makes the scheduler for a number of optimizer steps."""

    def make(made: TorchOptimizer, total_steps: int) -> LRScheduler:
        if spec.name == "one_cycle":
            return OneCycleLR(made, max_lr=[group["lr"] for group in made.param_groups], total_steps=total_steps)
        return LambdaLR(made, Course(spec.name, spec.warmup_steps, total_steps))

    return make


class Course:
    """The factor of the learning rate at a step: a straight line up to 1, then the course by name."""

    def __init__(self, name: str, warmup_steps: int, total_steps: int) -> None:
        self.name, self.warmup_steps, self.total_steps = name, warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return {"cosine": (1 + math.cos(math.pi * min(1.0, done))) / 2, "linear": max(0.0, 1 - done), "constant": 1.0}[
            self.name
        ]


def _tuples(arguments: dict[str, Any]) -> dict[str, Any]:
    """Lists, which is what a file can hold, as the tuples that optimizers take (betas)."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
