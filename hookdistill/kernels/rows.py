"""Row-wise losses of many student tensors by Triton: what `fused.rows.run_rows` does for one.

All of a call is planned on the host without looking at a single value, put into one table, and launched: the counts of masks,
the feature losses of each width, the logits of each tensor, and the sums. A call whose tensors stand where they stood before
uploads nothing. It may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fused.rows import RowLosses, RowTask, block_losses, run_rows
from . import distributions, features
from .availability import unsuited
from .device import sums
from .launching import launch
from .layout import Layout, counted_part
from .records import Table
from .tables import on_device
from .terms import Launch, Numbered, Piece, Records, masks_of

UNSUITED_BLOCK = 1 << 22
"""Elements of a block of what is left to the closed forms."""
SUMMED = 4096
"""Partial sums, and entries of masks, that are read at a time."""


def run_rows_triton(tasks: Sequence[RowTask], *, gradient: bool) -> list[RowLosses]:
    """The values of all terms of all tasks, and the gradients.

    What kernels do not do (see `availability.unsuited`) the closed forms do. Tensors whose rows are not dense, or take more
    than two strides, are copied; so are all but one dtype of several teachers. The gradient has the student's shape, and its
    dtype but
    for float16, whose gradient is float32.
    """
    suited = [task for task in tasks if unsuited(task) is None]
    done: dict[int, RowLosses] = {}
    for device in dict.fromkeys(task.student.device for task in suited):
        here = [task for task in suited if task.student.device == device]
        with torch.cuda.device(device if device.type == "cuda" else -1):
            done.update(zip(map(id, here), _run(here, device, gradient=gradient), strict=True))
    return [
        done[id(task)] if id(task) in done else run_rows(task, block_losses, most=UNSUITED_BLOCK, gradient=gradient)
        for task in tasks
    ]


def _run(tasks: Sequence[RowTask], device: torch.device, *, gradient: bool) -> list[RowLosses]:
    masks = masks_of(tasks)
    shares = torch.empty(len(masks), dtype=torch.float32, device=device)
    terms = sum(len(task.terms) for task in tasks)
    records = Records(device, shares, {id(mask): number for number, mask in enumerate(masks)}, [()] * terms)
    _count(masks, shares, records.keep)

    spans, gradients, launches = [], [], []
    all_features, all_logits = [], []
    first = 0
    for task in tasks:
        layout = Layout.of(task)
        rows, shaped = layout.gradient() if gradient else (None, None)
        of_features, of_logits = _families(task, first)
        if of_features:
            all_features.append(Piece(layout, of_features, rows))
        if of_logits:
            all_logits.append(Piece(layout, of_logits, rows, add=bool(of_features)))
        spans.append((first, first + len(task.terms)))
        gradients.append(shaped)
        first += len(task.terms)
    launches += features.plan(records, all_features, gradient=gradient)
    launches += [each for piece in all_logits for each in distributions.plan(records, piece, gradient=gradient)]
    values, totals = launch_all(records, launches, spans)
    return [
        RowLosses(values[first:last], totals[number], slopes)
        for number, ((first, last), slopes) in enumerate(zip(spans, gradients, strict=True))
    ]


def _families(task: RowTask, first: int) -> tuple[list[Numbered], list[Numbered]]:
    """The terms of a task on features and on logits, numbered in this order."""
    positions = sorted(range(len(task.terms)), key=lambda position: task.terms[position].form.family != "features")
    numbered = [Numbered(first + rank, first + position, task.terms[position]) for rank, position in enumerate(positions)]
    return (
        [each for each in numbered if each.term.form.family == "features"],
        [each for each in numbered if each.term.form.family != "features"],
    )


def _count(masks: Sequence[Tensor], shares: Tensor, keep: list[Tensor]) -> None:
    """Count what every mask counts, before anything reads it."""
    if not masks:
        return
    table, counts = Table(), []
    for mask in masks:
        view, count, times = counted_part(mask)
        keep.append(view.tensor)
        counts.append((*view.record, count, times))
    table.add(counts)
    launch(sums.shares, (len(masks),), on_device(tuple(table.numbers), shares.device), shares, warps=8, BLOCK=SUMMED)


def launch_all(records: Records, launches: Sequence[Launch], spans: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Upload the table, launch everything, and sum: the values of all terms, and the totals of all tasks."""
    terms = records.table.add(records.terms)
    tasks = records.table.add([(0, 0, 0, 0, 0, 0, *span) for span in spans])
    table = on_device(tuple(records.table.numbers), records.device)
    part, values, totals = (
        torch.empty(size, dtype=torch.float32, device=records.device)
        for size in (records.parts, len(records.terms), len(spans))
    )
    for each in launches:
        sections = [table[start:] for start in each.sections]
        arguments: tuple[Tensor | int, ...] = (*sections, table[terms:], part, *each.numbers)
        launch(each.kernel, each.grid, *arguments, warps=each.warps, registers=each.registers, **each.constants)
    launch(sums.totals, (len(spans),), table[tasks:], table[terms:], part, values, totals, warps=8, BLOCK=SUMMED)
    return values, totals
