"""Where a sample's valid tokens lie in a padded batch: cutting the padding off, and putting it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from .dtypes import Array, raw


@dataclass(frozen=True, slots=True)
class Span:
    """The valid tokens of one row of a mask: a run, or where there are holes an index."""

    start: int
    length: int
    index: Array | None = None

    def narrow(self, tensor: Tensor, dim: int) -> Tensor:
        """The valid tokens along ``dim``; a view where they are a run."""
        if self.index is None:
            return tensor.narrow(dim, self.start, self.length)
        return tensor.index_select(dim, torch.from_numpy(self.index).to(tensor.device))

    def positions(self) -> Array:
        """Their positions in the row."""
        return np.arange(self.start, self.start + self.length) if self.index is None else self.index

    def only(self, kept: Array) -> Span:
        """The span of those of them that ``kept`` counts off."""
        return Span(0, len(kept), self.positions()[kept])


def spans_of(mask: Tensor, name: object) -> list[Span]:
    """One span for each row of a ``[batch, tokens]`` mask.

    Raises:
        StoreError: the mask has another shape, or values that are not 0 and 1.
    """
    valid = mask.detach().cpu()
    if valid.ndim != 2:
        raise StoreError(f"the mask {name!r} must be [batch, tokens], got {list(valid.shape)}. Name another, or mask=None")
    ones = valid != 0
    if not bool((ones == valid).all()):
        raise StoreError(f"the mask {name!r} holds values other than 0 and 1; it must be 1 where a token is valid")
    rows = ones.numpy()
    lengths = rows.sum(1)
    starts = rows.argmax(1)
    ends = rows.shape[1] - rows[:, ::-1].argmax(1)
    return [
        Span(int(start) if length else 0, int(length), None if length in (0, end - start) else np.flatnonzero(row))
        for row, start, end, length in zip(rows, starts, ends, lengths, strict=True)
    ]


def unpadded(tensor: Tensor, spans: Sequence[Span], token_dims: Sequence[int]) -> list[Tensor]:
    """The samples of a batch ``[batch, …]`` without their padding."""
    samples = list(tensor.unbind(0))
    for dim in token_dims:
        samples = [span.narrow(sample, dim) for span, sample in zip(spans, samples, strict=True)]
    return samples


def padded(
    samples: Sequence[Array],
    spans: Sequence[Span] | None,
    token_dims: Sequence[int],
    tokens: int,
    dtype: torch.dtype,
    fill: float,
) -> Tensor:
    """The samples in one batch ``[batch, …]``, each at the places of its valid tokens, ``fill`` everywhere else.

    Samples are raw numbers of the size of ``dtype``, whose bits they are.

    Raises:
        StoreError: without token dimensions, the samples differ in shape.
    """
    shape = list(samples[0].shape)
    for dim in token_dims:
        shape[dim] = tokens
    odd = next((each for each in {sample.shape for sample in samples} if _differs(each, shape, token_dims)), None)
    if odd is not None:
        raise StoreError(f"two samples of the batch have the stored shapes {list(samples[0].shape)} and {list(odd)}")
    batch = torch.empty(len(samples), *shape, dtype=dtype)
    if spans is None or not token_dims:
        raw(batch)[:] = samples
        return batch
    runs = list(token_dims) == [0] and all(span.index is None for span in spans)
    if not runs:
        batch.fill_(fill)
    numbers = raw(batch)
    for row, (sample, span) in enumerate(zip(samples, spans, strict=True)):
        if runs:
            end = span.start + span.length
            numbers[row, span.start : end] = sample
            batch[row, : span.start] = fill
            batch[row, end:] = fill
        else:
            places = [np.arange(size) for size in shape]
            for dim in token_dims:
                places[dim] = span.positions()
            numbers[row][np.ix_(*places)] = sample
    return batch


def _differs(shape: Sequence[int], expected: Sequence[int], token_dims: Sequence[int]) -> bool:
    return len(shape) != len(expected) or any(
        size != wanted for dim, (size, wanted) in enumerate(zip(shape, expected, strict=True)) if dim not in token_dims
    )
