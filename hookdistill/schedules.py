"""Weights and temperatures that move with the optimizer step: what ``Match(weight=…, temperature=…)`` takes beside a number.

    Match("encoder.layer.11", "encoder.layer.2", weight=Warmup(500, Cosine(1.0, 0.1, steps=10_000)))
    Match(":logits", ":logits", loss="kl", weight=Window(1.0, start=2_000), temperature=Linear(8.0, 2.0, steps=5_000))

Any callable from the step to a number is a schedule; these say what they are when they are printed, and can be pickled.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real

from .errors import MatchError

Schedule = Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Linear:
    """From ``start`` to ``end`` in a straight line over ``steps`` optimizer steps, and ``end`` ever after."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True, slots=True)
class Cosine:
    """From ``start`` to ``end`` along half a cosine over ``steps`` optimizer steps, and ``end`` ever after."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * done)) / 2


class Steps:
    """A staircase: ``Steps({0: 1.0, 1_000: 0.5, 5_000: 0.1})`` is 0.5 from step 1,000 to 4,999."""

    __slots__ = ("_starts", "values")

    def __init__(self, values: Mapping[int, float]) -> None:
        if 0 not in values or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in values):
            raise MatchError(
                f"Steps takes {{first step: value}} with whole steps, the first of them 0; got {dict(values)!r:.80}"
            )
        self.values = dict(sorted(values.items()))
        self._starts = [*self.values]

    def __call__(self, step: int) -> float:
        return self.values[self._starts[bisect_right(self._starts, step) - 1]]

    def __repr__(self) -> str:
        return f"Steps({self.values})"


@dataclass(frozen=True, slots=True)
class Warmup:
    """``then``, a number or a schedule, times a factor that rises from 0 to 1 over the first ``steps`` optimizer steps."""

    steps: int
    then: float | Schedule = 1.0

    def __post_init__(self) -> None:
        _check_steps(self, self.steps)

    def __call__(self, step: int) -> float:
        return _value(self.then, step) * min(1.0, step / self.steps)


@dataclass(frozen=True, slots=True)
class Window:
    """``inside``, a number or a schedule, from step ``start`` to before ``stop``; ``outside``, 0 by default, elsewhere.

    A schedule inside is asked for the steps since ``start``.
    """

    inside: float | Schedule = 1.0
    start: int = 0
    stop: int | None = None
    outside: float = 0.0

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise MatchError(f"{self}: start must be at least 0 and stop after it")

    def __call__(self, step: int) -> float:
        if step < self.start or (self.stop is not None and step >= self.stop):
            return self.outside
        return _value(self.inside, step - self.start)


def _value(value: float | Schedule, step: int) -> float:
    return value(step) if callable(value) else value


def _check_steps(schedule: object, steps: object) -> None:
    if isinstance(steps, bool) or not isinstance(steps, Real) or not 0 < float(steps) < math.inf:
        raise MatchError(f"{schedule}: steps must be a number of optimizer steps above 0")
