"""Data in samples of different length, loaders over them, and what a teacher makes of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hookdistill
from hookdistill.store.manifest import Manifest
from hookdistill.store.shards import Shard


def sentences(count: int = 12, *, longest: int = 7, vocab: int = 20, seed: int = 0) -> list[Tensor]:
    """Token ids of samples of one to ``longest`` tokens; no two are alike."""
    draw = torch.Generator().manual_seed(seed)
    drawn = []
    while len(drawn) < count:
        ids = torch.randint(vocab, (int(torch.randint(1, longest + 1, (), generator=draw)),), generator=draw)
        if not any(torch.equal(ids, other) for other in drawn):
            drawn.append(ids)
    return drawn


def padded(samples: Sequence[Tensor], *, left: bool = False, length: int | None = None, pad: int = 0) -> dict[str, Tensor]:
    """One batch of them, padded to the longest, or to ``length``."""
    length = length or max(map(len, samples))
    ids = torch.full((len(samples), length), pad)
    mask = torch.zeros(len(samples), length, dtype=torch.long)
    for row, sample in enumerate(samples):
        place = slice(length - len(sample), length) if left else slice(len(sample))
        ids[row, place], mask[row, place] = sample, 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(samples: Sequence[Tensor], size: int = 4, **padding: Any) -> list[dict[str, Tensor]]:
    """The samples in order, in batches of ``size``."""
    return [padded(samples[start : start + size], **padding) for start in range(0, len(samples), size)]


def live(teacher: nn.Module, batch: Any, addresses: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """What a capture of the teacher itself gives, by path and key."""
    mode = teacher.training
    with torch.no_grad(), hookdistill.Capture(teacher.eval(), addresses) as captured:
        teacher(**{name: value for name, value in batch.items() if name != "id"})
    teacher.train(mode)
    return {(path, key): captured[path][key] for path in captured for key in captured[path]}


def flat(captures: Any) -> dict[tuple[str, str], Tensor]:
    """Captures by path and key."""
    return {(path, key): tensor for path, layer in captures.items() for key, tensor in layer.items()}


def files(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a store."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def contents(folder: Path) -> dict[bytes, dict[str, bytes]]:
    """The bytes of every column of every sample by key, whatever shard it is in."""
    found: dict[bytes, dict[str, bytes]] = {}
    for facts in Manifest.read(folder).shards:
        shard = Shard(folder / "shards" / facts.name)
        for row in range(len(shard)):
            sample = {column: shard.sample(column, row).tobytes() for column in shard.columns}
            found.setdefault(shard.keys[row].tobytes(), sample)
    return found


class Interrupted(Exception):
    """What stops a loader."""


def until(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """A loader that fails after ``count`` batches."""
    for number, batch in enumerate(loader):
        if number == count:
            raise Interrupted
        yield batch
