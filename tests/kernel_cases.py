"""Row-wise losses by kernels, held against their definitions in float64 and against the error of these in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookdistill import losses
from hookdistill.fused.forms import FORMS
from hookdistill.fused.rows import RowLosses, RowTask, RowTerm
from hookdistill.kernels.availability import interpreted
from hookdistill.kernels.rows import run_rows_triton

ARGUMENTS = {
    "smooth_l1": {"beta": 0.3},
    "huber": {"delta": 0.4},
    "js": {"beta": 0.3},
    "skew_kl": {"alpha": 0.2},
    "cross_entropy": {"label_smoothing": 0.1},
}
FEATURES = [name for name, form in FORMS.items() if form.family == "features"]
DISTRIBUTIONS = [name for name, form in FORMS.items() if form.family == "distributions"]
LOGITS = [*DISTRIBUTIONS, "cross_entropy"]
HALF = (torch.bfloat16, torch.float16)
EPSILON = torch.finfo(torch.float32).eps


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0, device: Any = "cpu") -> Tensor:
    """Numbers that do not depend on dtype and device."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw, dtype=torch.float64) * spread).to(device, dtype)


def labels(*shape: int, classes: int, device: Any = "cpu") -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(7)).to(device)


def some(*shape: int, seed: int = 1, device: Any = "cpu") -> Tensor:
    """A mask with about two of three entries."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.67).to(device)


def term(name: str, other: Tensor, **kwargs: Any) -> RowTerm:
    constants = {**FORMS[name].constants, **kwargs.pop("constants", ARGUMENTS.get(name, {}))}
    return RowTerm(form=FORMS[name], other=other, constants=tuple(constants.items()), **kwargs)


def computed(*tasks: RowTask, gradient: bool = True) -> list[RowLosses]:
    """By kernels, with all new memory full of NaN, and nothing that is given changed."""
    before = [(tensor, tensor.clone()) for task in tasks for tensor in (task.student, *_others(task))]
    torch.use_deterministic_algorithms(True)
    try:
        found = run_rows_triton(tasks, gradient=gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor, copy in before:
        assert same_bits(tensor, copy)
    return found


def same_bits(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[one.itemsize]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def _others(task: RowTask) -> list[Tensor]:
    return [tensor for term in task.terms for tensor in (term.other, term.valid) if tensor is not None]


def defined(task: RowTask, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """The values of the terms, and the gradient of their weighted sum, by their definitions under autograd."""
    student = task.student.detach().to(dtype or task.student.dtype).requires_grad_()
    values, total = [], 0.0
    for each in task.terms:
        other = each.other if not each.other.is_floating_point() else each.other.to(dtype or each.other.dtype)
        heat: dict[str, Any] = {}
        if each.form.family == "distributions":
            heat = {"temperature": _float(each.temperature), "vocabulary": "padded" if each.padded else "shared"}
        value = getattr(losses, each.form.name)(
            student,
            other,
            mask=each.valid,
            reduction="mean" if each.mean else "sum",
            dim=task.dim,
            **dict(each.constants),
            **heat,
        )
        values.append(value.detach())
        total = total + value * _float(each.coefficient)
    (gradient,) = torch.autograd.grad(total, student)
    return torch.stack(values), gradient


def check(task: RowTask, found: RowLosses | None = None) -> RowLosses:
    """The error against float64 is no larger than 1.5 times that of the definition in the same dtype, plus rounding.

    The interpreter cuts bfloat16 off where a GPU rounds, so that there the truth cut off is what to compare with.
    """
    found = computed(task)[0] if found is None else found
    values, gradient = defined(task, torch.float64)
    eager_values, eager_gradient = defined(task)
    assert found.gradient is not None
    assert found.gradient.shape == task.student.shape
    assert found.gradient.dtype is (torch.float32 if task.student.dtype is torch.float16 else task.student.dtype)
    steep = sum(abs(_float(each.coefficient)) * _float(each.temperature) for each in task.terms)
    mine = distance(found.gradient.to(task.student.dtype), gradient)
    inherent = distance(eager_gradient, gradient)
    if interpreted() and task.student.dtype is torch.bfloat16:
        inherent = max(inherent, distance(cut_off(gradient), gradient))
    allowed = 1.5 * inherent + 4 * EPSILON * gradient.norm().item() + EPSILON * steep
    assert mine <= allowed, (mine, allowed)
    for position, (value, eager, true) in enumerate(zip(found.values, eager_values, values, strict=True)):
        heat = max(_float(task.terms[position].temperature) ** 2, 1.0)
        bound = 1.5 * distance(eager, true) + 8 * EPSILON * (abs(true.item()) + heat)
        assert distance(value, true) <= bound, (task.terms[position].form.name, value, eager, true)
    coefficients = torch.tensor([_float(each.coefficient) for each in task.terms], dtype=torch.float64)
    total = (found.values.double().cpu() * coefficients).sum()
    torch.testing.assert_close(found.total.double().cpu(), total, rtol=1e-5, atol=1e-6)
    return found


def cut_off(tensor: Tensor) -> Tensor:
    """Without the bits that bfloat16 has no room for."""
    return (tensor.float().view(torch.int32) & ~0xFFFF).view(torch.float32)


def distance(one: Tensor, other: Tensor) -> float:
    found = (one.double() - other.double()).norm().item()
    return math.inf if math.isnan(found) else found


def _float(number: float | Tensor) -> float:
    return float(number)


def terms(names: Sequence[str], other: Tensor, target: Tensor | None = None, **kwargs: Any) -> list[RowTerm]:
    """One term for each name, with weights of their own; labels are compared with ``target``."""
    found = []
    for number, name in enumerate(names):
        options = {"coefficient": 0.5 + number, **kwargs}
        if FORMS[name].family != "distributions":
            options.pop("temperature", None)
        compared = target if FORMS[name].family == "labels" else other
        assert compared is not None
        found.append(term(name, compared, **options))
    return found
