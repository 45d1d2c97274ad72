"""What is run, in words and numbers: for ``run.json``, the report and the trackers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .faults import teachers_of
from .log import machine, versions

if TYPE_CHECKING:
    from .loop import Run


def describe(run: Run) -> dict[str, Any]:
    """What is run: for ``run.json``, the report and the trackers."""
    settings, distiller = run.settings, run.settings.distiller
    plain = {
        each.name: value
        if isinstance(value := getattr(settings, each.name), (str, int, float, bool, type(None)))
        else repr(value)
        for each in dataclasses.fields(settings)
        if each.name not in ("distiller", "train_loader", "eval_loader", "accelerator")
    }
    return {
        "settings": {**plain, "output_dir": str(run.folder)},
        "steps": run.total,
        "batches of a pass": run.passes.length,
        "plan": [dataclasses.asdict(row) for row in run.plan],
        "inputs": list(run.plan.inputs),
        "student": _described(distiller.student),
        "teachers": [_described(each) for each in teachers_of(distiller)],
        "optimizer": type(run.torch_optimizer).__name__,
        "scheduler": type(run.scheduler).__name__,
        "processes": run.accelerator.num_processes,
        "machine": machine(run.accelerator.device),
        "versions": versions(),
        "best": settings.best,
    }


def _described(model: Any) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(each.numel() for each in parameters),
        "trained": sum(each.numel() for each in parameters if each.requires_grad),
    }
