"""Telling of a run while it runs: lines in ``log.jsonl``, numbers for accelerate's trackers, and ``run.json``."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TrainerError
from ..files import write_text
from ..journal import LOG, RUN, plain, read_log, version
from .meters import Values

if TYPE_CHECKING:
    from accelerate import Accelerator


class Log:
    """Lines of JSON appended to a file, and the same numbers for the trackers; of several processes, the first one writes."""

    def __init__(self, folder: Path | None, accelerator: Accelerator) -> None:
        self.file = folder / LOG if folder is not None and accelerator.is_main_process else None
        self.accelerator = accelerator

    def start(self, *, after: int | None) -> None:
        """Begin a new log, or go on after step ``after``; lines of later steps, and half a line, are what was cut off."""
        if self.file is None:
            return
        kept = []
        if after is not None and self.file.exists():
            kept = [line for line in read_log(self.file) if line.get("step", 0) <= after]
        with _logging(self.file):
            write_text(self.file, "".join(f"{json.dumps(line)}\n" for line in kept))

    def event(self, kind: str, **values: Any) -> None:
        """One line."""
        if self.file is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"kind": kind, "time": now, **plain(values)})
        with _logging(self.file), self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{line}\n")

    def step(
        self, step: int, losses: Values, values: Mapping[str, float], *, groups: Mapping[str, Mapping[str, float]], epoch: int
    ) -> None:
        """The line of an optimizer step: losses, single values, and several by name."""
        named = {f"{kind}_by_name": each for kind, each in groups.items() if each}
        self.event("step", step=step, epoch=epoch, **losses.as_dict(), **values, **named)
        flat = {f"{kind}/{name}": value for kind, each in groups.items() for name, value in each.items()}
        parts = {f"loss/{name}": value for name, value in losses.parts.items()}
        self.track({"loss": losses.loss, **parts, **values, **flat}, step)

    def track(self, values: Mapping[str, float], step: int) -> None:
        """The numbers of a step or an evaluation, for the trackers."""
        if self.accelerator.trackers:
            self.accelerator.log(dict(values), step=step)


def versions() -> dict[str, str]:
    """Of everything that may matter."""
    import accelerate
    import numpy
    import safetensors

    found = {"hookdistill": version(), "python": platform.python_version(), "torch": str(torch.__version__)}
    found |= {module.__name__: str(module.__version__) for module in (accelerate, numpy, safetensors)}
    if "transformers" in sys.modules:
        found["transformers"] = str(sys.modules["transformers"].__version__)
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What it ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "cpus": os.cpu_count()}


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``run.json``."""
    with _logging(folder / RUN):
        write_text(folder / RUN, json.dumps(plain(content), indent=1) + "\n")


@contextlib.contextmanager
def _logging(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TrainerError(
            f"{str(file)!r} cannot be written: {error}. The training stops here; its last checkpoint is whole, and "
            "train(resume=True) goes on from it"
        ) from error
