"""Where each sample is: keys in order, in one file that is mapped into memory and searched, never read whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .keys import halves
from .shards import Mapped, Shard, tensor, write_safetensors

NAME = "index-{}.safetensors"


class Places(NamedTuple):
    """Where samples are: numbers of shards and rows, and the 64-bit hashes of their inputs; -1 for what is not there."""

    shards: np.ndarray[Any, Any]
    rows: np.ndarray[Any, Any]
    inputs: np.ndarray[Any, Any]


class Index:
    """The samples of a store by key."""

    def __init__(self, path: Path, header: str | None = None) -> None:
        self.file = Mapped(path, header)
        self.high, self.low = self.file.array("high"), self.file.array("low")
        self.shard, self.row, self.inputs = (self.file.array(name) for name in ("shard", "row", "inputs"))

    def __len__(self) -> int:
        return len(self.high)

    def find(self, keys: Sequence[bytes]) -> Places:
        """Where the samples with these keys are."""
        high, low = halves(np.frombuffer(b"".join(keys), np.uint8))
        at = np.searchsorted(self.high, high)
        for number, wanted in enumerate(low):  # two keys of 128 bits that share 64: not to be expected, but to be told apart
            place = at[number]
            while place < len(self) and self.high[place] == high[number] and self.low[place] != wanted:
                place += 1
            at[number] = place if place < len(self) and self.high[place] == high[number] else -1
        if not len(self):
            return Places(np.full(len(at), -1), np.full(len(at), -1), np.zeros(len(at), np.uint64))
        shards, rows = (np.where(at >= 0, column[at].astype(np.int64), -1) for column in (self.shard, self.row))
        return Places(shards, rows, self.inputs[at])


def write_index(path: Path, shards: Sequence[Shard]) -> int:
    """Write the index of these shards, which are numbered in this order; how many samples it has.

    A sample that is in two of them is taken from the first.
    """
    keys = np.concatenate([shard.keys for shard in shards])
    inputs = np.concatenate([shard.inputs for shard in shards])
    numbers = np.concatenate([np.full(len(shard), number, np.uint32) for number, shard in enumerate(shards)])
    rows = np.concatenate([np.arange(len(shard), dtype=np.uint32) for shard in shards])
    high, low = halves(keys)
    order = np.lexsort((rows, numbers, low, high))
    high, low = high[order], low[order]
    first = np.ones(len(order), bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    order = order[first]
    columns = {"high": high[first], "low": low[first], "shard": numbers[order], "row": rows[order], "inputs": inputs[order]}
    write_safetensors(path, [tensor(name, array) for name, array in columns.items()], {"format": "hookdistill-index-1"})
    return len(order)
