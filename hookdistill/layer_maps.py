"""Which teacher layer each student layer learns from, when both sides of a match are wildcards."""

from __future__ import annotations

from collections.abc import Callable


def uniform(teacher: int, student: int) -> list[int]:
    """Evenly spread, the last from the last: student layer i of m learns from teacher layer ⌈i·n/m⌉ (TinyBERT, section 4.1).

    Positions count from 0; ``teacher`` and ``student`` are numbers of layers. 12 → 3 gives 3, 7, 11.
    """
    return [-(-(position + 1) * teacher // student) - 1 for position in range(student)]


def first(teacher: int, student: int) -> list[int]:
    """The teacher's first layers, in order."""
    return list(range(student))


def last(teacher: int, student: int) -> list[int]:
    """The teacher's last layers, in order (PKD-Last of Patient KD, section 3.2)."""
    return list(range(teacher - student, teacher))


LAYER_MAPS: dict[str, Callable[[int, int], list[int]]] = {"uniform": uniform, "first": first, "last": last}
