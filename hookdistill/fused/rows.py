"""Row-wise losses of one student tensor: every term in one pass over its rows, values and gradient together.

A `RowTask` is a student tensor and all terms on it. It is cut into blocks of rows; `block_losses` does one block, as it stands
or compiled (`compiler`), and writes the block's gradient. So nothing of the size of the tensors is held but the gradient, and
the teacher's tensors are free as soon as this returns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..losses.reduction import working_dtype
from .forms import FORMS, Form, Softmax

Block = tuple[slice, ...]
BlockFunction = Callable[["Program", Tensor, Sequence[Tensor], Sequence[Tensor], Tensor, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowTerm:
    """One loss on a student tensor.

    Args:
        form: its closed form.
        constants: the loss's own arguments.
        other: the teacher's tensor, of the student's shape; or labels, of the shape of its positions. Where logits are made
            block by block, the teacher's `head.Head`.
        valid: bool, which positions count; ``None`` for all.
        mean: divide by their number.
        temperature: a number or a tensor without dimensions; one for features and labels.
        coefficient: what the gradient is multiplied by; likewise.
        padded: where student and teacher have different numbers of classes, the smaller side's others have a logit of -inf;
            else both lose the classes that one of them lacks.
    """

    form: Form
    other: Any
    constants: tuple[tuple[str, float], ...] = ()
    valid: Tensor | None = None
    mean: bool = True
    temperature: float | Tensor = 1.0
    coefficient: float | Tensor = 1.0
    padded: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowTask:
    """A student tensor, which of its dimensions holds the features or classes, and the terms on it."""

    student: Tensor
    dim: int = -1
    terms: list[RowTerm] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class RowLosses:
    """The values of the terms, ``[terms]``, without their coefficients; their sum with them, and its gradient."""

    values: Tensor
    total: Tensor
    gradient: Tensor | None


@dataclass(frozen=True, slots=True)
class ProgramTerm:
    """A term by numbers: of its teacher tensor, its row weights and its temperature among those of the program."""

    form: str
    constants: tuple[tuple[str, float], ...]
    other: int
    weight: int
    masked: bool
    temperature: int
    classes: int
    """How many are compared."""


@dataclass(frozen=True, slots=True)
class Program:
    """What is computed for a block, apart from the tensors; equal programs can share compiled code."""

    terms: tuple[ProgramTerm, ...]
    width: int
    work: torch.dtype


def block_losses(
    program: Program,
    student: Tensor,
    others: Sequence[Tensor],
    weights: Sequence[Tensor],
    scalars: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """The terms' values on some rows, ``[terms]``; their gradient is written to ``gradient``, unless that is ``None``.

    Args:
        student: ``[rows, width]``.
        others: teachers ``[rows, width]`` and labels ``[rows]``.
        weights: for each row its share in the mean, ``[rows]``, zero where it does not count.
        scalars: the coefficients of the terms, then the temperatures.
    """
    s = student.to(program.work)
    softmaxes: dict[tuple[int, int, int], Softmax] = {}  # by teacher, the student's being -1, temperature and classes

    def softmax(which: int, temperature: int, classes: int) -> Softmax:
        key = (which, temperature, classes)
        if key not in softmaxes:
            logits = with_classes(s if which < 0 else others[which].to(program.work), classes, -math.inf)
            softmaxes[key] = Softmax.of(logits if temperature < 0 else logits / scalars[len(program.terms) + temperature])
        return softmaxes[key]

    values, total = [], None
    for number, term in enumerate(program.terms):
        form, constants = FORMS[term.form], dict(term.constants)
        weight, coefficient = weights[term.weight], scalars[number]
        if form.family == "features":
            value, slope = form.function(s, others[term.other].to(program.work), program.width, constants)
        elif form.family == "labels":
            value, slope = form.function(softmax(-1, -1, program.width), others[term.other], constants)
        else:
            heat = scalars[len(program.terms) + term.temperature]
            ours, theirs = (softmax(which, term.temperature, term.classes) for which in (-1, term.other))
            value, slope = form.function(ours, theirs, constants)
            value, coefficient = value * heat * heat, coefficient * heat
        counts = weight != 0
        if term.masked:  # NaN times zero is NaN
            value = torch.where(counts, value, 0.0)
        values.append((value * weight).sum())
        if gradient is not None:
            slope = slope * (weight * coefficient).unsqueeze(-1)
            if term.masked:
                slope = torch.where(counts.unsqueeze(-1), slope, 0.0)
            slope = with_classes(slope, program.width, 0.0) if form.family == "distributions" else slope
            total = slope if total is None else total + slope
    if gradient is not None and total is not None:
        gradient.copy_(total)
    return torch.stack(values)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Terms arranged for `block_losses`: the program, and what it takes besides the student's rows.

    ``others`` are the distinct teachers and labels, ``weights`` the distinct row weights, in the shape of the positions.
    """

    program: Program
    others: Sequence[Any]
    weights: Sequence[Tensor]
    scalars: Tensor


