"""Tensors as kernels see them: rows, each of them dense, at addresses that two strides give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..fused.rows import RowTask, gradient_dtype

ALIGNMENT = 16
"""Bytes of the widest load that a thread can make."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A tensor as rows: row r stands at ``(r // size) * outer + (r % size) * inner`` elements from the first.

    ``split`` says whether it takes both strides; where it does not, ``size`` is the number of rows.
    """

    tensor: Tensor
    outer: int
    inner: int
    size: int
    split: bool = False

    @property
    def record(self) -> tuple[int, int, int, int]:
        """Its four columns in a table, see `records`."""
        return self.tensor.data_ptr(), self.outer, self.inner, self.size

    def multiple_of(self, elements: int) -> bool:
        """Whether all rows start at multiples of so many elements from an address that is aligned."""
        aligned = self.tensor.data_ptr() % ALIGNMENT == 0
        return aligned and self.outer % elements == 0 and self.inner % elements == 0


NOTHING = (0, 0, 0, 1)
"""The record of a tensor that is not there."""


def rows_view(tensor: Tensor) -> View:
    """The view of a tensor whose last dimension is a row; of a copy, where its rows are not dense or take three strides."""
    if tensor.is_contiguous():
        return View(tensor, 0, tensor.shape[-1], tensor.numel() // tensor.shape[-1])
    if tensor.shape[-1] != 1 and tensor.stride(-1) != 1:
        return rows_view(tensor.contiguous())
    return entries_view(tensor, tensor.shape[:-1], tensor.stride()[:-1]) or rows_view(tensor.contiguous())


def entries_view(tensor: Tensor, shape: Sequence[int], strides: Sequence[int]) -> View | None:
    """The view of these dimensions of a tensor, or ``None`` where it takes more than two strides."""
    levels = _merged(zip(shape, strides, strict=True))
    if len(levels) > 2:
        return None
    if len(levels) == 2:
        (_, outer), (size, inner) = levels
        return View(tensor, outer, inner, size, split=True)
    ((size, inner),) = levels or [(1, 0)]
    return View(tensor, 0, inner, max(size, 1))


def _merged(levels: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes and strides with those merged that make one."""
    merged: list[tuple[int, int]] = []
    for size, stride in levels:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How the tensors of a task are cut into rows.

    Losses of whole rows need the features last. Sums over single features may be cut anywhere: features in the second dimension
    of a dense tensor, as in the map of a convolution, are rows of the dimensions behind them, and each position a part of
    several.
    """

    task: RowTask
    dim: int
    cut: bool
    width: int
    rows: int

    @staticmethod
    def of(task: RowTask) -> Layout:
        """The layout that needs the fewest copies."""
        student, dim = task.student, task.dim % task.student.ndim
        cut = 0 < dim < student.ndim - 1
        cut = cut and all(tensor.is_contiguous() for tensor in (student, *(term.other for term in task.terms)))
        cut = cut and all(term.form.elementwise and _same_behind(term.valid, dim) for term in task.terms)
        width = student.shape[dim + 1 :].numel() if cut else student.shape[dim]
        return Layout(task, dim, cut, width, student.numel() // width)

    def view(self, tensor: Tensor) -> View:
        """The rows of a tensor with the student's positions."""
        if self.cut:
            return View(tensor, 0, self.width, self.rows)
        return rows_view(tensor if self.dim == tensor.ndim - 1 else tensor.movedim(self.dim, -1))

    def mask(self, valid: Tensor) -> View:
        """Which rows count, of a mask with an entry for each position."""
        if self.cut:
            items = valid
            while items.ndim > self.dim:
                items = items.select(-1, 0)
            strides, shape = (*items.stride(), 0), (*items.shape, self.task.student.shape[self.dim])
            found = entries_view(items, shape, strides)
            if found is None:
                items = items.contiguous()
                found = entries_view(items, shape, (*items.stride(), 0))
            assert found is not None  # dense dimensions, and one of stride zero
            return found
        return entries_view(valid, valid.shape, valid.stride()) or View(valid.contiguous(), 0, 1, max(valid.numel(), 1))

    def gradient(self) -> tuple[Tensor, Tensor]:
        """A new tensor for the gradient, as dense rows, and the same as the student's shape has it."""
        student = self.task.student
        if self.cut or self.dim == student.ndim - 1:
            rows = torch.empty(student.shape, dtype=gradient_dtype(student), device=student.device)
            return rows, rows
        shape = student.movedim(self.dim, -1).shape
        rows = torch.empty(shape, dtype=gradient_dtype(student), device=student.device)
        return rows, rows.movedim(-1, self.dim)


def _same_behind(valid: Tensor | None, dim: int) -> bool:
    """Whether a mask over positions is the same in all dimensions from that of the features on."""
    if valid is None:
        return True
    behind = zip(valid.shape[dim:], valid.stride()[dim:], strict=True)
    return all(size == 1 or stride == 0 for size, stride in behind)


def counted_part(valid: Tensor) -> tuple[View, int, int]:
    """What of a mask is to be counted: its entries without repetitions, how many they are, and how often each is repeated."""
    times = 1
    for dim, (size, stride) in enumerate(zip(valid.shape, valid.stride(), strict=True)):
        if stride == 0 and size > 1:
            times *= size
            valid = valid.narrow(dim, 0, 1)
    count = valid.numel()
    return entries_view(valid, valid.shape, valid.stride()) or View(valid.contiguous(), 0, 1, max(count, 1)), count, times


def unit(*dtypes: torch.dtype) -> int:
    """How many elements the narrowest of these dtypes needs for a load of 16 bytes."""
    return ALIGNMENT // min(dtype.itemsize for dtype in dtypes)
