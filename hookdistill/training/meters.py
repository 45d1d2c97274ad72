"""What the last steps were like. Values stay on their device until somebody looks, so that nothing waits for it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import Losses

if TYPE_CHECKING:
    from accelerate import Accelerator

RECENT = 50


@dataclass(frozen=True, slots=True)
class Where:
    """An optimizer step, and the batches of this process that it took."""

    step: int
    number: int
    """The pass over the loader."""
    first: int
    last: int

    def __str__(self) -> str:
        batches = f"batch {self.first}" if self.first == self.last else f"batches {self.first} to {self.last}"
        return f"step {self.step}, {batches} of pass {self.number}"


@dataclass(frozen=True, slots=True)
class Values:
    """A total, and its parts by name."""

    loss: float
    parts: dict[str, float]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in [("loss", self.loss), *self.parts.items()])

    def as_dict(self) -> dict[str, Any]:
        """For a line of the log."""
        return {"loss": self.loss, "parts": self.parts}


class Meter:
    """The losses of the steps since somebody looked, and of the last `RECENT` ones."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.recent: deque[Tensor] = deque(maxlen=RECENT)  # each [1 + parts]: the total, then the parts
        self.unchecked: list[tuple[Where, Tensor]] = []
        self.unlogged: list[Tensor] = []
        self.rows = self.rows_shown = 0
        self.speed = 0.0
        self.since = self.shown_at = time.perf_counter()

    def add(self, where: Where, values: Tensor, rows: int) -> None:
        """Those of one optimizer step more."""
        self.recent.append(values)
        self.unchecked.append((where, values))
        self.unlogged.append(values)
        self.rows += rows
        self.rows_shown += rows

    def not_finite(self) -> tuple[Where, Values] | None:
        """The first step since the last look whose losses are not all finite, and these; waits for the device."""
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked:
            return None
        values = torch.stack([each for _, each in unchecked])
        finite = values.isfinite().all(-1).tolist()
        if all(finite):
            return None
        first = finite.index(False)
        return unchecked[first][0], self.named(values[first])

    def drop_last(self) -> None:
        """Forget the last step, which was not taken."""
        self.recent.pop()
        self.unlogged.pop()

    def shown(self) -> Values:
        """Means over the last steps of this process; waits for the device."""
        return self.named(torch.stack(list(self.recent)).mean(0))

    def examples_per_second(self) -> float:
        """Of this process, since this was last asked."""
        if self.rows_shown:
            now = time.perf_counter()
            self.speed = self.rows_shown / max(now - self.shown_at, 1e-9)
            self.shown_at, self.rows_shown = now, 0
        return self.speed

    def pause(self) -> None:
        """The time since then does not count for the speed."""
        self.since = self.shown_at = time.perf_counter()

    def means(self, accelerator: Accelerator) -> Values:
        """Means over the last steps of all processes; every one has to ask. NaN where there was no step."""
        if not self.recent:
            return Values(math.nan, {})
        return self.named(_mean(torch.stack(list(self.recent)).mean(0), accelerator))

    def logged(self, accelerator: Accelerator) -> tuple[Values, dict[str, float]]:
        """Means and speed over all processes since this was last asked; every one has to ask."""
        now = time.perf_counter()
        seconds, rows = max(now - self.since, 1e-9), self.rows
        self.since, self.rows = now, 0
        unlogged, self.unlogged = self.unlogged, []
        if not unlogged:
            return Values(math.nan, {}), {}
        rate = torch.tensor([rows / seconds * accelerator.num_processes], device=unlogged[0].device)
        means = _mean(torch.cat([torch.stack(unlogged).mean(0), rate]), accelerator)
        return self.named(means[:-1]), {
            "examples_per_second": round(float(means[-1]), 3),
            "steps_per_second": round(len(unlogged) / seconds, 3),
        }

    def named(self, values: Tensor) -> Values:
        """A row of values by name."""
        loss, *parts = values.tolist()
        return Values(loss, dict(zip(self.names, parts, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the last steps, so that a resumed run ends with the same means."""
        return {"recent": torch.stack(list(self.recent)).cpu() if self.recent else None}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from there."""
        if state["recent"] is not None:
            self.recent.extend(state["recent"].to(device).unbind())


class StepLosses:
    """The losses of one optimizer step, put together from its batches."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.values: Tensor | None = None

    def add(self, losses: Losses, shares: Mapping[str, float] | None) -> None:
        """Those of one batch, whose parts count by their shares."""
        if shares is not None and not any(shares.values()):
            return
        parts = [
            losses.parts[name] * share if (share := _share(shares, name)) != 1 else losses.parts[name] for name in self.names
        ]
        values = torch.stack([each.detach().float() for each in (losses.total, *parts)])
        self.values = values if self.values is None else self.values + values

    def result(self, device: torch.device) -> Tensor:
        """``[1 + parts]``: the total, then the parts."""
        return torch.zeros(1 + len(self.names), device=device) if self.values is None else self.values


def memory(device: torch.device) -> dict[str, float]:
    """Peak MiB since the last look: of a GPU what torch has allocated, else what the process holds."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory_mib": round(peak, 1)}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import sys

    return {"memory_mib": round(kilobytes / (2**20 if sys.platform == "darwin" else 2**10), 1)}


def _mean(values: Tensor, accelerator: Accelerator) -> Tensor:
    if accelerator.num_processes == 1:
        return values
    reduced: Tensor = accelerator.reduce(values, "mean")
    return reduced


def _share(shares: Mapping[str, float] | None, name: str) -> float:
    return 1.0 if shares is None else shares[name]
