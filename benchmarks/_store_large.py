"""A store that does not fit into memory: built, opened, and read in random order while memory and rate are watched."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from _store_data import HiddenStates, Samples, batches, bytes_in, out_of_the_cache, padded
from hookdistill import TeacherStore
from hookdistill.store.index import Index
from hookdistill.store.keys import halves
from hookdistill.store.shards import tensor, write_safetensors

BATCH, LAYERS = 32, 7
Row = dict[str, Any]


def build(folder: Path, gigabytes: float) -> Row:
    """Seven float32 hidden states of 768 for each token, until there are that many gigabytes."""
    samples = Samples(int(gigabytes * 1e9 / (LAYERS * 768 * 4 * 96)) + 1)
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    start, processor = time.perf_counter(), time.process_time()
    TeacherStore.build(folder, HiddenStates(LAYERS), ["layers.*"], batches(samples, BATCH), progress=True)
    seconds = time.perf_counter() - start
    worked = time.process_time() - processor
    size = bytes_in(folder)
    return {
        "samples": len(samples),
        "gigabytes": size / 1e9,
        "seconds": seconds,
        "mb_per_s": size / seconds / 1e6,
        "mb_per_cpu_s": size / worked / 1e6,
        "rss_before_mb": before,
        "rss_peak_mb": memory("VmHWM"),
    }


def read(folder: Path, seconds: float, window: float) -> tuple[Row, list[Row]]:
    """Batches of samples drawn at random from all of it: what opening took, and a row for each window of time."""
    out_of_the_cache(folder)
    start = time.perf_counter()
    store = TeacherStore.open(folder)
    opened = time.perf_counter() - start
    samples, draw = Samples(len(store)), random.Random(0)
    rows: list[Row] = []
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        count, size, spent, worked, at = 0, 0, 0.0, 0.0, time.perf_counter()
        while time.perf_counter() - at < window:
            batch = padded([samples[draw.randrange(len(samples))] for _ in range(BATCH)])
            before, processor = time.perf_counter(), time.process_time()
            captures = store.captures(batch, store.addresses)
            spent += time.perf_counter() - before
            worked += time.process_time() - processor
            count += BATCH
            size += int(batch["attention_mask"].sum()) * 768 * 4 * len(captures)
        rows.append(
            {
                "seconds": time.perf_counter() - begun,
                "samples_per_s": count / spent,
                "mb_per_s": size / spent / 1e6,
                "mb_per_cpu_s": size / worked / 1e6,
                "rss_anonymous_mb": memory("RssAnon"),
                "rss_files_mb": memory("RssFile"),
            }
        )
    return {"open_ms": opened * 1e3, "samples": len(store), "shards": len(store.manifest.shards)}, rows


def index_rows(folder: Path, counts: list[int]) -> list[Row]:
    """How long it takes to open an index of so many samples and to find 32 of them, none of it in the file cache."""
    rows = []
    for count in counts:
        path = folder / f"index-{count}.safetensors"
        keys = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
        high, low = halves(keys)
        order = np.lexsort((low, high))
        columns = {
            "high": high[order],
            "low": low[order],
            "shard": np.zeros(count, np.uint32),
            "row": np.arange(count, dtype=np.uint32),
            "inputs": np.zeros(count, np.uint64),
        }
        write_safetensors(path, [tensor(name, array) for name, array in columns.items()], {})
        out_of_the_cache(folder)
        start = time.perf_counter()
        index = Index(path)
        opened = time.perf_counter()
        places = index.find([key.tobytes() for key in keys[:: max(1, count // BATCH)][:BATCH]])
        found = time.perf_counter()
        assert bool((places.shards >= 0).all())
        rows.append(
            {
                "samples": count,
                "megabytes": path.stat().st_size / 1e6,
                "open_ms": (opened - start) * 1e3,
                "find_32_ms": (found - opened) * 1e3,
            }
        )
        path.unlink()
    return rows


def memory(what: str = "VmRSS") -> float:
    """Of this process, in MB, as Linux tells it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {what}")
