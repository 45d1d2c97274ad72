"""Which terms have a fast form here, and which implementation computes it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..attention import AttentionCall, hidden_at
from ..errors import MatchError
from ..fused.attention import AttentionTask, Heads, Kind, attention_losses
from ..fused.compiler import compiled_block, compiler_available
from ..fused.forms import FORMS
from ..fused.head import Head, HeadTask, head_losses
from ..fused.rows import RowTask, RowTerm, block_losses, run_rows
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
HEAD_CHUNK = 1 << 20
"""The same within a block of logits that is in memory already."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What computes a term, and why that."""

    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.implementation} ({self.reason})" if self.reason else self.implementation


Task = RowTask | AttentionTask | HeadTask


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The values of a task's terms, their weighted sum, and the gradient of that by tensors of the student."""

    values: Sequence[Tensor]
    total: Tensor
    slopes: Sequence[tuple[Tensor, Tensor]]


def row_term(
    spec: LossSpec, student: Tensor | Head, other: Tensor | Head, arguments: Mapping[str, Any], coefficient: float | Tensor
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
    dim, rank = int(arguments.get("dim", -1)), len(student.shape)
    if not -rank <= dim < rank or not _is_real(student, other):
        return "arguments"
    positions = [size for number, size in enumerate(student.shape) if number != dim % rank]
    if labels and isinstance(other, Tensor) and other.is_floating_point():
        return "probabilities as target"
    if other.shape != (torch.Size(positions) if labels else student.shape) or (labels and not positions):
        return "shapes"
    mask = arguments.get("mask")
    valid = None if mask is None else fit_mask(mask, positions)
    if labels and isinstance(other, Tensor):
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


def _is_real(student: Tensor | Head, other: Tensor | Head) -> bool:
    floating = isinstance(student, Head) or student.is_floating_point()
    return floating and not (isinstance(other, Tensor) and other.is_complex())


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


def _unusual(tensor: Tensor | Head) -> str | None:
    if isinstance(tensor, Head):
        parts = (tensor.hidden, tensor.weight, *([] if tensor.bias is None else [tensor.bias]))
        return next(filter(None, map(_unusual, parts)), None)
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
    if impl == "triton":
        raise MatchError("impl='triton' needs tensors on a CUDA device")
    if isinstance(task, AttentionTask):
        return Choice("chunked", "no map")
    head = "head and loss in one" if isinstance(task, HeadTask) else ""
    if not compiler_available():
        return Choice("chunked", head or "no C++ compiler found")
    if impl == "compiled" or task.student.shape.numel() >= COMPILED_FROM:
        return Choice("compiled", head)
    return Choice("chunked", head or "small")


def run(task: Task, choice: Choice, *, gradient: bool) -> Computed:
    """Compute a task. Without gradients, as in an evaluation, nothing is worth a compilation of its own."""
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if isinstance(task, AttentionTask):
            attention = attention_losses(task, gradient=gradient)
            slopes = ((task.student.query, attention.query), (task.student.key, attention.key))
            return Computed([attention.value], attention.total, [(to, slope) for to, slope in slopes if slope is not None])
        compiled = choice.implementation == "compiled" and gradient
        if isinstance(task, HeadTask):
            block, most = (compiled_block, HEAD_CHUNK) if compiled else (block_losses, CHUNK)
            head = head_losses(task, block, most=most, gradient=gradient)
            task.terms.clear()
            return Computed(list(head.values.unbind()), head.total, head.slopes)
        if compiled:
            rows = run_rows(task, compiled_block, most=COMPILED_CHUNK, gradient=gradient)
        else:
            rows = run_rows(task, block_losses, most=CHUNK, gradient=gradient)
        task.terms.clear()  # and with them the teacher's tensors
        found = [] if rows.gradient is None else [(task.student, rows.gradient)]
        return Computed(list(rows.values.unbind()), rows.total, found)
