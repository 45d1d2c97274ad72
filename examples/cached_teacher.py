"""A student learns from teacher tensors on disk: the teacher runs over the data once, is deleted, and the epochs get faster.

Digits as in quickstart.py, 100 labels, with a teacher of 80k parameters whose forward is most of a step. It is trained, run
once into a store, and then two students with the same seed are trained, one with the teacher and one from the store; they end
equal. What is saved is the teacher's forward, so it depends on how large the teacher is beside the student.

Half a minute on one CPU core. An epoch took 0.47 s with the teacher in memory and 0.29 s from the store; both students name
98.5 % of 600 held-out images, and their weights are equal to the bit.
"""

import argparse
import gc
import tempfile
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader

from hookdistill import Distiller, Match, TeacherStore, Trainer
from hookdistill.store import info
from quickstart import LABELS, TEACHER, Batch, ConvNet, accuracy, data, keep_labels

BATCH = 64
MATCHES = [LABELS, TEACHER, Match("blocks.1", "blocks.1", loss="mse", weight=0.1)]


class Run(NamedTuple):
    """A line of the table."""

    teacher: str
    seconds_per_epoch: float
    accuracy: float
    student: nn.Module


def train(distiller: Distiller, images: list[Batch], epochs: int) -> float:
    """Train the student of `distiller`; seconds for an epoch."""
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-2, weight_decay=1.0)
    return Trainer(distiller, loader, optimizer=optimizer, epochs=epochs, seed=0, progress=False).train().seconds / epochs


def distilled(name: str, teacher: nn.Module | TeacherStore, images: list[Batch], held_out: list[Batch], epochs: int) -> Run:
    """A student that learns from a teacher, or from its store."""
    torch.manual_seed(0)
    distiller = Distiller(teacher, ConvNet(8, 16), MATCHES, example_batch={k: v[None] for k, v in images[0].items()})
    seconds = train(distiller, images, epochs)
    return Run(name, seconds, accuracy(distiller.student, held_out), distiller.student)


def show(runs: list[Run]) -> None:
    table = Table(title="students of 1,946 parameters, 100 labels", title_justify="left")
    for heading in ("teacher", "seconds/epoch", "speed-up", "accuracy, %"):
        table.add_column(heading, justify="right" if heading != "teacher" else "left", no_wrap=True)
    for run in runs:
        faster = runs[0].seconds_per_epoch / run.seconds_per_epoch
        table.add_row(run.teacher, f"{run.seconds_per_epoch:.3f}", f"{faster:.1f}x", f"{run.accuracy:.1f}")
    Console().print(table)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=15)
    options.add_argument("--store", type=Path, help="folder of the store; default: a temporary one")
    given = options.parse_args()
    torch.set_num_threads(1)

    images, held_out = data()
    torch.manual_seed(0)
    teacher = ConvNet(64, 128)
    train(Distiller(None, teacher, [LABELS]), images, given.epochs)
    few = keep_labels(images, per_class=10)
    live = distilled("in memory", teacher, few, held_out, given.epochs)

    with tempfile.TemporaryDirectory() as temporary:
        folder = given.store or Path(temporary) / "store"
        store = TeacherStore.build(folder, teacher, MATCHES, DataLoader(few, BATCH))
        print(info(folder))
        gone = weakref.ref(teacher)
        del teacher
        gc.collect()
        print(f"the teacher is {'still in memory' if gone() is not None else 'gone from memory'}")
        read = distilled("on disk", store, few, held_out, given.epochs)

    show([live, read])
    pairs = zip(live.student.parameters(), read.student.parameters(), strict=True)
    largest = max(float((one - other).detach().abs().max()) for one, other in pairs)
    print(f"the weights of the two students differ by {largest:.1e} at most")


if __name__ == "__main__":
    main()
