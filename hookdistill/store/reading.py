"""Finding the samples of a batch in the shards, and laying their arrays out as the batch needs them."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StoreError
from .codecs import Sampled, Scaled, TopK
from .dtypes import Array
from .index import Index, Places
from .keys import Samples
from .manifest import SHARDS, Manifest, Stored
from .shards import Shard
from .spans import Span, padded

KEPT = "#kept"
"""The part ``[batch, tokens]`` of a tensor of which not all tokens are stored: where there is one."""

_MOST_OPEN = 4096


class Reader:
    """The shards of a store, opened when they are needed.

    Each sample is checked by its checksum the first time it is read. Of what was read no more than ``resident_bytes`` stay
    mapped into this process.
    """

    def __init__(self, folder: Path, manifest: Manifest, resident_bytes: int) -> None:
        self.folder, self.manifest, self.resident_bytes = folder, manifest, resident_bytes
        self.index = Index(folder / manifest.index.name, manifest.index.header)
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._checked: dict[tuple[int, str], bytearray] = {}
        self._touched = 0
        self._fits = 2 * sum(shard.bytes for shard in manifest.shards) < _memory()

    def soon(self, stored: Sequence[Stored], places: Places) -> None:
        """Let the system begin to read the samples that it has to get from the disk, all at once.

        A page fault for every few pages, one after the other, is several times slower.
        """
        columns = [column for each in stored for column in each.columns]
        for number, row in zip(places.shards.tolist(), places.rows.tolist(), strict=True):
            shard = self._shard(number)
            for column in columns:
                if not self._fits or not self._was_read(number, column, row):
                    shard.soon(column, row)

    def tokens(self, samples: Samples, places: Places) -> list[int]:
        """How many valid tokens each sample has, where it is; 0 without a mask.

        Raises:
            StoreError: another sample is there.
        """
        lengths = []
        for key, number, row in zip(samples.keys, places.shards.tolist(), places.rows.tolist(), strict=True):
            shard = self._shard(number)
            if row >= len(shard) or shard.keys[row].tobytes() != key:
                raise StoreError(
                    f"{self.folder / self.manifest.index.name} is damaged: it names another sample of {shard.path.name} than "
                    "is there. Delete it and run the same build again, which writes it anew"
                )
            lengths.append(int(shard.tokens[row]))
        return lengths

    def parts(self, stored: Stored, samples: Samples, places: Places) -> dict[str, Tensor]:
        """What is stored of a tensor, as parts ``[batch, …]`` on the CPU, padded as the batch is; `decoded` reads them."""
        codec, name = stored.codec, stored.name
        columns = [(suffix, f"{name}{suffix}") for suffix in codec.parts]
        arrays: list[dict[str, Array]] = []
        for shard, row in zip(places.shards.tolist(), places.rows.tolist(), strict=True):
            arrays.append(codec.spread({suffix: self._sample(shard, row, column) for suffix, column in columns}))
        spans = self._spans(stored, samples, places) if stored.token_dims else None
        parts = {}
        for suffix in arrays[0]:
            part = codec.parts[suffix]
            dims = [dim for dim in stored.token_dims if dim < arrays[0][suffix].ndim]
            try:
                parts[suffix] = padded([each[suffix] for each in arrays], spans, dims, samples.tokens, part.dtype, part.fill)
            except StoreError as error:
                raise StoreError(
                    f"{name!r}: {error}. A mask would have cut off what differs between them; without one, batches must "
                    "be of samples of one shape"
                ) from error
        if spans is not None and (stored.keep.tokens is not None or _scaled_along_tokens(stored)):
            parts[KEPT] = valid_tokens(spans, samples.tokens)
        return parts

    def _spans(self, stored: Stored, samples: Samples, places: Places) -> list[Span]:
        spans = samples.spans
        assert spans is not None
        if stored.keep.tokens is None:
            return spans
        column = f"{stored.name}#positions"
        located = zip(spans, places.shards.tolist(), places.rows.tolist(), strict=True)
        return [span.only(self._sample(shard, row, column)) for span, shard, row in located]

    def _sample(self, number: int, row: int, column: str) -> Array:
        shard = self._shard(number)
        array = shard.sample(column, row)
        if not self._was_read(number, column, row):
            shard.check(column, row, array)
            self._checked.setdefault((number, column), bytearray(len(shard) // 8 + 1))[row >> 3] |= 1 << (row & 7)
        self._touched += array.nbytes
        if self._touched > self.resident_bytes:
            self._touched = 0
            for each in self._shards.values():
                each.file.forget()
        return array

    def _was_read(self, number: int, column: str, row: int) -> bool:
        checked = self._checked.get((number, column))
        return checked is not None and bool(checked[row >> 3] >> (row & 7) & 1)

    def _shard(self, number: int) -> Shard:
        shard = self._shards.get(number)
        if shard is None:
            if number >= len(self.manifest.shards):
                raise StoreError(f"{self.folder / self.manifest.index.name} is damaged: it names a shard that there is not")
            facts = self.manifest.shards[number]
            shard = self._shards[number] = Shard(self.folder / SHARDS / facts.name, facts.header)
            if len(self._shards) > _MOST_OPEN:
                self._shards.popitem(last=False)
        return shard


def _memory() -> int:
    """Bytes of memory of this machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def decoded(stored: Stored, parts: dict[str, Tensor], *, packed: bool) -> Tensor:
    """The tensor of which these are the parts, on their device; with ``packed`` the kept classes alone."""
    codec = stored.codec
    if packed:
        assert isinstance(codec, (TopK, Sampled))
        return codec.packed(parts)
    tensor = codec.decode(parts)
    if _scaled_along_tokens(stored):
        # The scale is that of a whole row, of which only some tokens are there.
        kept = parts[KEPT]
        tensor.masked_fill_(~kept.view(len(kept), *[1] * (tensor.ndim - 2), -1), torch.nan)
    return tensor


def valid_tokens(spans: Sequence[Span], tokens: int) -> Tensor:
    """``[batch, tokens]``: which positions the spans are."""
    valid = torch.zeros(len(spans), tokens, dtype=torch.bool)
    for row, span in zip(valid.numpy(), spans, strict=True):
        row[span.positions()] = True
    return valid


def _scaled_along_tokens(stored: Stored) -> bool:
    return isinstance(stored.codec, Scaled) and len(stored.shape) - 1 in stored.token_dims
