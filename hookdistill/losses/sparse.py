"""Divergences from a teacher of which only some classes were kept: what a `hookdistill.TeacherStore` hands over.

The teacher's tensor is float32 ``[…, 2n + 1]``: n numbers, then the n classes that they are of, then one number more. The
student's are logits ``[…, classes]``. Values are those at the temperature at which the teacher's numbers were made, times
``temperature ** 2``; positions, masks and reductions are as for the other losses between logits.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from ..errors import LossError
from .reduction import Reduction, check_student, check_tensor, fit_mask, reduce_valid, working_dtype
from .registry import register_loss


@register_loss("top_k_tail_kl", compares="logits")
def top_k_tail_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher ‖ student) between the teacher's n likeliest classes and, as one class more, all the others together.

    ``teacher`` holds n log-probabilities, their n classes, and the log of the others' mass. Never more than the whole
    divergence, since joining classes loses some of it; its gradient leaves the shares within the tail to the student.
    """

    def value(logits: Tensor, packed: Tensor) -> Tensor:
        log_p, ids, log_tail = _unpacked(packed)
        normaliser = logits.logsumexp(-1)
        total = _weighted(log_p.exp(), log_p - (logits.gather(-1, ids) - normaliser[..., None])).sum(-1)
        if ids.shape[-1] < logits.shape[-1]:
            log_q_tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - normaliser
            total = total + _weighted(log_tail.exp(), log_tail - log_q_tail)
        return total

    return _compare("top_k_tail_kl", value, student, teacher, temperature, mask, reduction)


@register_loss("sampled_kl", compares="logits")
def sampled_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher ‖ student), estimated from classes that were drawn from the teacher's distribution.

    ``teacher`` holds the weights of the drawn classes (zero for unused places), the classes, and the negative entropy of the
    whole distribution. Value and gradient are unbiased over the draws; a single value may be negative. Anshumann et al.,
    *Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs*, ACL 2025, arXiv 2503.16870.
    """

    def value(logits: Tensor, packed: Tensor) -> Tensor:
        weights, ids, neg_entropy = _unpacked(packed)
        log_q = logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)
        return neg_entropy - _weighted(weights, log_q).sum(-1)

    return _compare("sampled_kl", value, student, teacher, temperature, mask, reduction)


def _compare(
    loss: str,
    value: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    mask: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    check_student(loss, student, -1)
    check_tensor(loss, "teacher", teacher)
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not temperature > 0:
        raise LossError(f"{loss} got temperature={temperature!r}; it is a positive number.")
    if teacher.ndim != student.ndim or teacher.shape[:-1] != student.shape[:-1] or teacher.shape[-1] % 2 != 1:
        raise LossError(
            f"{loss} compares logits [positions, classes] with kept classes [positions, 2n + 1]; got {list(student.shape)} and "
            f"{list(teacher.shape)}. A TeacherStore built with top_k= or samples= hands over the latter."
        )
    dtype = working_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    valid = None if mask is None else fit_mask(mask, student.shape[:-1])

    def scaled(logits: Tensor, packed: Tensor) -> Tensor:
        return value(logits / temperature, packed) * float(temperature) ** 2

    return reduce_valid(scaled, student, teacher, valid=valid, reduction=reduction)


def _unpacked(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kept = packed.shape[-1] // 2
    numbers, ids, last = torch.split(packed, [kept, kept, 1], -1)
    return numbers, ids.nan_to_num(0).long(), last[..., 0]  # NaN where nothing was stored: the numbers carry it on


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The product, which is zero where the weight is, also for values that are infinite."""
    return torch.where(weights == 0, 0, weights * values.masked_fill(weights == 0, 0))
