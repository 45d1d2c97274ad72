"""Feature losses: which of them share a launch, and in what blocks it goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton.language as tl

from ..fused.rows import RowTerm
from .device.features import narrow_rows, wide_rows
from .layout import View, unit
from .records import COSINE, DISTANCE, NORMALIZED_MSE
from .terms import Launch, Piece, Records, power_of_two, teachers

WIDEST = 8192
"""Of rows that a program holds; wider ones are read twice where a loss needs the length of the whole row."""
CHUNK = 4096
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_KINDS = {
    "mse": DISTANCE,
    "l1": DISTANCE,
    "smooth_l1": DISTANCE,
    "huber": DISTANCE,
    "cosine": COSINE,
    "normalized_mse": NORMALIZED_MSE,
}


@dataclass(frozen=True, slots=True)
class _Key:
    """What all tensors of a launch have in common."""

    student: torch.dtype
    teacher: torch.dtype
    gradient: torch.dtype
    width: int
    aligned: bool


@dataclass(slots=True, eq=False)
class _Prepared:
    """A piece with the views of its tensors."""

    piece: Piece
    student: View
    others: list[View]

    def split(self, records: Records) -> bool:
        """Whether any view takes two strides."""
        masks = (each.term.valid for each in self.piece.terms)
        views = (records.mask(valid, self.piece.layout) for valid in masks if valid is not None)
        return self.student.split or any(view.split for view in (*self.others, *views))


@dataclass(slots=True, eq=False)
class _Bucket:
    """The pieces of one launch."""

    key: _Key
    pieces: list[_Prepared] = field(default_factory=list)

    def names(self) -> set[str]:
        return {each.term.form.name for prepared in self.pieces for each in prepared.piece.terms}

    def launch(self, records: Records, *, gradient: bool) -> Launch:
        """Make the records of the terms and tensors, and the launch of them all."""
        names = self.names()
        lines = bool(names & {"l1", "smooth_l1", "huber"})
        angles = bool(names & {"cosine", "normalized_mse"})
        blocks = Blocks.of(self.key.width, lines=lines, angles=angles)
        tasks = []
        for prepared in self.pieces:
            piece, rows = prepared.piece, prepared.piece.layout.rows
            records.keep.extend(view.tensor for view in (prepared.student, *prepared.others))
            for each, other in zip(piece.terms, prepared.others, strict=True):
                records.term(
                    each,
                    piece.layout,
                    parts=blocks.parts(rows),
                    behind=blocks.behind(rows),
                    kind=_KINDS[each.term.form.name],
                    constants=distance_constants(each.term, piece.student.shape[piece.layout.dim]),
                    other=other.record,
                )
            first = piece.terms[0].number
            address = 0 if piece.gradient is None else piece.gradient.data_ptr()
            tasks.append((*prepared.student.record, address, rows, first, first + len(piece.terms)))
        multiple = unit(self.key.student, self.key.teacher, self.key.gradient) if self.key.aligned else 1
        most = max(prepared.piece.layout.rows for prepared in self.pieces)
        constants = {
            "UNIT": multiple,
            "S": TYPES[self.key.student],
            "T": TYPES[self.key.teacher],
            "G": TYPES[self.key.gradient],
            "WIDTH": blocks.width,
            "ALIGNED": self.key.aligned,
            "SPLIT": any(prepared.split(records) for prepared in self.pieces),
            "SQUARES": "mse" in names,
            "LINES": lines,
            "ANGLES": angles,
            "GRADIENT": gradient,
        }
        units = self.key.width // multiple
        grid = (blocks.programs(most), len(tasks))
        section = (records.table.add(tasks),)
        if blocks.chunks == 0:
            return Launch(narrow_rows, grid, section, (units,), blocks.warps, {**constants, "ROWS": blocks.rows})
        return Launch(wide_rows, grid, section, (units, blocks.chunks), blocks.warps, constants)


@dataclass(frozen=True, slots=True)
class Blocks:
    """How rows are shared out: ``rows`` of them to a program, or ``chunks`` of one row where they are too wide for that."""

    rows: int
    width: int
    chunks: int
    warps: int
    angles: bool

    @staticmethod
    def of(width: int, *, lines: bool, angles: bool) -> Blocks:
        """Blocks for rows of this width. A thread has 16 features of each tensor, or 8 where that would cost it registers."""
        each = 8 if lines and not angles else 16
        if width > WIDEST:
            chunk = each * CHUNK // 16
            return Blocks(1, chunk, math.ceil(width / chunk), max(CHUNK // 512, 4), angles)
        whole = power_of_two(width)
        warps = min(max(whole // (32 * each), 4), 16)
        return Blocks(min(max(warps * 32 * each // whole, 1), 64), whole, 0, warps, angles)

    def programs(self, rows: int) -> int:
        """How many programs a tensor of so many rows takes."""
        if self.chunks == 0:
            return math.ceil(rows / self.rows)
        return rows if self.angles else rows * self.chunks

    def parts(self, rows: int) -> int:
        """How many partial sums each of its terms has."""
        return math.ceil(rows / self.rows) if self.chunks == 0 else rows * self.chunks

    def behind(self, rows: int) -> int:
        """How many numbers of its own each of its terms has: the lengths of both sides' rows, and their product."""
        return 3 * rows if self.chunks and self.angles else 0


def plan(records: Records, pieces: Sequence[Piece], *, gradient: bool) -> list[Launch]:
    """The launches for all pieces, and the records that they read: one for each width, dtype and alignment."""
    buckets: dict[_Key, _Bucket] = {}
    for piece in pieces:
        layout, student = piece.layout, piece.student
        others = teachers([each.term.other for each in piece.terms])
        views = [layout.view(each) for each in (student.detach(), *others)]
        slopes = student.dtype if piece.gradient is None else piece.gradient.dtype
        whole = layout.width % unit(student.dtype, others[0].dtype, slopes) == 0
        aligned = whole and all(view.multiple_of(unit(view.tensor.dtype)) for view in views)
        key = _Key(student.dtype, others[0].dtype, slopes, layout.width, aligned)
        buckets.setdefault(key, _Bucket(key)).pieces.append(_Prepared(piece, views[0], views[1:]))
    return [bucket.launch(records, gradient=gradient) for bucket in buckets.values()]


def distance_constants(term: RowTerm, features: int) -> tuple[float, ...]:
    """The four constants of a distance: where the square ends, its factor, the slope of the line, and where the line starts."""
    constants: Mapping[str, float] = dict(term.constants)
    name = term.form.name
    if name == "mse":
        return math.inf, 1 / features, 0.0, 0.0
    if name == "l1" or constants.get("beta") == 0:
        return -1.0, 0.0, 1 / features, 0.0
    if name == "smooth_l1":
        beta = constants["beta"]
        return beta, 0.5 / beta / features, 1 / features, 0.5 * beta
    if name == "huber":
        delta = constants["delta"]
        return delta, 0.5 / features, delta / features, 0.5 * delta
    return ()
