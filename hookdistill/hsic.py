"""Centred kernel alignment (CKA) of many layers at once, from minibatches.

Per minibatch each layer gives one n × n Gram matrix, so nothing of size n × features is kept and layers of any width compare.
With the linear kernel everything here is unchanged by an orthogonal map, a shift and a scaling of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import CaptureError
from .precision import product

FEWEST = 4  # examples for which the unbiased estimate exists
MOST_TOKENS = 1024


def centred_gram(features: Tensor) -> Tensor:
    """The U-centred Gram matrix ``[n, n]`` in float64 of features ``[n, …]``, n ≥ 4; its diagonal is zero.

    The inner product of two of these, divided by n (n - 3), is the unbiased estimator HSIC₁ (Song et al., *Feature Selection
    via Dependence Maximization*, 2012, eq. 5; in this form Székely and Rizzo, 2014, section 2).
    """
    features = features.reshape(len(features), -1).to(_widest(features.device))
    features = features - features.mean(0)  # changes nothing but the rounding: hidden states often lie far from zero
    n = len(features)
    gram = product(features, features.T).fill_diagonal_(0)
    rows = gram.sum(1) / (n - 2)
    centred = gram - rows[:, None] - rows[None, :] + rows.sum() / (n - 1)
    return centred.fill_diagonal_(0)


class MinibatchCKA:
    """CKA between every teacher and every student layer, summed up batch by batch.

    The three HSIC terms are averaged over the minibatches before they are divided, so that the result does not depend on the
    size of the minibatch (Nguyen et al., *Do Wide and Deep Networks Learn the Same Things?*, 2021, arXiv 2010.15327, eq. 2 and
    3). Sums are float64 and stay on the device (float32 on MPS, which has no float64); nothing is read on the host before
    `result`.
    """

    def __init__(self) -> None:
        self.batches = self.examples = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, teacher: Sequence[Tensor], student: Sequence[Tensor]) -> None:
        """Add one minibatch: for each layer the features ``[n, …]`` of the same n examples, n ≥ 4."""
        n = len(teacher[0])
        theirs, ours = (torch.stack([centred_gram(each).flatten() for each in side]) for side in (teacher, student))
        ours = ours.to(theirs.device)
        # The mean over minibatches of unequal size is weighted by their number of examples.
        terms = (product(theirs, ours.T), theirs.square().sum(1), ours.square().sum(1))
        scaled = [term / (n - 3) for term in terms]
        self._sums = tuple(scaled if self._sums is None else map(torch.add, self._sums, scaled))  # type: ignore[assignment]
        self.batches += 1
        self.examples += n

    def result(self) -> Tensor:
        """The matrix ``[teacher layers, student layers]``, float64, on the CPU.

        One for features that agree up to rotation, shift and scale, about zero for independent ones (the estimate may fall
        below), NaN for a layer whose output does not vary.
        """
        if self._sums is None:
            raise CaptureError("no minibatch was added")
        across, theirs, ours = (each.double().cpu() for each in self._sums)
        scale = torch.outer(theirs, ours)
        return torch.where(scale > 0, across / scale.clamp_min(torch.finfo(scale.dtype).tiny).sqrt(), torch.nan)

    def finite(self) -> tuple[list[bool], list[bool]]:
        """For each teacher and each student layer whether its sums are finite numbers."""
        assert self._sums is not None
        return self._sums[1].isfinite().tolist(), self._sums[2].isfinite().tolist()


def same_tokens(tensors: Sequence[Tensor]) -> bool:
    """Whether all are ``[batch, tokens, width]`` with the same tokens."""
    return all(tensor.dim() == 3 and tensor.shape[:2] == tensors[0].shape[:2] for tensor in tensors)


def token_features(tensors: Sequence[Tensor], valid: Tensor | None, *, most: int = MOST_TOKENS) -> list[Tensor]:
    """The features ``[n, width]`` of the valid tokens of each ``[batch, tokens, width]``, at most ``most``, evenly spread."""
    shape = tensors[0].shape[:2]
    kept = torch.ones(shape, dtype=torch.bool) if valid is None else valid.cpu()
    if kept.shape != shape:
        raise CaptureError(f"the mask {list(kept.shape)} does not fit the tokens {list(shape)} of the layers; give mask=None")
    where = kept.flatten().nonzero()[:, 0]
    if len(where) > most:
        where = where[torch.linspace(0, len(where) - 1, most).round().long()]
    return [each.flatten(0, 1)[where.to(each.device)] for each in tensors]


def item_features(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """The features of each item of the batch; invalid tokens of ``[batch, tokens, width]`` are zero in all of them."""
    if valid is not None and tensor.dim() == 3 and tensor.shape[:2] == valid.shape:
        return tensor.masked_fill(~valid.to(tensor.device)[..., None], 0)
    return tensor


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
