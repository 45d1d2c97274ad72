"""The random states that a training draws from: Python's, NumPy's, torch's, and that of the device."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def random_state(device: torch.device | None = None) -> State:
    """All random states of this process; of the devices, that of ``device``."""
    state: State = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
    }
    if (module := _module(device)) is not None:
        state["device"] = module.get_rng_state(device)
    return state


def set_random_state(state: State, device: torch.device | None = None) -> None:
    """Go on from a state that `random_state` gave."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if "device" in state and (module := _module(device)) is not None:
        module.set_rng_state(state["device"], device)


def set_seed(seed: int) -> None:
    """Seed all of them, on every device."""
    set_seed_of_cpu(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def forked(device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside is not missed outside."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


class Stream:
    """A random stream of its own: inside ``with stream:`` everything draws from it, outside it stands still."""

    def __init__(self, seed: int) -> None:
        self._outside = random_state()
        set_seed_of_cpu(seed)
        self._inside = random_state()
        set_random_state(self._outside)

    def __enter__(self) -> Stream:
        self._outside = random_state()
        set_random_state(self._inside)
        return self

    def __exit__(self, *_: object) -> None:
        self._inside = random_state()
        set_random_state(self._outside)


def set_seed_of_cpu(seed: int) -> None:
    """Seed what data loading draws from, and leave the devices alone."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _module(device: torch.device | None) -> Any:
    """``torch.cuda`` and its like, for a device that has random numbers of its own."""
    if device is None or device.type in ("cpu", "meta"):
        return None
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "set_rng_state") else None
