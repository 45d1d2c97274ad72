"""Writing models and tensors so that no partial file is ever mistaken for a whole one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from .paths import unwrap

WEIGHTS = "model.safetensors"
_ALL_WEIGHTS = "model*.safetensors*"


def save_student(student: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write ``student`` to the folder ``path``: by its own ``save_pretrained``, else its state as ``model.safetensors``.

    Files appear under their names only when they are whole. Wrappers (DDP, ``torch.compile``) are left out.
    """
    model = unwrap(student)
    if callable(getattr(model, "save_pretrained", None)):
        write_whole(path, lambda folder: model.save_pretrained(folder))  # type: ignore[operator]
    else:
        write_whole(path, lambda folder: save_weights(model, folder / WEIGHTS))


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the state of a module as safetensors; tensors that share memory are written once."""
    from safetensors.torch import save_model

    save_model(model, str(file))


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write(folder)`` fill a temporary folder beside ``path``, then move its files into ``path`` one by one."""
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target))
    try:
        write(folder)
        written = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in written:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).replace(target / file)
        if any(file.match(_ALL_WEIGHTS) for file in written):
            for stale in {file.relative_to(target) for file in target.glob(_ALL_WEIGHTS)} - {*written}:
                (target / stale).unlink()  # shards of an earlier, larger student do not belong to this one
    finally:
        shutil.rmtree(folder, ignore_errors=True)
