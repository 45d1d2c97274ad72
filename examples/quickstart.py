"""A 1.9k-parameter convnet learns handwritten digits from 100 labelled images: alone, and with a teacher.

The teacher, nine times as large, has learnt from 1,197 labels. Both students get the same 100 labels, model, optimizer and
number of steps; the distilled one also gets the teacher's view of 1,097 images that nobody labelled for it. The settings
(learning rate, weight decay, no shifts) are those that suit the student alone: within noise the best of 48 that were tried on
200 training images kept aside. With every image labelled there is nothing to gain here: a tuned student alone is as good.

About ten seconds on one CPU core.
"""

import argparse
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from hookdistill import Distiller, Match, Trainer

STEPS, BATCH, SEEDS, HELD_OUT = 300, 64, (0, 1, 2), 600
UNLABELLED = -100  # cross_entropy passes over it

LABELS = Match(None, "head", loss="cross_entropy", target="labels")
TEACHER = Match("head", "head", loss="kl", temperature=4.0)

Batch = dict[str, Tensor]


class ConvNet(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and pooling, then a linear head: 8 × 8 pixels to 10 logits."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.block(*pair) for pair in zip((1, *widths), widths, strict=False)))
        self.head = nn.Linear(4 * widths[-1], 10)

    def block(self, width_in: int, width_out: int) -> nn.Sequential:
        convolution = nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks(pixels).flatten(1))


def data() -> tuple[list[Batch], list[Batch]]:
    """1,197 images to train on and 600 held out."""
    pixels, labels = load_digits(return_X_y=True)
    rows = zip(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels), strict=True)
    images = [{"pixels": image, "labels": label} for image, label in rows]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    return [images[i] for i in order[:-HELD_OUT]], [images[i] for i in order[-HELD_OUT:]]


def keep_labels(images: list[Batch], per_class: int) -> list[Batch]:
    """The same images with the labels of all but the first `per_class` of each class taken away."""
    labels = torch.stack([image["labels"] for image in images])
    rank = functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    kept = labels.where(rank <= per_class, UNLABELLED)
    return [{**image, "labels": label} for image, label in zip(images, kept, strict=True)]


class Run(NamedTuple):
    """What a line of the table is made of."""

    parameters: int
    labels: int
    accuracy: float
    seconds: float


def run(distiller: Distiller, images: list[Batch], held_out: list[Batch]) -> Run:
    """Train the student of `distiller` on `images`, and measure it."""
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-2, weight_decay=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=STEPS)
    trainer = Trainer(distiller, loader, optimizer=optimizer, scheduler=scheduler, max_steps=STEPS, progress=False)
    seconds = trainer.train().seconds
    parameters = sum(parameter.numel() for parameter in distiller.student.parameters())
    labels = sum(int(image["labels"] != UNLABELLED) for image in images)
    return Run(parameters, labels, accuracy(distiller.student, held_out), seconds)


@torch.no_grad()
def accuracy(model: nn.Module, images: Iterable[Batch]) -> float:
    """Per cent of the images recognised."""
    batch = default_collate(list(images))
    return 100 * (model.eval()(batch["pixels"]).argmax(-1) == batch["labels"]).double().mean().item()


def show(runs: dict[str, list[Run]]) -> None:
    """Print a line for each model: mean and spread over the seeds."""
    table = Table(title=f"accuracy on {HELD_OUT} held-out images, %", title_justify="left")
    for heading in ("", "parameters", "labels", "mean", "sd", "seeds", "seconds"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, done in runs.items():
        scores = [run.accuracy for run in done]
        spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        each = " ".join(f"{score:.1f}" for score in scores)
        seconds = f"{statistics.mean(run.seconds for run in done):.1f}"
        first = done[0]
        table.add_row(
            name, f"{first.parameters:,}", f"{first.labels:,}", f"{statistics.mean(scores):.1f}", spread, each, seconds
        )
    Console().print(table)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", default="quickstart-student", help="folder for the last distilled student")
    output = options.parse_args().output
    torch.set_num_threads(1)  # models this small gain nothing from a second core, and their figures would depend on it

    images, held_out = data()
    few = keep_labels(images, per_class=10)
    labelled = [image for image in few if image["labels"] != UNLABELLED]
    arms = {"alone": ([LABELS], labelled), "distilled": ([LABELS, TEACHER], few)}

    torch.manual_seed(0)
    teacher = ConvNet(32, 52)
    runs: dict[str, list[Run]] = {"teacher": [], **{arm: [] for arm in arms}}
    with tqdm(total=1 + len(arms) * len(SEEDS), unit="model", desc="teacher") as progress:
        runs["teacher"].append(run(Distiller(None, teacher, [LABELS]), images, held_out))
        progress.update()
        for arm, (matches, subset) in arms.items():
            for seed in SEEDS:
                progress.set_description(f"{arm}, seed {seed}")
                torch.manual_seed(seed)
                distiller = Distiller(teacher, ConvNet(8, 16), matches)
                runs[arm].append(run(distiller, subset, held_out))
                progress.update()
    show(runs)
    distiller.export(output)
    print(f"The last distilled student is in {output}/model.safetensors.")


if __name__ == "__main__":
    main()
