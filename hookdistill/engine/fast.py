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
from ..fused.attention import MAP_BLOCK, AttentionTask, Heads, Kind, attention_losses
from ..fused.compiler import compiled_block, compiled_scores, compiler_available
from ..fused.forms import FORMS
from ..fused.head import Head, HeadTask, head_losses
from ..fused.relations import RelationTask, relation_losses
from ..fused.rows import RowLosses, RowTask, RowTerm, block_losses, run_rows
from ..fused.scores import score_loss
from ..kernels.availability import unavailable, unsuited
from ..losses.reduction import fit_mask
from ..losses.registry import LossSpec, registered_losses

Implementation = Literal["auto", "eager", "compiled", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)

COMPILED_FROM = 1 << 20
"""Elements of a student tensor from which on compiling a loss for the CPU pays: it takes seconds, once in a process."""
CHUNK = 1 << 18
"""Elements of a block of the uncompiled forms: a megabyte in float32, which stays in the cache between operations."""
COMPILED_CHUNK = 1 << 21
"""The same for compiled ones, which make a few passes each: student, teacher and gradient fit in a cache of 32 MiB. KL over
30,522 classes took 1.6 times as long with twice as many, 1.3 times with an eighth."""
HEAD_CHUNK = 1 << 20
"""The same within a block of logits that is in memory already."""
COMPILED_MAP_BLOCK = 1 << 19
"""Entries of a block of a map for compiled losses. KL of attention over 512 keys took 1.7 times as long with an eighth, and 1.2
times with four times as many."""
WHOLE = 1 << 62
"""For kernels, which take a block of logits as it is."""
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


Task = RowTask | AttentionTask | RelationTask | HeadTask


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The values of a task's terms, their weighted sum, and the gradient of that by tensors of the student."""

    values: Sequence[Tensor]
    total: Tensor
    slopes: Sequence[tuple[Tensor, Tensor]]


def row_term(
    spec: LossSpec,
    student: Tensor | Head,
    other: Tensor | Head,
    arguments: Mapping[str, Any],
    coefficient: float | Tensor,
    masks: Masks | None = None,
) -> tuple[RowTerm, int] | str:
    """The term in closed form and the dimension of its features or classes; or why it has none.

    What is wrong with its tensors is not said here: the eager loss does that.

    Raises:
        LossError: the mask does not fit.
    """
    form = FORMS.get(spec.name)
    if form is None or spec.function is not registered_losses()[spec.name].function:
        return "no closed form"
    if unknown := [name for name in arguments if name not in {*_KNOWN[form.family], *form.constants}]:
        return f"no closed form with {unknown[0]}="
    constants = {name: arguments.get(name, default) for name, default in form.constants.items()}
    if not all(isinstance(value, (int, float)) for value in constants.values()) or not form.allows(constants):
        return "arguments"
    if arguments.get("reduction", "mean") not in ("mean", "sum"):
        return f"reduction={arguments['reduction']!r}"
    if reason := _unusual(student) or _unusual(other):
        return reason
    dim, rank = int(arguments.get("dim", -1)), len(student.shape)
    temperature = arguments.get("temperature", 1.0)
    if not -rank <= dim < rank or not _is_real(student, other) or (isinstance(temperature, Tensor) and temperature.ndim):
        return "arguments"
    positions = _without(student.shape, dim)
    if form.family == "labels":
        if isinstance(other, Tensor) and other.is_floating_point():
            return "probabilities as target"
        if not positions or other.shape != positions or not isinstance(other, Tensor):
            return "shapes"
        other, valid = _counted(arguments, positions, other, other.device, masks)
    else:
        if len(other.shape) != rank or _without(other.shape, dim) != positions:
            return "shapes"
        if not _classes_fit(form.name, student.shape[dim], other.shape[dim], arguments.get("vocabulary", "same")):
            return "shapes"
        target = arguments.get("target")
        if target is not None and (target.shape != positions or target.is_floating_point()):
            return "arguments"
        device = student.hidden.device if isinstance(student, Head) else student.device
        _, valid = _counted(arguments, positions, target, device, masks)
    term = RowTerm(
        form=form,
        other=other,
        constants=tuple((name, float(value)) for name, value in constants.items()),
        valid=valid,
        mean=arguments.get("reduction", "mean") == "mean",
        temperature=temperature,
        coefficient=coefficient,
        padded=arguments.get("vocabulary") == "padded",
    )
    return term, dim


