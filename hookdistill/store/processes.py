"""The processes that build a store together, as ``accelerate launch`` and ``torchrun`` start them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.utils.data.distributed import DistributedSampler

_PREPARED = ("DataLoaderShard", "DataLoaderDispatcher", "MpDeviceLoaderWrapper")
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all of them."""

    rank: int
    count: int

    @staticmethod
    def here() -> Processes:
        """Those of the process group, which accelerate makes where a launcher started several processes and there is none."""
        if not distributed.is_available():
            return Processes(0, 1)
        if not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            PartialState()
        if not distributed.is_initialized():
            return Processes(0, 1)
        return Processes(distributed.get_rank(), distributed.get_world_size())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; a wait for all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def share(self, loader: Iterable[Any], *, divided: bool) -> Iterator[Any]:
        """The batches of this process: those of a loader that is divided already, else every so-manyth."""
        if self.count == 1 or divided:
            return iter(loader)
        return itertools.islice(loader, self.rank, None, self.count)


def is_divided(loader: Any) -> bool:
    """Whether a loader gives each process its own part: prepared by accelerate, or with a ``DistributedSampler``."""
    if type(loader).__name__ in _PREPARED or type(getattr(loader, "batch_sampler", None)).__name__ == "BatchSamplerShard":
        return True
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights lie in parts on several processes, so that all must run the model together."""
    return any(base.__name__ in _SHARDED for module in model.modules() for base in type(module).__mro__)


def any_process(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set in some process; a wait for all of them."""
    set_somewhere = torch.tensor([float(flag) for flag in flags], device=device)
    distributed.all_reduce(set_somewhere, op=distributed.ReduceOp.MAX)
    return [flag > 0 for flag in set_somewhere.tolist()]
