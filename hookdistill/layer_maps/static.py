"""Layer maps that need nothing but the numbers of layers. Positions count from 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..errors import MatchError, did_you_mean, listing


def uniform(teacher: int, student: int) -> list[int]:
    """Evenly spread, the last from the last: student layer i of m learns from teacher layer ⌈i·n/m⌉ (TinyBERT, section 4.1).

    12 → 3 gives 3, 7, 11.
    """
    return [-(-(position + 1) * teacher // student) - 1 for position in range(student)]


def first(teacher: int, student: int) -> list[int]:
    """The teacher's first layers, in order."""
    return list(range(student))


def last(teacher: int, student: int) -> list[int]:
    """The teacher's last layers, in order (PKD-Last of Patient KD, section 3.2)."""
    return list(range(teacher - student, teacher))


def skip(teacher: int, student: int) -> list[int]:
    """Every k-th layer with k = ⌊n/m⌋ (PKD-Skip of Patient KD, section 3.2): as ``uniform`` where m divides n.

    12 → 5 gives 1, 3, 5, 7, 9.
    """
    step = teacher // student
    return [(position + 1) * step - 1 for position in range(student)]


def spread(teacher: int, student: int) -> list[int]:
    """Evenly from the first to the last, both included: 12 → 6 gives 0, 2, 4, 7, 9, 11, the layers that DistilBERT's authors
    copy.

    One student layer takes the first.
    """
    if student == 1:
        return [0]
    return [round(position * (teacher - 1) / (student - 1)) for position in range(student)]


STATIC: dict[str, Callable[[int, int], list[int]]] = {
    "uniform": uniform,
    "first": first,
    "last": last,
    "skip": skip,
    "spread": spread,
}


def positions_of(given: str | Callable[[int, int], Iterable[int]], teacher: int, student: int) -> list[int]:
    """For each of ``student`` layers the position of its teacher layer, by the name of a map or a function of both numbers.

    Raises:
        MatchError: as `chosen` does.
    """
    return chosen(given if isinstance(given, str) else list(given(teacher, student)), teacher, student)


def chosen(layers: str | Sequence[int], teacher: int, student: int) -> list[int]:
    """For each of ``student`` layers the position of its teacher layer, by the name of a map or written out.

    Negative positions count from the end.

    Raises:
        MatchError: no map has that name, positions that do not exist, or not one for each student layer.
    """
    if isinstance(layers, str):
        if layers not in STATIC:
            raise MatchError(f"no map is called {layers!r}.{did_you_mean(layers, STATIC)} Known are {listing(STATIC)}")
        if student > teacher:
            raise MatchError(f"{layers!r} needs no fewer teacher layers than student layers; there are {teacher} and {student}")
        return STATIC[layers](teacher, student)
    positions = list(layers)
    if len(positions) != student:
        raise MatchError(f"there are {student} student layers, but {len(positions)} teacher layers are given: {positions}")
    return [_position(each, teacher, "teacher") for each in positions]


def explicit(pairs: Sequence[tuple[int, int]], teacher: int, student: int) -> list[tuple[int, int]]:
    """Pairs (teacher position, student position) with negative positions resolved.

    Raises:
        MatchError: a position that does not exist, or a pair that occurs twice.
    """
    found = [(_position(t, teacher, "teacher"), _position(s, student, "student")) for t, s in pairs]
    if twice := [pair for pair in found if found.count(pair) > 1]:
        raise MatchError(f"layer_map has the pair {twice[0]} twice")
    return found


def _position(position: int, count: int, side: str) -> int:
    if isinstance(position, bool) or not isinstance(position, int) or not -count <= position < count:
        raise MatchError(f"there is no {side} layer {position!r}: there are {count}, 0 to {count - 1}")
    return position % count