_KNOWN = {
    "features": {"mask", "reduction", "dim"},
    "distributions": {"mask", "reduction", "dim", "temperature", "target", "ignore_index", "causal_shift", "vocabulary"},
    "labels": {"mask", "reduction", "dim", "ignore_index", "causal_shift"},
}


def _without(shape: Sequence[int], dim: int) -> torch.Size:
    return torch.Size(size for number, size in enumerate(shape) if number != dim % len(shape))


def _classes_fit(name: str, ours: int, theirs: int, vocabulary: str) -> bool:
    """Whether the numbers of classes can be compared; where they cannot, the eager loss says why."""
    if ours == theirs:
        return vocabulary in ("same", "shared", "padded")
    if vocabulary == "padded":  # the side that must cover the other is infinitely far from classes that it lacks
        return not (ours < theirs and name in ("kl", "soft_cross_entropy")) and not (theirs < ours and name == "reverse_kl")
    return vocabulary == "shared"


def _counted(
    arguments: Mapping[str, Any], positions: torch.Size, labels: Tensor | None, device: torch.device, masks: Masks | None
) -> tuple[Tensor, Tensor | None]:
    """Labels without those that do not count, which become class 0, and the positions that do; ``None`` for all.

    A shift leaves the rows in place: a token takes label and mask of the next, and the last one predicts nothing.
    """
    mask = arguments.get("mask")
    valid = None if mask is None else _fitted(mask, positions, masks)
    if labels is not None:
        labelled = labels != int(arguments.get("ignore_index", -100))
        valid = labelled if valid is None else valid & labelled
    if arguments.get("causal_shift") and positions:
        valid = torch.ones(positions, dtype=torch.bool, device=device) if valid is None else valid
        labels, valid = None if labels is None else labels.roll(-1, -1), valid.roll(-1, -1)
        valid[..., -1] = False
    if labels is None:
        return torch.empty(0), valid
    assert valid is not None
    return torch.where(valid, labels, 0).long(), valid


def _fitted(mask: Any, positions: Sequence[int], masks: Masks | None) -> Tensor:
    if masks is None:
        return fit_mask(mask, positions)
    key = (id(mask), tuple(positions))
    if key not in masks:
        masks[key] = (mask, fit_mask(mask, positions))
    return masks[key][1]


