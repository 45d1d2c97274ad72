"""Teach a small convnet handwritten digits by a larger one, on as many processes as there are: a run that can be cut off.

    python examples/train_accelerate.py
    accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py   (also without a GPU)

Kill it and start it again: it goes on where the last checkpoint was. `run/report.html` has the curves.
A quarter of a minute on one CPU core.
"""

import argparse

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from hookdistill import Distiller, ExampleMetric, Fidelity, HeldOutLosses, Match, Trainer
from hookdistill.schedules import Linear


class ConvNet(nn.Module):
    """Two convolutions, then a linear head: 8 × 8 pixels to 10 logits."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, widths[0], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.second = nn.Sequential(nn.Conv2d(*widths, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(4 * widths[1], 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(pixels)).flatten(1))


def data() -> tuple[list, list]:
    """Images to train on, and 600 held out."""
    pixels, labels = load_digits(return_X_y=True)
    rows = zip(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels), strict=True)
    images = [{"pixels": image, "labels": label} for image, label in rows]
    return images[:-600], images[-600:]


def right(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Which images are recognised."""
    return logits.argmax(-1) == batch["labels"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", default="run", help="folder for checkpoints, log, report and students")
    options.add_argument("--epochs", type=int, default=15)
    options = options.parse_args()

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    images, held_out = data()
    labels = Match(None, "head", loss="cross_entropy", target="labels", name="labels")
    torch.manual_seed(0)
    teacher, student = ConvNet(32, 64), ConvNet(8, 16)

    batches = DataLoader(images, batch_size=32, shuffle=True)
    options_of_both = {"lr": 3e-3, "progress": accelerator.is_local_main_process, "accelerator": accelerator, "seed": 0}
    Trainer(Distiller(None, teacher, [labels]), batches, epochs=options.epochs, **options_of_both).train()

    matches = [
        labels,
        Match("head", "head", loss="kl", temperature=Linear(6.0, 2.0, steps=200), name="logits"),
        Match("second", "second", loss="mse", weight=0.1, name="features"),  # 64 channels and 16: an adapter is made
    ]
    distiller = Distiller(teacher, student, matches)
    trainer = Trainer(
        distiller,
        batches,
        eval_loader=DataLoader(held_out, batch_size=128),
        evaluators=[ExampleMetric("accuracy", right), Fidelity(), HeldOutLosses()],
        best="accuracy",
        load_best_at_end=True,
        epochs=options.epochs,
        warmup=0.1,
        output_dir=options.output,
        **options_of_both,
    )
    result = trainer.train(resume=True)
    accelerator.print(
        f"student {result.best.metrics['accuracy']:.3f}, teacher {result.teacher['accuracy']:.3f} on held-out images"
    )
    accelerator.print(f"in {options.output}: best, last, report.html, log.jsonl")
    accelerator.end_training()


if __name__ == "__main__":
    main()
