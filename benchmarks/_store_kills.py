"""Builds that are killed at random moments and go on, compared byte for byte with one that was left alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch

from _store_data import HiddenStates, Samples, batches
from hookdistill import Keep, TeacherStore
from hookdistill.store import verify

COUNT, BATCH, SHARD = 400, 8, 60_000
ADDRESSES = ["layers.*"]
KEEP = {"layers.1": "int8", "layers.2": Keep(tokens=[0, -1]), "layers.3": Keep(samples=8)}


def build(folder: Path) -> None:
    """About fifty shards in a second or two."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = HiddenStates(4, width=16)
    samples = Samples(COUNT, longest=24)
    TeacherStore.build(folder, teacher, ADDRESSES, batches(samples, BATCH), keep=KEEP, shard_bytes=SHARD, progress=False)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def killed(folder: Path, kills: int, seed: int) -> list[dict[str, Any]]:
    """One row for each kill: when it came, what it found; and whether the store it was of came out as it should.

    A store that was finished before its next kill is compared and a new one begun, until there were ``kills``.
    """
    fork = multiprocessing.get_context("fork")
    build(folder / "whole")
    expected = digests(folder / "whole")
    start = time.perf_counter()
    build(folder / "timed")
    alone = time.perf_counter() - start
    draw, rows = random.Random(seed), []
    number = 0
    while len(rows) < kills:
        store = folder / f"killed-{number}"
        number += 1
        mine: list[dict[str, Any]] = []
        while True:
            process = fork.Process(target=build, args=(store,))
            process.start()
            process.join(draw.uniform(0, alone) if len(rows) + len(mine) < kills else None)
            if process.exitcode is not None:
                break
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            mine.append({"store": number, **state_of(store)})
        good = process.exitcode == 0 and digests(store) == expected and verify(store).samples == COUNT
        rows += [{**row, "identical": good} for row in mine]
    return rows


def state_of(store: Path) -> dict[str, Any]:
    """What a killed build has left."""
    shards = list((store / "shards").glob("shard-*")) if store.exists() else []
    partial = list(store.rglob(".partial-*")) if store.exists() else []
    return {
        "shards": len(shards),
        "half_written": [path.name for path in partial],
        "finished": (store / "manifest.json").exists(),
    }
