"""What is in a store, and whether all of it is as it was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import StoreError
from ..tables import table
from .index import Index
from .manifest import SHARDS, Manifest, ShardFacts
from .shards import Mapped, Shard

_CHUNK = 16 * 2**20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of every sample."""

    address: str
    shape: str
    dtype: str
    kept: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """What is in a store; ``print(info)`` shows it."""

    path: str
    teacher: str
    parameters: int
    weights: str
    """sha256 of the teacher's weights."""
    samples: int
    tokens: int
    bytes: int
    shards: int
    key: str
    mask: str | None
    transforms: dict[str, str]
    tensors: tuple[TensorInfo, ...]
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        tensors = [{name: getattr(each, name) for name in each.__slots__} for each in self.tensors]
        return {**values, "tensors": tensors, "bytes_per_sample": self.bytes / max(self.samples, 1)}

    def __str__(self) -> str:
        per = "bytes/token" if self.tokens else "bytes/sample"
        count = max(self.tokens or self.samples, 1)
        rows = [
            (each.address, each.shape, each.dtype, each.kept, _size(each.bytes), f"{each.bytes / count:,.1f}")
            for each in self.tensors
        ]
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        lines = [
            f"{self.path}: {self.samples:,} samples{tokens}, {_size(self.bytes)} in {self.shards} shards, "
            f"{self.bytes / max(self.samples, 1):,.0f} bytes a sample",
            f"teacher: {self.teacher}, {self.parameters:,} parameters, weights sha256 {self.weights[:16]}…",
            f"key: {self.key}; mask: {self.mask or 'none'}",
            *(f"transform {name}: {what}" for name, what in self.transforms.items()),
            "versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "",
            table(("tensor", "shape", "dtype", "kept as", "size", per), rows, right=("size", per)),
        ]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Checked:
    """A store of which every byte was checked."""

    path: str
    samples: int
    shards: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.path}: {self.shards} shards with {self.samples:,} samples, {_size(self.bytes)}, all as they were written"


def info(path: str | os.PathLike[str]) -> Info:
    """What is in the store at ``path``, from its manifest.

    Raises:
        StoreError: there is no finished store.
    """
    manifest = Manifest.read(Path(path))
    settings, recognition = manifest.settings, manifest.settings.recognition
    tensors = tuple(
        TensorInfo(
            each.name,
            each.described(),
            str(each.made_as).removeprefix("torch."),
            str(each.keep),
            sum(manifest.column_bytes[column] for column in each.columns),
        )
        for each in settings.stored
    )
    return Info(
        path=str(path),
        teacher=settings.teacher["class"],
        parameters=settings.teacher["parameters"],
        weights=settings.teacher["weights"],
        samples=manifest.samples,
        tokens=manifest.tokens,
        bytes=sum(shard.bytes for shard in manifest.shards) + manifest.index.bytes,
        shards=len(manifest.shards),
        key=", ".join(map(str, recognition.fields)) or "content of " + ", ".join(recognition.inputs),
        mask=None if recognition.mask is None else str(recognition.mask),
        transforms=dict(settings.transforms),
        tensors=tensors,
        versions=dict(manifest.versions),
    )


def verify(path: str | os.PathLike[str], *, progress: Callable[[int, int], object] | None = None) -> Checked:
    """Read every byte of the store at ``path`` and check it: files, checksums, and that the index names what is there.

    Args:
        progress: called with the bytes checked so far and all bytes.

    Raises:
        StoreError: something is missing or damaged; the message lists what.
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    total, done = sum(shard.bytes for shard in manifest.shards), 0
    problems, shards = [], []
    for facts in manifest.shards:
        try:
            shards.append(check_file(folder / SHARDS / facts.name, facts))
        except StoreError as error:
            problems.append(str(error))
        done += facts.bytes
        if progress is not None:
            progress(done, total)
    try:
        check_file(folder / manifest.index.name, manifest.index)
        if not problems:
            problems += _index_problems(Index(folder / manifest.index.name), [Shard(shard) for shard in shards], manifest)
    except StoreError as error:
        problems.append(str(error))
    if problems:
        more = f"\nand {len(problems) - 20} more" if len(problems) > 20 else ""
        raise StoreError(
            f"the store at {folder} is damaged:\n" + "\n".join(problems[:20]) + more + "\nDelete the files named and run the "
            "same build again; it writes anew what is missing"
        )
    return Checked(str(path), manifest.samples, len(shards), total)


def check_file(path: Path, facts: ShardFacts) -> Path:
    """Raise a `StoreError` unless the file is the one that the manifest knows."""
    check_size(path, facts)
    file = Mapped(path, facts.header)
    digest = hashlib.sha256()
    for chunk in _chunks(path, len(file.header)):
        digest.update(chunk)
    if digest.hexdigest() != facts.data:
        raise StoreError(f"{path} is damaged: the sha256 of its data is not the one of the manifest")
    return path


def check_size(path: Path, facts: ShardFacts) -> None:
    """Raise a `StoreError` unless the file is there and as long as it should be."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StoreError(
            f"{path} is missing. Put it back, or run the same build again, which writes its samples anew"
        ) from None
    if size != facts.bytes:
        raise StoreError(f"{path} is damaged: it has {size} bytes and should have {facts.bytes}")


def _chunks(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while chunk := file.read(_CHUNK):
            yield chunk


def _index_problems(index: Index, shards: list[Shard], manifest: Manifest) -> Iterator[str]:
    if len(index) != manifest.samples:
        yield f"the index has {len(index)} samples and the manifest {manifest.samples}"
    for number, shard in enumerate(shards):
        places = index.find([key.tobytes() for key in shard.keys])
        if bool((places.shards < 0).any()):
            yield f"{shard.path} has samples that the index does not know"
        here = places.shards == number
        if not bool((places.rows[here] == np.flatnonzero(here)).all()):
            yield f"the index has other rows than {shard.path}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    raise AssertionError("unreachable")
