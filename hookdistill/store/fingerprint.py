"""What tells one teacher from another, and one tokenizer from another."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..errors import StoreError
from ..paths import module_paths, unwrap
from .dtypes import raw

_PREFIXES = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_CHUNK = 64 * 2**20


def teacher_facts(teacher: nn.Module) -> dict[str, Any]:
    """Class, size, structure, weights and config of a teacher, as plain values.

    ``weights`` is a sha256 over the names, dtypes, shapes and bytes of everything in the ``state_dict``; ``structure`` one
    over the paths, classes and settings of all modules. Wrappers (DDP, ``torch.compile``) do not change them.
    """
    model = unwrap(teacher)
    config: Any = getattr(model, "config", None)
    return {
        "class": f"{_class_of(model).__module__}.{_class_of(model).__qualname__}",
        "parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "weights": _weights(teacher),
        "structure": _structure(teacher),
        "config": json.loads(json.dumps(config.to_dict(), default=str)) if hasattr(config, "to_dict") else None,
    }


def transforms_facts(transforms: object) -> dict[str, str]:
    """Fingerprints of tokenizers, processors and other transforms, by name; of a single one under its class's name.

    A tokenizer is its vocabulary and rules, without the padding and truncation that were last asked of it; a processor its
    ``to_dict()``; anything else its ``repr``.
    """
    if transforms is None:
        return {}
    named = transforms if isinstance(transforms, Mapping) else {type(transforms).__name__: transforms}
    return {str(name): f"{type(each).__name__} {_sha256(_described(each).encode())}" for name, each in named.items()}


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A sha256 of plain values."""
    return _sha256(json.dumps(settings, sort_keys=True).encode())


def _weights(model: nn.Module) -> str:
    state = {}
    for name, value in model.state_dict().items():
        bare = name
        while (shorter := _PREFIXES.sub("", bare)) != bare:
            bare = shorter
        state[bare] = value
    if meta := [name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta]:
        raise StoreError(f"the teacher's weight {meta[0]!r} is on the meta device and holds no values; load its weights first")
    # Parts of a sharded weight come from all processes, which must ask for them in one order: not from threads.
    sharded = [name for name, value in state.items() if hasattr(value, "full_tensor")]
    digests = {name: _tensor(state[name].full_tensor()) for name in sharded}
    whole = [name for name in state if name not in digests]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests.update(zip(whole, pool.map(_tensor, (state[name] for name in whole)), strict=True))
    lines = [f"{name} {digest}" for name, digest in digests.items()]
    return _sha256("\n".join(sorted(lines)).encode())


def _tensor(value: Any) -> str:
    if not isinstance(value, Tensor):
        return _sha256(repr(value).encode())
    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
    numbers = value.detach().flatten()
    for start in range(0, numbers.numel(), _CHUNK):  # a large weight on a GPU never needs its whole copy on the host
        piece = numbers[start : start + _CHUNK].cpu().contiguous()
        digest.update(raw(piece).view(np.uint8).data)
    return digest.hexdigest()


def _structure(model: nn.Module) -> str:
    lines = []
    for path, module in module_paths(model).items():
        inner = unwrap(module)
        lines.append(f"{path} {_class_of(inner).__name__} {_ADDRESS.sub('', inner.extra_repr())}")
    return _sha256("\n".join(lines).encode())


def _class_of(module: nn.Module) -> type:
    """The class of the user's module; FSDP2 puts one of its own in front."""
    return next(each for each in type(module).__mro__ if not each.__module__.startswith("torch.distributed.fsdp"))


def _described(transform: Any) -> str:
    backend = getattr(transform, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "to_str"):
        rules = json.loads(backend.to_str())
        return json.dumps({**rules, "truncation": None, "padding": None}, sort_keys=True) + _special(transform)
    if hasattr(transform, "get_vocab"):
        return json.dumps(transform.get_vocab(), sort_keys=True) + _special(transform)
    if hasattr(transform, "to_dict"):
        return json.dumps(transform.to_dict(), sort_keys=True, default=str)
    if isinstance(transform, str):
        return transform
    if callable(transform) and hasattr(transform, "__qualname__"):
        return f"{transform.__module__}.{transform.__qualname__}"
    return _ADDRESS.sub("", repr(transform))


def _special(tokenizer: Any) -> str:
    return json.dumps(getattr(tokenizer, "special_tokens_map", {}), sort_keys=True, default=str)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