def relation_task(
    spec: LossSpec, student: Tensor, teacher: Tensor, arguments: Mapping[str, Any], coefficient: float | Tensor
) -> RelationTask | str:
    """MiniLMv2's loss without its maps; or why it is computed by its definition, which also says what is wrong."""
    if spec.name != "relation_kl" or spec.function is not registered_losses()[spec.name].function:
        return "no closed form"
    if arguments.get("reduction", "mean") not in ("mean", "sum"):
        return f"reduction={arguments['reduction']!r}"
    if reason := _unusual(student) or _unusual(teacher):
        return reason
    fits = student.ndim == teacher.ndim == 4 and student.shape[::2] == teacher.shape[::2]
    if not fits or not student.is_floating_point() or teacher.is_complex():
        return "shapes"
    heads, mask = arguments.get("heads"), arguments.get("mask")
    heads = student.shape[1] if heads is None and student.shape[1] == teacher.shape[1] else heads
    widths = [side.shape[1] * side.shape[3] for side in (student, teacher)]
    if type(heads) is not int or heads < 1 or any(width % heads for width in widths):
        return "arguments"
    valid = None if mask is None else fit_mask(mask, (student.shape[0], student.shape[2]))
    mean = arguments.get("reduction", "mean") == "mean"
    return RelationTask(student=student, teacher=teacher, heads=heads, valid=valid, mean=mean, coefficient=coefficient)


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
    device = _device(task)
    kernels = impl == "triton" or (impl == "auto" and device.type == "cuda")
    missing = unavailable(device) if kernels else None
    if impl == "triton" and missing is not None:
        raise MatchError(f"impl='triton' {missing}")
    if isinstance(task, (AttentionTask, RelationTask)):
        unfit = unsuited(task) if kernels and missing is None else missing and f"Triton {missing}"
        if kernels and unfit is None:
            return Choice("triton", "no map")
        pays = impl == "compiled" or _map_entries(task) >= COMPILED_FROM
        implementation = "compiled" if device.type == "cpu" and pays and compiler_available() else "chunked"
        return Choice(implementation, "no map" + (f"; {unfit}" if unfit else ""))
    reason = "head and loss in one" if isinstance(task, HeadTask) else ""
    if kernels and missing is None:
        unfit = unsuited(task) if isinstance(task, RowTask) else _double(task.student)
        if unfit is None:
            return Choice("triton", reason or ("interpreted" if device.type == "cpu" else ""))
        reason = reason or unfit
    if missing is not None:
        return Choice("chunked", reason or f"Triton {missing}")
    if not compiler_available():
        return Choice("chunked", reason or "no C++ compiler found")
    if impl == "compiled" or task.student.shape.numel() >= COMPILED_FROM:
        return Choice("compiled", reason)
    return Choice("chunked", reason or "small")


def _map_entries(task: AttentionTask | RelationTask) -> int:
    if isinstance(task, RelationTask):
        return task.student.shape[0] * task.heads * task.student.shape[2] ** 2
    return task.student.query.shape[:3].numel() * task.student.key.shape[2]


def _double(head: Head) -> str | None:
    return "float64" if head.hidden.dtype is torch.float64 else None


def _device(task: Task) -> torch.device:
    if isinstance(task, HeadTask):
        return task.student.hidden.device
    return task.student.query.device if isinstance(task, AttentionTask) else task.student.device


def run(task: Task, choice: Choice, *, gradient: bool) -> Computed:
    """Compute a task. Without gradients, as in an evaluation, nothing is worth a compilation of its own."""
    with _plainly():
        kernels = choice.implementation == "triton"
        compiled = choice.implementation == "compiled" and gradient
        scores, most = (compiled_scores, COMPILED_MAP_BLOCK) if compiled else (score_loss, MAP_BLOCK)
        if isinstance(task, AttentionTask):
            if kernels:
                from ..kernels.attention import attention_losses_triton

                attention = attention_losses_triton(task, gradient=gradient)
            else:
                attention = attention_losses(task, gradient=gradient, most=most, function=scores)
            slopes = ((task.student.query, attention.query), (task.student.key, attention.key))
            return Computed([attention.value], attention.total, [(to, slope) for to, slope in slopes if slope is not None])
        if isinstance(task, RelationTask):
            if kernels:
                from ..kernels.relations import relation_losses_triton

                relation = relation_losses_triton(task, gradient=gradient)
            else:
                relation = relation_losses(task, gradient=gradient, most=most, function=scores)
            found = [] if relation.gradient is None else [(task.student, relation.gradient)]
            return Computed([relation.value], relation.total, found)
        if isinstance(task, HeadTask):
            block, most = (compiled_block, HEAD_CHUNK) if compiled else (block_losses, CHUNK)
            if kernels:
                from ..kernels.blocks import block_losses_triton

                block, most = block_losses_triton, WHOLE
            head = head_losses(task, block, most=most, gradient=gradient)
            task.terms.clear()
            return Computed(list(head.values.unbind()), head.total, head.slopes)
        if compiled:
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
