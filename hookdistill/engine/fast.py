"""Which terms have a fast form here, and which implementation computes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..attention import AttentionCall, hidden_at
from ..errors import MatchError
from ..fused.attention import AttentionTask, Heads, Kind, attention_losses
from ..fused.compiler import compiled_block, compiler_available
from ..fused.forms import FORMS
from ..fused.rows import RowLosses, RowTask, RowTerm, block_losses, run_rows
from ..kernels.availability import unavailable, unsuited
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
TOGETHER_BELOW = 8 << 20
"""Bytes of a student tensor below which its terms wait for those of others: launching a kernel takes longer than it runs."""

Masks = dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]]
"""Masks as they were given and as they fit positions, by id and positions: terms with the same mask share what is counted."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a term, and why that."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})" if self.reason else self.implementation


Task = RowTask | AttentionTask


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The values of a task's terms, their weighted sum, and the gradient of that by tensors of the student."""

    values: Sequence[Tensor]
    total: Tensor
    slopes: Sequence[tuple[Tensor, Tensor]]


def row_term(
    spec: LossSpec,
    student: Tensor,
    other: Tensor,
    arguments: Mapping[str, Any],
    coefficient: float | Tensor,
    masks: Masks,
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
    valid = None if mask is None else _fitted(mask, positions, masks)
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


def attention_task(
    spec: LossSpec,
    word: str,
    student: AttentionCall,
    teacher: AttentionCall,
    arguments: Mapping[str, Any],
    coefficient: float | Tensor,
) -> AttentionTask | str:
    """The loss between two attentions from their queries and keys; or why their maps are needed.

    Args:
        word: the selector, ``attention`` or ``attention_scores``.
    """
    kinds: dict[str, Kind] = {"attention_kl": "kl", "attention_mse": "mse" if word == "attention" else "scores mse"}
    kind = kinds.get(spec.name)
    if kind is None or spec.function is not registered_losses()[spec.name].function or (kind == "kl" and word != "attention"):
        return "no form without a map"
    if arguments.get("reduction", "mean") not in ("mean", "sum"):
        return f"reduction={arguments['reduction']!r}"
    sides = []
    for call in (student, teacher):
        mask, tensors = call.mask, (call.query, call.key)
        if call.scores is not None or call.score_mod is not None or call.mask_mod is not None:
            return "the attention makes its own map"
        if mask is not None and (mask.requires_grad or type(mask) is not Tensor or mask.ndim > 4):
            return "kind of mask"
        if reason := next(filter(None, map(_unusual, tensors)), None):
            return reason
        if call.query.ndim != 4 or call.key.ndim != 4 or call.query.device != student.query.device:
            return "shapes"
        sides.append(
            Heads(
                query=call.query,
                key=call.key,
                mask=mask,
                is_causal=call.is_causal,
                scale=call.scale,
                never=hidden_at(call),
            )
        )
    shapes = [(side.query.shape[:3], side.key.shape[2]) for side in sides]
    mask = arguments.get("mask")
    batch, _, queries, _ = student.query.shape
    keys = student.key.shape[2]
    valid = None
    if mask is not None:
        fits = (batch, queries) if queries == keys else None, (batch, queries, keys), (*shapes[0][0], keys)
        if mask.shape not in fits:
            return "arguments"
        valid = mask if mask.dtype is torch.bool else mask != 0
        valid = valid.unsqueeze(1) if valid.ndim == 3 else valid
    if shapes[0] != shapes[1]:
        return "shapes"
    mean = arguments.get("reduction", "mean") == "mean"
    return AttentionTask(kind=kind, student=sides[0], teacher=sides[1], valid=valid, mean=mean, coefficient=coefficient)


def _fitted(mask: Any, positions: Sequence[int], masks: Masks) -> Tensor:
    key = (id(mask), tuple(positions))
    if key not in masks:
        masks[key] = (mask, fit_mask(mask, positions))
    return masks[key][1]


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


def choose(task: Task, impl: str) -> Choice:
    """What computes a task.

    Raises:
        MatchError: ``impl`` asks for what is not there.
    """
    device = task.student.device if isinstance(task, RowTask) else task.student.query.device
    kernels = impl == "triton" or (impl == "auto" and device.type == "cuda")
    missing = unavailable(device) if kernels else None
    if impl == "triton" and missing is not None:
        raise MatchError(f"impl='triton' {missing}")
    if isinstance(task, AttentionTask):
        return Choice("chunked", "no map")
    if missing is not None:
        return Choice("chunked", f"Triton {missing}")
    reason = unsuited(task) if kernels else None
    if kernels and reason is None:
        return Choice("triton", "interpreted" if device.type == "cpu" else "")
    if not compiler_available():
        return Choice("chunked", "no C++ compiler found")
    if impl == "compiled" or task.student.numel() >= COMPILED_FROM:
        return Choice("compiled", reason or "")
    return Choice("chunked", reason or "small")


def run(task: Task, choice: Choice, *, gradient: bool) -> Computed:
    """Compute a task. Without gradients, as in an evaluation, nothing is worth a compilation of its own."""
    with _plainly():
        if isinstance(task, AttentionTask):
            attention = attention_losses(task, gradient=gradient)
            slopes = ((task.student.query, attention.query), (task.student.key, attention.key))
            return Computed([attention.value], attention.total, [(to, slope) for to, slope in slopes if slope is not None])
        if choice.implementation == "compiled" and gradient:
            rows = run_rows(task, compiled_block, most=COMPILED_CHUNK, gradient=gradient)
        else:
            rows = run_rows(task, block_losses, most=CHUNK, gradient=gradient)
        return _computed(task, rows)


def waits(student: Tensor, impl: str) -> bool:
    """Whether the terms of a student tensor had better wait for those of others, to be launched with them."""
    asked = impl == "triton" or (impl == "auto" and student.device.type == "cuda")
    return asked and student.numel() * student.itemsize < TOGETHER_BELOW and unavailable(student.device) is None


def run_together(tasks: Sequence[RowTask], *, gradient: bool) -> list[Computed]:
    """Compute tasks for which `choose` says Triton."""
    from ..kernels.rows import run_rows_triton

    with _plainly():
        return [_computed(*each) for each in zip(tasks, run_rows_triton(tasks, gradient=gradient), strict=True)]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Without gradients and autocast."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _computed(task: RowTask, rows: RowLosses) -> Computed:
    task.terms.clear()  # and with them the teacher's tensors
    found = [] if rows.gradient is None else [(task.student, rows.gradient)]
    return Computed(list(rows.values.unbind()), rows.total, found)
