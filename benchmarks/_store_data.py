"""Teachers that cost next to nothing, so that what is measured is the store, and samples of random length for them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTH, LONGEST, VOCABULARY = 768, 128, 30_522


class HiddenStates(nn.Module):
    """Hidden states of ``layers`` layers, all one embedding of the tokens: no arithmetic."""

    def __init__(self, layers: int, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(nn.Identity() for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Samples(Sequence[Tensor]):
    """Token ids of samples between half and the whole of ``LONGEST`` tokens, made when they are asked for."""

    def __init__(self, count: int, *, vocabulary: int = VOCABULARY, longest: int = LONGEST) -> None:
        self.count, self.vocabulary, self.longest = count, vocabulary, longest

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:  # type: ignore[override]
        if not 0 <= number < self.count:
            raise IndexError(number)
        draw = torch.Generator().manual_seed(number)
        length = int(torch.randint(self.longest // 2, self.longest + 1, (), generator=draw))
        return torch.randint(self.vocabulary, (length,), generator=draw)


def padded(samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """One batch, padded to its longest sample."""
    lengths = torch.tensor([len(sample) for sample in samples])
    ids = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def batches(samples: Samples, size: int, *, order: Sequence[int] | None = None) -> Iterator[dict[str, Tensor]]:
    """The samples in batches, in their order or another."""
    numbers = order if order is not None else range(len(samples))
    for start in range(0, len(numbers), size):
        yield padded([samples[number] for number in numbers[start : start + size]])


def shuffled(count: int, seed: int = 0) -> list[int]:
    """Numbers of samples in random order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def out_of_the_cache(folder: Path) -> None:
    """Ask the system to drop what it keeps of the files in memory, so that the disk is read."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bytes_in(folder: Path) -> int:
    """Of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
