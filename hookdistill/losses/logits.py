"""Losses between distributions that are given as logits, and between logits and labels.

``dim`` holds the classes; positions are all the other dimensions, and ``mask`` says which of them count
(``reduction.fit_mask``). The value at a position is the *sum* over classes, in nats. With a ``temperature`` both
sides are ``softmax(logits / temperature)`` and the value is multiplied by ``temperature ** 2``, which keeps the size of
a divergence's gradient (Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, section 2). ``target`` with
``ignore_index``, ``causal_shift`` and ``vocabulary`` are the same for all losses between logits: `classes` says what they do.

A logit of -inf is a class that cannot be: where both sides exclude it, it costs nothing and gets a zero gradient.
Half precision is computed and returned in float32. All raise ``LossError`` for shapes that differ, a student that is
not floating-point, a temperature that is not positive, a mask or target that does not fit and an unknown reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Real

from torch import Tensor, logaddexp

from ..errors import LossError
from .classes import Positions, Vocabulary, compare_logits, kl_divergence, pick_positions, without_first
from .reduction import Reduction, check_student, check_tensor, reduce_valid, working_dtype
from .registry import register_loss


@register_loss("kl", compares="logits")
def kl(
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
    dim: int = -1,
) -> Tensor:
    """KL(teacher ‖ student), the student covering all the teacher does; infinite if the student excludes some of it.

    Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531, section 2.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        return kl_divergence(t.log_softmax(-1), s.log_softmax(-1))

    positions = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "kl",
        value,
        student,
        teacher,
        positions,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
        must_cover="student",
    )


@register_loss("reverse_kl", compares="logits")
def reverse_kl(
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
    dim: int = -1,
) -> Tensor:
    """KL(student ‖ teacher), the student keeping to the teacher's modes; infinite if it leaves what the teacher allows.

    Gu et al., *MiniLLM: Knowledge Distillation of Large Language Models*, 2023, arXiv 2306.08543.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        return kl_divergence(s.log_softmax(-1), t.log_softmax(-1))

    positions = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "reverse_kl",
        value,
        student,
        teacher,
        positions,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
        must_cover="teacher",
    )


@register_loss("js", compares="logits")
def js(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    dim: int = -1,
) -> Tensor:
    """Generalised Jensen-Shannon: ``beta * KL(p_t ‖ m) + (1 - beta) * KL(p_s ‖ m)``, always finite.

    ``m = beta * p_t + (1 - beta) * p_s``. Also raises ``LossError`` unless 0 < beta < 1: at both ends it is zero for
    any two distributions. Agarwal et al., *On-Policy Distillation of Language Models*, 2023, arXiv 2306.13649.
    """
    _check_share("js", "beta", beta, "At both ends it is zero; near 0 take the loss 'kl', near 1 'reverse_kl'.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
        log_m = _log_mixture(log_t, log_s, beta)
        return beta * kl_divergence(log_t, log_m) + (1 - beta) * kl_divergence(log_s, log_m)

    positions = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "js",
        value,
        student,
        teacher,
        positions,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
    )


@register_loss("skew_kl", compares="logits")
def skew_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    dim: int = -1,
) -> Tensor:
    """KL(p_t ‖ alpha * p_t + (1 - alpha) * p_s), always finite.

    Also raises ``LossError`` unless 0 < alpha < 1. Ko et al., *DistiLLM: Towards Streamlined Distillation for Large
    Language Models*, 2024, arXiv 2402.03898.
    """
    _check_share("skew_kl", "alpha", alpha, "At 0 it is the loss 'kl', at 1 it is zero.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
        return kl_divergence(log_t, _log_mixture(log_t, log_s, alpha))

    positions = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "skew_kl",
        value,
        student,
        teacher,
        positions,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
    )


@register_loss("tvd", compares="logits")
def tvd(
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
    dim: int = -1,
) -> Tensor:
    """Total variation distance, half the sum of ``|p_t - p_s|``: in [0, 1] at temperature one, no gradient at a tie.

    Its gradient is not as steep as that of a divergence, so with the factor ``temperature ** 2`` it grows with the
    temperature. Wen et al., *f-Divergence Minimization for Sequence-Level Knowledge Distillation*, 2023,
    arXiv 2307.15190.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (t.softmax(-1) - s.softmax(-1)).abs().sum(-1)

    positions = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "tvd",
        value,
        student,
        teacher,
        positions,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
    )


