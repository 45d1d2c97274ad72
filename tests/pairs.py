"""Pairs of tiny models, each with its forward spelled out, so that expected values come from torch alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import hookdistill


class Mlp(nn.Module):
    """Points ``[batch, features]`` to logits ``[batch, classes]``; dropout and batch norm are there to be disturbed."""

    def __init__(self, width: int = 8, *, features: int = 6, classes: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.spelled_out(x)["head"]

    def spelled_out(self, x: Tensor) -> dict[str, Tensor]:
        """Every intermediate tensor by the name of the module that makes it."""
        first = self.first(x)
        second = self.second(self.drop(torch.relu(self.norm(first))))
        return {"first": first, "second": second, "head": self.head(torch.tanh(second))}


@dataclass
class Read:
    """What a `Reader` returns."""

    logits: Tensor
    pooled: Tensor
    nothing: None = None


class Reader(nn.Module):
    """Tokens ``[batch, tokens]`` to logits ``[batch, tokens, classes]``, through ``depth`` layers."""

    def __init__(self, width: int = 8, *, depth: int = 2, vocab: int = 20, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, classes)
        self.unused = nn.Linear(width, width)
        self.got_labels = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Read:
        self.got_labels = labels is not None
        seen = self.spelled_out(input_ids)
        return Read(logits=seen["logits"], pooled=seen["logits"].mean(1))

    def spelled_out(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Every intermediate tensor by the name of the module that makes it; the last is ``logits``."""
        hidden = self.embed(input_ids)
        seen = {"embed": hidden}
        for position, layer in enumerate(self.layers):
            hidden = torch.tanh(seen.setdefault(f"layers.{position}", layer(hidden)))
        return {**seen, "logits": self.head(hidden)}


class ConvNet(nn.Module):
    """Pictures ``[batch, 1, 8, 8]`` to logits; ``stride`` decides the grid after the stem."""

    def __init__(self, channels: int = 4, *, stride: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, stride=stride)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(channels, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.relu(self.norm(self.stem(pixels))).mean((2, 3)))


def seeded(build: Callable[..., nn.Module], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A model whose weights depend on nothing but ``seed``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*args, **kwargs)


def mlps(teacher_width: int = 8, student_width: int = 8, **student: Any) -> tuple[Mlp, Mlp]:
    """A teacher and a student of different weights."""
    return seeded(Mlp, teacher_width, seed=1), seeded(Mlp, student_width, seed=2, **student)


def readers(teacher_width: int = 8, student_width: int = 8, *, depths: tuple[int, int] = (4, 2)) -> tuple[Reader, Reader]:
    """A teacher and a student of different weights."""
    return seeded(Reader, teacher_width, depth=depths[0], seed=1), seeded(Reader, student_width, depth=depths[1], seed=2)


def points(batch: int = 5, *, seed: int = 3) -> dict[str, Tensor]:
    """A batch for `Mlp`: ``x``, ``labels``, ``valid``."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 6, generator=draw)
    valid = torch.ones(batch, dtype=torch.long)
    valid[-1] = 0
    return {"x": x, "labels": torch.randint(4, (batch,), generator=draw), "valid": valid}


def tokens(batch: int = 3, length: int = 5, *, seed: int = 3) -> dict[str, Tensor]:
    """A batch for `Reader`, with padding of a different length in each row."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length - row for row in range(batch)])
    return {
        "input_ids": torch.randint(20, (batch, length), generator=draw),
        "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
        "labels": torch.randint(5, (batch, length), generator=draw),
    }


def pictures(batch: int = 3, *, seed: int = 3) -> dict[str, Tensor]:
    """A batch for `ConvNet`."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randn(batch, 1, 8, 8, generator=draw),
        "labels": torch.randint(3, (batch,), generator=draw),
    }


def hooks(*models: nn.Module) -> int:
    """How many hooks sit on the models."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for model in models for m in model.modules())


def flags(*models: nn.Module) -> list[bool]:
    """Training mode of every module and ``requires_grad`` of every parameter."""
    modes = [module.training for model in models for module in model.modules()]
    return modes + [parameter.requires_grad for model in models for parameter in model.parameters()]


def state(*models: nn.Module) -> list[Tensor]:
    """A copy of all parameters and buffers."""
    return [value.clone() for model in models for value in model.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def gradients(model: nn.Module, total: Tensor) -> list[Tensor | None]:
    """The gradients of ``total`` for all parameters; nothing is left in ``.grad``."""
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True))


def assert_same_gradients(left: list[Tensor | None], right: list[Tensor | None]) -> None:
    """Gradients agree to rounding, and are absent in the same places."""
    assert [each is None for each in left] == [each is None for each in right]
    for ours, expected in zip(left, right, strict=True):
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected)


def train(distiller: hookdistill.Distiller, batch: Any, *, steps: int, lr: float = 0.05) -> Iterator[float]:
    """The bare loop; gives the total before each step."""
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        total = distiller(batch).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        yield float(total.detach())


def twin(model: nn.Module) -> Any:
    """A deep copy, to compare with later."""
    return copy.deepcopy(model)
