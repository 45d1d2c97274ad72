"""What lossy formats cost in final quality: digits with 100 labels, as in examples/quickstart.py, paired by seed."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from hookdistill import Distiller, Keep, Match, TeacherStore, Trainer
from quickstart import LABELS, TEACHER, Batch, ConvNet, accuracy, data, keep_labels

Row = dict[str, Any]
HIDDEN = Match("blocks.1", "blocks.1", loss="mse", weight=0.1)
STEPS, BATCH = 300, 64


def formats() -> dict[str, tuple[list[Match], object]]:
    """What is trained on, and how it is kept; those with sparse logits have no hidden states."""
    both, logits = [LABELS, TEACHER, HIDDEN], [LABELS, TEACHER]
    whole = {name: (both, name) for name in ("float32", "bfloat16", "float16", "float8", "int8")}
    sparse = {
        "top 1 and tail": Keep(top_k=1, temperature=4.0),
        "top 3 and tail": Keep(top_k=3, temperature=4.0),
        "3 draws": Keep(samples=3, temperature=4.0),
        "10 draws": Keep(samples=10, temperature=4.0),
        "50 draws": Keep(samples=50, temperature=4.0),
    }
    return {**whole, **{name: (logits, keep) for name, keep in sparse.items()}}


def quality(folder: Path, seeds: int) -> list[Row]:
    """Accuracy in per cent on 600 held-out images, and its difference from that of the live teacher's students.

    What a change of the seeds alone does is in the table too: any rounding sets a training on another course.
    """
    images, held_out = data()
    few = keep_labels(images, per_class=10)
    torch.manual_seed(0)
    teacher = ConvNet(32, 52)
    train(Distiller(None, teacher, [LABELS]), images, seed=0)
    rows: list[Row] = []
    live: dict[str, list[float]] = {}
    for name, matches in (("hidden and logits", [LABELS, TEACHER, HIDDEN]), ("logits", [LABELS, TEACHER])):
        live[name] = [student_of(teacher, matches, few, held_out, seed) for seed in range(seeds)]
        rows.append(row(f"live teacher, {name}", live[name], live[name], None))
        others = [student_of(teacher, matches, few, held_out, seeds + seed) for seed in range(seeds)]
        rows.append(row(f"the same, other seeds, {name}", others, live[name], None))
    for name, (matches, keep) in formats().items():
        against = "hidden and logits" if HIDDEN in matches else "logits"
        store = TeacherStore.build(folder / name, teacher, matches, DataLoader(few, BATCH), keep=keep_of(keep), progress=False)
        scores = [student_of(store, matches, few, held_out, seed) for seed in range(seeds)]
        size = sum(store.manifest.column_bytes.values()) / len(store)
        rows.append(row(f"{name}, {against}", scores, live[against], size))
    return rows


def keep_of(keep: object) -> object:
    """A dtype is for all tensors, a `Keep` of classes for the logits."""
    return {"head": keep} if isinstance(keep, Keep) else keep


def student_of(
    teacher: nn.Module | TeacherStore, matches: list[Match], few: list[Batch], held_out: list[Batch], seed: int
) -> float:
    """The accuracy of a student, whose weights and batches depend on the seed alone."""
    torch.manual_seed(seed)
    first = {name: value[None] for name, value in few[0].items()}
    distiller = Distiller(teacher, ConvNet(8, 16), matches, example_batch=first)
    train(distiller, few, seed=seed)
    return accuracy(distiller.student, held_out)


def train(distiller: Distiller, images: list[Batch], *, seed: int) -> None:
    """As the quickstart does."""
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-2, weight_decay=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=STEPS)
    Trainer(distiller, loader, optimizer=optimizer, scheduler=scheduler, max_steps=STEPS, progress=False, seed=seed).train()


def row(name: str, scores: list[float], against: list[float], size: float | None) -> Row:
    differences = [one - other for one, other in zip(scores, against, strict=True)]
    spread = stdev(differences) if len(differences) > 1 else 0.0  # by seed: equal courses cancel
    return {
        "kept": name,
        "accuracy": scores,
        "mean": mean(scores),
        "sd": stdev(scores) if len(scores) > 1 else 0.0,
        "difference": mean(differences),
        "standard_error": spread / len(differences) ** 0.5,
        "bytes_per_sample": size,
    }
