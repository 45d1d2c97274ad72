"""The optimizer and the scheduler of a training: given or made, and fit for the distiller."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from .distiller import Distiller
from .errors import TrainerError, listing

GivenOptimizer = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
GivenScheduler = LRScheduler | Callable[[Optimizer, int], LRScheduler] | None

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


def make_optimizer(given: GivenOptimizer, distiller: Distiller, *, lr: float | None) -> Optimizer:
    """The optimizer that was given, or what the callable makes of all trainable parameters, or AdamW.

    Raises:
        TrainerError: it does not fit the distiller, whose plan must exist; or nothing is trainable.
    """
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    if not any(parameter.requires_grad for parameter in distiller.student.parameters()):
        raise TrainerError("no parameter of the student requires a gradient, so there is nothing to train; unfreeze some")
    if given is None:
        return _adamw(parameters, LEARNING_RATE if lr is None else lr)
    optimizer = given if isinstance(given, Optimizer) else given(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TrainerError(f"the callable optimizer= must return a torch optimizer, it returned {type(optimizer).__name__}")
    check_optimizer(optimizer, distiller)
    return optimizer


def make_scheduler(given: GivenScheduler, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """The scheduler that was given, or what the callable makes, or a cosine from the optimizer's rate to 0.

    Raises:
        TrainerError: it needs a metric at its steps, or has not enough of them.
    """
    if given is None:
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    scheduler = given if isinstance(given, LRScheduler) else given(optimizer, total_steps)
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise TrainerError(
            "scheduler= must be a torch scheduler that steps without a metric, or a callable (optimizer, total_steps) that "
            f"returns one; got {type(scheduler).__name__}"
        )
    left = getattr(scheduler, "total_steps", math.inf) - scheduler.last_epoch
    if left < total_steps:
        raise TrainerError(
            f"the training takes {total_steps} optimizer steps, and {type(scheduler).__name__} has {left} left. Write "
            "scheduler=lambda optimizer, total_steps: … to have one of the right length made for each training"
        )
    return scheduler


def check_optimizer(optimizer: GivenOptimizer, distiller: Distiller) -> None:
    """An optimizer must train the student, all adapters there are so far, and nothing else.

    Raises:
        TrainerError: it does not.
    """
    if not isinstance(optimizer, Optimizer):
        if optimizer is not None and not callable(optimizer):
            raise TrainerError(f"optimizer= is a torch optimizer or a callable, got {type(optimizer).__name__}")
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(distiller.student.parameters()):
        raise TrainerError(
            "the optimizer holds no parameter of the student. Make it from distiller.parameters(), after "
            "distiller.plan(batch); or pass a callable: optimizer=lambda parameters: …"
        )
    if strangers := held.difference(distiller.parameters()):
        shapes = listing((str(list(parameter.shape)) for parameter in strangers), most=4)
        raise TrainerError(
            f"the optimizer holds {len(strangers)} parameters that are not the distiller's, of shapes {shapes}. They may be "
            "the teacher's, or the student's before its modules were replaced; make it from distiller.parameters()"
        )
    if left_out := _untrained(distiller, held):
        raise TrainerError(
            f"the optimizer does not hold the adapters (or losses with parameters) of {listing(left_out)}, so they would "
            "stay as random as they are. Call distiller.plan(batch), which makes them, and make the optimizer from "
            "distiller.parameters() then; or pass a callable: optimizer=lambda parameters: …"
        )


def check_scheduler(scheduler: GivenScheduler, optimizer: GivenOptimizer) -> None:
    """A scheduler that was made already must be that of the optimizer.

    Raises:
        TrainerError: it is not.
    """
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler) and not callable(scheduler):
        raise TrainerError(f"scheduler= is a torch scheduler or a callable, got {type(scheduler).__name__}")
    if isinstance(scheduler, LRScheduler) and scheduler.optimizer is not optimizer:
        raise TrainerError(
            "scheduler= was made for another optimizer than optimizer=, and would change nothing. Pass both, or a callable: "
            "scheduler=lambda optimizer, total_steps: …"
        )


def _adamw(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    """Weight decay pulls matrices towards 0; biases and the scales of norms have no reason to be small."""
    decayed = {"params": [each for each in parameters if each.dim() > 1], "weight_decay": WEIGHT_DECAY}
    others = {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([group for group in (decayed, others) if group["params"]], lr=lr)


def _untrained(distiller: Distiller, held: set[nn.Parameter]) -> list[str]:
    """The matches whose adapter or loss has a trainable parameter that is not held."""
    named = distiller.loss.named_parameters()
    keys = [name.split(".")[1] for name, parameter in named if parameter.requires_grad and parameter not in held]
    return [key.replace("/", ".") for key in dict.fromkeys(keys)]
