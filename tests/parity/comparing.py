"""A comparison: one of our losses beside an independent implementation, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parity.peers import module

KINDS = ("random", "large", "tiny", "equal rows", "zero row")


@dataclass(frozen=True)
class Draw:
    """Random tensors of one kind, the same for the same seed."""

    kind: str

    def __call__(self, *shape: int, seed: int = 0) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if self.kind in ("large", "tiny"):
            values = values * (20.0 if self.kind == "large" else 1e-2)
        elif self.kind == "equal rows":
            values[1] = values[0]
        elif self.kind == "zero row":
            values[0] = 0
        return values

    def pair(self, *shape: int, teacher: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Student, which wants a gradient, and teacher."""
        return self(*shape, seed=1).requires_grad_(), self(*(teacher or shape), seed=2)


Computed = tuple[Tensor, Tensor, Tensor]
"""Our value, theirs in our scale, and the student's tensor."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    ``relation`` says how their value becomes ours, where it is not the same number. ``differs`` says why the two are not
    comparable, and who is right by the paper: then the values must *not* agree. ``trouble`` are kinds of input on which the
    peer gives something else, with the reason.
    """

    loss: str
    peer: str
    theirs: str
    compute: Callable[[Draw], Computed]
    relation: str
    differs: str
    trouble: dict[str, str]

    def __str__(self) -> str:
        return f"{self.loss}-{self.peer}-{self.theirs}"


CASES: list[Case] = []


def parity(loss: str, peer: str, theirs: str, *, relation: str = "", differs: str = "", **trouble: str) -> Any:
    """Register a comparison; keywords name kinds of input with ``_`` for blanks."""

    def register(compute: Callable[[Draw], Computed]) -> Callable[[Draw], Computed]:
        reasons = {kind.replace("_", " "): reason for kind, reason in trouble.items()}
        CASES.append(Case(loss, peer, theirs, compute, relation, differs, reasons))
        return compute

    return register


def io(tensor: Any) -> dict[str, dict[str, Any]]:
    """Captures as torchdistill hands them to its losses."""
    return {"m": {"output": tensor, "input": tensor}}


def td(name: str) -> Any:
    """A loss class of torchdistill."""
    return getattr(module("torchdistill.losses.mid_level"), name)


def mm(file: str, name: str) -> Any:
    """A loss class of MMRazor."""
    return getattr(module(f"mmrazor.models.losses.{file}"), name)


def tb(name: str) -> Any:
    """A loss function of TextBrewer."""
    return getattr(module("textbrewer.losses"), name)


PATHS = {"student_module_path": "m", "student_module_io": "output", "teacher_module_path": "m", "teacher_module_io": "output"}
PAIRS = {"pair": {"student": {"io": "output", "path": "m"}, "teacher": {"io": "output", "path": "m"}}}
BY_NORM = "divides by the length of the vector, which is zero: NaN"
