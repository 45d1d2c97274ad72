"""What tells samples apart: a hash of their contents, or fields of the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batches import BatchKey, contents, has_item, pick
from ..errors import StoreError
from .dtypes import raw
from .shards import KEY_BYTES
from .spans import Span, spans_of

AUGMENTED = (
    "With random augmentation no sample comes twice: put the seed that decides it into the batch and into the key, as in "
    "key=('id', 'augmentation_seed'), and draw it from as many as the store can hold"
)


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one batch."""

    keys: list[bytes]
    inputs: list[int]
    """64 bits of the hash of what the teacher is called with."""
    spans: list[Span] | None
    """Where each one's valid tokens are; ``None`` without a mask."""
    tokens: int
    """The padded length; 0 without a mask."""

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True)
class Recognition:
    """How samples are told apart; the same when a store is written and when it is read.

    Args:
        inputs: parameter of the teacher's ``forward`` → the item of the batch it is filled from.
        mask: the item ``[batch, tokens]`` that says which tokens are no padding.
        fields: the items that make the key; empty for a hash of the inputs.
    """

    inputs: Mapping[str, BatchKey]
    mask: BatchKey | None
    fields: tuple[BatchKey, ...]

    def of(self, batch: Any, *, hashed: bool = True) -> Samples:
        """The samples of a batch; without ``hashed`` the inputs, which are not part of the key then, are not looked at.

        Raises:
            StoreError: the batch lacks an item, or its samples cannot be told apart.
        """
        hashed = hashed or not self.fields
        items = [*(self.inputs.values() if hashed else ()), *self.fields, *([] if self.mask is None else [self.mask])]
        for name in items:
            if not has_item(batch, name):
                raise StoreError(
                    f"samples are recognised by {name!r}, which the batch does not have; it has {contents(batch)}. Give the "
                    "batches that the store was built from, or build it with key= an item that both have"
                )
        spans, tokens = None, 0
        if self.mask is not None:
            mask = _item(batch, self.mask)
            spans, tokens = spans_of(mask, self.mask), mask.shape[-1]
        values = {name: pick(batch, key) for name, key in self.inputs.items() if key != self.mask} if hashed else {}
        fields = {str(name): pick(batch, name) for name in self.fields}
        count = len(spans) if spans is not None else _count(values or fields)
        digests = _digests(values, spans, tokens, count)
        keys = _keys_of_fields(fields, count) if fields else [digest[:KEY_BYTES] for digest in digests]
        return Samples(keys, [int.from_bytes(digest[-8:], "little") for digest in digests], spans, tokens)


class KeySet:
    """A set of keys in 16 bytes for each: sorted arrays, of which the small ones are merged."""

    def __init__(self) -> None:
        self.runs: list[np.ndarray[Any, Any]] = []

    def add(self, keys: Sequence[bytes]) -> None:
        """Take keys in."""
        run = np.sort(_as_array(keys), order=("high", "low"))
        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self.runs.pop(), run]), order=("high", "low"))
        self.runs.append(run)

    def __contains__(self, key: bytes) -> bool:
        wanted = _as_array([key])[0]
        for run in self.runs:
            place = int(np.searchsorted(run["high"], wanted["high"]))
            while place < len(run) and run["high"][place] == wanted["high"]:
                if run["low"][place] == wanted["low"]:
                    return True
                place += 1
        return False

    def __len__(self) -> int:
        return sum(map(len, self.runs))


