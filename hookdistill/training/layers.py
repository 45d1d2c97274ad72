"""How alike the layers of teacher and student are before and after a training, for the report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..distiller import Distiller
from ..errors import HookDistillError
from ..files import write_text
from ..journal import SIMILARITY
from ..layer_similarity import similarity
from ..sharding import is_sharded
from .log import Log

_BATCHES = 4


def record_similarity(folder: Path, when: str, distiller: Distiller, batches: Iterable[Any], log: Log) -> None:
    """Add the CKA matrix to ``similarity.json``; where it cannot be made, the log says why.

    Args:
        when: ``"before"`` or ``"after"``.
        batches: the first few are taken.
    """
    found = _similarity(distiller, batches)
    if isinstance(found, str):
        log.event("note", note=f"no picture of the layers {when} the training: {found}")
        return
    file = folder / SIMILARITY
    earlier = json.loads(file.read_text(encoding="utf-8")) if when == "after" and file.exists() else {}
    write_text(file, json.dumps({**earlier, when: found}) + "\n")


def _similarity(distiller: Distiller, batches: Iterable[Any]) -> dict[str, Any] | str:
    teacher = distiller.teacher
    if not isinstance(teacher, nn.Module):
        return "there is not one teacher that is a module"
    if is_sharded(distiller) or is_sharded(teacher):
        return "the models are sharded"
    compare = partial(similarity, teacher, distiller.student, batches, batches=_BATCHES, batch_adaptor=distiller.batch_adaptor)
    try:
        return compare().as_dict()
    except HookDistillError as error:
        reason = str(error)
    named = [(term.teacher_address, term.student_address) for term in distiller.loss.terms.values()]
    sides = [list(dict.fromkeys(str(pair[side]) for pair in named if pair[0] is not None)) for side in (0, 1)]
    try:  # where no layers are found by themselves, those that the matches compare
        return compare(teacher_layers=sides[0], student_layers=sides[1]).as_dict()
    except (HookDistillError, ValueError):
        return reason
