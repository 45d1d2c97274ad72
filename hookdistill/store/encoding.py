"""From a tensor of the teacher to the arrays of each sample that a shard takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import has_item, pick
from ..errors import StoreError
from .codecs import Plain, Sampled, Scaled, TopK
from .dtypes import Array, raw
from .keep import feature_indices
from .keys import Samples
from .manifest import Stored
from .spans import Span, unpadded

_BLOCK = 1 << 24
"""Numbers of a block of distributions: 128 MB in float64."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of several samples end to end, encoded."""

    parts: dict[str, Tensor]
    shapes: list[tuple[int, ...]]
    leads: list[tuple[int, ...]]
    """Of each sample, the shape of its rows: that of the sample without the dimensions that are within a row."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One stored tensor of all samples of a batch, on its way to the host."""

    stored: Stored
    groups: list[_Rows]
    positions: list[Array] | None

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(part.nbytes for group in self.groups for part in group.parts.values())

    def samples(self) -> list[dict[str, Array]]:
        """For each sample, its array for each column."""
        codec, name = self.stored.codec, self.stored.name
        samples = [
            {f"{name}{suffix}": array for suffix, array in arrays.items()}
            for group in self.groups
            for arrays in _split(codec, group)
        ]
        for sample, positions in zip(samples, self.positions or (), strict=False):
            sample[f"{name}#positions"] = positions.astype(np.int32)
        return samples


def encode(stored: Stored, tensor: Tensor, samples: Samples, batch: Any, *, seed: int) -> Encoded:
    """What is kept of a tensor ``[batch, …]``: a copy of it, which lies on the host as soon as the device has caught up.

    Raises:
        StoreError: the tensor is not of the kind that the store is for, or cannot be kept as it should.
    """
    try:
        return _encode(stored, tensor, samples, batch, seed)
    except StoreError as error:
        raise StoreError(f"{stored.name!r}: {error}") from error


def kept_positions(stored: Stored, spans: Sequence[Span], batch: Any) -> list[Array]:
    """Which of its valid tokens are kept of each sample; counted among them, in their order."""
    tokens = stored.keep.tokens
    if not isinstance(tokens, str):
        assert tokens is not None and not isinstance(tokens, int)
        inside = [[position for position in tokens if -span.length <= position < span.length] for span in spans]
        return [
            np.unique([position % span.length for position in each]).astype(np.int64)
            for span, each in zip(spans, inside, strict=True)
        ]
    if not has_item(batch, tokens):
        raise StoreError(f"tokens={tokens!r} is no item of the batch")
    chosen = torch.as_tensor(pick(batch, tokens)).detach().cpu().numpy()
    if chosen.ndim != 2 or len(chosen) != len(spans):
        raise StoreError(f"tokens={tokens!r} must be [batch, tokens], got {list(chosen.shape)}")
    return [np.flatnonzero(row[span.positions()]) for row, span in zip(chosen, spans, strict=True)]


def _encode(stored: Stored, tensor: Tensor, samples: Samples, batch: Any, seed: int) -> Encoded:
    _check(stored, tensor, samples)
    spans, positions = samples.spans, None
    if stored.keep.tokens is not None:
        assert spans is not None
        positions = kept_positions(stored, spans, batch)
        spans = [span.only(kept) for span, kept in zip(spans, positions, strict=True)]
    each = unpadded(tensor, spans or (), stored.token_dims)
    if (features := feature_indices(stored.keep, tensor.shape[-1])) is not None:
        indices = torch.tensor(features, device=tensor.device)
        each = [sample.index_select(-1, indices) for sample in each]
    leads = [_lead(stored, sample.shape) for sample in each]
    widths = [math.prod(sample.shape[len(lead) :]) for sample, lead in zip(each, leads, strict=True)]
    # Rows of one width are encoded together; attention maps of samples of different length are not, nor are logits, of which
    # a joined copy would be large.
    together = len(set(widths)) == 1 and not stored.keep.sparse
    groups = [range(len(each))] if together else [range(i, i + 1) for i in range(len(each))]
    codec = stored.codec
    encoded = []
    for group in groups:
        rows = torch.cat([each[i].reshape(math.prod(leads[i]), widths[i]) for i in group])
        draws = None
        if isinstance(codec, Sampled):
            drawn = [_draws(samples.keys[i], stored.name, seed, math.prod(leads[i]), codec.draws) for i in group]
            draws = torch.from_numpy(np.concatenate(drawn))
        parts = {name: _to_host(part) for name, part in _in_blocks(codec, rows, draws).items()}
        encoded.append(_Rows(parts, [tuple(each[i].shape) for i in group], [leads[i] for i in group]))
    return Encoded(stored, encoded, positions)