def halves(keys: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The keys ``[n, 16]`` as two 64-bit numbers each, by which they are ordered."""
    numbers = np.ascontiguousarray(keys).reshape(-1, KEY_BYTES).view("<u8")
    return numbers[:, 0], numbers[:, 1]


def _as_array(keys: Sequence[bytes]) -> np.ndarray[Any, Any]:
    return np.frombuffer(b"".join(keys), np.dtype([("high", "<u8"), ("low", "<u8")]))


def _item(batch: Any, name: BatchKey) -> Tensor:
    value = pick(batch, name)
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"the batch item {name!r} must be a tensor, got {type(value).__name__}") from error


def _count(values: Mapping[str, Any]) -> int:
    """How many samples a batch without a mask has: the first dimension of its first tensor, or the length of a list."""
    for value in values.values():
        for _, leaf in _leaves("", value):
            if isinstance(leaf, Tensor) and leaf.ndim:
                return int(leaf.shape[0])
    for value in values.values():
        if isinstance(value, (list, tuple)):
            return len(value)
    raise StoreError("the teacher is called with no tensor, so its samples cannot be told apart; give key= an item")


def _digests(values: Mapping[str, Any], spans: Sequence[Span] | None, tokens: int, count: int) -> list[bytes]:
    """The sha256 of what each sample is made of, which neither padding nor the rest of the batch has part in."""
    hashes = [hashlib.sha256() for _ in range(count)]
    for name, value in sorted(values.items()):
        for path, leaf in _leaves(name, value):
            for each, (kind, content) in zip(hashes, _rows(path, leaf, spans, tokens, count), strict=True):
                each.update(f"{path}\0{kind}\0".encode())
                each.update(content)
    return [each.digest() for each in hashes]


def _rows(
    name: str, leaf: Any, spans: Sequence[Span] | None, tokens: int, count: int
) -> Iterator[tuple[str, bytes | memoryview]]:
    """For each sample, what kind of value it has and its bytes."""
    if not isinstance(leaf, Tensor):
        yield from [(type(leaf).__name__, repr(leaf).encode())] * count
        return
    if not leaf.is_floating_point() and not leaf.is_complex():
        leaf = leaf.long()  # loaders are not at one about the width of token ids
    if not leaf.ndim or leaf.shape[0] != count:  # the same for all samples
        numbers = raw(leaf.detach().cpu().contiguous())
        yield from [(f"{leaf.dtype}{list(leaf.shape)}", numbers.tobytes())] * count
        return
    rows = raw(leaf.detach().cpu().contiguous())
    if spans is None or leaf.ndim < 2 or leaf.shape[1] != tokens:
        kind = f"{leaf.dtype}{list(leaf.shape[1:])}"
        yield from ((kind, row.tobytes()) for row in rows)
        return
    for row, span in zip(rows, spans, strict=True):
        row = row[span.start : span.start + span.length] if span.index is None else row[span.index]
        yield f"{leaf.dtype}{list(row.shape)}", row.tobytes()


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of nested containers, with their paths; arrays as tensors."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _leaves(f"{path}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield from _leaves(f"{path}[{index}]", child)
    elif isinstance(value, np.ndarray):
        yield path, torch.from_numpy(value)
    elif value is None or isinstance(value, (Tensor, bool, int, float, str, bytes)):
        yield path, value
    else:
        raise StoreError(
            f"the input {path!r} of the teacher is a {type(value).__name__}, from which no key can be made; "
            "give key= an item of the batch"
        )


def _keys_of_fields(values: Mapping[str, Any], count: int) -> list[bytes]:
    hashes = [hashlib.sha256(b"fields\0") for _ in range(count)]
    for name, value in values.items():
        each = value.detach().cpu().reshape(len(value), -1).tolist() if isinstance(value, Tensor) and value.ndim else value
        each = each.tolist() if isinstance(each, np.ndarray) else each
        if not isinstance(each, (list, tuple)) or len(each) != count:
            has = f"{len(each)} values" if isinstance(each, (list, tuple)) else f"a {type(value).__name__}"
            raise StoreError(f"the key {name!r} needs one value for each of the {count} samples of the batch, got {has}")
        for digest, sample in zip(hashes, each, strict=True):
            plain = sample[0] if isinstance(sample, list) and len(sample) == 1 else sample
            if not isinstance(plain, (int, str, float, list)):
                raise StoreError(f"the key {name!r} holds a {type(plain).__name__}; keys are numbers or strings")
            digest.update(f"{name}\0{plain!r}\0".encode())
    return [digest.digest()[:KEY_BYTES] for digest in hashes]


def as_fields(key: object) -> tuple[BatchKey, ...]:
    """The items that make a key: none for ``None`` and ``"content"``.

    Raises:
        StoreError: ``key`` is no item, and no sequence of them.
    """
    if key is None or key == "content":
        return ()
    fields = (key,) if isinstance(key, (str, int)) else key
    if not isinstance(fields, (list, tuple)) or not fields or not all(isinstance(each, (str, int)) for each in fields):
        raise StoreError(f"key= is 'content', the name of an item of the batch, or several, got {key!r}")
    return tuple(fields)
