"""A teacher tensor for each student layer, mixed of all teacher layers: ALP-KD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MatchError


def mix(student: Tensor, teachers: Sequence[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mixture of the teacher tensors that the student tensor attends to, and the weights ``[batch, teachers]`` of it.

    A teacher layer's weight is the softmax over the layers of its dot product with the student's representation, and gradients
    flow through it, so that the assignment is learnt with the student (Passban et al., *ALP-KD: Attention-Based Layer
    Projection for Knowledge Distillation*, 2020, arXiv 2012.14022, section 3). The paper takes the dot product at ``[CLS]``;
    here it is the mean over the valid positions divided by √width, which is defined for any tensor and does not saturate with
    its width.

    Args:
        student: ``[batch, …, width]``, already brought to the teacher's shape.
        teachers: tensors of the student's shape.
        mask: valid positions: a tensor of the leading dimensions of the student, nonzero where valid.

    Raises:
        MatchError: the mask does not fit.
    """
    stacked = torch.stack(list(teachers)).to(student.dtype)
    products = (student * stacked).sum(-1) / student.shape[-1] ** 0.5
    scores = _mean_over_positions(products, mask).T
    weights = scores.softmax(-1)
    shape = (len(teachers), -1, *(1,) * (student.dim() - 1))
    return (weights.T.reshape(shape) * stacked).sum(0), weights


def _mean_over_positions(products: Tensor, mask: Tensor | None) -> Tensor:
    """``[layers, batch, …]`` to ``[layers, batch]``."""
    if mask is None:
        return products.flatten(2).mean(-1) if products.dim() > 2 else products
    valid = mask != 0
    positions = products.shape[1:]
    if valid.shape != positions[: valid.dim()]:
        raise MatchError(f"the mask {list(mask.shape)} does not fit the positions {list(positions)}")
    valid = valid.reshape(valid.shape + (1,) * (len(positions) - valid.dim())).expand(positions)
    kept = products.masked_fill(~valid, 0).flatten(2).sum(-1) if products.dim() > 2 else products.masked_fill(~valid, 0)
    count = valid.flatten(1).sum(-1) if valid.dim() > 1 else valid
    return kept / count.clamp_min(1)