def layout_of(terms: Sequence[RowTerm], shape: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of terms on a student tensor of ``shape`` with its features or classes in ``dim``."""
    others, other_number = _distinct([term.other for term in terms])
    positions = [size for number, size in enumerate(shape) if number != dim % len(shape)]
    weights, weight_number = _row_weights(terms, positions, dtype, device)
    temperatures, temperature_number = _temperatures(terms)
    numbered = (
        ProgramTerm(
            term.form.name,
            term.constants,
            other_number[number],
            weight_number[number],
            term.valid is not None,
            temperature_number[number],
            _classes(term, shape[dim], dim),
        )
        for number, term in enumerate(terms)
    )
    scalars = _scalars([*(term.coefficient for term in terms), *temperatures], device, dtype)
    return Layout(Program(tuple(numbered), shape[dim], dtype), others, weights, scalars)


def with_classes(rows: Tensor, classes: int, fill: float) -> Tensor:
    """Rows with as many columns, the last ones left out or filled in."""
    missing = classes - rows.shape[-1]
    if missing == 0:
        return rows
    return functional.pad(rows, (0, missing), value=fill) if missing > 0 else rows[..., :classes]


def _classes(term: RowTerm, ours: int, dim: int) -> int:
    if term.form.family != "distributions":
        return ours
    theirs = term.other.shape[dim]
    return int(max(ours, theirs) if term.padded else min(ours, theirs))


def run_rows(task: RowTask, function: BlockFunction, *, most: int, gradient: bool) -> RowLosses:
    """All terms of a task, in blocks of at most ``most`` elements (but at least one row)."""
    student, dtype = task.student.detach(), working_dtype(task.student, *(term.other for term in task.terms))
    layout = layout_of(task.terms, student.shape, task.dim, dtype, student.device)
    cut = _cut(task)
    ours = cut.rows(student)
    theirs = [cut.rows(o) if o.ndim == student.ndim else cut.positions(o) for o in layout.others]
    weights = [cut.positions(weight) for weight in layout.weights]
    slopes = torch.empty_like(student, dtype=gradient_dtype(student)) if gradient else None
    out = None if slopes is None else cut.rows(slopes)
    values = torch.zeros(len(task.terms), dtype=dtype, device=student.device)
    flat = ours.ndim == 2
    for block in blocks(ours.shape, most):
        part = None if out is None else out[block] if flat else out.new_empty(ours[block].shape)
        values += function(
            layout.program,
            _flat(ours[block]),
            [_flat(o[block]) if o.ndim == ours.ndim else o[block].reshape(-1) for o in theirs],
            [w[block].reshape(-1) for w in weights],
            layout.scalars,
            None if part is None else _flat(part),
        )
        if out is not None and part is not None and not flat:
            out[block] = part
    return RowLosses(values, values @ layout.scalars[: len(task.terms)], slopes)


def gradient_dtype(student: Tensor) -> torch.dtype:
    """What a gradient is kept in until it is asked for: float16 would lose small ones before a loss scale can save them."""
    return torch.float32 if student.dtype is torch.float16 else student.dtype


def blocks(shape: Sequence[int], most: int) -> Iterator[Block]:
    """Slices of the leading dimensions (all but the last) that cut a tensor into blocks of about ``most`` elements."""
    *leading, width = shape
    inner = [width * math.prod(leading[dim + 1 :]) for dim in range(len(leading))]
    cut = next((dim for dim, size in enumerate(inner) if size <= most), len(leading) - 1)
    step = max(1, most // max(inner[cut], 1))
    outer = itertools.product(*(range(size) for size in leading[:cut]))
    for index in outer:
        for start in range(0, leading[cut], step):
            yield (*(slice(i, i + 1) for i in index), slice(start, min(start + step, leading[cut])))


class _Cut:
    """How tensors of the student's shape are seen as rows: features last, and ``[rows, width]`` where that is a view."""

    def __init__(self, dim: int, flat: bool) -> None:
        self.dim, self.flat = dim, flat

    def rows(self, tensor: Tensor) -> Tensor:
        last = tensor.movedim(self.dim, -1)
        return last.view(-1, last.shape[-1]) if self.flat else last.unsqueeze(0) if last.ndim == 1 else last

    def positions(self, tensor: Tensor) -> Tensor:
        """The same for one entry for each position; these are small, and may be copied."""
        return tensor.reshape(-1) if self.flat else tensor.unsqueeze(0) if tensor.ndim == 0 else tensor


class _Whole(_Cut):
    """For losses that are sums over single elements: a row is all of one item of the batch."""

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.view(tensor.shape[0], -1)

    def positions(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1)[:, 0]


def _cut(task: RowTask) -> _Cut:
    student, dim = task.student, task.dim % task.student.ndim
    tensors = [student, *(term.other for term in task.terms if term.other.ndim == student.ndim)]
    if dim == student.ndim - 1:
        return _Cut(-1, all(_collapses(tensor) for tensor in tensors))
    elementwise = all(term.form.elementwise for term in task.terms) and dim > 0
    if elementwise and all(tensor.is_contiguous() for tensor in tensors) and all(map(_same_within_item, task.terms)):
        return _Whole(dim, flat=True)
    return _Cut(dim, flat=False)


def _collapses(tensor: Tensor) -> bool:
    """Whether the leading dimensions can be seen as one, with the last one dense."""
    strides, shape = tensor.stride(), tensor.shape
    if tensor.ndim == 0 or strides[-1] != 1:
        return False
    real = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in itertools.pairwise(real)) and (
        not real or real[-1][1] >= shape[-1]
    )


