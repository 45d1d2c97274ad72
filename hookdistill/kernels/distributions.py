"""Losses on logits: which of them share a launch, and in what blocks it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..fused.rows import RowTerm
from .availability import interpreted
from .device.distributions import distribution_rows
from .features import TYPES
from .layout import ALIGNMENT, NOTHING, View, unit
from .records import ANYWHERE, LAUNCH, ON_COLUMNS, ON_ROWS
from .terms import Launch, Numbered, Piece, Records, power_of_two, teachers

PLACES = {
    "kl": "KL",
    "reverse_kl": "REVERSE",
    "js": "JS",
    "skew_kl": "SKEW",
    "tvd": "TVD",
    "soft_cross_entropy": "SOFT",
    "cross_entropy": "HARD",
}
"""The losses by name, and the constant of the kernel that says where each stands."""
BLOCK = 2048
"""Classes that a program does at a time: eight of each tensor to a thread."""
MANY = 3
"""Terms in one launch from which on a program takes half as many, since its threads hold sums for each of them."""
REGISTERS_ON_COLUMNS = (64, 64, 96, 128, 128, 168)
"""Of a thread, for one term in a launch, for two, and so on: the fewest that keep everything out of memory."""
REGISTERS_ELSEWHERE = (80, 80, 128, 168, 168, 208)
"""The same where the ends of rows take code of their own."""
HEAVY = {"js", "skew_kl", "tvd", "soft_cross_entropy"}
"""Losses that with others take as many registers as one more would."""


@dataclass(slots=True, eq=False)
class _Together:
    """Terms of one launch: one teacher, one temperature, and each loss once. ``teacher`` is ``None`` if there are labels only.

    ``ours`` and ``theirs`` are the classes in which student and teacher are compared; the student has ``width``.
    """

    width: int
    ours: int
    theirs: int
    teacher: Tensor | None = None
    temperature: float | Tensor = 1.0
    terms: dict[str, Numbered] = field(default_factory=dict)

    def accepts(self, term: RowTerm, ours: int, theirs: int) -> bool:
        """Whether a term that compares so many classes can go along."""
        if term.form.name in self.terms:
            return False
        if term.form.family == "labels":
            return self.ours == self.width
        if self.teacher is None:
            return not self.terms or ours == self.width
        alike = (self.ours, self.theirs) == (ours, theirs)
        return alike and self.teacher is term.other and _same(self.temperature, term.temperature)

    def add(self, numbered: Numbered, ours: int, theirs: int) -> None:
        if numbered.term.form.family != "labels":
            self.teacher, self.temperature = numbered.term.other, numbered.term.temperature
            self.ours, self.theirs = ours, theirs
        self.terms[numbered.term.form.name] = numbered


def plan(records: Records, piece: Piece, *, gradient: bool) -> list[Launch]:
    """The launches for a piece, and the records that they read.

    Terms with another teacher or temperature, and those of a loss that is there already, are in launches of their own, which
    add to the gradient of the first.
    """
    groups: list[_Together] = []
    width = piece.layout.width
    for each in piece.terms:
        classes = _classes(each.term, width, piece.layout.dim)
        group = next((group for group in groups if group.accepts(each.term, *classes)), None)
        if group is None:
            groups.append(group := _Together(width, width, width))
        group.add(each, *classes)
    if piece.gradient is not None and not piece.add and groups[0].ours < width:
        piece.gradient.zero_()
    return [
        _launch(records, piece, group, add=piece.add or number > 0, gradient=gradient) for number, group in enumerate(groups)
    ]


def _launch(records: Records, piece: Piece, group: _Together, *, add: bool, gradient: bool) -> Launch:
    layout = piece.layout
    student = layout.view(piece.student.detach())
    theirs = None if group.teacher is None else layout.view(teachers([group.teacher])[0])
    slopes = piece.student.dtype if piece.gradient is None else piece.gradient.dtype
    views = [student] if theirs is None else [student, theirs]
    records.keep.extend(view.tensor for view in views)
    dtypes = [*(view.tensor.dtype for view in views), slopes]
    names = [name for name in PLACES if name in group.terms]
    for name in names:
        term = group.terms[name].term
        records.term(group.terms[name], layout, parts=layout.rows, constants=[value for _, value in term.constants])
    labels = 0
    if "cross_entropy" in group.terms:
        dense = group.terms["cross_entropy"].term.other.long().contiguous()
        records.keep.append(dense)
        labels = dense.data_ptr()
    record = (
        *student.record,
        *(NOTHING if theirs is None else theirs.record),
        labels,
        0 if piece.gradient is None else piece.gradient.data_ptr(),
        *records.number(group.temperature),
        *(group.terms[name].number for name in names),
    )
    step, counts = unit(*dtypes), (group.ours, group.theirs, group.width)
    align = _alignment(views, counts, step)
    multiple = step if align == ON_COLUMNS else 1
    lanes, warps, registers = blocks(max(group.ours, group.theirs), step, names, align=align)
    constants = {
        "MULTIPLE": multiple,
        "S": TYPES[dtypes[0]],
        "T": TYPES[dtypes[-2]],
        "G": TYPES[slopes],
        "LANES": lanes,
        "UNIT": step,
        "ALIGN": align,
        **{place: names.index(name) if name in names else -1 for name, place in PLACES.items()},
        "SOLO": len(names) == 1,
        "ONE": not isinstance(group.temperature, Tensor) and group.temperature == 1,
        "GRADIENT": gradient,
        "ADD": add,
        "EXACT": interpreted(),
    }
    section = (records.table.add([(*record, *[0] * (LAUNCH - len(record)))]),)
    numbers = tuple(count // multiple for count in counts)
    return Launch(distribution_rows, (layout.rows,), section, numbers, warps, constants, registers)


def _classes(term: RowTerm, ours: int, dim: int) -> tuple[int, int]:
    """In how many classes student and teacher are compared."""
    if term.form.family == "labels":
        return ours, ours
    theirs = term.other.shape[dim]
    classes = max(ours, theirs) if term.padded else min(ours, theirs)
    return min(ours, classes), min(theirs, classes)


def _alignment(views: Sequence[View], counts: Sequence[int], step: int) -> int:
    if all(count % step == 0 for count in counts) and all(view.multiple_of(step) for view in views):
        return ON_COLUMNS
    width = counts[-1]
    dense = all(count == width for count in counts) and all(
        not view.split and (view.inner == width or view.size == 1) for view in views
    )
    if dense and all(view.tensor.data_ptr() % ALIGNMENT == 0 for view in views):
        return ON_ROWS
    return ANYWHERE


def blocks(classes: int, step: int, names: Sequence[str], *, align: int) -> tuple[int, int, int]:
    """How many units of ``step`` classes a program does at a time, its warps, and the registers of a thread."""
    many = len(names) >= MANY
    reach = classes + step - 1 if align == ON_ROWS else classes
    block = min(max(power_of_two(reach), 32 * step), BLOCK // 2 if many else BLOCK)
    enough = REGISTERS_ON_COLUMNS if align == ON_COLUMNS else REGISTERS_ELSEWHERE
    heavy = len(names) + (len(names) > 1 and not HEAVY.isdisjoint(names))
    registers = enough[min(heavy, len(enough)) - 1]
    return block // step, max(block // 256, 1), registers


def _same(one: float | Tensor, other: float | Tensor) -> bool:
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)
