"""Which terms have a fast form here, and which implementation computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..errors import MatchError
from ..fused.compiler import compiled_block, compiler_available
from ..fused.forms import FORMS
from ..fused.rows import RowLosses, RowTask, RowTerm, block_losses, run_rows
from ..losses.reduction import fit_mask
from ..losses.registry import LossSpec, registered_losses

Implementation = Literal["auto", "eager", "compiled", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

COMPILED_FROM = 1 << 20
"""Elements of a student tensor from which on compiling a loss for the CPU pays: it takes seconds, once in a process."""
CHUNK = 1 << 18
"""Elements of a block of the uncompiled forms: a megabyte in float32, which stays in the cache between operations."""
COMPILED_CHUNK = 1 << 22
"""The same for compiled ones, which make few passes; it bounds what the compiler may buffer."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a term, and why that."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})" if self.reason else self.implementation


def row_term(
    spec: LossSpec, student: Tensor, other: Tensor, arguments: Mapping[str, Any], coefficient: float | Tensor
) -> tuple[RowTerm, int] | str:
    """The term in closed form and the dimension of its features or classes; or why it has none.

    What is wrong with its tensors is not said here: the eager loss does that.

    Raises:
        LossError: the mask does not fit.
    """
    form = FORMS.get(spec.name)
    if form is None or spec.function is not registered_losses()[spec.name].function:
        return "no closed form"
    labels = form.family == "labels"
    known = {"mask", "reduction", "dim", "temperature", *form.constants, *(("ignore_index", "causal_shift") if labels else ())}
    if unknown := [name for name in arguments if name not in known]:
        return f"no closed form with {unknown[0]}="
    constants = {name: arguments.get(name, default) for name, default in form.constants.items()}
    if not all(isinstance(value, (int, float)) for value in constants.values()) or not form.allows(constants):
        return "arguments"
    if arguments.get("reduction", "mean") not in ("mean", "sum"):
        return f"reduction={arguments['reduction']!r}"
    if reason := _unusual(student) or _unusual(other):
        return reason
    dim = int(arguments.get("dim", -1))
    if not student.is_floating_point() or not -student.ndim <= dim < student.ndim or other.is_complex():
        return "arguments"
    positions = [size for number, size in enumerate(student.shape) if number != dim % student.ndim]
    if other.shape != (torch.Size(positions) if labels else student.shape) or (labels and other.is_floating_point()):
        return "probabilities as target" if labels and other.shape == student.shape else "shapes"
    mask = arguments.get("mask")
    valid = None if mask is None else fit_mask(mask, positions)
    if labels:
        if not positions:
            return "shapes"
        other, valid = _labels(other, valid, int(arguments.get("ignore_index", -100)), bool(arguments.get("causal_shift")))
    temperature = arguments.get("temperature", 1.0)
    if isinstance(temperature, Tensor) and temperature.ndim:
        return "arguments"
    term = RowTerm(
        form=form,
        other=other,
        constants=tuple((name, float(value)) for name, value in constants.items()),
        valid=valid,
        mean=arguments.get("reduction", "mean") == "mean",
        temperature=temperature,
        coefficient=coefficient,
    )
    return term, dim


def _labels(labels: Tensor, valid: Tensor | None, ignored: int, shift: bool) -> tuple[Tensor, Tensor]:
    """Labels without those that do not count, which become class 0, and the positions that do.

    A shift leaves the rows in place: the last token predicts nothing.
    """
    counts = labels != ignored
    valid = counts if valid is None else valid & counts
    if shift:
        labels, valid = labels.roll(-1, -1), valid.roll(-1, -1)
        valid[..., -1] = False
    return torch.where(valid, labels, 0).long(), valid


def _unusual(tensor: Tensor) -> str | None:
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"{type(tensor).__name__} instead of a plain tensor"
    if tensor.layout is not torch.strided or tensor.device.type not in ("cpu", "cuda") or tensor.is_nested:
        return "kind of tensor"
    return "empty" if not tensor.numel() else None


def inactive(impl: str) -> str | None:
    """Why no fast form is to be used at all, if that is so."""
    if impl == "eager":
        return "asked for"
    if torch.compiler.is_compiling():
        return "inside torch.compile"
    return "inside a function transform" if torch._C._are_functorch_transforms_active() else None


def choose(task: RowTask, impl: str) -> Choice:
    """What computes a task.

    Raises:
        MatchError: ``impl`` asks for what is not there.
    """
    size = task.student.numel()
    if impl == "triton":
        raise MatchError("impl='triton' needs tensors on a CUDA device")
    if not compiler_available():
        return Choice("chunked", "no C++ compiler found")
    if impl == "compiled" or size >= COMPILED_FROM:
        return Choice("compiled", "")
    return Choice("chunked", "small")


def run(task: RowTask, choice: Choice, *, gradient: bool) -> RowLosses:
    """Compute a task. Without gradients, as in an evaluation, nothing is worth a compilation of its own."""
    with torch.no_grad(), torch.autocast(task.student.device.type, enabled=False):
        if choice.implementation == "compiled" and gradient:
            return run_rows(task, compiled_block, most=COMPILED_CHUNK, gradient=gradient)
        return run_rows(task, block_losses, most=CHUNK, gradient=gradient)
