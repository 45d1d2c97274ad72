"""Nested states of optimizers, schedulers and random generators as JSON beside safetensors, and back, to the bit.

Nothing is pickled: reading such a file runs no code.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError

_KIND = "__kind__"
_PLAIN = (str, bool, int, type(None))


def pack(tree: Any, *, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """What JSON can say of ``tree``, and the tensors in it by their place, on the CPU; one that is there twice is kept once.

    Raises:
        CheckpointError: something in it is of another kind; the message has its place.
    """
    packer = _Packer(name)
    return packer.pack(tree, name), packer.tensors


def check_packable(tree: Any, *, name: str) -> None:
    """Raise what `pack` would raise, and copy nothing."""
    _Packer(name, dry=True).pack(tree, name)


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(tree, list):
        return [unpack(each, tensors) for each in tree]
    if not isinstance(tree, dict):
        return tree
    if _KIND not in tree:
        return {key: unpack(value, tensors) for key, value in tree.items()}
    value = tree["value"]
    match tree[_KIND]:
        case "tensor":
            return tensors[value]
        case "array":
            return tensors[value].numpy()
        case "float":
            return float(value)
        case "dtype":
            return getattr(torch, value)
        case "tuple":
            return tuple(unpack(each, tensors) for each in value)
        case "set":
            return {unpack(each, tensors) for each in value}
        case "dict":
            return {unpack(key, tensors): unpack(each, tensors) for key, each in value}
        case "counter":
            return Counter({unpack(key, tensors): each for key, each in value})
        case kind:
            raise CheckpointError(f"a state of the kind {kind!r} is not known; it was written by a newer hookdistill")


def write_state(tree: Any, folder: Path, name: str) -> None:
    """Write ``tree`` as ``name.json``, and its tensors, if it has any, as ``name.safetensors``."""
    from safetensors.torch import save_file

    structure, tensors = pack(tree, name=name)
    (folder / f"{name}.json").write_text(json.dumps(structure), encoding="utf-8")
    if tensors:
        save_file(tensors, str(folder / f"{name}.safetensors"))


def read_state(folder: Path, name: str) -> Any:
    """Read what `write_state` wrote."""
    from safetensors.torch import load_file

    file = folder / f"{name}.safetensors"
    structure = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return unpack(structure, load_file(str(file)) if file.exists() else {})


class _Packer:
    def __init__(self, name: str, *, dry: bool = False) -> None:
        self.name, self.dry = name, dry
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[Any, str] = {}
        self.storages: set[Any] = set()

    def pack(self, value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return _kind("tensor", self.tensor(value, place))
        if isinstance(value, np.ndarray):
            return _kind("array", self.tensor(torch.from_numpy(value), place))
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float):
            return value if math.isfinite(value) else _kind("float", repr(value))
        if type(value) in _PLAIN or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, torch.dtype):
            return _kind("dtype", str(value).removeprefix("torch."))
        if isinstance(value, Counter):
            return _kind("counter", [[self.pack(key, place), count] for key, count in value.items()])
        if isinstance(value, Mapping):
            return self.mapping(value, place)
        if isinstance(value, (list, tuple, set, frozenset)):
            packed = [self.pack(each, f"{place}.{position}") for position, each in enumerate(value)]
            return packed if isinstance(value, list) else _kind("tuple" if isinstance(value, tuple) else "set", packed)
        raise CheckpointError(
            f"{place} is a {type(value).__name__}, which cannot be saved in a checkpoint: numbers, strings, tensors, and "
            "lists, tuples, sets and dicts of them can. Keep it out of the state_dict, or train with save_every=None"
        )

    def mapping(self, value: Mapping[Any, Any], place: str) -> Any:
        if all(type(key) is str for key in value) and _KIND not in value:
            return {key: self.pack(each, f"{place}.{key}") for key, each in value.items()}
        items = [[self.pack(key, f"{place}.key"), self.pack(each, f"{place}.{key}")] for key, each in value.items()]
        return _kind("dict", items)

    def tensor(self, tensor: Tensor, place: str) -> str:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise CheckpointError(f"{place} is a tensor of layout {tensor.layout}, which safetensors cannot hold")
        if self.dry:
            return place
        tensor = tensor.detach()
        memory = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and memory in self.known:
            return self.known[memory]
        name, number = place.removeprefix(f"{self.name}."), 2
        while name in self.tensors:
            name, number = f"{place}#{number}", number + 1
        self.known[memory] = name
        # Two tensors may share memory without being the same; safetensors refuses that, so the second is a copy.
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        tensor = tensor.clone() if storage in self.storages else tensor
        self.storages.add(storage)
        self.tensors[name] = tensor.cpu().contiguous()
        return name


def _kind(kind: str, value: Any) -> dict[str, Any]:
    return {_KIND: kind, "value": value}
