"""Terms as records: what kernels of every family read of them, and what must stay in memory until they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..fused.rows import RowTask, RowTerm
from .availability import DTYPES
from .layout import NOTHING, Layout, View
from .records import Table, bits


@dataclass(frozen=True, slots=True, eq=False)
class Numbered:
    """A term, its number among the terms of a call, and where its value goes.

    ``shares`` is the share of each row in the mean, ``[rows]``, where that is known already; zero for rows that do not count.
    """

    number: int
    value: int
    term: RowTerm
    shares: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The terms of one family on one student tensor; ``gradient`` is where theirs goes, as dense rows."""

    layout: Layout
    terms: list[Numbered]
    gradient: Tensor | None
    add: bool = False
    """To the gradient that another family has written."""

    @property
    def student(self) -> Tensor:
        return self.layout.task.student


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """A launch that waits for the table to be uploaded.

    Attributes:
        sections: where in the table its records begin.
        numbers: its other arguments, which stand behind those that every kernel has: sections, and the partial sums.
    """

    kernel: Any
    grid: tuple[int, ...]
    sections: tuple[int, ...]
    numbers: tuple[int, ...]
    warps: int
    constants: dict[str, Any]
    registers: int | None = None


@dataclass(slots=True, eq=False)
class Records:
    """The records of a call, on one device.

    Attributes:
        shares: for each mask that a mean is taken over, the share of one position.
        counted: the number of a mask among them, by its id.
        terms: the records of terms, by number.
        parts: how many numbers partial sums take so far.
        keep: tensors made on the way, whose memory kernels will read.
    """

    device: torch.device
    shares: Tensor
    counted: dict[int, int]
    terms: list[tuple[int, ...]]
    table: Table = field(default_factory=Table)
    parts: int = 0
    keep: list[Tensor] = field(default_factory=list)
    masks: dict[tuple[int, torch.Size | None], View] = field(default_factory=dict)

    def term(
        self,
        numbered: Numbered,
        layout: Layout,
        *,
        parts: int,
        behind: int = 0,
        kind: int = 0,
        constants: Sequence[float] = (),
        other: tuple[int, int, int, int] = NOTHING,
    ) -> None:
        """Make the record of a term, with ``parts`` partial sums and room for some numbers ``behind`` them."""
        term = numbered.term
        mask = NOTHING if term.valid is None else self.mask(term.valid, layout).record
        self.terms[numbered.number] = (
            *mask,
            *self._share(numbered, layout),
            *self.number(term.coefficient),
            self.parts,
            parts,
            kind,
            *map(bits, (*constants, *[0.0] * (4 - len(constants)))),
            *other,
            numbered.value,
            0 if numbered.shares is None else numbered.shares.stride(0),
            0,
        )
        self.parts += parts + behind

    def mask(self, valid: Tensor, layout: Layout) -> View:
        """The view of a mask; terms often have the same."""
        key = (id(valid), layout.task.student.shape if layout.cut else None)
        if key not in self.masks:
            self.masks[key] = layout.mask(valid)
        return self.masks[key]

    def number(self, given: float | Tensor) -> tuple[int, int]:
        """A number as two columns of a record: one that is on the device stays there."""
        if isinstance(given, Tensor) and given.device.type == "cpu" and self.device.type != "cpu":
            given = float(given)
        if not isinstance(given, Tensor):
            return 0, bits(given)
        tensor = given.detach().to(self.device, torch.float32)
        self.keep.append(tensor)
        return tensor.data_ptr(), 0

    def _share(self, numbered: Numbered, layout: Layout) -> tuple[int, int]:
        term = numbered.term
        if numbered.shares is not None:
            return numbered.shares.data_ptr(), 0
        if not term.mean:
            return 0, bits(1.0)
        if term.valid is not None:
            return self.shares.data_ptr() + self.shares.itemsize * self.counted[id(term.valid)], 0
        student = layout.task.student
        return 0, bits(student.shape[layout.dim] / max(student.numel(), 1))


def teachers(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same in a dtype that kernels read, which is float32 unless all have one of the others."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes <= set(DTYPES):
        return [tensor.detach() for tensor in tensors]
    return [tensor.detach().float() for tensor in tensors]


def masks_of(tasks: Sequence[RowTask]) -> list[Tensor]:
    """The masks that means are taken over, each once."""
    found = {id(term.valid): term.valid for task in tasks for term in task.terms if term.mean and term.valid is not None}
    return list(found.values())


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << max(number - 1, 0).bit_length()
