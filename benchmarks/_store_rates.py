"""How fast a store is written and read, beside plain sequential writing and reading of the same bytes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from _store_data import HiddenStates, Samples, batches, bytes_in, out_of_the_cache, shuffled
from hookdistill import Keep, TeacherStore

BATCH, FEW, BLOCK = 32, 8, 16 * 2**20
Row = dict[str, Any]


def against_the_disk(folder: Path, gigabytes: float, rounds: int, layers: int = 7) -> list[Row]:
    """Rates in MB/s of the tensors that are stored; every round writes and reads everything once, in turn."""
    count = max(BATCH, int(gigabytes * 1e9 / (layers * 768 * 4 * 96)))
    samples, teacher = Samples(count), HiddenStates(layers)
    ready = list(batches(samples, BATCH))
    mixed = list(batches(samples, BATCH, order=shuffled(count)))
    store, plain = folder / "store", folder / "plain"
    found: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, run: Callable[..., object], *given: Any, cold: bool = False) -> None:
        if cold:
            out_of_the_cache(folder)
        found.setdefault(name, []).append(both_clocks(partial(run, *given)))

    for _ in range(rounds):
        shutil.rmtree(store, ignore_errors=True)
        timed("build the store", partial(TeacherStore.build, progress=False), store, teacher, ["layers.*"], ready)
        timed("write the same bytes", copied, store, plain)
        timed("read files, cold", swallowed, plain, cold=True)
        # A file that is mapped into memory is not dropped from the cache: each store is opened, read and let go.
        timed("read the store in order, cold", lambda: read(TeacherStore.open(store), ready), cold=True)
        timed("read the store shuffled, cold", lambda: read(TeacherStore.open(store), mixed), cold=True)
        opened = TeacherStore.open(store)
        timed("read files, cached", swallowed, store)
        timed("read the store shuffled, cached, first time", read, opened, mixed)
        timed("read the store shuffled, cached", read, opened, mixed)
        del opened
    size = bytes_in(store / "shards")
    against = {
        "build the store": "write the same bytes",
        "read the store in order, cold": "read files, cold",
        "read the store shuffled, cold": "read files, cold",
        "read the store shuffled, cached, first time": "read files, cached",
        "read the store shuffled, cached": "read files, cached",
    }
    rows = []
    for name, clocks in found.items():
        seconds = [wall for wall, _ in clocks]
        ratios = [found[against[name]][i][0] / second for i, second in enumerate(seconds)] if name in against else None
        rows.append(
            {
                "what": name,
                "mb_per_s": [size / second / 1e6 for second in seconds],
                "mb_per_cpu_s": size / median(cpu for _, cpu in clocks) / 1e6,
                "samples_per_s": count / median(seconds),
                "share_of_plain": None if ratios is None else median(ratios),
            }
        )
    shutil.rmtree(store)
    shutil.rmtree(plain)
    return [{"gigabytes": size / 1e9, "samples": count, **row} for row in rows]


def beside_a_teacher(folder: Path, rounds: int, *, layers: int = 12, width: int = 768) -> list[Row]:
    """Milliseconds for a batch of 8 samples: the forward of a BERT, and reading seven hidden states of it instead."""
    config = BertConfig(num_hidden_layers=layers, hidden_size=width, num_attention_heads=12, intermediate_size=4 * width)
    teacher = BertModel(config, add_pooling_layer=False).eval()
    samples = Samples(2 * FEW)
    loader = list(batches(samples, FEW))
    addresses = [f"encoder.layer.{number}" for number in range(0, layers, 2)] + [f"encoder.layer.{layers - 1}"]
    rows = []
    for keep in (None, "bfloat16", "int8", "float8"):
        shutil.rmtree(folder, ignore_errors=True)
        store = TeacherStore.build(folder, teacher, addresses, loader, keep=keep, progress=False)
        forward, reading = [], []
        for _ in range(rounds):
            forward.append(seconds_of(partial(run, teacher, loader[0])))
            reading.append(seconds_of(partial(read, store, loader)) / len(loader))
        rows.append(
            {
                "keep": keep or "float32",
                "teacher_ms": median(forward) * 1e3,
                "read_ms": median(reading) * 1e3,
                "share": median(r / f for r, f in zip(reading, forward, strict=True)),
                "bytes_per_token": bytes_in(folder / "shards") / sum(map(len, samples)),
            }
        )
    shutil.rmtree(folder)
    return rows


class Head(nn.Module):
    """Logits over a vocabulary, spread as a language model's are: most tokens have few likely successors."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(64, vocabulary, generator=draw) * 2.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.table[input_ids % 64]


def of_logits(folder: Path, rounds: int, vocabulary: int, count: int = 64) -> list[Row]:
    """Bytes for each token and milliseconds for a batch of 32 samples, of whole and of sparse logits."""
    teacher = Head(vocabulary)
    samples = Samples(count)
    loader = list(batches(samples, BATCH))
    rows = []
    for name, keep in (
        ("whole, float32", None),
        ("whole, bfloat16", "bfloat16"),
        ("whole, int8", "int8"),
        ("top 64, float16", Keep("float16", top_k=64)),
        ("50 draws, float16", Keep("float16", samples=50)),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        store = TeacherStore.build(folder, teacher, [""], loader, keep=keep, progress=False)
        address = ":output.kept_classes" if isinstance(keep, Keep) else ":output"
        reading = [seconds_of(partial(read, store, loader, [address])) / len(loader) for _ in range(rounds)]
        tokens = sum(map(len, samples))
        rows.append(
            {
                "kept": name,
                "bytes_per_token": sum(store.manifest.column_bytes.values()) / tokens,
                "read_ms": median(reading) * 1e3,
                "tokens_per_s": tokens / len(loader) / median(reading),
            }
        )
    shutil.rmtree(folder)
    return rows


def read(store: TeacherStore, loader: Iterable[Any], addresses: list[str] | None = None) -> None:
    """Everything that is stored of the batches."""
    for batch in loader:
        store.captures(batch, addresses or store.addresses)


@torch.no_grad()
def run(teacher: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    teacher(**batch)


def seconds_of(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def both_clocks(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall and of the processor, the threads of this process together."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


def copied(source: Path, target: Path) -> None:
    """Files of random bytes as large as the shards, in plain sequential writes, and waited for."""
    target.mkdir(exist_ok=True)
    block = os.urandom(BLOCK)
    for path in (source / "shards").iterdir():
        left = path.stat().st_size
        with (target / path.name).open("wb", buffering=0) as file:
            while left > 0:
                left -= file.write(block[: min(left, BLOCK)])
            os.fsync(file.fileno())


def swallowed(folder: Path) -> None:
    """Every byte of the files, in plain sequential reads."""
    block = bytearray(BLOCK)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
