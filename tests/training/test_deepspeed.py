"""DeepSpeed's own engine around a distiller, in two processes: `Trainer` does not drive it, a loop of one's own does."""

import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from hookdistill import Distiller, Match
from ranks import in_processes

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

BATCHES = torch.linspace(-1, 1, 8 * 8 * 8).sin().view(8, 8, 8)


def net(seed, width):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def distiller():
    matches = [Match("2", "2"), Match("4", "4", loss="kl")]  # different widths: with an adapter
    return Distiller(net(0, 32), net(1, 16), matches, example_batch=BATCHES[0])


def optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train_by_deepspeed(stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    model = distiller()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    rank = torch.distributed.get_rank()
    for batch in BATCHES:
        losses = engine(batch[4 * rank : 4 * rank + 4])
        engine.backward(losses.total)
        engine.step()
    if stage == 3:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return [p.detach().clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_end_where_one_does_on_the_joined_batches(stage):
    model = distiller()
    stepping = optimizer(model)
    for batch in BATCHES:
        stepping.zero_grad()
        model(batch).total.backward()
        stepping.step()
    for found in in_processes(train_by_deepspeed, stage):
        for one, other in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)
