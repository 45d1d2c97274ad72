"""Losses between features: hidden states, conv maps, embeddings.

All take two tensors of equal shape in which ``dim`` holds the features; positions are all the other dimensions, and
``mask`` says which of them count (``reduction.fit_mask``). The value at a position is the mean over its features
unless the docstring says otherwise. Half precision is computed and returned in float32. All raise ``LossError``
for shapes that differ, a student that is not floating-point, a mask that does not fit and an unknown reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LossError
from .reduction import Reduction, compare
from .registry import register_loss

ZERO_NORM = 1e-8


@register_loss("mse", compares="features")
def mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean", dim: int = -1
) -> Tensor:
    """Squared difference, so that a masked mean over ``[batch, tokens, width]`` is one over all valid elements."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        return functional.mse_loss(s, t, reduction="none").mean(-1)

    return _compare("mse", value, student, teacher, mask, reduction, dim)


@register_loss("l1", compares="features")
def l1(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean", dim: int = -1) -> Tensor:
    """Absolute difference; the gradient at a tie is zero."""

    def value(s: Tensor, t: Tensor) -> Tensor:
        return functional.l1_loss(s, t, reduction="none").mean(-1)

    return _compare("l1", value, student, teacher, mask, reduction, dim)


@register_loss("smooth_l1", compares="features")
def smooth_l1(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int = -1,
) -> Tensor:
    """Squared difference over ``2 * beta`` below ``beta``, absolute difference minus ``beta / 2`` above.

    Also raises ``LossError`` for a negative ``beta``; zero is ``l1``. Girshick, *Fast R-CNN*, 2015, eq. 3.
    """
    if not beta >= 0:
        raise LossError(f"smooth_l1 got beta={beta}; it is where the square ends, zero or more.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        return functional.smooth_l1_loss(s, t, reduction="none", beta=beta).mean(-1)

    return _compare("smooth_l1", value, student, teacher, mask, reduction, dim)


@register_loss("huber", compares="features")
def huber(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int = -1,
) -> Tensor:
    """Half the squared difference below ``delta``, a line of slope ``delta`` above: ``delta * smooth_l1(beta=delta)``.

    Also raises ``LossError`` unless ``delta`` is positive.
    """
    if not delta > 0:
        raise LossError(f"huber got delta={delta}; it is where the line begins, more than zero.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        return functional.huber_loss(s, t, reduction="none", delta=delta).mean(-1)

    return _compare("huber", value, student, teacher, mask, reduction, dim)


@register_loss("cosine", compares="features")
def cosine(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean", dim: int = -1
) -> Tensor:
    """One minus the cosine of the angle between both vectors, in [0, 2]; one where either is the zero vector.

    The values are those of ``torch.nn.functional.cosine_similarity``, zero vectors (see ``unit_vectors``) included.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        return 1 - (unit_vectors(s) * unit_vectors(t)).sum(-1)

    return _compare("cosine", value, student, teacher, mask, reduction, dim)


@register_loss("normalized_mse", compares="features")
def normalized_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean", dim: int = -1
) -> Tensor:
    """Squared distance of the two vectors at length one, in [0, 4]: the *sum* over features, not their mean.

    Away from zero vectors (see ``unit_vectors``) this is ``2 * cosine``. Sun et al., *Patient Knowledge Distillation
    for BERT Model Compression*, 2019, arXiv 1908.09355, eq. 7.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        return (unit_vectors(s) - unit_vectors(t)).square().sum(-1)

    return _compare("normalized_mse", value, student, teacher, mask, reduction, dim)


@register_loss("activation_boundary", compares="features")
def activation_boundary(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int = -1,
) -> Tensor:
    """Squared distance of the student to the teacher's side of zero: to above ``margin`` where the teacher is positive, to
    below ``-margin`` elsewhere.

    Only the sign of the teacher matters, so both are to be taken *before* the activation function. Identical inputs cost
    nothing where they are at least ``margin`` from zero. Heo et al., *Knowledge Transfer via Distillation of Activation
    Boundaries Formed by Hidden Neurons*, 2018, arXiv 1811.03233, which sums over neurons.

    Also raises ``LossError`` for a negative ``margin``.
    """
    if not margin >= 0:
        raise LossError(f"activation_boundary got margin={margin}; it is zero or more.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        signed = torch.where(t > 0, s, -s)
        return (margin - signed).clamp_min(0).square().mean(-1)

    return _compare("activation_boundary", value, student, teacher, mask, reduction, dim)


@register_loss("ofd", compares="features")
def ofd(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: Tensor | float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int = -1,
) -> Tensor:
    """Partial squared difference to max(teacher, margin): zero where the student is below a target that is not positive.

    Both are to be taken before the activation function. ``margin`` is negative, a number or one for each channel. By default
    it is the mean of the channel's negative values in this batch, which couples the batch; `ofd_margin` gives the expected one
    from a batch normalisation, as the authors do. Heo et al., *A Comprehensive Overhaul of Feature Distillation*, 2019, arXiv
    1904.01866, which sums over channels.

    Also raises ``LossError`` for a ``margin`` that is not one number or one for each channel.
    """
    channels = student.shape[dim] if isinstance(student, Tensor) and -student.ndim <= dim < student.ndim else 0
    if isinstance(margin, Tensor) and margin.shape not in ((), (channels,)):
        raise LossError(f"ofd got a margin {list(margin.shape)}; it is one number, or one for each of {channels} channels.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        lowest = margin
        if lowest is None:
            # Masked positions are zero here, so they are not among the negative ones.
            negative = t.clamp_max(0).reshape(-1, t.shape[-1])
            lowest = negative.sum(0) / (negative < 0).sum(0).clamp_min(1)
        elif isinstance(lowest, Tensor):
            lowest = lowest.to(t)
        target = torch.maximum(t, lowest) if isinstance(lowest, Tensor) else t.clamp_min(lowest)
        difference = (target - s).square()
        return difference.masked_fill((s <= target) & (target <= 0), 0).mean(-1)

    return _compare("ofd", value, student, teacher, mask, reduction, dim)


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The expected negative value of each channel after a batch normalisation with this ``weight`` and ``bias``.

    E[x | x < 0] of a normal x with mean ``bias`` and standard deviation |``weight``|; where a channel is hardly ever negative
    (chance below 0.001), minus three standard deviations, as the authors' code has it. Both ``[channels]``, and so the result.
    """
    deviation = weight.detach().abs().double().clamp_min(ZERO_NORM)
    z = -bias.detach().double() / deviation
    chance = torch.special.ndtr(z)
    density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    expected = bias.detach().double() - deviation * density / chance.clamp_min(1e-3)
    return torch.where(chance > 1e-3, expected, -3 * deviation).to(weight.dtype)


def unit_vectors(vectors: Tensor) -> Tensor:
    """The vectors along the last dimension at length one; those shorter than ``ZERO_NORM`` are divided by that.

    So the zero vector stays zero, and its gradient is finite though large: that of a division by ``ZERO_NORM``, which
    a float16 input cannot hold.
    """
    # Squared before the clamp: a square root at zero has no finite second derivative.
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(ZERO_NORM**2).rsqrt()


def _compare(
    loss: str,
    value: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    reduction: Reduction,
    dim: int,
) -> Tensor:
    return compare(loss, value, student, teacher, mask=mask, reduction=reduction, dim=dim)