def _in_blocks(codec: Plain | Scaled | TopK | Sampled, rows: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
    """The rows encoded; distributions in blocks, since what is computed on the way is several times as large as they are."""
    block = max(1, _BLOCK // max(1, rows.shape[-1]))
    if not isinstance(codec, (TopK, Sampled)) or len(rows) <= block:
        return codec.encode(rows, draws)
    chunks = zip(torch.split(rows, block), [None] * len(rows) if draws is None else torch.split(draws, block), strict=False)
    parts = [codec.encode(*chunk) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check(stored: Stored, tensor: Tensor, samples: Samples) -> None:
    shape = tuple(tensor.shape)
    if not shape or shape[0] != len(samples):
        raise StoreError(f"the teacher gave {list(shape)} for a batch of {len(samples)} samples")
    if tensor.dtype is not stored.made_as:
        raise StoreError(f"the teacher gave {tensor.dtype}, and {stored.made_as} in its first batch; do not change its dtype")
    if len(shape) != len(stored.shape) + 1:
        raise StoreError(f"the teacher gave {list(shape)}, and {stored.described()} for each sample of its first batch")
    for dim in stored.token_dims:
        if shape[dim + 1] != samples.tokens:
            raise StoreError(
                f"the teacher gave {list(shape)}, whose dimension {dim + 1} should be the {samples.tokens} tokens of the mask"
            )
    if stored.keep.sparse and shape[-1] != stored.shape[-1]:
        raise StoreError(f"the teacher gave {shape[-1]} classes, and {stored.shape[-1]} in its first batch")


def _lead(stored: Stored, shape: Sequence[int]) -> tuple[int, ...]:
    is_map = not stored.token_dims and len(shape) > 2 and not stored.keep.sparse
    return tuple(shape[:1] if is_map else shape[:-1])


def _draws(key: bytes, name: str, seed: int, rows: int, draws: int) -> Array:
    """Uniform random numbers that depend on the sample and the tensor alone, so that it does not matter when it is stored."""
    digest = hashlib.sha256(key + f"{seed}\0{name}".encode()).digest()
    bits = np.random.Philox(key=np.frombuffer(digest[:16], np.uint64))
    return np.random.Generator(bits).random((rows, draws))


def _to_host(part: Tensor) -> Tensor:
    # From a GPU this is into pinned memory and does not wait; the writer does, before it looks.
    return part.to("cpu", non_blocking=True)


def _split(codec: Plain | Scaled | TopK | Sampled, group: _Rows) -> list[dict[str, Array]]:
    counts = [math.prod(lead) for lead in group.leads]
    ends = np.cumsum(counts)
    arrays = {name: raw(part.contiguous()) for name, part in group.parts.items()}
    flat_ends = ends
    if any(part.ragged for part in codec.parts.values()):
        flat_ends = np.concatenate([[0], arrays["#distinct"].astype(np.int64).cumsum()])[ends]
    result = []
    for index, (shape, lead) in enumerate(zip(group.shapes, group.leads, strict=True)):
        start, end = ends[index] - counts[index], ends[index]
        flat_start = flat_ends[index - 1] if index else 0
        sample = {}
        for name, array in arrays.items():
            if codec.parts[name].ragged:
                sample[name] = array[flat_start : flat_ends[index]]
            else:
                inner = shape[len(lead) :] if name == "" else array.shape[1:]
                sample[name] = array[start:end].reshape((*lead, *inner))
        result.append(sample)
    return result
