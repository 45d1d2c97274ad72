"""A module of one's own that returns nested dicts: which addresses it offers, and how they are matched.

A toy detector: a pyramid of two levels of features and two heads, `{"features": {"p2", "p3"}, "boxes", "scores"}`, on random
pictures. There is nothing to learn beyond imitation; the point is the addresses. Half a minute on one CPU core.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hookdistill
from hookdistill import Match


class Detector(nn.Module):
    """Pictures [batch, 3, 32, 32] to features, boxes [batch, 4, 8, 8] and scores [batch, classes, 8, 8]."""

    def __init__(self, width: int, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.backbone = Backbone(width)
        self.boxes = nn.Conv2d(2 * width, 4, 1)
        self.scores = nn.Conv2d(2 * width, classes, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
        features = self.backbone(self.stem(image))
        deepest = features["p3"]
        return {"features": features, "boxes": self.boxes(deepest), "scores": self.scores(deepest)}


class Backbone(nn.Module):
    """Two levels of features, as a dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.p2 = nn.Conv2d(width, width, 3, padding=1)
        self.p3 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        p2 = torch.relu(self.p2(hidden))
        return {"p2": p2, "p3": torch.relu(self.p3(p2))}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options = options.parse_args()
    torch.manual_seed(0)
    teacher, student = Detector(24), Detector(8)
    loader = DataLoader([{"image": torch.randn(3, 32, 32)} for _ in range(256)], 16, shuffle=True)

    hookdistill.outline(student, next(iter(loader)))
    matches = [
        # A leaf of the dict that the backbone returns; an automatic 1 × 1 convolution brings 8 channels to 24, 16 to 48.
        Match("backbone:output.p2", "backbone:output.p2", loss="mse"),
        Match("backbone:output.p3", "backbone:output.p3", loss="cosine"),
        # Leaves of the model's own output; classes are dimension 1 of [batch, classes, height, width].
        Match(":boxes", ":boxes", loss="smooth_l1"),
        Match(":scores", ":scores", loss="kl", temperature=2.0, dim=1),
        # What a module was called with: here the stem's output before the backbone.
        Match("backbone:input.hidden", "backbone:input.hidden", loss="mse", weight=0.5),
    ]
    distiller = hookdistill.Distiller(teacher, student, matches)
    print(distiller.plan(next(iter(loader))))
    before = distiller(next(iter(loader)))
    result = hookdistill.Trainer(distiller, loader, max_steps=options.steps, lr=3e-3).train()
    print(f"\n{'':<52}at first  after {result.steps} steps, {result.seconds:.0f} s")
    for name, value in result.losses.items():
        print(f"{name:<52}{before.parts[name].item():8.4f}  {value:8.4f}")


if __name__ == "__main__":
    main()
