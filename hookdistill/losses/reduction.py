"""The mask and the mean, written once for all losses.

A loss is written as a function of two tensors whose *last* dimension holds the features or classes. It returns one
value for each *position*, which is any index into the other dimensions (`compare`); for each *sample*, where it looks
at all places of a map at once (`compare_maps`); or for each sample with an eye on all others (`compare_samples`). What
every loss must do around that function is here: check the shapes, choose the dtype, keep masked positions out of the
computation, reduce.

Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LossError

Reduction = Literal["mean", "sum", "none"]
Samples = Literal["batch", "positions"]


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
        student, other = zero_invalid(student, valid), zero_invalid(other, valid)
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
) -> Tensor:
    """Everything around ``value`` that losses of two equally shaped tensors share.

    ``value`` gets both tensors in one dtype, float32 or float64, with ``dim`` moved last, and returns one value per
    position. ``loss`` is for the error messages only.

    Raises ``LossError`` if the student is not floating-point, the teacher not real, ``dim`` not a dimension of the
    student, the shapes differ, the mask does not fit, or there is no such reduction.
    """
    check_student(loss, student, dim)
    check_teacher(loss, teacher)
    if student.shape != teacher.shape:
        same_rank = student.ndim == teacher.ndim
        where = f": widths {student.shape[dim]} and {teacher.shape[dim]} along dim {dim}" if same_rank else ""
        raise LossError(
            f"{loss} compares equal shapes, but student {list(student.shape)} and teacher {list(teacher.shape)} "
            f"differ{where}. In a Match, adapter= brings the student's width to the teacher's."
        )
    dtype = working_dtype(student, teacher)
    student, teacher = student.movedim(dim, -1).to(dtype), teacher.movedim(dim, -1).to(dtype)
    valid = None if mask is None else fit_mask(mask, student.shape[:-1])
    return reduce_valid(value, student, teacher, valid=valid, reduction=reduction)


def compare_maps(
    loss: str,
    value: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None,
    reduction: Reduction,
    dim: int | None,
    same_width: bool = False,
) -> Tensor:
    """Everything around ``value`` that losses with one value per *sample* share: those that look at all its places.

    ``value`` gets both maps and the valid places as `map_pair` gives them, and returns ``[batch]``. Samples without a valid
    place do not count.

    Raises ``LossError`` as `map_pair` does, and for widths that differ if ``same_width``.
    """
    ours, theirs, places = map_pair(loss, student, teacher, mask=mask, dim=dim)
    if same_width and ours.shape[-1] != theirs.shape[-1]:
        raise LossError(
            f"{loss} needs as many channels on both sides; student {list(student.shape)} has {ours.shape[-1]} and teacher "
            f"{list(teacher.shape)} {theirs.shape[-1]}. In a Match, adapter= brings the student's width to the teacher's."
        )
    return reduce(value(ours, theirs, places), None if mask is None else places.any(-1), reduction)


def map_pair(
    loss: str,
    first: Tensor,
    second: Tensor,
    *,
    mask: Tensor | None,
    dim: int | None,
    roles: tuple[str, str] = ("student", "teacher"),
    shrink: Literal["avg", "max"] = "avg",
) -> tuple[Tensor, Tensor, Tensor]:
    """Two maps as ``[batch, places, channels]``, zero at masked places, and which places are valid, ``[batch, places]``.

    Both come as ``[batch, channels, *grid]`` or ``[batch, *grid, channels]``, see `features_last`. Where the grids differ, the
    larger is pooled to the smaller, by the average or the maximum of what falls together.

    Raises ``LossError`` as `compare` does, for tensors without places, for different batches, and for a mask of places where
    the grids differ.
    """
    ours, theirs, valid = place_pair(loss, first, second, mask=mask, dim=dim, roles=roles, shrink=shrink)
    if valid is None:
        valid = torch.ones(ours.shape[:-1], dtype=torch.bool, device=ours.device)
    return ours.flatten(1, -2), theirs.flatten(1, -2), valid.flatten(1)


def place_pair(
    loss: str,
    first: Tensor,
    second: Tensor,
    *,
    mask: Tensor | None,
    dim: int | None,
    roles: tuple[str, str] = ("student", "teacher"),
    shrink: Literal["avg", "max"] = "avg",
    placeless: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `map_pair`, but the grids stay: ``[batch, *grid, channels]``, and ``[batch, *grid]`` or ``None`` for all.

    ``placeless`` takes ``[batch, channels]`` too.
    """
    ours, theirs = features_last(loss, first, second, dim)
    if ours.ndim < (2 if placeless else 3) or theirs.ndim != ours.ndim or ours.shape[0] != theirs.shape[0]:
        raise LossError(
            f"{loss} compares maps [batch, channels, *grid] or [batch, tokens, width] of the same batch; got {roles[0]} "
            f"{list(first.shape)} and {roles[1]} {list(second.shape)}."
        )
    grid, grids_differ = tuple(map(min, ours.shape[1:-1], theirs.shape[1:-1])), ours.shape[1:-1] != theirs.shape[1:-1]
    if isinstance(mask, Tensor) and mask.ndim > 1 and grids_differ:
        raise LossError(
            f"{loss} got a mask {list(mask.shape)} of places, but {roles[0]} {list(first.shape)} and {roles[1]} "
            f"{list(second.shape)} have different grids; give a mask [{ours.shape[0]}] of samples, or bring both to one grid."
        )
    if mask is not None:
        ours, theirs = (zero_invalid(side, fit_mask(mask, side.shape[:-1])) for side in (ours, theirs))
    valid = None if mask is None else fit_mask(mask, (ours.shape[0], *grid))
    return _pool(ours, grid, shrink), _pool(theirs, grid, shrink), valid


