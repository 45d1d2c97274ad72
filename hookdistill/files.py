"""Writing files and folders so that no partial one is ever mistaken for a whole one, also when the machine stops half-way.

What is new is written under a temporary name, flushed to the disk, and then renamed, which is one indivisible act.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

PARTIAL = ".partial-"
_REPLACED = ".replaced-"


def write_text(file: Path, text: str) -> None:
    """Replace a text file as a whole."""
    handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=file.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        _usual_mode(partial, 0o666)
        publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, file: Path) -> None:
    """Give a whole file, flushed to the disk, its name, and see to it that the name is on the disk too."""
    partial.replace(file)
    flush(file.parent)


def write_into(path: str | os.PathLike[str], write: Callable[[Path], object]) -> list[Path]:
    """Let ``write(folder)`` fill a temporary folder, then move its files into ``path`` one by one, beside what is there.

    Each file is whole, the folder may be a mixture if this is cut short. Returns the files, relative to ``path``.
    """
    target = Path(path)
    target.mkdir(parents=True, exist_ok=True)
    with _partial(target) as folder:
        write(folder)
        flush_tree(folder)
        written = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
        for file in written:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).replace(target / file)
        flush(target)
    return written


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Let ``write(folder)`` fill a temporary folder that then takes the place of ``target``, whatever was there.

    Where ``target`` existed there is a moment without it, between two renames; `recover` puts the old one back after a kill
    in that moment.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _partial(target.parent) as folder:
        write(folder)
        flush_tree(folder)
        _usual_mode(folder, 0o777)
        replaced = target.with_name(_REPLACED + target.name)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            target.replace(replaced)
        folder.replace(target)
        flush(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def recover(parent: Path) -> None:
    """Tidy up after a process that was killed while it wrote into ``parent``; no other may be writing there."""
    for left in parent.glob(f"{_REPLACED}*"):
        original = left.with_name(left.name.removeprefix(_REPLACED))
        if not original.exists():
            left.replace(original)
    for left in [*parent.glob(f"{PARTIAL}*"), *parent.glob(f"{_REPLACED}*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove_folder(target: Path) -> None:
    """Remove a folder so that no half of it stays under its name."""
    doomed = target.with_name(PARTIAL + target.name)
    target.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


@contextlib.contextmanager
def _partial(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _usual_mode(path: Path, mode: int) -> None:
    """What tempfile makes is private to the user; what takes its place is as open as any other file of theirs."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(mode & ~mask)
