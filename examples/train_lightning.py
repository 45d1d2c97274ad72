"""Distil one small network into another with Lightning (`pip install "hookdistill[lightning]"`). Random data, some seconds."""

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

from hookdistill import Distiller, Match
from hookdistill.integrations import DistillationModule


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", default="lightning-run")
    options.add_argument("--epochs", type=int, default=3)
    options = options.parse_args()

    lightning.seed_everything(0)
    rows = torch.randn(512, 20)
    loader, held_out = DataLoader(rows[:448], 32, shuffle=True), DataLoader(rows[448:], 32)
    matches = [Match("2", "2", name="hidden"), Match("4", "4", loss="kl", temperature=2.0, name="logits")]
    distiller = Distiller(
        network(64), network(16), matches, example_batch=rows[:2]
    )  # the adapter must exist before the optimizer

    trainer = lightning.Trainer(max_epochs=options.epochs, default_root_dir=options.output, accelerator="auto", devices=1)
    trainer.fit(DistillationModule(distiller, lr=3e-3, warmup=0.1), loader, held_out)
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    distiller.export(f"{options.output}/student")


if __name__ == "__main__":
    main()
