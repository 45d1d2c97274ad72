"""A shard: a safetensors file with the tensors of many samples end to end, where to find each, and a checksum for each.

Tensors of the file, for every column (an address, or with ``#`` a part of one):

    <column>           [samples, …] where all samples have one shape; [Σ tokens, …] where they differ in their first dimension
                       alone; else flat
    <column>@offsets   [samples + 1] where they differ: the first row (or number) of each sample
    <column>@shapes    [samples, dimensions] where it is flat
    @keys              [samples, 16]: the key of each sample
    @inputs            [samples]: 64 bits of the hash of what the teacher was called with
    @tokens            [samples]: how many valid tokens it has; 0 without a mask
    @crc               [samples, columns]: crc32 of the bytes of each sample, columns in the order of the header

Columns that are equally ragged share one ``@offsets``, named in the header.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import StoreError
from ..files import PARTIAL, publish
from .dtypes import Array, dtype_of, raw_dtype, tag_of

KEY_BYTES = 16
FORMAT = "hookdistill-shard-1"

_WORTH_ASKING = 16 * 1024
"""Bytes of a sample from which on it is read faster when the system is told beforehand; less comes with one page fault."""


class Filling:
    """A shard that is being filled, in memory.

    Args:
        columns: name → dtype, the same for every sample.
    """

    def __init__(self, columns: Mapping[str, torch.dtype]) -> None:
        self.columns = dict(columns)
        self.names = sorted(columns)
        self.keys: list[bytes] = []
        self.inputs: list[int] = []
        self.tokens: list[int] = []
        self.arrays: dict[str, list[Array]] = {name: [] for name in self.names}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: bytes, inputs: int, tokens: int, arrays: Mapping[str, Array]) -> None:
        """One sample more: an array of raw numbers for each column."""
        self.keys.append(key)
        self.inputs.append(inputs)
        self.tokens.append(tokens)
        for name in self.names:
            self.arrays[name].append(np.asarray(arrays[name], order="C"))
        self.bytes += size_of(arrays)

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file so that it appears under its name only when it is whole and on the disk."""
        tensors: list[_Tensor] = []
        offsets: dict[bytes, str] = {}
        shared: dict[str, str] = {}
        for name in self.names:
            tensors += _column(name, tag_of(self.columns[name]), self.arrays[name], offsets, shared)
        crcs = [[zlib.crc32(_bytes(array)) for array in self.arrays[name]] for name in self.names]
        keys = np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, KEY_BYTES)
        tensors.append(_Tensor("@keys", "U8", keys.shape, [keys]))
        tensors.append(_Tensor("@inputs", "U64", (len(self),), [np.array(self.inputs, np.uint64)]))
        tensors.append(_Tensor("@tokens", "U32", (len(self),), [np.array(self.tokens, np.uint32)]))
        crc = np.ascontiguousarray(np.array(crcs, np.uint32).reshape(len(self.names), len(self)).T)
        tensors.append(_Tensor("@crc", "U32", crc.shape, [crc]))
        described = {"format": FORMAT, "columns": json.dumps(self.names), "offsets": json.dumps(shared)}
        write_safetensors(path, tensors, {**metadata, **described})


