"""Losses between embeddings and scores of retrieval models.

``dim`` holds the features or candidates; positions are all the other dimensions, and ``mask`` says which of them count. Half
precision is computed and returned in float32. All raise ``LossError`` for shapes that differ, a student that is not
floating-point, a mask that does not fit and an unknown reduction.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..errors import LossError
from .features import unit_vectors
from .reduction import Reduction, compare
from .registry import register_loss


@register_loss("margin_mse", compares="relations")
def margin_mse(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean", dim: int = -1
) -> Tensor:
    """Squared difference of the margins: score of the first candidate, the positive one, minus that of each other.

    Both are scores ``[queries, candidates]``; the value at a query is the mean over its negatives. Hofstätter et al.,
    *Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation*, 2020, arXiv 2010.02666.

    Also raises ``LossError`` where there is no second candidate.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        if s.shape[-1] < 2:
            raise LossError(
                f"margin_mse compares a positive candidate with others; student {list(student.shape)} has just one."
            )
        ours, theirs = (side[..., :1] - side[..., 1:] for side in (s, t))
        return (ours - theirs).square().mean(-1)

    return compare("margin_mse", value, student, teacher, mask=mask, reduction=reduction, dim=dim)


@register_loss("embed_distill", compares="features")
def embed_distill(
    student: Tensor,
    teacher: Tensor,
    *,
    metric: Literal["l2", "mse", "cosine"] = "l2",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int = -1,
) -> Tensor:
    """Distance of two embeddings: the length of their difference (``"l2"``), its mean square, or one minus the cosine.

    Where the widths differ, a `Match` projects the student linearly, as the paper does. Kim et al., *EmbedDistill: A Geometric
    Knowledge Distillation for Information Retrieval*, 2023, arXiv 2301.12005, section 4, which is ``"l2"``.

    Also raises ``LossError`` for another metric.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        if metric == "cosine":
            return 1 - (unit_vectors(s) * unit_vectors(t)).sum(-1)
        squared = (s - t).square()
        if metric == "mse":
            return squared.mean(-1)
        summed = squared.sum(-1)
        equal = summed == 0  # the root has no derivative there; zero is one of its subgradients
        return summed.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)

    if metric not in ("l2", "mse", "cosine"):
        raise LossError(f"embed_distill got metric={metric!r}; it is 'l2', 'mse' or 'cosine'.")
    return compare("embed_distill", value, student, teacher, mask=mask, reduction=reduction, dim=dim)
