"""Losses that look at all places of a map at once: how strong they are, how channels go together.

Both sides are feature maps ``[batch, channels, *grid]`` or hidden states ``[batch, tokens, width]``, in which the tokens are
the places and the width the channels; ``dim`` says where the channels are, by default where torch has them (dimension 1 of
four and five dimensions, the last otherwise). The value is that of one sample, ``[batch]``; a mask ``[batch]`` or ``[batch,
*grid]`` says which samples or places count. Where the grids differ the larger one is pooled to the smaller, by the average
unless the docstring says otherwise. Half precision is computed and returned in float32. All raise ``LossError`` for other
shapes, a student that is not floating-point, a mask that does not fit and an unknown reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LossError
from ..precision import product
from .classes import check_temperature, kl_divergence
from .features import unit_vectors
from .reduction import Reduction, check_teacher, compare_maps, map_pair, reduce
from .registry import register_loss


@register_loss("attention_transfer", compares="relations", per="sample")
def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Squared difference of where both maps are strong: of Σ_c |x_c| ** power, as a vector of length one over the places.

    The value is the mean over the valid places, as in the authors' code; the paper (eq. 2) has the length of the difference,
    not squared. Channels may differ in number. Zagoruyko and Komodakis, *Paying More Attention to Attention*, 2016, arXiv
    1612.03928.

    Also raises ``LossError`` for a power that is not positive.
    """
    if not power > 0:
        raise LossError(f"attention_transfer got power={power}; it is more than zero.")

    def value(s: Tensor, t: Tensor, places: Tensor) -> Tensor:
        ours, theirs = (unit_vectors(_power(side, power).mean(-1)) for side in (s, t))
        return (ours - theirs).square().sum(-1) / places.sum(-1).clamp_min(1)

    return compare_maps("attention_transfer", value, student, teacher, mask=mask, reduction=reduction, dim=dim)


@register_loss("nst", compares="relations", per="sample")
def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    degree: int = 2,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Maximum mean discrepancy of two sets of channels, each a vector of length one over the places.

    The kernel is (xᵀ y) ** degree; the value mean k(t, t) + mean k(s, s) - 2 mean k(s, t) over all pairs of channels, so
    channels may differ in number and in order. Huang and Wang, *Like What You Like: Knowledge Distill via Neuron Selectivity
    Transfer*, 2017, arXiv 1707.01219, with the polynomial kernel (d = 2, c = 0); degree 1 is the linear one.

    Also raises ``LossError`` for a degree below one.
    """
    if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
        raise LossError(f"nst got degree={degree!r}; it is a whole number from one.")

    def value(s: Tensor, t: Tensor, places: Tensor) -> Tensor:
        ours, theirs = unit_vectors(s.transpose(1, 2)), unit_vectors(t.transpose(1, 2))

        def kernel(x: Tensor, y: Tensor) -> Tensor:
            return product(x, y.transpose(1, 2)).pow(degree).mean((1, 2))

        return kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)

    return compare_maps("nst", value, student, teacher, mask=mask, reduction=reduction, dim=dim)


@register_loss("fsp", compares="relations", per="sample")
def fsp(
    student: Tensor,
    teacher: Tensor,
    *,
    student_second: Tensor,
    teacher_second: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Squared difference of the flow between two layers: F₁ᵀ F₂ over the places, divided by their number.

    ``student`` and ``teacher`` are the first layer of each side, ``student_second`` and ``teacher_second`` the second. The
    value is the mean over the entries of the channels × channels matrix. Both sides need as many channels in each layer.
    Where two grids differ, the larger one is max-pooled, as in the paper. Yim et al., *A Gift from Knowledge Distillation*,
    CVPR 2017, eqs. 1 and 2 (where the sum is over the entries).

    Also raises ``LossError`` for numbers of channels that differ between the sides.
    """
    check_teacher("fsp", teacher)
    sides = {
        "student": (student, student_second),
        "teacher": (teacher if teacher.is_floating_point() else teacher.float(), teacher_second),
    }
    flows = []
    for side, (first, second) in sides.items():
        roles = (side, f"{side}_second")
        one, two, places = map_pair("fsp", first, second, mask=mask, dim=dim, roles=roles, shrink="max")
        flows.append(product(one.transpose(1, 2), two) / places.sum(-1).clamp_min(1)[:, None, None])
    ours, theirs = flows
    if ours.shape != theirs.shape:
        raise LossError(
            f"fsp needs the same batch and as many channels on both sides; the flow of the student is {list(ours.shape)}, that "
            f"of the teacher {list(theirs.shape)}."
        )
    return reduce((ours - theirs).square().mean((1, 2)), None if mask is None else places.any(-1), reduction)


@register_loss("ickd", compares="features", per="sample")
def ickd(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Squared difference of how the channels of each map correlate: of the rows of F Fᵀ (channels × channels) at length one.

    The value is the mean over the channels of the squared distance of two rows. Liu et al., *Exploring Inter-Channel
    Correlation for Diversity-preserved Knowledge Distillation*, 2021, arXiv 2202.03680. Rows at length one are from the
    authors' code; the paper writes the squared difference of the raw matrices.
    """

    def value(s: Tensor, t: Tensor, places: Tensor) -> Tensor:
        ours, theirs = (unit_vectors(product(side.transpose(1, 2), side)) for side in (s, t))
        return (ours - theirs).square().sum(-1).mean(-1)

    return compare_maps("ickd", value, student, teacher, mask=mask, reduction=reduction, dim=dim, same_width=True)


@register_loss("cwd", compares="features", per="sample")
def cwd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """KL(teacher ‖ student) of each channel's softmax over the valid places, times ``temperature ** 2``; mean over channels.

    Shu et al., *Channel-wise Knowledge Distillation for Dense Prediction*, 2020, arXiv 2011.13256 (temperature 4 there).
    """
    check_temperature("cwd", temperature)

    def value(s: Tensor, t: Tensor, places: Tensor) -> Tensor:
        heat = temperature.to(s.dtype) if isinstance(temperature, Tensor) else temperature
        hidden = ~places[:, None, :]

        def log_softmax(side: Tensor) -> Tensor:
            return (side.transpose(1, 2) / heat).masked_fill(hidden, torch.finfo(side.dtype).min).log_softmax(-1)

        return kl_divergence(log_softmax(t), log_softmax(s)).mean(-1) * heat**2

    return compare_maps("cwd", value, student, teacher, mask=mask, reduction=reduction, dim=dim, same_width=True)


def _power(values: Tensor, power: float) -> Tensor:
    """|x| ** power; of squares without the absolute value, whose second derivative at zero is not defined."""
    return values.square() if power == 2 else values.abs().pow(power)