def compare_samples(
    loss: str,
    value: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None,
    reduction: Reduction,
    dim: int | None,
    samples: Samples = "batch",
) -> Tensor:
    """Everything around ``value`` that losses which couple the batch share: those that look at all its samples at once.

    With ``samples="batch"`` a sample is one entry of the batch, all its places and channels its features (a masked place
    is zero on both sides); with ``"positions"`` each place, such as a token, is a sample of its own. ``value`` gets
    ``[samples, features]`` of both, zero at masked samples, and which samples are valid, bool ``[samples]``; it returns
    one value per sample. Widths may differ, and grids where a sample is an entry of the batch.

    Raises ``LossError`` as `compare` does, and for different numbers of samples.
    """
    if samples not in get_args(Samples):
        raise LossError(f"{loss} got samples={samples!r}; a sample is one entry of the 'batch', or each of its 'positions'.")
    ours, theirs = features_last(loss, student, teacher, dim)
    kept = 1 if samples == "batch" else -1
    if ours.ndim < 2 or theirs.ndim < 2 or ours.shape[:kept] != theirs.shape[:kept]:
        raise LossError(
            f"{loss} compares the same samples on both sides ({samples=}); got student {list(student.shape)} and teacher "
            f"{list(teacher.shape)}."
        )
    samples_shape = ours.shape[:kept]
    if mask is None:
        valid = torch.ones(samples_shape, dtype=torch.bool, device=ours.device)
    else:
        valid = fit_mask(mask, ours.shape[:-1])
        ours, theirs = zero_invalid(ours, valid), zero_invalid(theirs, fit_mask(mask, theirs.shape[:-1]))
        valid = valid if kept == -1 or valid.ndim == 1 else valid.flatten(1).any(-1)
    count = samples_shape.numel()
    ours, theirs = ours.reshape(count, -1), theirs.reshape(count, -1)
    values = value(ours, theirs, valid.reshape(count))
    return reduce(values.reshape(samples_shape), None if mask is None else valid, reduction)


def features_last(loss: str, student: Tensor, teacher: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    """Both tensors in one dtype, float32 or float64, with the features last.

    ``dim`` says where they are; by default where torch has them: dimension 1 of images and volumes (four or five
    dimensions), the last of everything else.

    Raises ``LossError`` if the student is not floating-point, the teacher not real, or ``dim`` not a dimension of both.
    """
    check_tensor(loss, "student", student)
    check_student(loss, student, _channels(student) if dim is None else dim)
    check_teacher(loss, teacher)
    axes = [_channels(side) if dim is None else dim for side in (student, teacher)]
    if not -teacher.ndim <= axes[1] < teacher.ndim:
        raise LossError(f"{loss} got dim={dim} as the dimension of features, but the teacher is {list(teacher.shape)}.")
    dtype = working_dtype(student, teacher)
    return student.movedim(axes[0], -1).to(dtype), teacher.movedim(axes[1], -1).to(dtype)


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


def check_teacher(loss: str, teacher: Tensor) -> None:
    """Raises ``LossError`` unless the teacher is a tensor of real numbers."""
    check_tensor(loss, "teacher", teacher)
    if teacher.is_complex():
        raise LossError(f"{loss} compares real numbers, but the teacher is {teacher.dtype}.")


def check_tensor(loss: str, role: str, given: Any) -> None:
    """Raises ``LossError`` for anything that is no tensor."""
    if not isinstance(given, Tensor):
        raise LossError(f"{loss} compares tensors, but the {role} is a {type(given).__name__}.")


def _channels(tensor: Tensor) -> int:
    return 1 if tensor.ndim in (4, 5) else -1


def _pool(maps: Tensor, grid: tuple[int, ...], how: str) -> Tensor:
    """``[batch, *larger grid, channels]`` to ``[batch, *grid, channels]``."""
    if maps.shape[1:-1] == grid:
        return maps
    if len(grid) > 3:
        raise LossError(f"grids of {len(grid)} dimensions are not pooled; bring both sides to one grid first.")
    pool: Callable[..., Tensor] = getattr(functional, f"adaptive_{how}_pool{len(grid)}d")
    return pool(maps.movedim(-1, 1), grid).movedim(1, -1)


def zero_invalid(tensor: Tensor, valid: Tensor) -> Tensor:
    """The tensor with zeros wherever ``valid``, bool with the shape of its leading dimensions, is false."""
    trailing = (1,) * (tensor.ndim - valid.ndim)
    return tensor.masked_fill(~valid.reshape(valid.shape + trailing), 0)
