"""Running a teacher once over the data, and writing what it makes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..addresses import Address, Segment, parse
from ..batches import BatchAdaptor, BatchKey
from ..engine import batch_items, teacher_inputs
from ..errors import StoreError, listing
from ..files import PARTIAL, publish
from ..matches import Match, as_matches
from ..paths import has_forward, module_paths, resolve, unwrap
from ..plan import expand
from ..running import device_of
from .encoding import encode
from .fingerprint import teacher_facts, transforms_facts
from .index import NAME, write_index
from .keep import kept
from .keys import KeySet, Samples, as_fields
from .manifest import MANIFEST, SHARDS, Manifest, Settings, ShardFacts, check_same, read_settings, versions
from .processes import Processes, any_process, is_divided, is_sharded
from .shards import Mapped, Shard
from .survey import Run, survey
from .writer import Writer, shard_name

Wanted = Iterable[Match | Mapping[str, Any] | str | Address]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The keywords of `TeacherStore.build`, which describes them."""

    key: object = None
    keep: object = None
    mask: BatchKey | None = "auto"
    student: nn.Module | None = None
    teacher_model: str | None = None
    transforms: object = None
    batch_adaptor: BatchAdaptor | None = None
    shard_bytes: int = 256 * 2**20
    divided: bool | None = None
    seed: int = 0
    progress: bool = True


def build(folder: Path, teacher: nn.Module, wanted: Wanted, loader: Iterable[Any], options: Options) -> None:
    """Write the store to ``folder``, or what is missing of it."""
    if not isinstance(teacher, nn.Module):
        raise StoreError(f"the teacher must be a torch.nn.Module, got {type(teacher).__name__}")
    if isinstance(options.shard_bytes, bool) or not isinstance(options.shard_bytes, int) or options.shard_bytes < 1:
        raise StoreError(f"shard_bytes= is a number of bytes, got {options.shard_bytes!r}")
    matches, addresses = _wanted(teacher, wanted, options)
    processes = Processes.here()
    try:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"no store can be built at {folder}: {error}") from error
    targets, masks = batch_items(matches)
    with Run(teacher, addresses, targets=targets, masks=masks, adaptor=options.batch_adaptor) as run:
        divided = is_divided(loader) if options.divided is None else options.divided
        batches = processes.share(loader, divided=divided)
        first = next(batches, None)
        settings = None if first is None else _settings(run, first, options)
        settings = _agreed(folder, settings, processes)
        if is_sharded(teacher) and not all(processes.gather(first is not None)):
            raise StoreError("the teacher's weights lie on several processes, of which some got no batch; use fewer processes")
        number, done = _written(folder, settings, processes)
        if first is not None:
            writer = Writer(
                folder / SHARDS,
                rank=processes.rank,
                number=number,
                columns=settings.columns,
                metadata={"settings": settings.hash},
                shard_bytes=options.shard_bytes,
            )
            with _Progress(loader, processes, is_own=divided, enabled=options.progress) as progress, writer:
                _Pass(run, settings, done, writer, progress, processes).over(first, batches)
    processes.gather(None)
    if processes.rank == 0:
        finish(folder, settings)
    processes.gather(None)


def finish(folder: Path, settings: Settings) -> None:
    """Write the index and the manifest over the shards that there are."""
    names = [path.name for path in _shard_files(folder)]
    shards = [Shard(folder / SHARDS / name) for name in names]
    partial = folder / NAME.format("new")
    samples = write_index(partial, shards)
    index = _facts(partial)
    path = folder / NAME.format(index.data[:16])
    publish(partial, path)
    column_bytes = {column: sum(shard.bytes_of(column) for shard in shards) for column in settings.columns}
    Manifest(
        settings=settings,
        shards=tuple(_facts(shard.path, len(shard)) for shard in shards),
        index=ShardFacts(path.name, index.bytes, samples, index.data, index.header),
        samples=samples,
        tokens=sum(int(shard.tokens.sum(dtype="u8")) for shard in shards),
        column_bytes=column_bytes,
        versions=versions(),
    ).write(folder)
    left_over = [stale for stale in folder.glob(NAME.format("*")) if stale != path]
    for stale in (*left_over, *folder.rglob(f"{PARTIAL}*")):
        stale.unlink()


class _Pass:
    """One pass over the batches of this process."""

    def __init__(
        self, run: Run, settings: Settings, done: KeySet, writer: Writer, progress: _Progress, processes: Processes
    ) -> None:
        self.run, self.settings, self.done = run, settings, done
        self.writer, self.progress = writer, progress
        self.together = processes.count > 1 and is_sharded(run.teacher)

    def over(self, first: Any, batches: Iterator[Any]) -> None:
        batch: Any = first
        more = True
        while True:
            missing: list[int] = []
            if more:
                samples = self.settings.recognition.of(batch)
                missing = self._missing(samples)
            if self.together:
                anybody_has_more, anybody_runs = any_process([more, bool(missing)], device_of(self.run.teacher))
                if not anybody_has_more:
                    return
                if anybody_runs and not missing:
                    self.run(self.run.inputs(batch))  # the others need this process for their part of the weights
            elif not more:
                return
            if missing:
                self._store(batch, samples, missing)
            if more:
                self.progress.batch(len(missing), len(samples), self.writer.written_bytes)
            following = next(batches, None)
            more = following is not None
            batch = batch if following is None else following

    def _missing(self, samples: Samples) -> list[int]:
        """The samples that are in no shard yet, each once."""
        first = {key: index for index, key in reversed(list(enumerate(samples.keys)))}
        return sorted(index for key, index in first.items() if key not in self.done)

    def _store(self, batch: Any, samples: Samples, missing: Sequence[int]) -> None:
        # The batch runs whole even if a part of it is there: its samples come out to the bit as in an uninterrupted build.
        tensors = self.run(self.run.inputs(batch))
        encoded = [
            encode(each, tensors[each.address], samples, batch, seed=self.settings.seed) for each in self.settings.stored
        ]
        ready = None
        if device_of(self.run.teacher).type == "cuda":
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        self.writer.put(samples, missing, encoded, ready)
        self.done.add([samples.keys[index] for index in missing])


