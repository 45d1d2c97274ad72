"""What losses between logits share: which positions count, which classes both sides have, the temperature.

All of them take, besides ``mask``, ``reduction`` and ``dim``:

* ``target`` and ``ignore_index``: class indices with the shape of the positions; a position whose label is ``ignore_index``
  (such as a token of the prompt) does not count. In a `Match`, ``target="labels"`` beside a teacher address.
* ``causal_shift``: the logits of a token predict the next one, so mask and target lose their first token and the logits
  their last. Tokens are the last dimension of the positions; ``reduction="none"`` gives one value fewer.
* ``vocabulary``: what to do where the two sides have different numbers of classes. ``"same"`` refuses it. ``"shared"`` drops
  the classes that only the larger side has, before the softmax. ``"padded"`` gives the smaller side logits of -inf for the
  classes it lacks, so that they cannot be. Both are for two vocabularies of one family, in which equal ids mean equal
  tokens and the larger one is padded or has tokens added at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LossError
from .reduction import Reduction, check_student, check_teacher, check_tensor, fit_mask, reduce, working_dtype, zero_invalid

Vocabulary = Literal["same", "shared", "padded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """Which positions a loss between logits looks at; see the module's docstring."""

    mask: Tensor | None
    dim: int
    target: Tensor | None = None
    ignore_index: int = -100
    causal_shift: bool = False


def compare_logits(
    loss: str,
    value: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    positions: Positions,
    *,
    temperature: float | Tensor,
    reduction: Reduction,
    vocabulary: Vocabulary,
    must_cover: Literal["student", "teacher", "neither"] = "neither",
) -> Tensor:
    """Everything around ``value`` that losses of two logits share.

    ``value`` gets both in one dtype, float32 or float64, divided by the temperature, with the classes last; it returns one
    value per position, which is multiplied by ``temperature ** 2``. ``must_cover`` names the side that must have all
    classes of the other for the value to be finite.
    """
    pair = logit_pair(loss, student, teacher, positions, temperature=temperature, vocabulary=vocabulary, must_cover=must_cover)
    return reduce(value(pair.student, pair.teacher) * pair.scale, pair.valid, reduction)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitPair:
    """Two logits ready to be compared, the classes last: tempered, in one dtype, zero at masked positions.

    ``target`` are the labels, 0 at masked positions; ``valid`` which positions count, ``None`` for all; ``scale`` the squared
    temperature.
    """

    student: Tensor
    teacher: Tensor
    target: Tensor | None
    valid: Tensor | None
    scale: float | Tensor


def logit_pair(
    loss: str,
    student: Tensor,
    teacher: Tensor,
    positions: Positions,
    *,
    temperature: float | Tensor,
    vocabulary: Vocabulary,
    must_cover: Literal["student", "teacher", "neither"] = "neither",
) -> LogitPair:
    """The checks, the classes, the positions and the temperature that losses of two logits share."""
    check_temperature(loss, temperature)
    check_student(loss, student, positions.dim)
    check_teacher(loss, teacher)
    dtype = working_dtype(student, teacher)
    ours, theirs = share_classes(loss, student, teacher, positions.dim, vocabulary, must_cover)
    ours, theirs, target, valid = pick_positions(loss, ours.to(dtype), theirs.to(dtype), positions)
    if valid is not None:
        ours, theirs = zero_invalid(ours, valid), zero_invalid(theirs, valid)
        target = None if target is None else target.masked_fill(~valid, 0)
    heat = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    return LogitPair(student=ours / heat, teacher=theirs / heat, target=target, valid=valid, scale=heat**2)


