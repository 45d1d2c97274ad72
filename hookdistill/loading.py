"""Passes over a loader: what of it is this process's share, and how a pass is taken up again in its middle."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from .errors import HookDistillError, TrainerError
from .randomness import Stream, random_state, set_random_state

if TYPE_CHECKING:
    from accelerate import Accelerator

_KEPT = (
    *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator"),
    *("prefetch_factor", "persistent_workers", "pin_memory_device"),
)


class Passes:
    """Passes over a train loader, one after the other, and the position in the running one.

    A DataLoader is divided among the processes batch by batch, so that each batch is trained on once and every batch is one
    that a single process would have seen; any other iterable is this process's own share already.
    """

    def __init__(self, loader: Iterable[Any], accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.loader = shared_out(loader, accelerator)
        self.length = _per_process(loader, accelerator)
        """Batches of a pass for the process that has most of them; ``None`` where that is not known."""
        self.number = 0
        """The running pass, from 1."""
        self.taken = 0
        """Batches of it that were handed out."""
        self.over = True
        self._batches: Iterator[Any] = iter(())
        self._start: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the next pass."""
        self.number += 1
        self.taken, self.over = 0, False
        self._start = {"random": random_state(), "generators": [each.get_state() for each in self._generators()]}
        self._open()

    def take(self, count: int) -> list[Any]:
        """The next ``count`` batches of the pass, or the fewer that are left.

        Raises:
            TrainerError: a worker process of the loader has died.
        """
        group: list[Any] = []
        while len(group) < count and not self.over:
            with _loading(self.number, self.taken + 1):
                batch = next(self._batches, _END)
            if batch is _END:
                self.over = True
                self._batches = iter(())
            else:
                group.append(batch)
                self.taken += 1
        return group

    def peek(self) -> Any:
        """The first batch of the first pass, which is begun for it; it is not lost."""
        if self.number == 0:
            self.begin()
        first = self.take(1)
        if not first:
            world = self.accelerator.num_processes
            few = f", or are there fewer batches than the {world} processes?" if world > 1 else "?"
            raise TrainerError(
                f"train_loader gives no batch; is its data set empty, or smaller than a batch under drop_last=True{few}"
            )
        self.taken -= 1
        self._batches = itertools.chain(first, self._batches)
        return first[0]

    def state(self) -> dict[str, Any]:
        """Where this process is, for a checkpoint."""
        over = self.over or self.taken == self.length
        return {"number": self.number, "taken": self.taken, "over": over, "start": self._start}

    def restore(self, state: dict[str, Any], *, by_index: bool) -> Any:
        """Go to where `state` was taken; returns some batch of the pass.

        The pass is begun with the random numbers it was begun with then, and the batches that were taken are loaded again and
        dropped; with ``by_index`` only their indices are drawn, where that can be done. The random state is not put back.

        Raises:
            TrainerError: the loader gives fewer batches than then.
        """
        self.number, self.taken, self.over, self._start = state["number"], 0, False, state["start"]
        set_random_state(self._start["random"])
        for generator, was in zip(self._generators(), self._start["generators"], strict=True):
            generator.set_state(was)
        self._open()
        target = 0 if state["over"] else state["taken"]
        if by_index and target:
            self.taken = _skip_indices(self._batches, target - 1)  # one is loaded, for whoever needs to see a batch
        some = self.take(1) if target else [self.peek()]
        while self.taken < target and self.take(1):
            pass
        if self.taken < target:
            raise TrainerError(
                f"the checkpoint was saved after {target} batches of pass {self.number}, but now train_loader gives "
                f"{self.taken}; it has to be the loader of that run, made anew"
            )
        if state["over"]:
            self.taken, self.over, self._batches = state["taken"], True, iter(())
        return some[0]

    def _open(self) -> None:
        """An iterator over the running pass; it may draw random numbers."""
        loader = self.loader
        for part in (loader, *(getattr(loader, name, None) for name in ("dataset", "sampler", "batch_sampler"))):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(self.number - 1)
        for sampler in _shares(loader):
            sampler.begin(self.accelerator)
        self._batches = iter(loader)

    def _generators(self) -> list[torch.Generator]:
        """Random generators of the loader's own, which its order may come from."""
        parts: list[Any] = [self.loader]
        for part in parts:  # grows while it is walked
            parts += [
                each
                for name in ("sampler", "batch_sampler", "order")
                if (each := getattr(part, name, None)) is not None and not any(each is known for known in parts)
            ]
        found = [getattr(part, "generator", None) for part in parts]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