class _Progress:
    """A bar over the batches, on the first process of each machine."""

    def __init__(self, loader: Any, processes: Processes, *, is_own: bool, enabled: bool) -> None:
        try:
            length: int | None = len(loader)
        except TypeError:
            length = None
        self.total = length if length is None or is_own else -(-length // processes.count)
        self.enabled = enabled and int(os.environ.get("LOCAL_RANK", processes.rank)) == 0
        self.stored = self.there = 0

    def __enter__(self) -> _Progress:
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit="batch", desc="store", disable=not self.enabled)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def batch(self, stored: int, samples: int, written: int) -> None:
        """One batch more, of which so many samples were new."""
        self.stored += stored
        self.there += samples - stored
        there = f", {self.there:,} there already" if self.there else ""
        self.bar.set_postfix_str(f"{self.stored:,} samples{there}, {written / 1e6:,.0f} MB written", refresh=False)
        self.bar.update()


def _wanted(teacher: nn.Module, wanted: Wanted, options: Options) -> tuple[list[Match], list[Address]]:
    """The matches among what is asked for, and the addresses of single tensors of the teacher."""
    listed = [wanted] if isinstance(wanted, (str, Address, Match)) else list(wanted)
    plain = [each for each in listed if isinstance(each, (str, Address))]
    matches = as_matches([each for each in listed if not isinstance(each, (str, Address))]) if len(plain) < len(listed) else []
    named = sorted({match.teacher_model for match in matches if match.teacher_model is not None})
    if options.teacher_model is None and len(named) > 1:
        raise StoreError(f"the matches are for several teachers; say with teacher_model= which of {listing(named)} this is")
    if options.teacher_model is not None:
        matches = [match for match in matches if match.teacher_model in (None, options.teacher_model)]
    asked = [each if isinstance(each, Address) else parse(each) for each in plain]
    if options.student is not None:
        matches = [_without_name(match) for match in matches]
        entries = [entry for match in matches for entry in expand(match, {None: teacher}, options.student)]
    else:
        entries = matches
    asked += [entry.teacher_address for entry in entries if entry.teacher_address is not None]
    asked += [address for entry in entries for address in teacher_inputs(entry)]
    addresses: dict[Address, None] = {}
    for address in asked:
        if address.call == "*":
            raise StoreError(f"{str(address)!r} is a list of tensors; choose one call, as in @0 or @-1")
        for found in resolve(teacher, address):
            segments = tuple(map(Segment, found.path.split("."))) if found.path else ()
            addresses[Address(segments, address.selector, address.call)] = None
    if not addresses:
        raise StoreError("there is nothing to store: no match and no address names a tensor of the teacher")
    return matches, list(addresses)


def _without_name(match: Match) -> Match:
    return match.at(match.teacher_address, match.student_address) if match.teacher_model is not None else match


def _settings(run: Run, batch: Any, options: Options) -> Settings:
    keeps = kept(options.keep, run.teacher, run.addresses)
    recognition, stored = survey(run, batch, keeps, mask=options.mask, fields=as_fields(options.key))
    paths = module_paths(run.teacher)
    return Settings(
        teacher=teacher_facts(run.teacher),
        transforms=transforms_facts(options.transforms),
        stored=stored,
        recognition=recognition,
        layers=tuple(path for path, module in paths.items() if has_forward(unwrap(module))),
        seed=options.seed,
    )


def _agreed(folder: Path, settings: Settings | None, processes: Processes) -> Settings:
    """The settings of all processes, and of the build that was begun here before."""
    everybodys = [each for each in processes.gather(settings) if each is not None]
    if not everybodys:
        raise StoreError("the loader gave no batch, so there is nothing to store")
    for other in everybodys[1:]:
        check_same(other, everybodys[0], folder)
    agreed: Settings = everybodys[0]
    before = read_settings(folder)
    if before is not None:
        check_same(agreed, before, folder)
        agreed = before
    elif _shard_files(folder) or (folder / MANIFEST).exists():
        raise StoreError(f"{folder} holds shards, but nothing says what they are of; build the store in another folder")
    processes.gather(None)  # everybody has looked before the first one writes
    if before is None and processes.rank == 0:
        agreed.write(folder)
    return agreed


def _written(folder: Path, settings: Settings, processes: Processes) -> tuple[int, KeySet]:
    """The number of this process's next shard, and the keys that it need not store any more."""
    number, done = 0, KeySet()
    own = shard_name(processes.rank, 0)[: len("shard-00000-")]
    for path in _shard_files(folder):
        shard = Shard(path)
        if shard.metadata.get("settings") != settings.hash:
            raise StoreError(f"{path} is a shard of another build; delete it, or build the store in another folder")
        if path.name.startswith(own):
            number = max(number, int(path.name[len(own) :].split(".")[0]) + 1)
        done.add([key.tobytes() for key in shard.keys])
    for partial in (folder / SHARDS).glob(f"{PARTIAL}{own}*"):
        partial.unlink()
    return number, done


def _shard_files(folder: Path) -> list[Path]:
    return sorted((folder / SHARDS).glob("shard-*.safetensors"))


def _facts(path: Path, samples: int = 0) -> ShardFacts:
    file = Mapped(path)
    header = hashlib.sha256(file.header).hexdigest()
    return ShardFacts(path.name, path.stat().st_size, samples, file.metadata["sha256"], header)
