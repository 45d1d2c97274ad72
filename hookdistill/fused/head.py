"""Losses between logits from what the heads get: the logits of neither model are ever whole in memory.

Rows of hidden states become logits of both models by two matrix products, logits become losses and their own gradient
(`rows.block_losses`, in place), and that goes back into hidden states, weight and bias by two more. Logits are float32 whatever
the weights are: rounded to bfloat16, those of a student close to its teacher would give a gradient that is a few per cent off.

On the CPU rows that no term counts, such as padding and prompts, are left out of the products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .rows import BlockFunction, RowTerm, blocks, gradient_dtype, layout_of

HEAD_BLOCK = 1 << 22
"""Logits of a block, of each model: 16 MiB in float32."""
FEWEST_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Head:
    """A linear head with its input: logits are ``softcap · tanh(scale · (hidden @ weightᵀ + bias) / softcap)``.

    Args:
        hidden: ``[*positions, width]``.
        weight: ``[classes, width]``.
        bias: ``[classes]``.
        softcap: ``None`` for no cap.
        compute: what the product is computed in on a GPU, if not in the dtype of the weight: that of autocast.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    compute: torch.dtype | None = None

    @property
    def shape(self) -> torch.Size:
        """That of the logits."""
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HeadTask:
    """A student's head and the terms on its logits, which compare them with those of a teacher's `Head`, or with labels."""

    student: Head
    terms: list[RowTerm] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class HeadLosses:
    """The values of the terms, without their coefficients; their sum with them, and its gradient by the student's tensors."""

    values: Tensor
    total: Tensor
    slopes: Sequence[tuple[Tensor, Tensor]]


def head_losses(task: HeadTask, function: BlockFunction, *, most: int, gradient: bool) -> HeadLosses:
    """Value and gradient; logits in blocks of `HEAD_BLOCK`, their losses in blocks of ``most`` elements."""
    ours = task.student
    dtype = torch.float64 if ours.hidden.dtype is torch.float64 else torch.float32
    layout = layout_of(task.terms, ours.shape, -1, dtype, ours.hidden.device)
    chosen = _counted_rows(layout.weights)
    weights = [_rows_of(weight.reshape(-1), chosen) for weight in layout.weights]
    student = _Logits(ours, chosen, dtype)
    others = [
        _Logits(o, chosen, dtype, student.most) if isinstance(o, Head) else _rows_of(o.reshape(-1), chosen)
        for o in layout.others
    ]
    slopes = _Slopes(ours, student.hidden, chosen, dtype) if gradient else None
    values = torch.zeros(len(task.terms), dtype=dtype, device=ours.hidden.device)
    for rows in student.cuts():
        mine = student.rows(rows)
        theirs = [other.rows(rows) if isinstance(other, _Logits) else other[rows] for other in others]
        for (part,) in blocks(mine.shape, most):
            out = torch.empty_like(mine[part]) if gradient else None
            shares = [weight[rows][part] for weight in weights]
            values += function(layout.program, mine[part], [other[part] for other in theirs], shares, layout.scalars, out)
            if out is not None:
                mine[part] = student.before_cap(out, mine[part])
        if slopes is not None:
            slopes.add(rows, mine)
    found = [] if slopes is None else slopes.found()
    return HeadLosses(values, values @ layout.scalars[: len(task.terms)], found)


def _counted_rows(weights: Sequence[Tensor]) -> Tensor | None:
    """The numbers of the rows that count in any term; ``None`` for all of them.

    Only on the CPU: elsewhere the host would have to wait for the device.
    """
    if any(weight.device.type != "cpu" or not any(weight.stride()) for weight in weights):
        return None  # one number for all rows: no mask
    counted = torch.stack([weight.reshape(-1) != 0 for weight in weights]).any(0)
    return None if counted.all() else counted.nonzero().squeeze(-1)


def _rows_of(tensor: Tensor, chosen: Tensor | None) -> Tensor:
    return tensor if chosen is None else tensor[chosen]


