"""What a run leaves to be read: ``log.jsonl``, a line for each event, and ``run.json``, what was run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import TrainerError

LOG = "log.jsonl"
RUN = "run.json"
SIMILARITY = "similarity.json"


def version() -> str:
    """Of hookdistill."""
    return str(sys.modules["hookdistill"].__version__)  # which imports this module, and so cannot be imported by it


def read_log(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; half a line at its end is passed over.

    Raises:
        TrainerError: another line is damaged.
    """
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield _numbers(json.loads(line))
            except ValueError as error:
                if line.endswith("\n"):
                    raise TrainerError(f"line {number} of {str(file)!r} is damaged: {error}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """Read ``run.json`` of an output folder.

    Raises:
        TrainerError: there is none.
    """
    try:
        return dict(_numbers(json.loads((folder / RUN).read_text(encoding="utf-8"))))
    except (OSError, ValueError) as error:
        raise TrainerError(
            f"{str(folder)!r} is no output folder of a Trainer, or its {RUN} is damaged: {error}. Name the folder that was "
            "given as output_dir="
        ) from error


def plain(value: Any) -> Any:
    """For JSON, which knows no numbers but finite ones."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": repr(value)}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["number"]) if value.keys() == {"number"} else {key: _numbers(each) for key, each in value.items()}
    return [_numbers(each) for each in value] if isinstance(value, list) else value
