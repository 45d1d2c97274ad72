"""What is in a store, from which teacher, and how it was made: ``manifest.json``."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..addresses import Address, parse
from ..batches import BatchKey
from ..errors import StoreError, listing
from ..files import write_text
from .codecs import Plain, Sampled, Scaled, TopK, codec_for
from .dtypes import TAGS
from .fingerprint import settings_hash
from .keep import Keep, as_keep
from .keys import Recognition

FORMAT = 1
MANIFEST = "manifest.json"
SETTINGS = "building.json"
SHARDS = "shards"

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TAGS}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of every sample: which, as the teacher made it, and how it is kept."""

    address: Address
    made_as: torch.dtype
    shape: tuple[int, ...]
    """Of a sample, without the batch; along ``token_dims`` that of the first batch."""
    token_dims: tuple[int, ...]
    keep: Keep

    @property
    def name(self) -> str:
        """The address, which is also the name of its columns."""
        return str(self.address)

    @property
    def codec(self) -> Plain | Scaled | TopK | Sampled:
        """How its numbers are written."""
        return codec_for(self.keep, self.made_as, self.shape[-1] if self.shape else 1)

    @property
    def columns(self) -> dict[str, torch.dtype]:
        """Its columns in a shard."""
        columns = {f"{self.name}{suffix}": part.dtype for suffix, part in self.codec.parts.items()}
        return {**columns, f"{self.name}#positions": torch.int32} if self.keep.tokens is not None else columns

    def described(self) -> str:
        """Its shape, with ``tokens`` where the length is that of the sample."""
        sizes = ["tokens" if dim in self.token_dims else str(size) for dim, size in enumerate(self.shape)]
        return f"[{', '.join(sizes)}]"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes it again."""
        return {
            "address": self.name,
            "dtype": str(self.made_as).removeprefix("torch."),
            "shape": [None if dim in self.token_dims else size for dim, size in enumerate(self.shape)],
            "keep": self.keep.as_dict(),
        }

    def identity(self) -> dict[str, Any]:
        """What has to agree between two batches: not the lengths, which without a mask are those of the batch."""
        classes = self.shape[-1] if self.keep.sparse else None
        return {**self.as_dict(), "shape": len(self.shape), "token_dims": list(self.token_dims), "classes": classes}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Stored:
        """The record that `as_dict` has described."""
        dims = tuple(dim for dim, size in enumerate(values["shape"]) if size is None)
        shape = tuple(0 if size is None else int(size) for size in values["shape"])
        return Stored(parse(values["address"]), _DTYPES[values["dtype"]], shape, dims, as_keep(values["keep"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides what a store holds. Only shards that were made with the same settings belong together."""

    teacher: Mapping[str, Any]
    transforms: Mapping[str, str]
    stored: tuple[Stored, ...]
    recognition: Recognition
    layers: tuple[str, ...]
    """Paths of all modules of the teacher that can be called, against which wildcards are expanded."""
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes it again."""
        return {
            "teacher": dict(self.teacher),
            "transforms": dict(self.transforms),
            "tensors": [each.as_dict() for each in self.stored],
            "inputs": dict(self.recognition.inputs),
            "mask": self.recognition.mask,
            "key": list(self.recognition.fields) or "content",
            "layers": list(self.layers),
            "seed": self.seed,
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Settings:
        """The record that `as_dict` has described."""
        fields: tuple[BatchKey, ...] = () if values["key"] == "content" else tuple(values["key"])
        return Settings(
            teacher=values["teacher"],
            transforms=values["transforms"],
            stored=tuple(map(Stored.from_dict, values["tensors"])),
            recognition=Recognition(values["inputs"], values["mask"], fields),
            layers=tuple(values["layers"]),
            seed=values["seed"],
        )

    def identity(self) -> dict[str, Any]:
        """What has to agree between two processes, and between a build and the one that goes on with it."""
        teacher = {name: self.teacher[name] for name in ("class", "weights", "structure")}
        return {**self.as_dict(), "teacher": teacher, "tensors": [each.identity() for each in self.stored]}

    @property
    def hash(self) -> str:
        """Which settings they are, in the header of every shard."""
        return settings_hash(self.identity())

    @property
    def columns(self) -> dict[str, torch.dtype]:
        """The columns of a shard."""
        return {name: dtype for stored in self.stored for name, dtype in stored.columns.items()}

    def write(self, folder: Path) -> None:
        """Say in ``folder`` what is being built there."""
        write_text(folder / SETTINGS, json.dumps({"format": FORMAT, **self.as_dict()}, indent=1))


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """A shard as it was when the store was finished."""

    name: str
    bytes: int
    samples: int
    data: str
    """sha256 of its data."""
    header: str
    """sha256 of its header."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A finished store."""

    settings: Settings
    shards: tuple[ShardFacts, ...]
    index: ShardFacts
    samples: int
    tokens: int
    """Valid tokens of all samples; 0 without a mask."""
    column_bytes: Mapping[str, int]
    versions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put it in ``folder``: from here on the store is finished."""
        values = {
            "format": FORMAT,
            **self.settings.as_dict(),
            "samples": self.samples,
            "tokens": self.tokens,
            "column_bytes": dict(self.column_bytes),
            "shards": [asdict(shard) for shard in self.shards],
            "index": asdict(self.index),
            "versions": dict(self.versions),
        }
        write_text(folder / MANIFEST, json.dumps({**values, "sha256": settings_hash(values)}, indent=1))

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a finished store.

        Raises:
            StoreError: there is none, or it cannot be read here.
        """
        values = read_json(folder / MANIFEST)
        if values is None:
            raise StoreError(_no_store(folder))
        if values.pop("sha256", None) != settings_hash(values):
            raise StoreError(f"{folder / MANIFEST} is damaged, or was edited: its own sha256 does not agree")
        try:
            return Manifest(
                settings=Settings.from_dict(values),
                shards=tuple(ShardFacts(**shard) for shard in values["shards"]),
                index=ShardFacts(**values["index"]),
                samples=values["samples"],
                tokens=values["tokens"],
                column_bytes=values["column_bytes"],
                versions=values["versions"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{folder / MANIFEST} is damaged: {type(error).__name__}: {error}") from error


def read_settings(folder: Path) -> Settings | None:
    """What was built or is being built in ``folder``; ``None`` if nothing was."""
    values = read_json(folder / SETTINGS)
    try:
        return None if values is None else Settings.from_dict(values)
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder / SETTINGS} is damaged: {type(error).__name__}: {error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file of the store, or ``None`` if it is not there.

    Raises:
        StoreError: it is no JSON, or of a later format.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise StoreError(f"{path} is damaged or cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise StoreError(f"{path} has the format {found!r}; this version of hookdistill reads {FORMAT}")
    return values


def versions() -> dict[str, str]:
    """The libraries that made the tensors."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("hookdistill", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_same(given: Settings, there: Settings, folder: Path) -> None:
    """Raise a `StoreError` that says in what two settings differ, if they do."""
    ours, theirs = given.identity(), there.identity()
    for name, what in (("weights", "the weights of the teacher"), ("structure", "the modules of the teacher")):
        if ours["teacher"][name] != theirs["teacher"][name]:
            raise StoreError(
                f"{folder} holds tensors of another teacher: {what} ({ours['teacher']['class']}) have the sha256 "
                f"{ours['teacher'][name][:12]}…, those of its teacher ({theirs['teacher']['class']}) "
                f"{theirs['teacher'][name][:12]}…. {_WAY_OUT}"
            )
    check_transforms(given.transforms, there.transforms, folder)
    for name in ("tensors", "inputs", "mask", "key", "layers", "seed"):
        if ours[name] != theirs[name]:
            raise StoreError(f"{folder} was built with other {name}: {_difference(ours[name], theirs[name])}. {_WAY_OUT}")


def check_transforms(given: Mapping[str, str], there: Mapping[str, str], folder: Path) -> None:
    """Raise a `StoreError` that names the tokenizer, processor or other transform that is another one than in the store."""
    for name in sorted({*given, *there}):
        if given.get(name) != there.get(name):
            if name not in there:
                raise StoreError(f"{folder} was built without the transform {name!r}; it knows {listing(there)}. {_WAY_OUT}")
            found = given.get(name, "none was given")
            raise StoreError(f"{folder} was built with another {name!r}: there {there[name]}, here {found}. {_WAY_OUT}")


_WAY_OUT = "Build a store of its own in another folder, or delete this one"


def _difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, list) and isinstance(theirs, list):
        for here, there in zip(ours, theirs, strict=False):
            if here != there:
                return f"here {here}, there {there}"
        return f"here {len(ours)}, there {len(theirs)}"
    return f"here {ours!r}, there {theirs!r}"


def _no_store(folder: Path) -> str:
    if not folder.exists():
        return f"there is no store at {folder}: no such folder. TeacherStore.build(path, teacher, matches, loader) makes one"
    if (folder / SETTINGS).exists():
        shards = len(list((folder / SHARDS).glob("*.safetensors")))
        return (
            f"the store at {folder} is not finished: {shards} shards are written so far. Run the same build again; it goes on "
            "where it ended"
        )
    return f"{folder} is no store: it has no {MANIFEST}"
