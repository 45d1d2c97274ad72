"""What the output folder of a run tells, put in order for the page."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluation import more_is_better
from ..journal import LOG, SIMILARITY, read_log, read_run

Curve = list[tuple[int, float]]
"""Values by optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """How alike the layers of two models are; ``None`` where that is not defined."""

    teacher: Sequence[str]
    student: Sequence[str]
    values: Sequence[Sequence[float | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """One run."""

    name: str
    run: Mapping[str, Any]
    loss: Curve
    parts: Mapping[str, Curve]
    metrics: Mapping[str, Curve]
    gauges: Mapping[str, Curve]
    """Rates, norms, speed, memory."""
    teacher: Mapping[str, float]
    """The level of the teacher, by metric."""
    layers: Mapping[str, Matrix]
    """``before`` and ``after``."""
    events: Sequence[Mapping[str, Any]]
    """What happened besides steps and evaluations."""
    state: str
    steps: int
    seconds: float | None

    @property
    def best(self) -> tuple[int, float] | None:
        """Where the best value of the metric ``best=`` was, and what it was."""
        name = self.run["best"]
        curve = [(step, value) for step, value in self.metrics.get(name or "", []) if not math.isnan(value)]
        if not curve:
            return None
        sign = 1 if more_is_better(name, self.run["settings"]["higher_is_better"]) else -1
        return max(curve, key=lambda point: (sign * point[1], -point[0]))

    @property
    def total(self) -> int:
        """Optimizer steps in all."""
        return int(self.run["steps"])


_GAUGES = ("lr", "gradient_norm", "examples_per_second", "memory_mib")
_STATES = {"end": "finished", "interrupted": "interrupted"}


def read_story(folder: Path) -> Story:
    """Read the output folder of a run.

    Raises:
        TrainerError: it is none, or its files are damaged.
    """
    run = read_run(folder)
    lines = list(read_log(folder / LOG)) if (folder / LOG).exists() else []
    steps = [line for line in lines if line["kind"] == "step"]
    measured = [line for line in lines if line["kind"] == "evaluation"]
    last: dict[str, Any] = lines[-1] if lines else {"kind": ""}
    return Story(
        name=folder.resolve().name,
        run=run,
        loss=[(line["step"], line["loss"]) for line in steps],
        parts={row["name"]: [(line["step"], line["parts"][row["name"]]) for line in steps] for row in run["plan"]},
        metrics=_curves([(line["step"], line["metrics"]) for line in measured]),
        gauges=_curves([(line["step"], {name: line[name] for name in _GAUGES if name in line}) for line in steps]),
        teacher=next((line["metrics"] for line in lines if line["kind"] == "teacher"), {}),
        layers=_matrices(folder / SIMILARITY),
        events=[line for line in lines if line["kind"] not in ("step", "evaluation", "teacher")],
        state=_STATES.get(last["kind"], "running, or cut off"),
        steps=max((line.get("step", 0) for line in lines), default=0),
        seconds=last.get("seconds") or _seconds(lines),
    )


def _curves(rows: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for step, values in rows:
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    return found


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    if len(lines) < 2:
        return None
    first, last = (datetime.datetime.fromisoformat(lines[number]["time"]) for number in (0, -1))
    return (last - first).total_seconds()


def _matrices(file: Path) -> dict[str, Matrix]:
    if not file.exists():
        return {}
    return {
        when: Matrix(teacher=each["teacher_layers"], student=each["student_layers"], values=each["cka"])
        for when, each in json.loads(file.read_text(encoding="utf-8")).items()
    }