def _same_within_item(term: RowTerm) -> bool:
    valid = term.valid
    return valid is None or all(stride == 0 for stride in valid.stride()[1:])


def _distinct(things: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The things without repetitions, and for each its number among them."""
    found: dict[int, int] = {}
    distinct: list[Any] = []
    for thing in things:
        if id(thing) not in found:
            found[id(thing)] = len(distinct)
            distinct.append(thing)
    return distinct, [found[id(thing)] for thing in things]


def _row_weights(
    terms: Sequence[RowTerm], positions: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[int]]:
    """For each position its share in the mean of a term: terms with the same mask have theirs in common."""
    found: dict[tuple[int | None, bool], int] = {}
    weights: list[Tensor] = []
    numbers = []
    for term in terms:
        key = (None if term.valid is None else id(term.valid), term.mean)
        if key not in found:
            found[key] = len(weights)
            if term.valid is None:
                share = 1 / max(math.prod(positions), 1) if term.mean else 1.0
                weights.append(torch.full((), share, dtype=dtype, device=device).expand(positions))
            else:
                counted = term.valid.to(dtype)
                weights.append(counted / counted.sum().clamp_min(1) if term.mean else counted)
        numbers.append(found[key])
    return weights, numbers


def _temperatures(terms: Sequence[RowTerm]) -> tuple[list[float | Tensor], list[int]]:
    temperatures: list[float | Tensor] = []
    numbers = []
    for term in terms:
        same = [n for n, each in enumerate(temperatures) if each is term.temperature or _equal(each, term.temperature)]
        numbers.append(same[0] if same else len(temperatures))
        if not same:
            temperatures.append(term.temperature)
    return temperatures, numbers


def _equal(one: float | Tensor, other: float | Tensor) -> bool:
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other


def _scalars(numbers: Sequence[float | Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    if not any(isinstance(number, Tensor) for number in numbers):
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.stack([torch.as_tensor(number, dtype=dtype, device=device) for number in numbers])


def _flat(block: Tensor) -> Tensor:
    return block if block.ndim == 2 else block.reshape(-1, block.shape[-1])
