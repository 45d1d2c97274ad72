"""A student on its own: written to a folder, and read back into a model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExportError, did_you_mean, listing
from .files import write_into
from .journal import version
from .paths import unwrap
from .sharding import is_sharded, whole_state

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_ALL_WEIGHTS = "model*.safetensors*"


def save_student(student: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``student`` to the folder ``path``: by its own ``save_pretrained``, else `WEIGHTS` and a small `CONFIG`.

    Files appear under their names only when they are whole. Wrappers (DDP, ``torch.compile``) are left out. A student that
    `fully_shard` has divided is gathered: then every process calls this, and the first one writes.

    Raises:
        ExportError: the disk is full, or the folder cannot be written.
    """
    model = unwrap(student)
    state = whole_state(model)
    if is_sharded(model) and torch.distributed.get_rank() != 0:
        return
    with writing(path):
        written = write_into(path, lambda folder: write_student(model, folder, state))
        if any(file.match(_ALL_WEIGHTS) for file in written):
            for stale in {file.relative_to(path) for file in Path(path).glob(_ALL_WEIGHTS)} - {*written}:
                (Path(path) / stale).unlink()  # shards of an earlier, larger student do not belong to this one


def write_student(student: nn.Module, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """What `save_student` writes, straight into an empty folder; ``state`` is the student's `whole_state`."""
    model = unwrap(student)
    state = whole_state(model) if state is None else state
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained(folder, **({"state_dict": state} if is_sharded(model) else {}))  # type: ignore[operator]
        return
    write_weights(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(_description(model), indent=1) + "\n", encoding="utf-8")


def write_weights(state: Mapping[str, Tensor], file: Path) -> None:
    """Write a state dict as safetensors; of names for one tensor (tied weights), the first is kept."""
    from safetensors.torch import save_file

    if odd := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ExportError(f"{listing(odd, most=4)} in the state dict is no tensor, and only tensors are written")
    save_file({name: tensor.detach().contiguous() for name, tensor in _untied(state).items()}, str(file))


def load_student(student: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read the weights in the folder ``path``, as `save_student` wrote them, into ``student``; returns it.

    For a student of transformers, ``from_pretrained(path)`` builds the model too.

    Raises:
        ExportError: there are no such weights, or they are another model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model, file = unwrap(student), Path(path) / WEIGHTS
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"no weights can be read from {str(file)!r}: {error}") from error
    own = model.state_dict()
    needed = _untied(own, first={*found})
    for problem, names, known in (
        ("lacks", [name for name in needed if name not in found], found),
        ("has", [name for name in found if name not in own], own),
    ):
        if names:
            hint = did_you_mean(names[0], known)
            raise ExportError(f"{str(file)!r} {problem} {listing(names, most=4)}, unlike {type(model).__name__}.{hint}")
    if wrong := [name for name in needed if found[name].shape != own[name].shape]:
        shapes = f"{list(found[wrong[0]].shape)}, not {list(own[wrong[0]].shape)}"
        raise ExportError(f"{wrong[0]!r} in {str(file)!r} has the shape {shapes}; it is another model's")
    model.load_state_dict(found, strict=False)  # names for a tensor that has come under another name are left out
    return student


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], error: type[Exception] = ExportError) -> Iterator[None]:
    """What the system or safetensors say about a write becomes an ``error`` that names the place and what is free there."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise error(
            f"writing to {os.fspath(path)!r} failed: {problem}. {_free(Path(path))} Nothing half-written is left there, and "
            "what was there before is untouched. The models are as they were in memory: make room, or "
            "distiller.export(path) elsewhere"
        ) from problem


def _free(path: Path) -> str:
    with contextlib.suppress(OSError):
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        return f"{shutil.disk_usage(there).free / 2**20:,.0f} MiB are free on that disk."
    return ""


def _untied(state: Mapping[str, Tensor], first: set[str] = frozenset()) -> dict[str, Tensor]:  # type: ignore[assignment]
    """One name for each tensor: of several, one in ``first``, else the one that comes first."""
    names: dict[Any, str] = {}
    for name in sorted(state, key=lambda name: name not in first):
        tensor = state[name]
        memory = (
            tensor.device,
            tensor.dtype,
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        names.setdefault(memory if tensor.numel() else name, name)
    kept = {*names.values()}
    return {name: tensor for name, tensor in state.items() if name in kept}


def _description(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    described: dict[str, Any] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hookdistill_version": version(),
    }
    with contextlib.suppress(TypeError, ValueError):
        if isinstance(config, Mapping):
            described["config"] = json.loads(json.dumps(dict(config)))
    return described
