"""Losses between logits that are no divergence of the whole distribution: methods with a paper each.

The arguments that all losses between logits share are explained in `classes`; the value at a position is the sum over classes
times ``temperature ** 2`` unless the docstring says otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import LossError
from .classes import Positions, Vocabulary, check_temperature, compare_logits, kl_divergence, log_sum_exp, logit_pair
from .reduction import Reduction, check_student, check_teacher, fit_mask, reduce, working_dtype, zero_invalid
from .registry import register_loss

ZERO_SPREAD = 1e-8


@register_loss("dkd", compares="logits")
def dkd(
    student: Tensor,
    teacher: Tensor,
    *,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    dim: int = -1,
) -> Tensor:
    """Decoupled KD: ``alpha * TCKD + beta * NCKD``.

    TCKD is KL(teacher ‖ student) of the two-way choice "target or not", NCKD that of the distributions over the classes other
    than the target. With alpha 1 and beta = 1 - p_teacher(target) this is ``kl``. Zhao et al., *Decoupled Knowledge
    Distillation*, 2022, arXiv 2203.08679, eq. 7; alpha 1 and beta 8 are theirs for CIFAR-100. Their code subtracts 1000 from
    the target's logit, here the target is left out.

    Also raises ``LossError`` for a target that is no class indices.
    """
    which = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    pair = logit_pair("dkd", student, teacher, which, temperature=temperature, vocabulary=vocabulary, must_cover="student")
    assert pair.target is not None
    index = pair.target.long().unsqueeze(-1)
    is_target = torch.zeros_like(pair.student, dtype=torch.bool).scatter(-1, index, True)

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        others = logits.masked_fill(is_target, -math.inf)
        choice = torch.stack([logits.gather(-1, index).squeeze(-1), log_sum_exp(others)], -1)
        return choice.log_softmax(-1), others - log_sum_exp(others).masked_fill(is_target.all(-1), 0).unsqueeze(-1)

    (our_choice, our_others), (their_choice, their_others) = split(pair.student), split(pair.teacher)
    values = alpha * kl_divergence(their_choice, our_choice) + beta * kl_divergence(their_others, our_others)
    return reduce(values * pair.scale, pair.valid, reduction)


@register_loss("dist", compares="logits")
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    dim: int = -1,
) -> Tensor:
    """``beta * (1 - r_inter) + gamma * (1 - r_intra)``: one minus Pearson's correlation of the probabilities.

    ``r_inter`` is over the classes of a position. ``r_intra`` is over the valid positions for each class, averaged over the
    classes: it couples the batch, so two half batches do not give one whole; every position carries it in full. Huang et
    al., *Knowledge Distillation from A Stronger Teacher*, 2022, arXiv 2205.10536, section 4. The paper gives no factor
    ``temperature ** 2``; their code has it, and so does this.
    """
    which = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    pair = logit_pair("dist", student, teacher, which, temperature=temperature, vocabulary=vocabulary)
    ours, theirs = pair.student.softmax(-1), pair.teacher.softmax(-1)
    inter = 1 - _pearson(ours, theirs, None)
    our_rows, their_rows = (side.reshape(-1, side.shape[-1]).movedim(-1, 0) for side in (ours, theirs))  # [classes, positions]
    intra = 1 - _pearson(our_rows, their_rows, None if pair.valid is None else pair.valid.reshape(1, -1))
    return reduce((beta * inter + gamma * intra.mean()) * pair.scale, pair.valid, reduction)


@register_loss("logit_standardization", compares="logits")
def logit_standardization(
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
    """``kl`` of logits that are brought to mean zero and standard deviation one over their classes first.

    So shift and scale of either side do not matter; a side whose logits are all equal stays uniform. Classes with logit
    -inf are left out of mean and deviation. Sun et al., *Logit Standardization in Knowledge Distillation*, 2024, arXiv
    2403.01427; as in their code the deviation is that with K - 1 in the denominator (with K it would be another temperature).
    """

    def value(s: Tensor, t: Tensor) -> Tensor:
        # The temperature divides the standardised logits, so what came in is brought back first: standardising forgets it.
        heat = temperature.to(s.dtype) if isinstance(temperature, Tensor) else temperature
        return kl_divergence((_standardised(t) / heat).log_softmax(-1), (_standardised(s) / heat).log_softmax(-1))

    which = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "logit_standardization",
        value,
        student,
        teacher,
        which,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
        must_cover="student",
    )


@register_loss("top_k_kl", compares="logits")
def top_k_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    k: int = 64,
    tail: bool = True,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
    ignore_index: int = -100,
    causal_shift: bool = False,
    vocabulary: Vocabulary = "same",
    dim: int = -1,
) -> Tensor:
    """KL(teacher ‖ student) over the teacher's ``k`` likeliest classes and, with ``tail``, one more that holds all the rest.

    The tail makes it a lower bound of ``kl``, equal to it from as many ``k`` as there are classes. Without it both sides are
    renormalised over the k classes, and what the student gives to others is free: a biased target, as Anshumann et al.,
    *Sparse Logit Sampling*, 2025, arXiv 2503.16870, show.

    Also raises ``LossError`` for a ``k`` below one.
    """
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise LossError(f"top_k_kl got k={k!r}; it is how many of the teacher's classes are kept, one or more.")

    def value(s: Tensor, t: Tensor) -> Tensor:
        likeliest = t.topk(min(k, t.shape[-1]), -1).indices
        kept = torch.zeros_like(t, dtype=torch.bool).scatter(-1, likeliest, True)

        def grouped(logits: Tensor) -> Tensor:
            top = logits.gather(-1, likeliest)
            if not tail:
                return top.log_softmax(-1)
            rest = log_sum_exp(logits.masked_fill(kept, -math.inf)).unsqueeze(-1)
            return torch.cat([top, rest], -1).log_softmax(-1)

        return kl_divergence(grouped(t), grouped(s))

    which = Positions(mask=mask, dim=dim, target=target, ignore_index=ignore_index, causal_shift=causal_shift)
    return compare_logits(
        "top_k_kl",
        value,
        student,
        teacher,
        which,
        temperature=temperature,
        reduction=reduction,
        vocabulary=vocabulary,
        must_cover="student",
    )


@register_loss("uld", compares="logits")
def uld(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distance of two distributions over different vocabularies: the sum of |p_teacher - p_student|, both sorted.

    Sorted probabilities forget which class is which, so two tokenizers can be compared: student ``[batch, tokens, classes]``,
    teacher ``[batch, its tokens, its classes]``, the smaller vocabulary filled with zeros. The i-th valid token of a row is
    compared with the i-th valid token of the teacher's row, by ``mask`` ``[batch, tokens]`` and ``teacher_mask`` ``[batch, its
    tokens]``; tokens that the other side lacks do not count. Without masks both need as many tokens.

    It is the Wasserstein distance of Boizard et al., *Towards Cross-Tokenizer Distillation: the Universal Logit Distillation
    Loss for LLMs*, 2024, arXiv 2402.12030, which has no factor ``temperature ** 2``; here it is, as for all logits.

    Also raises ``LossError`` for other shapes.
    """
    check_temperature("uld", temperature)
    check_student("uld", student, -1)
    check_teacher("uld", teacher)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[0] != teacher.shape[0]:
        raise LossError(
            "uld compares [batch, tokens, classes] of the same batch on both sides; got student "
            f"{list(student.shape)} and teacher {list(teacher.shape)}."
        )
    if mask is None and teacher_mask is None and student.shape[1] != teacher.shape[1]:
        raise LossError(
            f"uld got {student.shape[1]} tokens of the student and {teacher.shape[1]} of the teacher; say which are valid "
            "with mask= and teacher_mask=, and the i-th valid ones are compared."
        )
    dtype = working_dtype(student, teacher)
    valid, index = _align(student, teacher, mask, teacher_mask)
    if teacher_mask is not None:
        teacher = zero_invalid(teacher, fit_mask(teacher_mask, teacher.shape[:-1]))
    ours = zero_invalid(student, valid).to(dtype)
    theirs = teacher.gather(1, index.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))
    theirs = zero_invalid(theirs, valid).to(dtype)
    heat = temperature.to(dtype) if isinstance(temperature, Tensor) else temperature
    p, q = ((side / heat).softmax(-1).sort(-1, descending=True).values for side in (ours, theirs))
    classes = max(p.shape[-1], q.shape[-1])
    p, q = (functional.pad(side, (0, classes - side.shape[-1])) for side in (p, q))
    return reduce((p - q).abs().sum(-1) * heat**2, valid, reduction)


