"""A 1.9k-parameter convnet learns handwritten digits from 100 labelled images: alone, and with a teacher.

The teacher, nine times as large, has learnt from 1,197 labels. Both students get the same 100 labels, model, optimizer and number
of steps; the distilled one also gets the teacher's view of 1,097 images that nobody labelled for it. The settings (learning
rate, weight decay, no shifts) are those that suit the student alone: best of 48 tried on 200 images that are not in the table,
within noise. With every image labelled there is nothing to gain here: a tuned student alone is as good.
"""

import argparse
import statistics
import time
from collections.abc import Iterable

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from hookdistill import Distiller, Match, Trainer

STEPS, BATCH, SEEDS = 300, 64, (0, 1, 2)
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
    return [images[i] for i in order[:1197]], [images[i] for i in order[1197:]]


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


def run(model: nn.Module, matches: list[Match], images: list[Batch], held_out: list[Batch], *, teacher: nn.Module) -> Run:
    """Train `model` on what `matches` say, and measure it."""
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-2, total_steps=STEPS)
    distiller = Distiller(teacher, model, matches)
    trainer = Trainer(distiller, loader, optimizer=optimizer, scheduler=scheduler, max_steps=STEPS)
    seconds = trainer.train().seconds
    parameters = sum(parameter.numel() for parameter in model.parameters())
    labels = sum(image["labels"] != UNLABELLED for image in images)
    return Run(parameters, int(labels), accuracy(model, held_out), seconds)


@torch.no_grad()
def accuracy(model: nn.Module, images: Iterable[Batch]) -> float:
    """Per cent of the images recognised."""
    batch = default_collate(list(images))
    return 100 * (model.eval()(batch["pixels"]).argmax(-1) == batch["labels"]).double().mean().item()


def show(runs: dict[str, list[Run]]) -> None:
    """Print a line for each model: mean and spread over the seeds."""
    table = Table(title=f"accuracy on {HELD_OUT} held-out images", title_justify="left")
    for heading in ("", "parameters", "labels", "mean", "sd", "runs", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, done in runs.items():
        scores = [run.accuracy for run in done]
        spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        each = " ".join(f"{score:.1f}" for score in scores)
        seconds = f"{statistics.mean(run.seconds for run in done):.1f}"
        table.add_row(
            name, f"{done[0].parameters:,}", f"{done[0].labels:,}", f"{statistics.mean(scores):.2f} %", spread, each, seconds
        )
    Console().print(table)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", default="quickstart-student", help="folder for the last distilled student")
    output = options.parse_args().output

    images, held_out = data()
    few = keep_labels(images, per_class=10)
    labelled = [image for image in few if image["labels"] != UNLABELLED]
    arms = {"student alone": ([LABELS], labelled), "student distilled": ([LABELS, TEACHER], few)}

    torch.manual_seed(0)
    teacher = ConvNet(32, 52)
    runs: dict[str, list[Run]] = {"teacher": [], **{arm: [] for arm in arms}}
    with tqdm(total=1 + len(arms) * len(SEEDS), unit="run", desc="teacher") as progress:
        runs["teacher"].append(run(teacher, [LABELS], images, held_out, teacher=teacher))
        progress.update()
        for arm, (matches, subset) in arms.items():
            for seed in SEEDS:
                progress.set_description(f"{arm}, seed {seed}")
                torch.manual_seed(seed)
                student = ConvNet(8, 16)
                runs[arm].append(run(student, matches, subset, held_out, teacher=teacher))
                progress.update()
    show(runs)
    save_student(student, output)
    print(f"The last distilled student is in {output}/{WEIGHTS}.")


if __name__ == "__main__":
    main()
