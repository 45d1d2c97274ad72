"""What is said when a training cannot go on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..batches import named_items, positional_items
from ..distiller import Distiller
from ..errors import BatchError, TrainerError, listing
from .meters import Values, Where


def not_finite(where: Where, values: Values, *, batches: Sequence[Any] = (), taken: bool, gradients: bool) -> TrainerError:
    """A loss or gradient is NaN or infinite.

    Args:
        where: the first step in which one was.
        values: the losses of that step.
        batches: of that step, where they are still there.
        taken: whether the optimizer has made that step.
        gradients: whether it is the gradient although the losses are finite.
    """
    broken = [name for name, value in values.parts.items() if not math.isfinite(value)]
    culprit = (
        f"the match {broken[0]!r} is" if len(broken) == 1 else f"the matches {listing(broken)} are" if broken else "the loss is"
    )
    found = "the gradient is no longer finite, although the losses are," if gradients else f"{culprit} no longer finite"
    dirty = [item for batch in batches for item in _not_finite_items(batch)]
    cause = f" The batch itself has values that are not finite in {listing(dirty)}." if dirty else ""
    state = (
        "The student was trained with it before it was noticed; the last checkpoint is from before"
        if taken
        else "The student is as it was before that step"
    )
    return TrainerError(
        f"{found} at {where}: {values}.{cause} {state}, and nothing was saved since. A lower lr, clip_norm=, or "
        "mixed_precision='no' may help; on_nonfinite='skip' passes over such steps; print(distiller.plan(batch)) shows every "
        "part on one batch"
    )


def too_many_skipped(count: int, where: Where, values: Values) -> TrainerError:
    """Step after step is not finite."""
    return TrainerError(
        f"{count} steps in a row were passed over because their loss or gradient was not finite, the last at {where}: "
        f"{values}. The student is as it was before them; a lower lr or clip_norm= may help"
    )


def out_of_memory(error: BaseException, where: Where, rows: int, distiller: Distiller, optimizer: Optimizer) -> TrainerError:
    """A device has no memory left; what holds the most of it, as far as that can be seen."""
    device = next(distiller.student.parameters()).device
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    held = {
        "the student": _bytes(distiller.student.parameters()) + _bytes(distiller.student.buffers()),
        "adapters and losses": _bytes(distiller.loss.parameters()) + _bytes(distiller.loss.buffers()),
        "the teacher": sum(_bytes(each.parameters()) + _bytes(each.buffers()) for each in teachers_of(distiller)),
        "gradients": sum(_bytes([each if each.grad is None else each.grad]) for each in trained),
        "the optimizer's state": _bytes(_tensors(optimizer.state.values())) or 2 * _bytes(trained),
    }
    known = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in held.items() if size)
    rest = ""
    if device.type == "cuda":
        peak, free = torch.cuda.max_memory_allocated(device), torch.cuda.mem_get_info(device)[0]
        others = max(0, peak - sum(held.values())) / 2**20
        rest = f"; activations and what was captured up to {others:,.0f} MiB; {free / 2**20:,.0f} MiB are free on {device}"
    notes = "".join(f" It was {note}." for note in getattr(error, "__notes__", []))
    first = str(error).strip().splitlines()[0]
    return TrainerError(
        f"out of memory at {where}, with {rows} examples: {first}{notes} What holds memory: {known}{rest}. A smaller batch "
        "with accumulate= gives the same step; mixed_precision='bf16', gradient_checkpointing=True, a teacher in half "
        "precision or on another device (teacher_device=), and fewer matches need less. Training goes on from the last "
        "checkpoint with train(resume=True)"
    )


def in_batch(error: BatchError, where: Where) -> None:
    """Say in an error at which batch it came."""
    error.add_note(f"raised at {where}")


def teachers_of(distiller: Distiller) -> list[nn.Module]:
    """The teachers that are modules; a store or another source of captures is none."""
    teacher = distiller.teacher
    several = teacher.values() if isinstance(teacher, Mapping) else [teacher]
    return [each for each in several if isinstance(each, nn.Module)]


def _not_finite_items(batch: Any) -> list[str]:
    try:
        named = named_items(batch)
        items = named.items() if named is not None else enumerate(positional_items(batch))
    except BatchError:
        return []
    return [
        str(name)
        for name, item in items
        if isinstance(item, Tensor) and item.is_floating_point() and not bool(item.isfinite().all())
    ]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(states: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    for state in states:
        yield from (value for value in state.values() if isinstance(value, Tensor))