def _align(student: Tensor, teacher: Tensor, mask: Tensor | None, teacher_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which student tokens have a partner, and at which teacher token it is: the i-th valid one for the i-th valid one."""
    valid, theirs = (
        torch.ones(side.shape[:-1], dtype=torch.bool, device=side.device) if given is None else fit_mask(given, side.shape[:-1])
        for side, given in ((student, mask), (teacher, teacher_mask))
    )
    rank = valid.long().cumsum(1) - 1
    partners = (~theirs).long().argsort(dim=1, stable=True)  # the valid teacher tokens first, in their order
    valid = valid & (rank < theirs.sum(1, keepdim=True))
    return valid, partners.gather(1, rank.clamp(0, max(teacher.shape[1] - 1, 0)))


def _standardised(logits: Tensor) -> Tensor:
    absent = logits == -math.inf
    count = (~absent).sum(-1, keepdim=True)
    present = logits.masked_fill(absent, 0)
    centred = (present - present.sum(-1, keepdim=True) / count.clamp_min(1)).masked_fill(absent, 0)
    variance = centred.square().sum(-1, keepdim=True) / (count - 1).clamp_min(1)
    return (centred * variance.clamp_min(ZERO_SPREAD**2).rsqrt()).masked_fill(absent, -math.inf)


def _pearson(x: Tensor, y: Tensor, valid: Tensor | None) -> Tensor:
    """Correlation over the last dimension; zero where either is constant."""
    count = torch.full((), x.shape[-1], dtype=x.dtype, device=x.device) if valid is None else valid.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values if valid is None else values.masked_fill(~valid, 0)
        values = values - values.sum(-1, keepdim=True) / count.clamp_min(1)
        return values if valid is None else values.masked_fill(~valid, 0)

    x, y = centred(x), centred(y)
    floor = torch.finfo(x.dtype).tiny  # of the squared norms, which are those of probabilities
    norms = [side.square().sum(-1).clamp_min(floor**0.5).rsqrt() for side in (x, y)]
    return (x * y).sum(-1) * norms[0] * norms[1]
