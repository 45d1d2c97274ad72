"""The optimizer and the scheduler of a training: given or made, and fit for the distiller."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from .distiller import Distiller
from .errors import TrainerError, did_you_mean, listing

GivenOptimizer = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None
GivenScheduler = LRScheduler | Callable[[Optimizer, int], LRScheduler] | str | None

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


def make_optimizer(
    given: GivenOptimizer,
    distiller: Distiller,
    *,
    lr: float | None = None,
    adapter_lr: float | None = None,
    weight_decay: float | None = None,
) -> Optimizer:
    """The optimizer that was given, or what the callable makes of all trainable parameters, or AdamW.

    Raises:
        TrainerError: it does not fit the distiller, whose plan must exist; or nothing is trainable.
    """
    if not any(parameter.requires_grad for parameter in distiller.student.parameters()):
        raise TrainerError("no parameter of the student requires a gradient, so there is nothing to train; unfreeze some")
    if given is None:
        groups = parameter_groups(distiller, adapter_lr=adapter_lr, weight_decay=weight_decay)
        return torch.optim.AdamW(groups, lr=LEARNING_RATE if lr is None else lr)
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = given if isinstance(given, Optimizer) else given(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TrainerError(f"the callable optimizer= must return a torch optimizer, it returned {type(optimizer).__name__}")
    check_optimizer(optimizer, distiller)
    return optimizer


def parameter_groups(
    distiller: Distiller, *, lr: float | None = None, adapter_lr: float | None = None, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters in groups for any torch optimizer: student and adapters, with weight decay and without.

    Weight decay pulls matrices towards 0; biases and the scales of norms, which have one dimension, have no reason to be small
    and get none. Each group has a ``name``.

    Args:
        distiller: one whose plan exists, or its adapters are missing.
        lr: of the student's groups; left out, that of the optimizer.
        adapter_lr: of the adapters' groups; left out, as ``lr``.
        weight_decay: default 0.01.
    """
    decay = WEIGHT_DECAY if weight_decay is None else weight_decay
    groups: list[dict[str, Any]] = []
    for name, module, rate in (("student", distiller.student, lr), ("adapters", distiller.loss, adapter_lr or lr)):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        options = {} if rate is None else {"lr": rate}
        for kind, group_decay, parameters in (
            ("", decay, [each for each in trained if each.dim() > 1]),
            (", no decay", 0.0, [each for each in trained if each.dim() <= 1]),
        ):
            if parameters:
                groups.append({"params": parameters, "weight_decay": group_decay, "name": name + kind, **options})
    return groups


def make_scheduler(
    given: GivenScheduler, optimizer: Optimizer, total_steps: int, *, warmup: float | None = None
) -> LRScheduler:
    """The scheduler that was given, or what the callable makes, or the one of that name, or a cosine from the rate to 0.

    Args:
        warmup: for a named one and the cosine: optimizer steps in which the rate rises from 0, or below 1 their share.

    Raises:
        TrainerError: it needs a metric at its steps, has not enough of them, or no scheduler has the name.
    """
    if given is None and not warmup:
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    if given is None or isinstance(given, str):
        return _named_scheduler(given or "cosine", optimizer, total_steps, warmup or 0)
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
    if isinstance(scheduler, str):
        check_scheduler_name(scheduler)
        return
    if not isinstance(scheduler, LRScheduler) and not callable(scheduler):
        raise TrainerError(f"scheduler= is a torch scheduler, a name or a callable, got {type(scheduler).__name__}")
    if isinstance(scheduler, LRScheduler) and scheduler.optimizer is not optimizer:
        raise TrainerError(
            "scheduler= was made for another optimizer than optimizer=, and would change nothing. Pass both, or a callable: "
            "scheduler=lambda optimizer, total_steps: …"
        )


def _named_scheduler(name: str, optimizer: Optimizer, total_steps: int, warmup: float) -> LRScheduler:
    from transformers import SchedulerType, get_scheduler

    steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
    try:
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=steps, num_training_steps=total_steps)
    except (ValueError, TypeError) as error:
        raise TrainerError(
            f"transformers cannot make the scheduler {name!r} from warm-up and length alone: {error}. Write "
            "scheduler=lambda optimizer, total_steps: transformers.get_scheduler(…)"
        ) from error
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        names = [each.value for each in SchedulerType if each is not SchedulerType.REDUCE_ON_PLATEAU]
        raise TrainerError(f"scheduler={name!r} needs a metric at its steps; it can be one of {listing(names)}")
    return scheduler


def check_scheduler_name(name: str) -> None:
    """Raise a `TrainerError` unless transformers knows a scheduler of this name."""
    from transformers import SchedulerType

    names = [each.value for each in SchedulerType]
    if name not in names:
        raise TrainerError(f"no scheduler is called {name!r}.{did_you_mean(name, names)} Known are {listing(names)}")


def _untrained(distiller: Distiller, held: set[nn.Parameter]) -> list[str]:
    """The matches whose adapter or loss has a trainable parameter that is not held."""
    named = distiller.loss.named_parameters()
    keys = [name.split(".")[1] for name, parameter in named if parameter.requires_grad and parameter not in held]
    return [key.replace("/", ".") for key in dict.fromkeys(keys)]
