"""Shards written by a thread of their own, while the teacher runs on."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from ..errors import HookDistillError, StoreError
from .encoding import Encoded
from .keys import Samples
from .shards import Filling, size_of


def shard_name(rank: int, number: int) -> str:
    """The file name of a shard; in order of names, shards are in the order in which one process wrote them."""
    return f"shard-{rank:05d}-{number:07d}.safetensors"


@dataclass(frozen=True, slots=True)
class _Work:
    samples: Samples
    wanted: Sequence[int]
    encoded: Sequence[Encoded]
    ready: torch.cuda.Event | None

    @property
    def bytes(self) -> int:
        return sum(each.bytes for each in self.encoded)


class Writer:
    """Takes encoded batches, fills shards with their samples, and writes them.

    Args:
        folder: where shards go.
        rank: of this process, a part of their names.
        number: of the first one.
        columns: of every shard.
        metadata: for the header of every shard.
        shard_bytes: a shard is closed before it grows larger, unless a single sample is. As many bytes may be waiting.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        number: int,
        columns: Mapping[str, torch.dtype],
        metadata: Mapping[str, str],
        shard_bytes: int,
    ) -> None:
        self.folder, self.rank, self.number = folder, rank, number
        self.columns, self.metadata, self.shard_bytes = columns, metadata, shard_bytes
        self.filling = Filling(columns)
        self.written_bytes = 0
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closing: str | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hookdistill-store-writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            # After an error the shard at hand is not closed: it would end where the next build does not expect it to.
            self._closing = "whole" if kind is None else "as it is"
            self._changed.notify_all()
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, samples: Samples, wanted: Sequence[int], encoded: Sequence[Encoded], ready: torch.cuda.Event | None) -> None:
        """Take the samples numbered ``wanted`` of a batch; waits where too much is waiting already.

        Raises:
            StoreError: the disk is full, or something else kept the thread from writing.
        """
        work = _Work(samples, wanted, encoded, ready)
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._waiting or self._backlog + work.bytes <= self.shard_bytes)
            self._raise()
            self._waiting.append(work)
            self._changed.notify_all()

    @property
    def _backlog(self) -> int:
        return sum(work.bytes for work in self._waiting)

    def _raise(self) -> None:
        failure = self._failure
        if isinstance(failure, HookDistillError):
            raise failure
        if isinstance(failure, OSError):
            raise StoreError(
                f"cannot write to {self.folder}: {failure}. What is written so far is whole; run the same build again to go on"
            ) from failure
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                self._take(work)
            if self._closing == "whole" and len(self.filling):
                self._flush()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._waiting.clear()
                self._changed.notify_all()

    def _next(self) -> _Work | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            return self._waiting[0]  # it counts as waiting until it is in a shard

    def _take(self, work: _Work) -> None:
        if work.ready is not None:
            work.ready.synchronize()
        columns = [each.samples() for each in work.encoded]
        for index in work.wanted:
            arrays = {name: array for column in columns for name, array in column[index].items()}
            if len(self.filling) and self.filling.bytes + size_of(arrays) > self.shard_bytes:
                self._flush()
            length = work.samples.spans[index].length if work.samples.spans is not None else 0
            self.filling.add(work.samples.keys[index], work.samples.inputs[index], length, arrays)
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()

    def _flush(self) -> None:
        self.filling.write(self.folder / shard_name(self.rank, self.number), self.metadata)
        self.written_bytes += self.filling.bytes
        self.number += 1
        self.filling = Filling(self.columns)
