"""Weights that balance themselves: factors on the weights of the matches, found from the losses or from their gradients.

A factor multiplies the weight that the match has, so that the weights say how much each match is to count once all are alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import TrainerError


class Balance(Protocol):
    """What ``Trainer(balance=…)`` takes."""

    every: int | None
    """Optimizer steps between two looks at the gradients; ``None`` where they are not needed."""

    def factors(self) -> Mapping[str, Tensor | float]:
        """For each match that has been seen, the factor on its weight."""
        ...

    def see_parts(self, parts: Mapping[str, Tensor]) -> None:
        """The unweighted values of all matches in one optimizer step, means over all processes."""
        ...

    def see_gradients(self, norms: Mapping[str, float], parts: Mapping[str, float]) -> None:
        """The norms of the gradients of the unweighted matches over the student's parameters, and the values of those."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


@dataclass(slots=True)
class MagnitudeBalance:
    """Each match divided by the running mean of its own value, so that all are about 1.

    The gradient of a loss divided by its value is that of its logarithm, which is what Lin et al., *Dual-Balancing for
    Multi-Task Learning*, 2023, section 3.1, train on; the running mean is there because a batch is noisy. The factors are of
    the steps before, and 1 in the first.

    Args:
        decay: how much of the mean stays at every step.
    """

    decay: float = 0.9
    every: int | None = field(default=None, init=False)
    _means: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise TrainerError(f"decay= of MagnitudeBalance is a number from 0 to below 1, got {self.decay!r}")

    def factors(self) -> dict[str, Tensor]:
        """One over the running mean, corrected for its start at 0; 1 for a match that has been 0 so far."""
        corrected = {name: mean / (1 - self.decay**self._seen) for name, mean in self._means.items()}
        return {name: torch.where(mean > 0, 1 / mean, 1.0) for name, mean in corrected.items()}

    def see_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Move the means."""
        self._seen += 1
        for name, value in parts.items():
            size = value.detach().abs().float()
            mean = self._means.get(name, torch.zeros_like(size)).to(size.device)
            self._means[name] = self.decay * mean + (1 - self.decay) * torch.where(size.isfinite(), size, mean)

    def see_gradients(self, norms: Mapping[str, float], parts: Mapping[str, float]) -> None:
        """Not needed."""

    def state_dict(self) -> dict[str, Any]:
        """Means and their number."""
        return {"means": dict(self._means), "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._means, self._seen = dict(state["means"]), state["seen"]


@dataclass(slots=True)
class GradNormBalance:
    """Each match gets the factor at which its gradient is as large as the others', or larger where it learns slower.

    The targets of Chen et al., *GradNorm: Gradient Normalization for Adaptive Loss Balancing*, 2018, section 3: the norm of the
    weighted gradient is the mean norm times (relative inverse training rate) ** alpha, and the factors add up to their number.
    Where the paper descends towards them with a learning rate, they are set here, and smoothed by ``decay``. The gradients are
    those over all parameters of the student.

    Every look at the gradients costs a forward and a backward for each match.

    Args:
        every: optimizer steps between two looks.
        alpha: 0 for equal gradients; the paper uses 0.12 to 1.5.
        decay: how much of a factor stays at a look.
    """

    every: int | None = 100
    alpha: float = 0.0
    decay: float = 0.0
    _factors: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _first: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every is None or isinstance(self.every, bool) or self.every < 1:
            raise TrainerError(f"every= of GradNormBalance is a number of optimizer steps above 0, got {self.every!r}")
        if not 0 <= self.decay < 1:
            raise TrainerError(f"decay= of GradNormBalance is a number from 0 to below 1, got {self.decay!r}")

    def factors(self) -> dict[str, float]:
        """The factors of the last look."""
        return dict(self._factors)

    def see_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Not needed."""

    def see_gradients(self, norms: Mapping[str, float], parts: Mapping[str, float]) -> None:
        """Set the factors; matches without a gradient keep theirs."""
        alive = [name for name, norm in norms.items() if norm > 0 and math.isfinite(norm)]
        if not alive:
            return
        for name in alive:
            self._first.setdefault(name, parts[name])
        # L(t) / L(0), each over the mean of all: above 1 where a match has come down less than the others.
        fallen = {name: parts[name] / self._first[name] if self._first[name] else 1.0 for name in alive}
        mean_fallen = sum(fallen.values()) / len(alive) or 1.0
        mean_norm = sum(norms[name] for name in alive) / len(alive)
        wanted = {name: mean_norm * (fallen[name] / mean_fallen) ** self.alpha / norms[name] for name in alive}
        scale = len(alive) / sum(wanted.values())
        for name in alive:
            old = self._factors.get(name)
            new = wanted[name] * scale
            self._factors[name] = new if old is None else self.decay * old + (1 - self.decay) * new

    def state_dict(self) -> dict[str, Any]:
        """Factors, and the values of the first look."""
        return {"factors": dict(self._factors), "first": dict(self._first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._factors, self._first = dict(state["factors"]), dict(state["first"])


BALANCES = {"magnitude": MagnitudeBalance, "gradnorm": GradNormBalance}


def balance_for(given: str | Balance | None) -> Balance | None:
    """What ``Trainer(balance=…)`` means: one of `BALANCES` by name, or a copy of one, new for each run."""
    if given is None:
        return None
    return BALANCES[given]() if isinstance(given, str) else copy.deepcopy(given)
