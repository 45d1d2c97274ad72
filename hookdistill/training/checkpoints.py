"""Checkpoints on disk: a folder each, written as a whole, with checksums; the newest whole one is found by itself.

output_dir/checkpoints/step-000000120/
    manifest.json            every other file with its length and SHA-256
    model.safetensors, model.json, optimizer.safetensors, …
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from ..export import writing
from ..files import recover, remove_folder, write_folder
from .states import read_state

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = "step-"


def save_checkpoint(root: Path, step: int, write: Callable[[Path], object], *, keep_last: int | None) -> Path:
    """Let ``write(folder)`` fill a new checkpoint; the older ones but ``keep_last`` in all are removed once it is whole.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    target = checkpoint_path(root, step)

    def write_and_sum(folder: Path) -> None:
        write(folder)
        files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
        manifest = {"format": FORMAT, "step": step, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")

    with writing(target, CheckpointError):
        write_folder(target, write_and_sum)
        older = [path for path in checkpoints(root) if path != target]
        for path in older[keep_last - 1 :] if keep_last is not None else []:
            remove_folder(path)
    return target


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return root / f"{_NAME}{step:09d}"


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints under ``root``, the newest first, whole or not."""
    found = [path for path in root.glob(f"{_NAME}*") if path.is_dir() and path.name.removeprefix(_NAME).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix(_NAME))


def newest_whole(root: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was written; damaged ones are passed over with a warning."""
    for path in checkpoints(root):
        if (problem := damage(path)) is None:
            return path
        warnings.warn(f"the checkpoint {path} is damaged and passed over: {problem}", stacklevel=2)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or ``None`` if every file is as it was written."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (int(sums["bytes"]), str(sums["sha256"])) for name, sums in manifest["files"].items()}
        written_by = int(manifest["format"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if written_by > FORMAT:
        return f"it has format {written_by}, written by a newer hookdistill"
    for name, (length, checksum) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != length:
            return f"{name} has {file.stat().st_size:,} bytes instead of {length:,}"
        if _sha256(file) != checksum:
            return f"{name} is not what was written (its checksum differs)"
    return None


def find_checkpoint(root: Path | None, resume: bool | str | Path) -> Path | None:
    """What ``train(resume=…)`` means: the newest whole checkpoint under ``root``, ``None`` if there is none, or the one named.

    Raises:
        CheckpointError: the one that is named is missing or damaged, all there are are damaged, or there is no ``root``.
    """
    if resume is False:
        return None
    if resume is not True:
        path = Path(resume)
        if not path.is_dir():
            raise CheckpointError(f"resume={str(resume)!r} is no folder{_there_is(root)}")
        nested = path / "checkpoints"
        if not (path / MANIFEST).exists() and (checkpoints(path) or checkpoints(nested)):
            return find_checkpoint(path if checkpoints(path) else nested, True)
        if problem := damage(path):
            raise CheckpointError(f"the checkpoint {str(resume)!r} cannot be resumed: {problem}{_there_is(root)}")
        return path
    if root is None:
        raise CheckpointError("resume=True looks for checkpoints in output_dir, and none is given; give output_dir= or a path")
    found = newest_whole(root)
    if found is None and (all_damaged := checkpoints(root)):
        raise CheckpointError(
            f"all {len(all_damaged)} checkpoints in {str(root)!r} are damaged, as the warnings say. To start anew on purpose, "
            "remove them or train(resume=False)"
        )
    return found


def make_way(root: Path | None) -> None:
    """Remove the checkpoints of an earlier run, where a new one begins in its folder.

    Raises:
        CheckpointError: the earlier run has not come to its end.
    """
    found = checkpoints(root) if root is not None else []
    if not found:
        return
    assert root is not None
    if damage(found[0]) is not None or not read_state(found[0], "run")["progress"]["done"]:
        raise CheckpointError(
            f"{str(root)!r} has a checkpoint of step {step_of(found[0])} of a run that has not come to its end. Go on with it "
            "by train(resume=True); or name another output_dir, or remove that folder, to begin a new run"
        )
    for path in found:
        remove_folder(path)


def tidy(root: Path | None) -> None:
    """Remove what a killed process has left half-written."""
    if root is not None and root.is_dir():
        recover(root)


def _there_is(root: Path | None) -> str:
    there = [path.name for path in checkpoints(root)] if root is not None else []
    return f". In {str(root)!r} there are {', '.join(there)}" if there else ""


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
