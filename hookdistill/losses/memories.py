"""Losses that remember: embeddings of earlier batches are what the student is compared with now.

The functions take the memory as keywords, and write to it where gradients are recorded, never in a dry run or an evaluation
under ``no_grad``. A `Match` makes and owns it (``state=`` of the registration), so that it moves and is saved with the
adapters. Both couple the batches of a run, and with several processes each keeps a memory of its own. Half precision is
compared in float32. Both raise ``LossError`` for shapes that differ, a student that is not floating-point, a mask that does
not fit and an unknown reduction.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import LossError
from ..precision import product
from .classes import check_labels, kl_divergence
from .features import unit_vectors
from .reduction import Reduction, check_student, check_teacher, fit_mask, reduce, working_dtype, zero_invalid
from .registry import register_loss

CRD_EPSILON = 1e-7  # of the authors' code
Map = Callable[[Tensor], Tensor]


class ContrastMemory(nn.Module):
    """An embedding of every training sample by either side, ``[samples, width]``, at length one but random to begin with.

    ``student_scale`` and ``teacher_scale`` are the normalisation constants, estimated from the first batch; zero before.
    """

    student: Tensor
    teacher: Tensor
    student_scale: Tensor
    teacher_scale: Tensor

    def __init__(self, samples: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width / 3)
        for side in ("student", "teacher"):
            self.register_buffer(side, torch.empty(samples, width).uniform_(-bound, bound))
            self.register_buffer(f"{side}_scale", torch.zeros(()))


class CrdState(nn.Module):
    """Two linear embeddings, and the memory of all training samples.

    Args:
        samples: how many there are in the training set; ``index`` counts them from 0.
        width: of the embeddings.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, *, samples: int, width: int = 128, index: Tensor | None = None
    ) -> None:
        super().__init__()
        if (
            index is not None
            and not index.is_meta
            and index.numel()
            and not 0 <= int(index.min()) <= int(index.max()) < samples
        ):
            raise LossError(f"crd got index= up to {int(index.max())}, but samples={samples} counts from 0 to {samples - 1}.")
        self.embed_student = nn.Linear(student.flatten(1).shape[1], width)
        self.embed_teacher = nn.Linear(teacher.flatten(1).shape[1], width)
        self.memory = ContrastMemory(samples, width)


@register_loss("crd", compares="relations", per="sample", state=CrdState)
def crd(
    student: Tensor,
    teacher: Tensor,
    *,
    index: Tensor,
    embed_student: Map,
    embed_teacher: Map,
    memory: ContrastMemory,
    negatives: Tensor | None = None,
    k: int = 16384,
    tau: float = 0.07,
    momentum: float = 0.5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Contrastive representation distillation: tell a sample's teacher embedding from those of others, and the reverse.

    ``index`` ``[batch]`` says which training samples these are. Each side's embedding, at length one, is compared with the
    other side's memory of the same sample and of ``k`` others, drawn anew with each call, or given as ``negatives`` ``[batch,
    k]``. The value of a sample is the noise-contrastive estimate -log h(positive) - Σ log(1 - h(negative)) of both
    directions, with h = P / (P + k / samples) and P = exp(a · b / tau) / Z, where Z is estimated from the first batch. The
    memory then moves to ``momentum`` · old + (1 - ``momentum``) · new, at length one.

    Tian et al., *Contrastive Representation Distillation*, 2019, arXiv 1910.10699, appendix. Like their code, negatives are
    taken from all other samples, whatever their class; unlike it, the sample itself is never among those drawn.
    """
    check_student("crd", student, 0)
    check_teacher("crd", teacher)
    check_labels("crd", index, student.shape[:1], name="index")
    if teacher.shape[:1] != student.shape[:1]:
        raise LossError(f"crd compares the same samples; student {list(student.shape)} and teacher {list(teacher.shape)}.")
    dtype = working_dtype(student, teacher)
    valid = None if mask is None else fit_mask(mask, student.shape[:1])
    ours, theirs = (
        unit_vectors(_embedded(embed, side.to(dtype), valid))
        for embed, side in ((embed_student, student), (embed_teacher, teacher))
    )
    samples = memory.student.shape[0]
    index = index.long() if valid is None else index.long().masked_fill(~valid, 0)
    if negatives is None:
        steps = torch.randint(1, max(samples, 2), (len(index), k), device=index.device)
        negatives = (index.unsqueeze(-1) + steps) % samples
    chosen = torch.cat([index.unsqueeze(-1), negatives], -1)
    learns = torch.is_grad_enabled() and memory.training
    values = [
        _contrast(anchor, bank, scale, chosen, tau, learns)
        for anchor, bank, scale in (
            (ours, memory.teacher, memory.student_scale),
            (theirs, memory.student, memory.teacher_scale),
        )
    ]
    if learns:
        for bank, new in ((memory.student, ours), (memory.teacher, theirs)):
            _remember(bank, index, new, momentum, valid)
    return reduce(values[0] + values[1], valid, reduction)


class QueueState(nn.Module):
    """A queue of the teacher's last embeddings, ``[size, width]``, empty (zero) to begin with."""

    queue: Tensor
    position: Tensor

    def __init__(self, student: Tensor, teacher: Tensor, *, size: int = 4096) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(size, teacher.shape[-1]))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))