class Shard:
    """A shard on the disk, mapped into memory.

    Args:
        path: the file.
        header: sha256 that its header must have, if that is known.

    Raises:
        StoreError: the file is not there, or is no whole shard, or another one.
    """

    def __init__(self, path: Path, header: str | None = None) -> None:
        self.path = path
        self.file = Mapped(path, header)
        metadata = self.file.metadata
        if metadata.get("format") != FORMAT:
            raise StoreError(f"{path} is no shard of a store that can be read here: its format is {metadata.get('format')!r}")
        self.metadata = metadata
        self.columns: list[str] = json.loads(metadata["columns"])
        self._shared: dict[str, str] = json.loads(metadata["offsets"])
        self.keys = self.file.array("@keys")
        self.inputs = self.file.array("@inputs")
        self.tokens = self.file.array("@tokens")
        self._crc = self.file.array("@crc")
        self._ready: dict[str, tuple[Array, Array | None, Array | None, int]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, column: str, row: int) -> Array:
        """The array of one sample, a view of the mapped file."""
        values, offsets, shapes, _ = self._column(column)
        if offsets is None:
            array: Array = values[row]
            return array
        start, end = self._extent(column, row, values, offsets)
        array = values[start:end]
        try:
            return array if shapes is None else array.reshape([int(size) for size in shapes[row]])
        except (ValueError, OverflowError) as error:
            raise StoreError(f"{self.path.name} is damaged: {column!r} of its sample {row}: {error}") from error

    def soon(self, column: str, row: int) -> None:
        """Let the system begin to read a sample, so that it is there when it is looked at."""
        values, offsets, _, _ = self._column(column)
        start, end = (row, row + 1) if offsets is None else self._extent(column, row, values, offsets)
        width = values.strides[0]
        if (end - start) * width >= _WORTH_ASKING:
            at = self.file.entries[column].range[0]
            self.file.soon(at + start * width, at + end * width)

    def check(self, column: str, row: int, array: Array) -> None:
        """Raise a `StoreError` unless the bytes of a sample are those that were written."""
        expected = int(self._crc[row, self._column(column)[3]])
        if zlib.crc32(_bytes(array)) != expected:
            raise StoreError(
                f"{self.path.name} is damaged: the checksum of {column!r} of its sample {row} does not agree. "
                f"`hookdistill cache verify` checks all shards; delete the damaged ones and build again"
            )

    def bytes_of(self, column: str) -> int:
        """How many bytes the column takes, with what says where its samples are."""
        own = (name for name in (column, f"{column}@offsets", f"{column}@shapes") if name in self.file.entries)
        return sum(end - start for name in own for start, end in [self.file.entries[name].range])

    def _extent(self, column: str, row: int, values: Array, offsets: Array) -> tuple[int, int]:
        start, end = int(offsets[row]), int(offsets[row + 1])
        if not 0 <= start <= end <= len(values):
            raise StoreError(f"{self.path.name} is damaged: {column!r} of its sample {row} has no place in it")
        return start, end

    def _column(self, column: str) -> tuple[Array, Array | None, Array | None, int]:
        if column not in self._ready:
            if column not in self.columns:
                raise StoreError(f"{self.path} has no {column!r}")
            offsets = self.file.array(f"{self._shared[column]}@offsets") if column in self._shared else None
            shapes = self.file.array(f"{column}@shapes") if f"{column}@shapes" in self.file.entries else None
            self._ready[column] = (self.file.array(column), offsets, shapes, self.columns.index(column))
        return self._ready[column]


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    range: tuple[int, int]
    """In bytes from the start of the file."""


class Mapped:
    """A safetensors file mapped into memory: arrays are views of it, and nothing is read before it is looked at.

    Args:
        path: the file.
        header: sha256 that its header must have, if that is known.

    Raises:
        StoreError: the file is not there, or is not whole, or another one.
    """

    def __init__(self, path: Path, header: str | None = None) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size >= 8 else None
        except FileNotFoundError:
            raise StoreError(f"the file {path} is missing") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error}") from error
        self.header = _header(path, self.map, size)
        if header is not None and hashlib.sha256(self.header).hexdigest() != header:
            raise StoreError(f"{path} is damaged: its header is not the one that was written")
        self.entries, self.metadata = _entries(path, self.header, size)

    def array(self, name: str) -> Array:
        """A tensor as raw numbers, without reading it."""
        entry = self.entries[name]
        count = math.prod(entry.shape)
        dtype = raw_dtype(dtype_of(entry.dtype))
        if not count:
            return np.empty(entry.shape, dtype)
        assert self.map is not None
        return np.frombuffer(self.map, dtype, count, entry.range[0]).reshape(entry.shape)

    def soon(self, start: int, end: int) -> None:
        """Let the system begin to read these bytes."""
        start -= start % mmap.ALLOCATIONGRANULARITY
        if self.map is not None and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_WILLNEED, start, end - start)

    def forget(self) -> None:
        """Let the pages that were read go, as far as this process is concerned."""
        if self.map is not None and hasattr(self.map, "madvise"):
            self.map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to be written, in pieces that need not be joined in memory."""

    name: str
    tag: str
    shape: tuple[int, ...]
    pieces: Sequence[Array]

    @property
    def bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def tensor(name: str, array: Array) -> _Tensor:
    """A whole array, to be written by `write_safetensors`."""
    tag = tag_of(torch.from_numpy(np.empty(0, array.dtype)).dtype)
    return _Tensor(name, tag, array.shape, [np.ascontiguousarray(array)])


def write_safetensors(path: Path, tensors: Iterable[_Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears under its name only when it is whole and on the disk.

    The sha256 of its data is in the header, so that a file can be checked alone.
    """
    # The wider numbers first: with a header whose length is a multiple of eight every array is aligned.
    ordered = sorted(tensors, key=lambda each: (-raw_dtype(dtype_of(each.tag)).itemsize, each.name))
    digest = hashlib.sha256()
    for piece in _pieces(ordered):
        digest.update(piece)
    header: dict[str, Any] = {"__metadata__": {**metadata, "sha256": digest.hexdigest()}}
    start = 0
    for each in ordered:
        header[each.name] = {"dtype": each.tag, "shape": list(each.shape), "data_offsets": [start, start + each.bytes]}
        start += each.bytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(PARTIAL + path.name)
    try:
        with partial.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for piece in _pieces(ordered):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def size_of(arrays: Mapping[str, Array]) -> int:
    """Bytes of a sample in a shard, with its key and checksums."""
    return sum(array.nbytes + 4 for array in arrays.values()) + KEY_BYTES + 12


