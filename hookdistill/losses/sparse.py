"""Divergences from a teacher of which only some classes were kept: what a `hookdistill.TeacherStore` hands over.

The teacher's tensor is float32 ``[…, 2n + 1]``: n numbers, then the n classes that they are of, then one number more. The
student's are logits ``[…, classes]``. The teacher's numbers are of the distribution at the temperature given; values are
multiplied by its square. ``mask``, ``reduction``, ``target``, ``ignore_index`` and ``causal_shift`` are as for the other losses
between logits (`classes`).

``classes`` is how many the teacher has, if that is to be checked: with ``vocabulary="same"`` the student must have as many,
with ``"padded"`` it may have more, which the teacher rules out. All raise ``LossError`` for what does not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import LossError
from .classes import Positions, check_temperature, log_sum_exp, pick_positions
from .reduction import Reduction, check_student, check_tensor, reduce_valid, working_dtype
from .registry import register_loss

Vocabulary = Literal["same", "padded"]


@register_loss("top_k_tail_kl", compares="logits")
def top_k_tail_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    classes: int | None = None,
) -> Tensor:
    """KL(teacher ‖ student) between the teacher's n likeliest classes and, as one class more, all the others together.

    ``teacher`` holds n log-probabilities, their n classes, and the log of the others' mass. Never more than the whole
    divergence, since joining classes loses some of it; the shares within the tail are left to the student. Of whole logits
    the loss ``top_k_kl`` computes the same.
    """

    def value(logits: Tensor, packed: Tensor) -> Tensor:
        log_p, ids, log_tail = _unpacked(packed)
        normaliser = log_sum_exp(logits)
        total = _weighted(log_p.exp(), log_p - (logits.gather(-1, ids) - normaliser[..., None])).sum(-1)
        if ids.shape[-1] < logits.shape[-1]:
            log_q_tail = log_sum_exp(logits.scatter(-1, ids, -torch.inf)) - normaliser
            total = total + _weighted(log_tail.exp(), log_tail - log_q_tail)
        return total

    positions = Positions(mask=mask, dim=-1, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return _compare("top_k_tail_kl", value, student, teacher, positions, temperature, reduction, vocabulary, classes)


@register_loss("sampled_kl", compares="logits")
def sampled_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    classes: int | None = None,
) -> Tensor:
    """KL(teacher ‖ student), estimated from classes that were drawn from the teacher's distribution.

    ``teacher`` holds the weights of the drawn classes (zero for unused places), the classes, and the negative entropy of the
    whole distribution. Value and gradient are unbiased over the draws; a single value may be negative. Anshumann et al.,
    *Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs*, ACL 2025, arXiv 2503.16870.
    """

    def value(logits: Tensor, packed: Tensor) -> Tensor:
        weights, ids, neg_entropy = _unpacked(packed)
        log_q = logits.gather(-1, ids) - log_sum_exp(logits)[..., None]
        return neg_entropy - _weighted(weights, log_q).sum(-1)

    positions = Positions(mask=mask, dim=-1, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return _compare("sampled_kl", value, student, teacher, positions, temperature, reduction, vocabulary, classes)


def _compare(
    loss: str,
    value: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    positions: Positions,
    temperature: float | Tensor,
    reduction: Reduction,
    vocabulary: Vocabulary,
    classes: int | None,
) -> Tensor:
    check_student(loss, student, -1)
    check_tensor(loss, "teacher", teacher)
    check_temperature(loss, temperature)
    if teacher.ndim != student.ndim or teacher.shape[:-1] != student.shape[:-1] or teacher.shape[-1] % 2 != 1:
        raise LossError(
            f"{loss} compares logits [positions, classes] with kept classes [positions, 2n + 1]; got {list(student.shape)} and "
            f"{list(teacher.shape)}. A TeacherStore built with top_k= or samples= hands over the latter."
        )
    _check_vocabulary(loss, vocabulary, student.shape[-1], classes)
    dtype = working_dtype(student, teacher)
    student, teacher, _, valid = pick_positions(loss, student.to(dtype), teacher.to(dtype), positions)

    def scaled(logits: Tensor, packed: Tensor) -> Tensor:
        return value(logits / temperature, packed) * temperature**2

    return reduce_valid(scaled, student, teacher, valid=valid, reduction=reduction)


def _check_vocabulary(loss: str, vocabulary: str, ours: int, theirs: int | None) -> None:
    if vocabulary not in get_args(Vocabulary):
        raise LossError(f"{loss} got vocabulary={vocabulary!r}; it is 'same' or 'padded'.")
    if theirs is None or ours == theirs or (ours > theirs and vocabulary == "padded"):
        return
    way_out = "vocabulary='padded' lets a student have more" if ours > theirs else "the student needs all that the teacher has"
    raise LossError(f"{loss}: the student has {ours} classes and the teacher {theirs}; {way_out}.")


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = packed.shape[-1] // 2
    numbers, ids, last = torch.split(packed, [kept, kept, 1], -1)
    return numbers, ids.nan_to_num(0).long(), last[..., 0]  # NaN where nothing was stored: the numbers carry it on


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The product, which is zero where the weight is, also for values that are infinite."""
    return torch.where(weights == 0, 0, weights * values.masked_fill(weights == 0, 0))
