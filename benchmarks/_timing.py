"""Timing by turns, in one process: shuffled rounds, in each of which every contender has one block of steps.

What is compared is paired by round, so that a machine that slows down or speeds up does so for all. Medians throughout; the
intervals are 95 % bootstrap intervals over rounds.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

import numpy as np
import torch

RESAMPLES = 2000


class Interval(NamedTuple):
    """A median and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def contains_one(self) -> bool:
        return self.low <= 1.0 <= self.high


Rounds = dict[int, list[float]]  # round number -> seconds of each step


def timed(step: Callable[[], object], steps: int, warm: int, device: torch.device) -> list[float]:
    """Seconds of each of ``steps`` steps, device work included, after ``warm`` more."""
    seconds = []
    for number in range(-warm, steps):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        if number >= 0:
            seconds.append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contenders: Mapping[str, Callable[[int, int], list[float]]],
    baseline: str,
    *,
    rounds: int,
    steps: int,
    warm: int,
    slow_rounds: int = 5,
    seed: int = 0,
) -> dict[str, Rounds]:
    """Seconds of every step of every contender, by round.

    A contender more than five times as slow as the baseline takes one step in each of ``slow_rounds`` rounds only.
    """
    first = {name: median(block(1, warm)) for name, block in contenders.items()}
    slow = {name for name, seconds in first.items() if seconds > 5 * first[baseline]}
    every = max(1, rounds // slow_rounds)
    results: dict[str, Rounds] = {name: {} for name in contenders}
    order, shuffle = list(contenders), random.Random(seed).shuffle
    gc.collect()
    gc.freeze()  # what exists by now is not looked at again, so that a collection is short wherever it falls
    for number in range(rounds):
        shuffle(order)
        for name in order:
            if name in slow and number % every:
                continue
            results[name][number] = contenders[name](1 if name in slow else steps, warm)
    gc.unfreeze()
    return results


def percentile(rounds: Rounds, percent: float) -> float:
    """Over all single steps, in seconds."""
    return float(np.percentile([second for block in rounds.values() for second in block], percent))


def ratio(one: Rounds, other: Rounds) -> Interval:
    """Median over rounds of the ratio of the blocks' medians."""
    mine, theirs = _paired(one, other)
    return _bootstrap(lambda pick: np.median((mine / theirs)[pick], axis=-1), len(mine))


def difference(one: Rounds, other: Rounds) -> Interval:
    """Median over rounds of the difference of the blocks' medians, in seconds."""
    mine, theirs = _paired(one, other)
    return _bootstrap(lambda pick: np.median((mine - theirs)[pick], axis=-1), len(mine))


def ratio_of_differences(one: Rounds, other: Rounds, baseline: Rounds) -> Interval:
    """How many times as much ``one`` adds to the baseline as ``other`` does, from the medians of both differences."""
    mine, theirs, none = _paired(one, other, baseline)

    def statistic(pick: np.ndarray) -> np.ndarray:
        return np.median((mine - none)[pick], axis=-1) / np.median((theirs - none)[pick], axis=-1)

    return _bootstrap(statistic, len(mine))


def _paired(*contenders: Rounds) -> list[np.ndarray]:
    shared = sorted(set.intersection(*(set(each) for each in contenders)))
    return [np.array([median(each[number]) for number in shared]) for each in contenders]


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int) -> Interval:
    picks = np.random.default_rng(0).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(statistic(picks), [2.5, 97.5])
    return Interval(float(statistic(np.arange(count))), float(low), float(high))