def _pieces(tensors: Iterable[_Tensor]) -> Iterator[memoryview]:
    for each in tensors:
        for piece in each.pieces:
            yield _bytes(piece)


def _bytes(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _column(
    name: str, tag: str, arrays: Sequence[Array], offsets: dict[bytes, str], shared: dict[str, str]
) -> Iterator[_Tensor]:
    """The tensors of one column. ``offsets`` and ``shared`` are of the whole shard: which offsets exist, and whose they are."""
    shapes = {array.shape for array in arrays}
    if len(shapes) == 1:
        yield _Tensor(name, tag, (len(arrays), *shapes.pop()), arrays)
        return
    by_rows = len({shape[1:] for shape in shapes}) == 1 and all(shapes)
    lengths = [len(array) if by_rows else array.size for array in arrays]
    starts = np.cumsum([0, *lengths], dtype=np.int64)
    owner = offsets.setdefault(starts.tobytes(), name)
    shared[name] = owner
    if owner == name:
        yield _Tensor(f"{name}@offsets", "I64", starts.shape, [starts])
    if by_rows:
        yield _Tensor(name, tag, (int(starts[-1]), *arrays[0].shape[1:]), arrays)
        return
    if len({len(shape) for shape in shapes}) > 1:
        raise StoreError(f"{name!r} has samples of different numbers of dimensions: {sorted(shapes)[:4]}")
    yield _Tensor(name, tag, (int(starts[-1]),), arrays)
    sizes = np.array([array.shape for array in arrays], np.int64)
    yield _Tensor(f"{name}@shapes", "I64", sizes.shape, [sizes])


def _header(path: Path, mapped: mmap.mmap | None, size: int) -> bytes:
    """The length and the JSON at the beginning of a safetensors file."""
    if mapped is None:
        raise StoreError(f"{path} is damaged: it has {size} bytes")
    (length,) = struct.unpack("<Q", mapped[:8])
    if 8 + length > size:
        raise StoreError(f"{path} is damaged: it ends within its header")
    return mapped[: 8 + length]


def _entries(path: Path, header: bytes, size: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Where each tensor of a safetensors file lies, and the metadata."""
    start = len(header)
    try:
        content = json.loads(header[8:])
        metadata = content.pop("__metadata__", {})
        entries = {
            name: _Entry(each["dtype"], tuple(each["shape"]), (start + low, start + high))
            for name, each in content.items()
            for low, high in [each["data_offsets"]]
        }
        end = max((entry.range[1] for entry in entries.values()), default=start)
        if end != size:
            raise ValueError(f"it has {size} bytes and should have {end}")
        for name, entry in entries.items():
            wanted = math.prod(entry.shape) * raw_dtype(dtype_of(entry.dtype)).itemsize
            if not start <= entry.range[0] <= entry.range[1] or entry.range[1] - entry.range[0] != wanted:
                raise ValueError(f"{name!r} does not fill the place that it is given")
    except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
        raise StoreError(f"{path} is damaged: {error}") from error
    return entries, metadata
