"""The mask and the mean, written once for all losses.

A loss is written as a function of two tensors whose *last* dimension holds the features or classes. It returns one
value for each *position*, which is any index into the other dimensions. What every loss must do around that function
is here: check the shapes, choose the dtype, keep masked positions out of the computation, reduce.

Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import LossError

Reduction = Literal["mean", "sum", "none"]


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32: half precision is never summed in half precision."""
    return torch.float64 if any(tensor.dtype is torch.float64 for tensor in tensors) else torch.float32


def fit_mask(mask: Tensor, positions: Sequence[int]) -> Tensor:
    """Which positions are valid: bool, expanded (a view, not a copy) to the shape of the positions.

    A mask is bool, integer or float, nonzero where valid, and holds for the leading dimensions: on positions
    ``[batch, tokens]`` both ``[batch, tokens]`` and ``[batch]`` fit. Size-1 dimensions are not broadcast, because
    ``[batch, 1]`` may as well be a mistake.

    Raises ``LossError`` if the mask is no tensor, or its shape is no prefix of ``positions``.
    """
    if not isinstance(mask, Tensor):
        raise LossError(f"A mask is a tensor, nonzero where a position is valid; got a {type(mask).__name__}.")
    shape = tuple(positions)
    if mask.shape != shape[: mask.ndim]:
        fitting = [str(list(shape[: rank + 1])) for rank in range(len(shape))] or ["[]"]
        raise LossError(
            f"The mask {list(mask.shape)} does not fit the positions {list(shape)} (all dimensions but that of the "
            f"features or classes): it holds for the leading dimensions, so {' or '.join(fitting)} would fit."
        )
    valid = mask if mask.dtype is torch.bool else mask != 0
    return valid.reshape(valid.shape + (1,) * (len(shape) - valid.ndim)).expand(shape)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the valid positions, a scalar; zero, still attached to the graph, where nothing is valid.

    ``values`` has one entry per position and ``mask`` fits them as in ``fit_mask``. Values at masked positions do not
    count and get no gradient, whatever they are, NaN included. Half precision is averaged, and returned, in float32.
    """
    values = values.to(working_dtype(values))
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    valid = fit_mask(mask, values.shape)
    return values.masked_fill(~valid, 0).sum() / valid.sum().clamp_min(1)


def reduce(values: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """One value per position brought to what ``reduction`` asks for.

    ``"mean"`` is ``masked_mean``, ``"sum"`` the sum over valid positions, ``"none"`` the values themselves with zeros
    at masked positions. Half precision becomes float32.

    Raises ``LossError`` for any other reduction, and for a mask that does not fit.
    """
    if reduction not in get_args(Reduction):
        allowed = ", ".join(map(repr, get_args(Reduction)))
        raise LossError(f"No reduction is called {reduction!r}; there are {allowed}.")
    if reduction == "mean":
        return masked_mean(values, mask)
    values = values.to(working_dtype(values))
    if mask is not None:
        values = values.masked_fill(~fit_mask(mask, values.shape), 0)
    return values.sum() if reduction == "sum" else values


def reduce_valid(
    value: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    other: Tensor,
    *,
    valid: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """``reduce(value(student, other))``, with both inputs zeroed wherever ``valid`` is false.

    ``valid`` is bool with the shape of the positions, which are the leading dimensions of both inputs. Dropping
    the *values* of masked positions would not do: the gradient of a NaN is NaN even when it is multiplied by zero.
    """
    if valid is not None:
        student, other = _zero_invalid(student, valid), _zero_invalid(other, valid)
    return reduce(value(student, other), valid, reduction)


def compare(
    loss: str,
    value: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None,
    reduction: Reduction,
    dim: int,
    compares: Literal["features", "logits"],
) -> Tensor:
    """Everything around ``value`` that losses of two equally shaped tensors share.

    ``value`` gets both tensors in one dtype, float32 or float64, with ``dim`` moved last, and returns one value per
    position. ``loss`` and ``compares`` are for the error messages only.

    Raises ``LossError`` if the student is not floating-point, the teacher not real, ``dim`` not a dimension of the
    student, the shapes differ, the mask does not fit, or there is no such reduction.
    """
    check_student(loss, student, dim)
    _check_teacher(loss, student, teacher, dim, compares)
    dtype = working_dtype(student, teacher)
    student, teacher = student.movedim(dim, -1).to(dtype), teacher.movedim(dim, -1).to(dtype)
    valid = None if mask is None else fit_mask(mask, student.shape[:-1])
    return reduce_valid(value, student, teacher, valid=valid, reduction=reduction)


def check_student(loss: str, student: Tensor, dim: int) -> None:
    """Raises ``LossError`` unless the student is a floating-point tensor that has a dimension ``dim``."""
    check_tensor(loss, "student", student)
    if not student.is_floating_point():
        raise LossError(f"{loss} needs a floating-point student to give a gradient to; got {student.dtype}.")
    if not -student.ndim <= dim < student.ndim:
        raise LossError(
            f"{loss} got dim={dim} as the dimension of features or classes, but the student {list(student.shape)} "
            f"has {student.ndim} dimensions."
        )


def check_tensor(loss: str, role: str, given: Any) -> None:
    """Raises ``LossError`` for anything that is no tensor."""
    if not isinstance(given, Tensor):
        raise LossError(f"{loss} compares tensors, but the {role} is a {type(given).__name__}.")


def _check_teacher(loss: str, student: Tensor, teacher: Tensor, dim: int, compares: str) -> None:
    check_tensor(loss, "teacher", teacher)
    if teacher.is_complex():
        raise LossError(f"{loss} compares real numbers, but the teacher is {teacher.dtype}.")
    if student.shape == teacher.shape:
        return
    differ = f"{loss} compares equal shapes, but student {list(student.shape)} and teacher {list(teacher.shape)} differ"
    same_rank = student.ndim == teacher.ndim
    widths = f"{student.shape[dim]} and {teacher.shape[dim]}" if same_rank else ""
    if compares == "features":
        where = f": widths {widths} along dim {dim}" if widths else ""
        raise LossError(f"{differ}{where}. In a Match, adapter= brings the student's width to the teacher's.")
    if same_rank and student.shape[dim] != teacher.shape[dim]:
        raise LossError(
            f"{differ}: the vocabularies differ, {widths} classes along dim {dim}. "
            "Cut or gather both sides to the classes they share first."
        )
    raise LossError(f"{differ} in their positions. Both sides need the same batch, tokenised in the same way.")


def _zero_invalid(tensor: Tensor, valid: Tensor) -> Tensor:
    trailing = (1,) * (tensor.ndim - valid.ndim)
    return tensor.masked_fill(~valid.reshape(valid.shape + trailing), 0)
