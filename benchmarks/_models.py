"""The models that benchmarks run, built from configurations with random weights: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A BERT encoder and the batch it gets; ``memory_batch`` is the one whose peak is measured (rows, tokens)."""

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    batch: tuple[int, int]
    memory_batch: tuple[int, int]
    steps: int
    warm: int
    share_of_rounds: float

    def model(self, device: torch.device) -> BertModel:
        torch.manual_seed(0)
        return BertModel(BertConfig(**self.sizes), add_pooling_layer=False).to(device).eval()

    def ids(self, device: torch.device, shape: tuple[int, int] | None = None) -> Tensor:
        return torch.randint(100, 1000, shape or self.batch, generator=torch.Generator().manual_seed(0)).to(device)

    def describe(self) -> str:
        config = BertConfig(**self.sizes)
        rows, tokens = self.batch
        return f"{config.num_hidden_layers} layers × {config.hidden_size}, batch {rows}, {tokens} tokens"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="tiny",
            sizes={"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256, "vocab_size": 1000},
            batch=(1, 16),
            memory_batch=(8, 64),
            steps=4,
            warm=1,
            share_of_rounds=1.0,
        ),
        Workload(name="bert-base", batch=(2, 64), memory_batch=(4, 128), steps=1, warm=0, share_of_rounds=0.25),
    )
}

SETS = ("1 layer", "12 layers", "every module")


def capture_set(name: str, model: nn.Module, ids: Tensor) -> list[str]:
    """Module paths in the order in which they run."""
    layers = [f"encoder.layer.{index}" for index in range(len(model.encoder.layer))]
    if name == "1 layer":
        return [layers[len(layers) // 2]]
    return layers if name == "12 layers" else modules_that_give_a_tensor(model, ids)


@torch.no_grad()
def modules_that_give_a_tensor(model: nn.Module, ids: Tensor) -> list[str]:
    """Every module that runs once in a forward and returns a tensor, bare or alone in a tuple with ``None``."""
    calls: list[str] = []

    def probe(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            leaves = output if isinstance(output, tuple) else (output,)
            if isinstance(leaves[0], Tensor) and all(leaf is None for leaf in leaves[1:]):
                calls.append(path)

        return hook

    handles = [module.register_forward_hook(probe(path)) for path, module in model.named_modules()]
    model(ids)
    for handle in handles:
        handle.remove()
    return [path for path in calls if calls.count(path) == 1]
