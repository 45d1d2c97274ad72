"""Losses that compare how the samples of a batch relate to each other: all of them couple the batch.

So two half batches do not give one whole, the value depends on the batch size, and with several processes each one sees its
own part only. Widths may differ between student and teacher, no adapter is needed.

Both sides are ``[batch, …]``; with ``samples="batch"`` everything but the first dimension is one sample's features, with
``samples="positions"`` each position, such as a token of ``[batch, tokens, width]``, is a sample of its own. ``mask`` fits the
leading dimensions: masked samples do not count, masked positions within a sample are zero on both sides. ``dim`` says where
the channels are, by default where torch has them. The value is that of one sample, over all its partners, and a mean over
valid samples. Half precision is computed and returned in float32. All raise ``LossError`` for different samples, a student
that is not floating-point, a mask that does not fit and an unknown reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LossError
from ..precision import product
from .features import unit_vectors
from .reduction import Reduction, Samples, compare_samples
from .registry import register_loss

PKT_EPSILON = 1e-7  # the least chance in a logarithm


@register_loss("similarity_preserving", compares="relations", per="sample")
def similarity_preserving(
    student: Tensor,
    teacher: Tensor,
    *,
    samples: Samples = "batch",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Squared difference of the rows of X Xᵀ (samples × samples) at length one; the mean over its b² entries.

    Couples the batch. Tung and Mori, *Similarity-Preserving Knowledge Distillation*, 2019, arXiv 1907.09682.
    """

    def value(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        ours, theirs = (unit_vectors(product(side, side.T)) for side in (s, t))
        return (ours - theirs).square().sum(-1) / _count(valid)

    return _compare("similarity_preserving", value, student, teacher, samples, mask, reduction, dim)


@register_loss("pkt", compares="relations", per="sample")
def pkt(
    student: Tensor,
    teacher: Tensor,
    *,
    samples: Samples = "batch",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """KL(teacher ‖ student) of how likely each sample picks each other as its neighbour, in nats.

    The chance is proportional to (1 + cos) / 2. Couples the batch. Passalis and Tefas, *Learning Deep Representations with
    Probabilistic Knowledge Transfer*, 2018, arXiv 1803.10837. Where the paper leaves the sample itself out (k ≠ j), the
    authors' code keeps it, and so does this; their code divides by b once more, as it takes the mean over all b² entries,
    and adds 1e-7 to chances in the logarithm, where this raises those below to it.
    """

    def value(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        def chances(side: Tensor) -> Tensor:
            unit = unit_vectors(side)
            affinity = ((product(unit, unit.T) + 1) / 2).masked_fill(~valid, 0)
            return affinity / affinity.sum(-1, keepdim=True).clamp_min(PKT_EPSILON)

        p, q = chances(t), chances(s)
        return (p * (p.clamp_min(PKT_EPSILON).log() - q.clamp_min(PKT_EPSILON).log())).sum(-1)

    return _compare("pkt", value, student, teacher, samples, mask, reduction, dim)


@register_loss("rkd_distance", compares="relations", per="sample")
def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    samples: Samples = "batch",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Huber distance of the pairwise distances of both sides, each divided by its mean over the pairs that differ.

    The mean is over all b² pairs, those of a sample with itself (zero) included, as in the authors' code; the paper sums.
    Couples the batch. Park et al., *Relational Knowledge Distillation*, 2019, arXiv 1904.05068, section 3.2.1.
    """

    def value(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        pairs = valid & valid.unsqueeze(-1)

        def relative(side: Tensor) -> Tensor:
            distances = _distances(side, valid).masked_fill(~pairs, 0)
            mean = distances.sum() / (distances > 0).sum().clamp_min(1)
            return distances / torch.where(mean > 0, mean, torch.ones_like(mean))

        return functional.smooth_l1_loss(relative(s), relative(t), reduction="none").sum(-1) / _count(valid)

    return _compare("rkd_distance", value, student, teacher, samples, mask, reduction, dim)


@register_loss("rkd_angle", compares="relations", per="sample")
def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    samples: Samples = "batch",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Huber distance of the cosines of all angles that three samples form, the value's sample being the vertex.

    Takes memory for b³ numbers. The mean is over all b³ triples, as in the authors' code; the paper sums. Couples the batch.
    Park et al., *Relational Knowledge Distillation*, 2019, arXiv 1904.05068, section 3.2.2.
    """

    def value(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        def cosines(side: Tensor) -> Tensor:
            gram = _gram(side, valid)
            own = gram.diagonal()
            # <b - a, c - a> from the scalar products, so that no b × b × width tensor is made
            products = gram + own[:, None, None] - gram[:, :, None] - gram[:, None, :]
            scale = _inverse(_squared_distances(gram))
            return products * scale[:, :, None] * scale[:, None, :]

        difference = functional.smooth_l1_loss(cosines(s), cosines(t), reduction="none")
        pairs = valid & valid.unsqueeze(-1)
        return difference.masked_fill(~pairs, 0).sum((-2, -1)) / _count(valid) ** 2

    return _compare("rkd_angle", value, student, teacher, samples, mask, reduction, dim)


@register_loss("correlation_congruence", compares="relations", per="sample")
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    samples: Samples = "batch",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Squared difference of the kernel matrices (samples × samples) of both sides; the mean over their b² entries.

    ``kernel="gaussian"`` is exp(-gamma ‖x - y‖²) of the samples at length one, by its Taylor series up to ``order``:
    exp(-2 gamma) Σ_p (2 gamma xᵀy)ᵖ / p!. ``"bilinear"`` is xᵀy of the samples as they are. Couples the batch. Peng et al.,
    *Correlation Congruence for Knowledge Distillation*, 2019, arXiv 1904.01802, section 3.

    Also raises ``LossError`` for another kernel, a negative gamma and an order below one.
    """
    if kernel not in ("gaussian", "bilinear"):
        raise LossError(f"correlation_congruence got kernel={kernel!r}; it is 'gaussian' or 'bilinear'.")
    if not gamma > 0 or not isinstance(order, int) or order < 1:
        raise LossError(f"correlation_congruence got gamma={gamma!r} and order={order!r}; they are above 0, and 1 or more.")

    def matrix(side: Tensor) -> Tensor:
        if kernel == "bilinear":
            return product(side, side.T)
        unit = unit_vectors(side)
        cosine = product(unit, unit.T)
        terms = [(2 * gamma) ** p / math.factorial(p) * cosine**p for p in range(1, order + 1)]
        return math.exp(-2 * gamma) * (1 + torch.stack(terms).sum(0))

    def value(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        return (matrix(s) - matrix(t)).square().masked_fill(~valid, 0).sum(-1) / _count(valid)

    return _compare("correlation_congruence", value, student, teacher, samples, mask, reduction, dim)


@register_loss("cka", compares="relations", per="sample")
def cka(
    student: Tensor,
    teacher: Tensor,
    *,
    samples: Samples = "batch",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """One minus linear CKA: ‖SᵀT‖² / (‖SᵀS‖ ‖TᵀT‖) of both sides, centred over the samples; in [0, 1].

    Does not change when either side is rotated, scaled or shifted. Couples the batch: every sample carries the whole value.
    It is the biased estimate, whose CKA is near 1 for fewer samples than features whatever they are, so with small batches
    of wide features take ``samples="positions"``. Kornblith et al., *Similarity of Neural Network Representations
    Revisited*, 2019, arXiv 1905.00414, section 3; as a loss for distillation, Zhou et al., *Rethinking Centered Kernel
    Alignment in Knowledge Distillation*, 2024, arXiv 2401.11824.
    """

    def value(s: Tensor, t: Tensor, valid: Tensor) -> Tensor:
        s, t = _centred(s, valid), _centred(t, valid)
        if s.shape[0] <= max(s.shape[1], t.shape[1]):  # whichever matrices are smaller: sample by sample, or feature by feature
            k, m = product(s, s.T), product(t, t.T)
            cross, ours, theirs = (k * m).sum(), k.square().sum(), m.square().sum()
        else:
            cross, ours, theirs = (product(*pair).square().sum() for pair in ((t.T, s), (s.T, s), (t.T, t)))
        tiny = torch.finfo(s.dtype).tiny
        similarity = cross * ours.clamp_min(tiny).rsqrt() * theirs.clamp_min(tiny).rsqrt()
        return (1 - similarity).expand(s.shape[0])

    return _compare("cka", value, student, teacher, samples, mask, reduction, dim)


def _compare(
    loss: str,
    value: Callable[[Tensor, Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    samples: Samples,
    mask: Tensor | None,
    reduction: Reduction,
    dim: int | None,
) -> Tensor:
    return compare_samples(loss, value, student, teacher, samples=samples, mask=mask, reduction=reduction, dim=dim)


def _count(valid: Tensor) -> Tensor:
    return valid.sum().clamp_min(1)


def _centred(side: Tensor, valid: Tensor) -> Tensor:
    """The valid samples minus their mean; the others stay zero."""
    return (side - side.sum(0) / _count(valid)).masked_fill(~valid.unsqueeze(-1), 0)


def _gram(side: Tensor, valid: Tensor) -> Tensor:
    centred = _centred(side, valid)  # distances do not change, and lose fewer digits
    return product(centred, centred.T)


def _squared_distances(gram: Tensor) -> Tensor:
    """From scalar products; exactly zero for a sample with itself and for what only rounding keeps apart."""
    own = gram.diagonal()
    sums = own.unsqueeze(-1) + own
    squared = sums - 2 * gram
    apart = squared > 8 * torch.finfo(gram.dtype).eps * sums
    return squared.masked_fill(~apart.fill_diagonal_(False), 0)


def _distances(side: Tensor, valid: Tensor) -> Tensor:
    squared = _squared_distances(_gram(side, valid))
    return squared * _inverse(squared)


def _inverse(squared: Tensor) -> Tensor:
    """1 / √x, and zero with a zero gradient where x is zero."""
    zero = squared == 0
    return squared.masked_fill(zero, 1).rsqrt().masked_fill(zero, 0)