@register_loss("soft_cross_entropy", compares="logits")
def soft_cross_entropy(
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
    dim: int = -1,
) -> Tensor:
    """Cross-entropy against the teacher's distribution: ``kl`` plus ``temperature ** 2`` times the teacher's entropy.

    So equal inputs do not cost nothing, while the student's gradient is that of ``kl``.
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        return _cross_entropy(t.softmax(-1), s.log_softmax(-1))

    positions = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "soft_cross_entropy",
        value,
        student,
        teacher,
        positions,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
        must_cover="student",
    )


@register_loss("cross_entropy", compares="labels")
def cross_entropy(
    student: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    causal_shift: bool = False,
    dim: int = -1,
) -> Tensor:
    """Negative log-likelihood of the target under the student's logits.

    An integer target holds class indices and has the shape of the positions; those equal to ``ignore_index`` are
    masked. A floating-point target holds class probabilities and has the shape of the logits. ``label_smoothing``
    mixes that much of the uniform distribution into the target, as ``torch.nn.functional.cross_entropy`` does.

    ``causal_shift`` lets the logits of a token predict the target of the next: tokens are the last dimension of the
    positions; target and mask lose their first, the logits their last.

    Also raises ``LossError`` for a target of another shape, a smoothing outside [0, 1], and a shift without tokens.
    """
    if not 0 <= label_smoothing <= 1:
        raise LossError(f"cross_entropy got label_smoothing={label_smoothing}; it is a share, from 0 to 1.")
    check_student("cross_entropy", student, dim)
    check_tensor("cross_entropy", "target", target)
    logits = student.movedim(dim, -1)
    which = Positions(mask=mask, dim=dim, ignore_index=ignore_index, causal_shift=causal_shift)
    dtype = working_dtype(student, target)
    if target.is_floating_point():
        if target.shape != student.shape:
            raise _target_error(student, target, dim)
        logits, _, _, valid = pick_positions("cross_entropy", logits, logits, which)
        target = target.movedim(dim, -1).to(dtype)
        target = without_first(target, target.ndim - 2) if causal_shift else target
        value = _probability_targets(label_smoothing)
    else:
        if target.shape != logits.shape[:-1]:
            raise _target_error(student, target, dim)
        logits, _, labels, valid = pick_positions("cross_entropy", logits, logits, replace(which, target=target))
        assert labels is not None
        target, value = labels.long(), _class_targets(label_smoothing)
    return reduce_valid(value, logits.to(dtype), target, valid=valid, reduction=reduction)


def _class_targets(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    def value(logits: Tensor, target: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        surprise = -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        # Not "plus zero times the mean": with an excluded class that would be NaN.
        return (1 - smoothing) * surprise - smoothing * log_p.mean(-1) if smoothing else surprise

    return value


def _probability_targets(smoothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    def value(logits: Tensor, target: Tensor) -> Tensor:
        return _cross_entropy((1 - smoothing) * target + smoothing / target.shape[-1], logits.log_softmax(-1))

    return value


def _cross_entropy(p: Tensor, log_q: Tensor) -> Tensor:
    """-Σ p log q over the last dimension, where classes with p = 0 cost nothing even if q is zero too."""
    return -(p * log_q.masked_fill(p == 0, 0)).sum(-1)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q); arbitrary, but with a finite gradient, where p and q are both zero."""
    absent = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = log_p.masked_fill(absent, 0), log_q.masked_fill(absent, 0)
    return logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


def _check_share(loss: str, name: str, share: float, limits: str) -> None:
    if not isinstance(share, Real) or not 0 < share < 1:
        raise LossError(f"{loss} got {name}={share!r}; it is a number between 0 and 1, both excluded. {limits}")


def _target_error(student: Tensor, target: Tensor, dim: int) -> LossError:
    shape = list(student.shape)
    axis = dim % student.ndim
    others = [d for d in range(len(shape)) if d != axis and shape[:d] + shape[d + 1 :] == list(target.shape)]
    hint = f" If dimension {others[0]} holds the classes, pass dim={others[0]}." if others else ""
    return LossError(
        f"cross_entropy got logits {shape} with the classes along dim {dim} and a {target.dtype} target "
        f"{list(target.shape)}. Class indices are integers of shape {shape[:axis] + shape[axis + 1 :]}, class "
        f"probabilities floating-point of shape {shape}.{hint}"
    )
