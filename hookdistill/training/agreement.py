"""What the processes of a training, and the batches of an optimizer step, have to agree on before its first forward.

The loss of a match is a mean over valid positions. Over several batches, of one process or of many, it is the mean over the
positions of all of them, not a mean of means: each batch gets the share that its positions have in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distiller import Distiller

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class Agreed:
    """What is done in one optimizer step."""

    shares: Sequence[Mapping[str, float] | None]
    """For each batch of this process, the factors on the weights of the matches; ``None`` for all 1, the usual step. Some more
    than it has batches, where another process has more: for a forward of nothing, in which all take part."""
    stop: bool
    """Some process has been told to stop."""


class Agreement:
    """Finds, for each optimizer step, the shares of the batches in the means, by one exchange of a few numbers.

    The numbers are counted where the batches are, which is the CPU if they come from a DataLoader, and go from process to
    process by gloo, so that no device is waited for.
    """

    def __init__(self, distiller: Distiller, accelerator: Accelerator) -> None:
        self.distiller, self.world = distiller, accelerator.num_processes
        self.terms = list(distiller.loss.terms)
        self.channel = torch.distributed.new_group(backend="gloo") if self.world > 1 else None

    def on(self, group: list[Any], *, stop: bool = False) -> Agreed:
        """The shares of this process's batches of the next step; no shares, if no process has a batch."""
        if self.world == 1 and len(group) < 2:
            return Agreed([None] * len(group), stop)
        counts = [self._counts(batch) for batch in group]
        ours = torch.tensor([float(stop), len(group), *([0.0] * len(self.terms))], dtype=torch.float64)
        if counts:
            ours[2:] = torch.stack(counts).sum(0)
        everyone = self._gathered(ours)
        totals, size = everyone[:, 2:].sum(0), int(everyone[:, 1].max())
        nothing = torch.zeros(len(self.terms), dtype=torch.float64)
        shares = [self._shares(count, totals) for count in [*counts, *[nothing] * (size - len(counts))]]
        return Agreed(shares, bool(everyone[:, 0].any()))

    def close(self) -> None:
        """Let the channel between the processes go."""
        if self.channel is not None:
            torch.distributed.destroy_process_group(self.channel)
            self.channel = None

    def _counts(self, batch: Any) -> Tensor:
        """Valid positions for each match; NaN for one that is a sum, which has no denominator."""
        counts = self.distiller.counts(batch)
        return torch.tensor([float(counts.get(name, torch.nan)) for name in self.terms], dtype=torch.float64)

    def _shares(self, count: Tensor, totals: Tensor) -> dict[str, float]:
        # The gradients, and so the losses, of several processes are averaged; what is to be summed is multiplied before.
        share = torch.where(totals > 0, count / totals.clamp_min(1e-300), 0.0) * self.world
        share = torch.where(totals.isnan(), torch.where(count.isnan(), float(self.world), 0.0), share)
        return dict(zip(self.terms, share.tolist(), strict=True))

    def _gathered(self, ours: Tensor) -> Tensor:
        if self.channel is None:
            return ours[None]
        everyone = [torch.empty_like(ours) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, ours, group=self.channel)
        return torch.stack(everyone)


def weighted(shares: Mapping[str, float] | None, factors: Mapping[str, Tensor | float]) -> dict[str, Tensor | float] | None:
    """Shares times the factors of a balance."""
    if not factors:
        return dict(shares) if shares is not None else None
    if shares is None:
        return dict(factors)
    return {name: share * factors.get(name, 1.0) for name, share in shares.items()}
