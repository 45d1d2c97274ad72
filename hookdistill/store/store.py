"""A store that stands where a teacher stands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from ..addresses import Address, Segment, Selector, Step, parse
from ..batches import BatchAdaptor, BatchKey, has_item, pick
from ..engine import teacher_inputs
from ..errors import StoreError, did_you_mean, listing
from ..matches import Match
from ..paths import resolve
from ..sources import skeleton
from .adjusting import LEAF, adjusted
from .build import Options, Wanted, build
from .fingerprint import teacher_facts, transforms_facts
from .index import Places
from .keep import same_tensor
from .keys import AUGMENTED, Samples
from .manifest import SHARDS, Manifest, Stored, check_transforms
from .reading import KEPT, Reader, decoded
from .report import check_size, verify


class TeacherStore:
    """Teacher tensors on disk, read in place of the teacher's forward.

        store = TeacherStore.build("store", teacher, matches, loader)
        distiller = Distiller(store, student, matches)  # the teacher may go

    Samples are found by a hash of what the teacher is called with, without padding, so that order, batch size and padding are
    free. Tensors are read from memory-mapped shards when a batch asks for them, and padding is rebuilt for the batch; NaN
    stands where nothing was stored. Each sample is checked by its checksum the first time it is read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, check_inputs: bool, resident_bytes: int) -> None:
        self.path = path
        self.manifest = manifest
        self.check_inputs = check_inputs
        self.resident_bytes = resident_bytes
        self._start()

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        teacher: nn.Module,
        matches_or_addresses: Wanted,
        loader: Iterable[Any],
        *,
        key: str | Sequence[str] | None = None,
        keep: object = None,
        mask: BatchKey | None = "auto",
        student: nn.Module | None = None,
        teacher_model: str | None = None,
        transforms: object = None,
        batch_adaptor: BatchAdaptor | None = None,
        shard_bytes: int = 256 * 2**20,
        divided: bool | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> TeacherStore:
        """Run the teacher once over a loader, and write what matches need of it to the folder ``path``.

        What is there already, from a build that was interrupted or from one over fewer samples, is not done again: the same
        call goes on. Processes that ``accelerate launch`` or ``torchrun`` have started write together.

        Args:
            path: a folder.
            teacher: runs in eval mode without gradients, under the autocast that is on.
            matches_or_addresses: `Match` entries, of which the teacher's side is stored, or addresses.
            loader: gives the batches that training will see, in any order and with any batch size.
            key: what tells samples apart: ``"content"`` (the default), a hash of the teacher's inputs without padding; or
                items of the batch with a number or string for each sample. Random augmentation needs the seed that decides
                it among them, ``key=("id", "augmentation_seed")``; without one the store serves un-augmented samples only.
            keep: how tensors are kept, see `Keep`: one for all, or by address, ``{"encoder.layer.*": "int8", ":logits":
                Keep(top_k=64)}``. A dtype stands for a `Keep` of that dtype. By default nothing is lost.
            mask: the item ``[batch, tokens]`` by which padding is cut off: by default ``attention_mask``, where there is one.
            student: where wildcards stand on both sides of a match, only the layers that this student is compared with are
                stored, not all that the teacher's wildcard names.
            teacher_model: of matches for several teachers, those of this one.
            transforms: the tokenizer or processor, or several by name, whose fingerprints go with the store.
            batch_adaptor: as for `Distiller`; samples are then recognised by all tensors of the batch that are no targets.
            shard_bytes: size of the files; up to three times as much memory is needed.
            divided: whether the loader gives each process its own part. By default that is looked up: loaders that
                accelerate has prepared do, and those with a ``DistributedSampler``; of others each process takes its share.
            seed: of the draws of ``Keep(samples=…)``.
            progress: a bar.

        Raises:
            StoreError: the folder holds something else, or a tensor cannot be stored as it should.
        """
        options = Options(
            key=key,
            keep=keep,
            mask=mask,
            student=student,
            teacher_model=teacher_model,
            transforms=transforms,
            batch_adaptor=batch_adaptor,
            shard_bytes=shard_bytes,
            divided=divided,
            seed=seed,
            progress=progress,
        )
        build(Path(path), teacher, matches_or_addresses, loader, options)
        return cls.open(path)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        verify: bool = False,
        *,
        teacher: nn.Module | None = None,
        transforms: object = None,
        check_inputs: bool = True,
        resident_bytes: int = 2**30,
    ) -> TeacherStore:
        """Open a finished store. Reads the manifest, and looks that all files are there in their sizes.

        Args:
            path: its folder.
            verify: check every byte first, as `hookdistill.store.verify` does.
            teacher: raise unless the store is of this teacher, by the hash of its weights.
            transforms: raise unless it was made with this tokenizer or these transforms.
            check_inputs: with ``key=`` items of the batch, raise where a sample's inputs are not those that the teacher saw.
                ``False`` serves the stored tensors whatever the student sees, as for an un-augmented teacher of an augmented
                student, and need not hash the inputs.
            resident_bytes: how much of the files may be in this process's memory at a time; the system's file cache is not
                limited by it.

        Raises:
            StoreError: there is no finished store, or it is not whole, or not the one that is meant.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        for facts in manifest.shards:
            check_size(folder / SHARDS / facts.name, facts)
        check_size(folder / manifest.index.name, manifest.index)
        if teacher is not None:
            _check_teacher(teacher, manifest, folder)
        if transforms is not None:
            check_transforms(transforms_facts(transforms), manifest.settings.transforms, folder)
        if verify:
            _verify(folder)
        return cls(folder, manifest, check_inputs=check_inputs, resident_bytes=resident_bytes)

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def layers(self) -> Sequence[str]:
        """Paths of all modules of the teacher, stored or not, so that wildcards are paired as with the teacher itself."""
        return self.manifest.settings.layers

    @property
    def addresses(self) -> list[str]:
        """The tensors that are stored."""
        return [stored.name for stored in self.manifest.settings.stored]

    def captures(self, batch: Any, addresses: Sequence[Address | str]) -> dict[str, dict[str, Tensor]]:
        """What the teacher would give for this batch: ``{layer: {output: tensor}}``, on the device of the batch.

        Shapes are those of the teacher, for the padding at hand; padding and tokens that were not kept are NaN. Of logits
        of which only some classes were kept, the others get the tail's mass in equal shares (``top_k=``) or none
        (``samples=``).

        Wildcards stand for the tensors that are stored.

        Raises:
            StoreError: a tensor or a sample is not in the store, or a shard is damaged.
        """
        parsed = [each if isinstance(each, Address) else parse(each) for each in addresses]
        wanted = [(address, *self.stored(address)) for pattern in parsed for address in self._expanded(pattern)]
        parts = self._parts(batch, [stored for _, stored, _ in wanted])
        captured: dict[str, dict[str, Tensor]] = {}
        for address, stored, packed in wanted:
            captured.setdefault(address.path, {})[address.key] = decoded(stored, parts[stored.name], packed=packed)
        return captured

    def collated(
        self, collate_fn: Callable[[Any], Any] | None = None, addresses: Sequence[Address | str] | None = None
    ) -> Collated:
        """A ``collate_fn`` that reads the store where batches are made: in the workers of a ``DataLoader``.

        The batch must be a dict, and gets one item more; `captures` takes from there what it would have to read otherwise.
        Inputs must not be changed afterwards: the store does not look at them again.

        Args:
            collate_fn: makes the batch; default: torch's ``default_collate``.
            addresses: what to read; default: all that is stored.
        """
        wanted = self.addresses if addresses is None else addresses
        parsed = [each if isinstance(each, Address) else parse(each) for each in wanted]
        names = [self.stored(address)[0].name for pattern in parsed for address in self._expanded(pattern)]
        return Collated(self, collate_fn or default_collate, tuple(dict.fromkeys(names)))

    def parts_of(self, batch: Any, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """For each stored tensor by name, its parts for this batch, still encoded."""
        samples, places = self._located(batch)
        stored = {each.name: each for each in self.manifest.settings.stored}
        self._reader.soon([stored[name] for name in names], places)
        return {name: self._reader.parts(stored[name], samples, places) for name in names}

    @property
    def item(self) -> str:
        """The item of a batch under which `collated` puts what it has read; no parameter of any model has such a name."""
        return f"teacher store {self.manifest.index.data[:12]}"

    def adjust(self, match: Match) -> Match:
        """A match, with the loss and the mask that fit what was stored of its teacher tensor.

        Raises:
            StoreError: the tensor is not stored, or not in a way that serves this loss.
        """
        assert match.teacher_address is not None
        stored, _ = self.stored(match.teacher_address)
        for address in teacher_inputs(match):
            further, _ = self.stored(address)
            if further.keep.sparse or further.keep.tokens is not None or further.keep.features is not None:
                raise StoreError(f"of {further.name!r} only a part is stored ({further.keep}), and inputs= needs it whole")
        return adjusted(match, stored, self)

    def kept(self, batch: Any, stored: Stored) -> Tensor:
        """``[batch, tokens]``: for which tokens of the batch there is a stored value."""
        if stored.keep.tokens is not None:
            return self._parts(batch, [stored])[stored.name][KEPT]
        mask = self.manifest.settings.recognition.mask
        assert mask is not None
        return torch.as_tensor(pick(batch, mask)) != 0

    def stored(self, address: Address) -> tuple[Stored, bool]:
        """What is stored under an address, and whether its kept classes alone are meant.

        Raises:
            StoreError: nothing is.
        """
        bare = _without_leaf(address)
        for stored in self.manifest.settings.stored:
            if stored.address.path == address.path and same_tensor(stored.address, address):
                return stored, False
            if (
                bare is not None
                and stored.keep.sparse
                and stored.address.path == bare.path
                and same_tensor(stored.address, bare)
            ):
                return stored, True
        hint = did_you_mean(str(address), self.addresses)
        teacher = self.manifest.settings.teacher["class"].rsplit(".", 1)[-1]
        raise StoreError(
            f"the store {self.path} holds no {str(address)!r} of its teacher {teacher}.{hint} It holds "
            f"{listing(self.addresses)}. Build one with the matches that need it, or change the match"
        )

    def _parts(self, batch: Any, stored: Sequence[Stored]) -> dict[str, dict[str, Tensor]]:
        """The parts of these tensors on the device of the batch, from where `collated` has put them or else from the shards."""
        names = list(dict.fromkeys(each.name for each in stored))
        there = batch[self.item] if isinstance(batch, Mapping) and self.item in batch else {}
        missing = [name for name in names if name not in there]
        read = self.parts_of(batch, missing) if missing else {}
        device = self._device(batch)
        parts = {name: there[name] if name in there else read[name] for name in names}
        return {name: {key: part.to(device, non_blocking=True) for key, part in each.items()} for name, each in parts.items()}

    def _expanded(self, address: Address) -> list[Address]:
        """The stored tensors that an address with wildcards names; one without names itself, by its full path."""
        if address not in self._expansions:
            paths = [found.path for found in resolve(skeleton(self), address)]
            segments = [tuple(map(Segment, path.split("."))) if path else () for path in paths]
            named = [Address(each, address.selector, address.call) for each in segments]
            if address.several:
                there = {
                    stored.address.path for stored in self.manifest.settings.stored if same_tensor(stored.address, address)
                }
                named = [each for each in named if each.path in there] or [address]
            self._expansions[address] = named
        return self._expansions[address]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        return f"TeacherStore({str(self.path)!r}, {len(self):,} samples of {listing(self.addresses)})"

    def _start(self) -> None:
        self._reader = Reader(self.path, self.manifest, self.resident_bytes)
        self._expansions: dict[Address, list[Address]] = {}

    def _located(self, batch: Any) -> tuple[Samples, Places]:
        recognition = self.manifest.settings.recognition
        samples = recognition.of(batch, hashed=self.check_inputs)
        places = self._reader.index.find(samples.keys)
        for missing in np.flatnonzero(places.shards < 0).tolist():
            raise StoreError(self._unknown(missing, samples, batch))
        if recognition.fields and self.check_inputs:
            for other in np.flatnonzero(places.inputs != np.array(samples.inputs, np.uint64)).tolist():
                raise StoreError(self._changed(other, samples, batch))
        lengths = self._reader.tokens(samples, places)
        if samples.spans is not None:
            for index, (span, length) in enumerate(zip(samples.spans, lengths, strict=True)):
                if length != span.length:
                    raise StoreError(
                        f"sample {index} of the batch ({self._described(index, samples, batch)}) has {span.length} tokens, and "
                        f"the teacher saw {length}: it was cut or tokenised otherwise"
                    )
        return samples, places

    def _device(self, batch: Any) -> torch.device:
        recognition = self.manifest.settings.recognition
        for name in (*recognition.inputs.values(), *recognition.fields, recognition.mask):
            if name is not None and has_item(batch, name) and isinstance(value := pick(batch, name), Tensor):
                return value.device
        return torch.device("cpu")

    def _described(self, index: int, samples: Samples, batch: Any) -> str:
        recognition = self.manifest.settings.recognition
        shown = []
        for name in recognition.fields or [each for each in recognition.inputs.values() if each != recognition.mask]:
            value = pick(batch, name)
            if isinstance(value, Tensor) and value.ndim == 2 and samples.spans is not None:
                value = samples.spans[index].narrow(value[index], 0)[:6].tolist()
                shown.append(f"{name} {str(value)[:-1]}, …]")
            elif isinstance(value, Tensor) and value.ndim == 1:
                shown.append(f"{name} {value[index].item()!r}")
            elif isinstance(value, (list, tuple)):
                shown.append(f"{name} {value[index]!r:.60}")
        return ", ".join([*shown, f"key {samples.keys[index].hex()[:12]}…"])

    def _unknown(self, index: int, samples: Samples, batch: Any) -> str:
        what = (
            "the teacher never saw it"
            if self.manifest.settings.recognition.fields
            else ("the teacher never saw it, or it was tokenised, cut, normalised or augmented otherwise then")
        )
        return (
            f"sample {index} of the batch ({self._described(index, samples, batch)}) is not among the {len(self):,} of the "
            f"store {self.path}: {what}. Run TeacherStore.build with a loader that has it, which adds it. {AUGMENTED}"
        )

    def _changed(self, index: int, samples: Samples, batch: Any) -> str:
        return (
            f"sample {index} of the batch ({self._described(index, samples, batch)}) has other inputs than the teacher saw "
            f"under this key: another tokenizer, other preprocessing, or augmentation. {AUGMENTED}. "
            "TeacherStore.open(path, check_inputs=False) serves the stored tensors all the same"
        )


_verify = verify


@dataclass(frozen=True, slots=True)
class Collated:
    """Makes batches and reads what a store has for them; goes to the workers of a loader, where it opens the store anew."""

    store: TeacherStore
    collate_fn: Callable[[Any], Any]
    names: tuple[str, ...]

    def __call__(self, samples: Any) -> Any:
        batch = self.collate_fn(samples)
        if not isinstance(batch, MutableMapping):
            raise StoreError(
                f"TeacherStore.collated needs a collate_fn that returns a dict, and it returned {type(batch).__name__}"
            )
        batch[self.store.item] = self.store.parts_of(batch, self.names)
        return batch


def _without_leaf(address: Address) -> Address | None:
    steps = address.selector.steps
    if not steps or steps[-1] != Step("name", LEAF):
        return None
    return Address(address.segments, Selector(address.selector.word, steps[:-1]), address.call)


def _check_teacher(teacher: nn.Module, manifest: Manifest, folder: Path) -> None:
    ours, theirs = teacher_facts(teacher), manifest.settings.teacher
    for name in ("weights", "structure"):
        if ours[name] != theirs[name]:
            raise StoreError(
                f"the store {folder} is of another teacher: the {name} of this {ours['class']} have the sha256 "
                f"{ours[name][:12]}…, those of its {theirs['class']} {theirs[name][:12]}…. Build a store of this teacher"
            )
