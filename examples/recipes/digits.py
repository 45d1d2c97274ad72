"""scikit-learn's digits for the recipes beside this file: 8 × 8 pictures, and a small network that reads them."""

from typing import Any, Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

HELD_OUT = 600
UNLABELLED = -100  # the losses on labels pass over it


class ConvNet(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and pooling, then a linear head: pixels to 10 logits."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        pairs = zip([1, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(self.block(*pair) for pair in pairs))
        self.head = nn.Linear(4 * widths[-1], 10)

    def block(self, width_in: int, width_out: int) -> nn.Sequential:
        convolution = nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks(pixels).flatten(1))


def images(part: Literal["train", "held_out"], labels_per_class: int | None = None, labelled_only: bool = False) -> list[Any]:
    """1,197 rows to train on or 600 held out; of the first, all labels or so many of each class."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[-HELD_OUT:] if part == "held_out" else order[:-HELD_OUT]
    pixels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(labels)[order]
    if labels_per_class is not None:
        rank = nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
        labels = labels.where(rank <= labels_per_class, UNLABELLED)
    rows = [{"pixels": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    return [row for row in rows if not labelled_only or row["labels"] != UNLABELLED]