@register_loss("queue_kl", compares="features", per="sample", state=QueueState)
def queue_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    queue: Tensor,
    position: Tensor | None = None,
    tau: float = 0.07,
    teacher_tau: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL(teacher ‖ student) of how similar an embedding is to the teacher's embeddings of this batch and of earlier ones.

    Student and teacher are ``[batch, width]``; ``queue`` is ``[size, width]``, whose zero rows are empty places. Similarities
    are cosines divided by ``tau`` (on the teacher's side by ``teacher_tau``, where given) under a softmax; there is no factor
    tau². Given ``position``, the teacher's embeddings of this batch replace the oldest in the queue. Couples the batch. Fang
    et al., *SEED: Self-supervised Distillation for Visual Representation*, 2021, arXiv 2101.04731, which is the
    cross-entropy, has the sample's own teacher embedding among the candidates rather than those of the batch, and takes 0.2
    and 0.01 as temperatures.

    Also raises ``LossError`` for temperatures that are not positive.
    """
    check_student("queue_kl", student, -1)
    check_teacher("queue_kl", teacher)
    if student.ndim != 2 or student.shape != teacher.shape or queue.ndim != 2 or queue.shape[-1] != teacher.shape[-1]:
        raise LossError(
            f"queue_kl compares [batch, width] with a queue [size, width]; got student {list(student.shape)}, teacher "
            f"{list(teacher.shape)} and queue {list(queue.shape)}."
        )
    temperatures = (tau, tau if teacher_tau is None else teacher_tau)
    if not min(temperatures) > 0:
        raise LossError(f"queue_kl got tau={tau} and teacher_tau={teacher_tau}; temperatures are more than zero.")
    dtype = working_dtype(student, teacher)
    valid = None if mask is None else fit_mask(mask, student.shape[:1])
    ours, theirs = (
        unit_vectors((side if valid is None else zero_invalid(side, valid)).to(dtype)) for side in (student, teacher)
    )
    candidates = torch.cat([theirs.detach(), queue.detach().to(dtype)])  # a copy, so the queue may move on below
    empty = candidates.square().sum(-1) == 0

    def log_similarity(side: Tensor, heat: float) -> Tensor:
        return (product(side, candidates.T) / heat).masked_fill(empty, torch.finfo(dtype).min).log_softmax(-1)

    values = kl_divergence(log_similarity(theirs, temperatures[1]), log_similarity(ours, temperatures[0]))
    if position is not None and torch.is_grad_enabled():
        with torch.no_grad():
            newest = theirs[-len(queue) :].to(queue.dtype)
            places = (position + torch.arange(len(newest), device=queue.device)) % len(queue)
            queue[places] = newest
            position.copy_((position + len(newest)) % len(queue))
    return reduce(values, valid, reduction)


def _embedded(embed: Map, side: Tensor, valid: Tensor | None) -> Tensor:
    flat = (side if valid is None else zero_invalid(side, valid)).flatten(1)
    weight = next(embed.parameters(), None) if isinstance(embed, nn.Module) else None
    return embed(flat if weight is None else flat.to(weight.dtype)).to(side.dtype)


@torch.no_grad()
def _remember(bank: Tensor, index: Tensor, new: Tensor, momentum: float, valid: Tensor | None) -> None:
    """Move the valid samples' entries of the bank towards the new embeddings, in place."""
    if not len(index):
        return
    moved = unit_vectors(momentum * bank[index] + (1 - momentum) * new.to(bank.dtype))
    if valid is not None:
        # A masked sample writes what the first valid one does: its own place could be that of a valid sample.
        first = valid.long().argmax()
        writer = torch.where(valid, torch.arange(len(index), device=index.device), first)
        moved = torch.where(valid.any(), moved[writer], bank[index[writer]])
        index = index[writer]
    bank[index] = moved


def _contrast(anchor: Tensor, bank: Tensor, scale: Tensor, chosen: Tensor, tau: float, learns: bool) -> Tensor:
    """The noise-contrastive estimate of each row, of which the first chosen entry of the bank is the positive one."""
    samples, k = bank.shape[0], chosen.shape[1] - 1
    scores = (product(bank[chosen].to(anchor.dtype), anchor.unsqueeze(-1)).squeeze(-1) / tau).exp()
    estimate = scores.detach().mean() * samples
    normaliser = torch.where(scale > 0, scale.to(scores.dtype), estimate)
    if learns:
        with torch.no_grad():
            scale.copy_(normaliser)
    p, noise = scores / normaliser, k / samples
    positive = (p[:, 0] / (p[:, 0] + noise + CRD_EPSILON)).log()
    negative = (noise / (p[:, 1:] + noise + CRD_EPSILON)).log()
    return -(positive + negative.sum(-1))