def share_classes(
    loss: str, student: Tensor, teacher: Tensor, dim: int, vocabulary: Vocabulary, must_cover: str = "neither"
) -> tuple[Tensor, Tensor]:
    """Both sides with the classes last, and as many of them.

    Raises:
        LossError: the positions differ; or the classes, and ``vocabulary`` does not bridge that or would make every value
            infinite.
    """
    if vocabulary not in get_args(Vocabulary):
        raise LossError(f"{loss} got vocabulary={vocabulary!r}; it is 'same', 'shared' or 'padded'.")
    shapes = f"{loss} compares equal shapes, but student {list(student.shape)} and teacher {list(teacher.shape)} differ"
    if student.ndim != teacher.ndim:
        raise LossError(f"{shapes} in their positions. Both sides need the same batch, tokenised in the same way.")
    ours, theirs = student.movedim(dim, -1), teacher.movedim(dim, -1)
    counts = ours.shape[-1], theirs.shape[-1]
    if counts[0] != counts[1] and vocabulary == "same":
        raise LossError(
            f"{shapes}: the vocabularies differ, {counts[0]} and {counts[1]} classes along dim {dim}. Within one family, "
            "vocabulary='shared' drops the classes that only one side has and vocabulary='padded' rules them out on the "
            "other; for two tokenizers there is the loss 'uld'."
        )
    if ours.shape[:-1] != theirs.shape[:-1]:
        raise LossError(f"{shapes} in their positions. Both sides need the same batch, tokenised in the same way.")
    if counts[0] == counts[1]:
        return ours, theirs
    if vocabulary == "shared":
        return ours[..., : min(counts)], theirs[..., : min(counts)]
    smaller = "student" if counts[0] < counts[1] else "teacher"
    if must_cover == smaller:
        raise LossError(
            f"{loss} would be infinite: with vocabulary='padded' the {smaller}, which has {min(counts)} of {max(counts)} "
            "classes, rules out what the other side allows. Take vocabulary='shared', or the losses 'js' or 'skew_kl'."
        )
    pad = max(counts) - min(counts)
    padded = functional.pad(ours if smaller == "student" else theirs, (0, pad), value=-math.inf)
    return (padded, theirs) if smaller == "student" else (ours, padded)


def pick_positions(
    loss: str, student: Tensor, other: Tensor, positions: Positions
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Student, other, labels and valid positions, after the causal shift; the classes are the last dimension.

    Raises:
        LossError: the mask or the target does not fit, or there are no tokens to shift.
    """
    shape = student.shape[:-1]
    valid = None if positions.mask is None else fit_mask(positions.mask, shape)
    target = positions.target
    if target is not None:
        check_labels(loss, target, shape)
        labelled = target != positions.ignore_index
        valid = labelled if valid is None else valid & labelled
    if not positions.causal_shift:
        return student, other, target, valid
    if not shape:
        raise LossError(f"causal_shift needs a dimension of tokens; the student is {list(student.shape)}.")
    return (
        _without_last(student, len(shape) - 1),
        _without_last(other, len(shape) - 1),
        None if target is None else without_first(target, len(shape) - 1),
        None if valid is None else without_first(valid, len(shape) - 1),
    )


def check_labels(loss: str, target: Tensor, positions: torch.Size, *, name: str = "target") -> None:
    """Raises ``LossError`` unless the labels are indices, one for each position."""
    check_tensor(loss, name, target)
    integers = not (target.is_floating_point() or target.is_complex() or target.dtype is torch.bool)
    if not integers or target.shape != positions:
        raise LossError(
            f"{loss} takes as {name}= indices, integers of shape {list(positions)}; got {target.dtype} {list(target.shape)}."
        )


def check_temperature(loss: str, temperature: float | Tensor) -> None:
    """Raises ``LossError`` unless it is positive; a tensor's value is taken on trust, as reading it would block the host."""
    if isinstance(temperature, Tensor):
        if temperature.ndim:
            raise LossError(
                f"{loss} takes one temperature, a number or a tensor without dimensions; got {list(temperature.shape)}."
            )
    elif not isinstance(temperature, Real) or not 0 < temperature < math.inf:
        raise LossError(f"{loss} got temperature={temperature!r}; it is a finite number greater than zero.")


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q) over the last dimension, where classes with p = 0 cost nothing even if q is zero too."""
    p = log_p.exp()
    absent = p == 0
    return (p * (log_p.masked_fill(absent, 0) - log_q.masked_fill(absent, 0))).sum(-1)


def log_sum_exp(logits: Tensor) -> Tensor:
    """log Σ exp over the last dimension; -inf, with a zero gradient rather than NaN, where all are -inf or there are none."""
    if logits.shape[-1] == 0:
        return logits.sum(-1) - math.inf
    absent = (logits == -math.inf).all(-1, keepdim=True)
    return logits.masked_fill(absent, 0).logsumexp(-1).masked_fill(absent.squeeze(-1), -math.inf)


def _without_last(tensor: Tensor, dim: int) -> Tensor:
    return tensor.narrow(dim, 0, max(tensor.shape[dim] - 1, 0))


def without_first(tensor: Tensor, dim: int) -> Tensor:
    """The tensor without the first entry of a dimension, if it has one: what a causal shift leaves of mask and target."""
    length = max(tensor.shape[dim] - 1, 0)
    return tensor.narrow(dim, tensor.shape[dim] - length, length)