class ShareOfBatches(Sampler[Any]):
    """Every n-th batch of a sampler, for one of n processes.

    All processes draw the order from the same random numbers, whatever state their own are in. (accelerate's
    ``BatchSamplerShard`` either repeats examples, which would then count twice, or loses short batches before the last.)
    """

    def __init__(self, order: Iterable[Any], rank: int, world: int) -> None:
        self.order, self.rank, self.world = order, rank, world
        self.seed = 0

    def begin(self, accelerator: Accelerator) -> None:
        """Agree on the order of the next pass."""
        from accelerate.utils import broadcast_object_list

        drawn = int(torch.randint(2**62, ()))
        self.seed = broadcast_object_list([drawn])[0]

    def __iter__(self) -> Iterator[Any]:
        stream, order = Stream(self.seed), iter(self.order)
        for position in itertools.count():
            with stream:
                indices = next(order, _END)
            if indices is _END:
                return
            if position % self.world == self.rank:
                yield indices

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.world)  # type: ignore[arg-type]


def shared_out(loader: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    """This process's share of a DataLoader; of what is none, or is divided already, all of it."""
    if accelerator.num_processes == 1 or not is_divisible(loader):
        return loader
    share = divided(loader, accelerator.process_index, accelerator.num_processes)
    return accelerator.prepare_data_loader(loader) if share is None else share


def divided(loader: Iterable[Any], rank: int, world: int) -> DataLoader[Any] | None:
    """A DataLoader of every ``world``-th batch, or ``None`` where the order is not the loader's: a stream, a subclass."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return None
    options = {name: getattr(loader, name) for name in _KEPT if hasattr(loader, name)}
    if loader.batch_sampler is None:  # every item of the data set is a batch
        return DataLoader(loader.dataset, batch_size=None, sampler=ShareOfBatches(loader.sampler, rank, world), **options)
    return DataLoader(loader.dataset, batch_sampler=ShareOfBatches(loader.batch_sampler, rank, world), **options)


def is_divisible(loader: Any) -> bool:
    """Whether processes are to get a part each: of a DataLoader, unless it or its sampler sees to that itself."""
    from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard

    if not isinstance(loader, DataLoader) or isinstance(loader, (DataLoaderShard, DataLoaderDispatcher)):
        return False
    return not isinstance(loader.sampler, DistributedSampler)


def length_of(loader: Any) -> int | None:
    """``len(loader)``, where it has one."""
    try:
        return len(loader)
    except TypeError:  # an iterable, or a DataLoader of an IterableDataset without a length
        return None


def rows_of(batch: Any) -> int:
    """How many examples a batch holds: the length of the first tensor in it."""
    from accelerate.utils import find_batch_size

    with contextlib.suppress(TypeError, IndexError):
        return int(find_batch_size(batch) or 0)
    return 0


def _per_process(loader: Any, accelerator: Accelerator) -> int | None:
    length = length_of(loader)
    if length is None or not is_divisible(loader):
        return length
    world: int = accelerator.num_processes
    return math.ceil(length / world)


def _shares(loader: Any) -> list[ShareOfBatches]:
    samplers = (getattr(loader, name, None) for name in ("sampler", "batch_sampler"))
    return [each for each in samplers if isinstance(each, ShareOfBatches)]


def _skip_indices(batches: Any, count: int) -> int:
    """Draw the indices of ``count`` batches and load nothing; how many were skipped, 0 where the iterator cannot do that."""
    draw = getattr(batches, "_next_index", None)  # torch's iterator over a DataLoader, without worker processes
    if draw is None or getattr(batches, "_num_workers", None) != 0:
        return 0
    for skipped in range(count):
        try:
            draw()
        except StopIteration:
            return skipped
    return count


@contextlib.contextmanager
def _loading(number: int, batch: int) -> Iterator[None]:
    """Errors of the loader say at which batch they came."""
    where = f"while batch {batch} of pass {number} was loaded"
    try:
        yield
    except HookDistillError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error) and "exited unexpectedly" in str(error):
            raise TrainerError(
                f"a worker process of train_loader died {where}: {error}. The system kills workers that take too much memory "
                "(/dev/shm counts); fewer num_workers or a smaller batch may help, and num_workers=0 shows errors of the data "
                "set itself. Training goes on from the last checkpoint with train(resume=True)"
            ) from error
        error.add_note(f"raised {where}")
        raise


_END: Any = object()