class _Logits:
    """Makes the logits of the chosen rows of a head, some at a time, always in the same memory."""

    def __init__(self, head: Head, chosen: Tensor | None, dtype: torch.dtype, most: int | None = None) -> None:
        self.head, self.dtype = head, dtype
        self.hidden = _rows_of(head.hidden.detach().reshape(-1, head.hidden.shape[-1]), chosen)
        self.weight = in_compute_dtype(head)
        count, classes = self.hidden.shape[0], self.weight.shape[0]
        self.most = most or max(1, min(count, max(FEWEST_ROWS, HEAD_BLOCK // classes)))
        self.bias = None if head.bias is None else head.bias.detach()
        self.memory: Tensor | None = None

    def cuts(self) -> Iterator[slice]:
        """The rows of each block."""
        for start in range(0, self.hidden.shape[0], self.most):
            yield slice(start, min(start + self.most, self.hidden.shape[0]))

    def rows(self, rows: slice) -> Tensor:
        """Logits ``[rows, classes]``; the next call overwrites them."""
        head, out = self.head, self._products(self.hidden[rows])
        if head.scale != 1:
            out *= head.scale
        return out if head.softcap is None else out.div_(head.softcap).tanh_().mul_(head.softcap)

    def _products(self, hidden: Tensor) -> Tensor:
        if self.dtype is torch.float32 and onednn_takes(hidden, self.weight, self.bias):
            self.memory = None  # let go before there is more: this operator has no out=
            self.memory = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
            return self.memory
        if self.memory is None:
            self.memory = torch.empty(self.most, self.weight.shape[0], dtype=self.dtype, device=hidden.device)
        out = self.memory[: hidden.shape[0]]
        product(hidden, self.weight.t(), out)
        return out if self.bias is None else out.add_(self.bias)

    def before_cap(self, slope: Tensor, logits: Tensor) -> Tensor:
        """The gradient by ``hidden @ weightᵀ``, from that by the logits."""
        head = self.head
        if head.softcap is not None:
            slope *= 1 - (logits / head.softcap).square()
        return slope if head.scale == 1 else slope.mul_(head.scale)


class _Slopes:
    """Adds up the gradient of weight and bias, and collects that of the chosen rows of the hidden states."""

    def __init__(self, head: Head, hidden: Tensor, chosen: Tensor | None, dtype: torch.dtype) -> None:
        self.head, self.weight = head, in_compute_dtype(head)
        self.hidden, self.chosen = hidden, chosen
        self.by_hidden = self._for(head.hidden, hidden.shape, dtype)
        self.by_weight = self._for(head.weight, head.weight.shape, dtype)
        self.by_bias = None if head.bias is None else self._for(head.bias, head.bias.shape, dtype)
        self.begun = False

    @staticmethod
    def _for(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=tensor.device) if tensor.requires_grad else None

    def add(self, rows: slice, slope: Tensor) -> None:
        """Of some rows, from the gradient by their products ``[rows, classes]``."""
        weight = self.weight
        if self.by_hidden is not None:
            product(slope.to(weight.dtype), weight, self.by_hidden[rows])
        if self.by_weight is not None:
            product(slope.t().to(weight.dtype), self.hidden[rows].to(weight.dtype), self.by_weight, add=self.begun)
        if self.by_bias is not None:
            by_rows = slope.sum(0)
            self.by_bias = self.by_bias + by_rows if self.begun else by_rows
        self.begun = True

    def found(self) -> list[tuple[Tensor, Tensor]]:
        """The tensors that want a gradient, each with its own."""
        head, by_hidden = self.head, self.by_hidden
        if not self.begun:  # no row at all
            for slope in (self.by_weight, self.by_bias):
                if slope is not None:
                    slope.zero_()
        if by_hidden is not None:
            if self.chosen is not None:
                every = by_hidden.new_zeros(head.shape[:-1].numel(), by_hidden.shape[-1])
                by_hidden = every.index_copy_(0, self.chosen, by_hidden)
            by_hidden = by_hidden.view(head.hidden.shape)
        pairs = ((head.hidden, by_hidden), (head.weight, self.by_weight), (head.bias, self.by_bias))
        return [
            (tensor, slope.to(gradient_dtype(tensor))) for tensor, slope in pairs if tensor is not None and slope is not None
        ]


def in_compute_dtype(head: Head) -> Tensor:
    """The weight in the dtype of the product."""
    weight = head.weight.detach()
    return weight.to(head.compute) if head.compute is not None and weight.device.type == "cuda" else weight


def onednn_takes(*tensors: Tensor | None) -> bool:
    """Whether oneDNN's linear layer, the one that compiled models use, is there for these tensors.

    A few hundred rows of float32 times 30522 x 768 weights took it 0.5 to 0.7 of the time of the BLAS behind ``torch.mm``.
    """
    return (
        bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and all(t is None or (t.device.type == "cpu" and t.dtype is torch.float32 and t.is_contiguous()) for t in tensors)
    )


def product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``left @ right`` into ``out``, or added to it, in the precision of ``out``."""
    if left.dtype is not right.dtype:
        left = left.to(right.dtype)
    if left.dtype is out.dtype:
        torch.addmm(out, left, right, out=out) if add else torch.mm(left, right, out=out)
    elif left.device.type == "cuda":  # tensor cores, summed and stored in float32
        wide = torch.mm(left, right, out_dtype=out.dtype)
        out.add_(wide) if add else out.copy_(wide)
    else:
        product(left.to(out.dtype), right.to(out.dtype), out, add=add)
