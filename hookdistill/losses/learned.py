"""Losses with parameters of their own: maps that are trained with the student and thrown away afterwards.

The functions take these maps as keywords, modules or any callables; a `Match` makes and owns them (``state=`` of the
registration), so that they move, train and are saved with the adapters. They bring different widths together by
themselves; where the grids differ the larger one is average-pooled to the smaller. ``dim`` says where the channels are, by
default where torch has them. A mask ``[batch]`` or ``[batch, *grid]`` says which samples or places count. Half precision is
compared in float32. All raise ``LossError`` for other shapes, a student that is not floating-point, a mask that does not
fit and an unknown reduction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import LossError
from .features import unit_vectors
from .reduction import Reduction, features_last, fit_mask, place_pair, reduce, zero_invalid
from .registry import register_loss

VID_EPSILON = 1e-5  # of the authors' code, added to the variance
Map = Callable[[Tensor], Tensor]

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class VidState(nn.Module):
    """The mean of the teacher given the student, and its variance for each channel.

    Args:
        mid: width between the layers; by default the teacher's.
        variance: what it is at the beginning; 5 in the authors' code.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, *, mid: int | None = None, variance: float = 5.0, dim: int | None = None
    ) -> None:
        super().__init__()
        ours, theirs = _widths("vid", student, teacher, dim)
        between = mid or theirs
        self.regressor = nn.Sequential(
            nn.Linear(ours, between, bias=False),
            nn.ReLU(),
            nn.Linear(between, between, bias=False),
            nn.ReLU(),
            nn.Linear(between, theirs, bias=False),
        )
        self.scale = nn.Parameter(torch.full((theirs,), math.log(math.expm1(variance - VID_EPSILON))))


@register_loss("vid", compares="relations", state=VidState)
def vid(
    student: Tensor,
    teacher: Tensor,
    *,
    regressor: Map,
    scale: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Negative log-likelihood of the teacher's features under normal distributions around ``regressor(student)``.

    (t - μ)² / 2σ² + log σ without the constant, the mean over channels, with one σ² = softplus(``scale``) + 1e-5 per channel
    of the teacher; so it can be negative, and equal inputs do not cost nothing. ``regressor`` maps the last dimension. Takes
    embeddings ``[batch, width]`` too.
    Ahn et al., *Variational Information Distillation for Knowledge Transfer*, 2019, arXiv 1904.05835, which sums
    over channels and places; a mean is the authors' code.
    """
    ours, theirs, valid = place_pair("vid", student, teacher, mask=mask, dim=dim, placeless=True)
    mean = _run("regressor", regressor, ours, theirs.shape)
    variance = functional.softplus(scale.to(theirs.dtype)) + VID_EPSILON
    return reduce(0.5 * ((theirs - mean).square() / variance + variance.log()).mean(-1), valid, reduction)


class MgdState(nn.Module):
    """A 1×1 convolution to the teacher's width, where it differs, and the two 3×3 convolutions that fill in the gaps."""

    def __init__(self, student: Tensor, teacher: Tensor, *, dim: int | None = None) -> None:
        super().__init__()
        ours, theirs = _widths("mgd", student, teacher, dim)
        convolution = _convolution("mgd", student)
        self.align = nn.Identity() if ours == theirs else convolution(ours, theirs, 1)
        self.generation = nn.Sequential(
            convolution(theirs, theirs, 3, padding=1), nn.ReLU(), convolution(theirs, theirs, 3, padding=1)
        )


@register_loss("mgd", compares="relations", state=MgdState)
def mgd(
    student: Tensor,
    teacher: Tensor,
    *,
    generation: Map,
    align: Map | None = None,
    ratio: float = 0.65,
    keep: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Squared difference of the teacher and what ``generation`` makes of a student of which some places were erased.

    The share ``ratio`` of the places is set to zero after ``align``, at random with each call; ``keep``, bool ``[batch,
    *grid]``, decides it instead. Both maps are called with ``[batch, channels, *grid]``. The value is the mean over channels.
    Yang et al., *Masked Generative Distillation*, 2022, arXiv 2205.01529, which sums; 0.65 is theirs for detectors.

    Also raises ``LossError`` for a ratio outside [0, 1] and a ``keep`` that does not fit.
    """
    if not 0 <= ratio <= 1:
        raise LossError(f"mgd got ratio={ratio}; it is the share of places to erase, from 0 to 1.")
    ours, theirs, valid = place_pair("mgd", student, teacher, mask=mask, dim=dim)
    if keep is None:
        keep = torch.rand((ours.shape[0], 1, *ours.shape[1:-1]), device=ours.device).squeeze(1) <= 1 - ratio
    if keep.shape != ours.shape[:-1]:
        raise LossError(f"mgd got keep= {list(keep.shape)}; it says for each place [batch, *grid] {list(ours.shape[:-1])}.")
    first = ours.movedim(-1, 1)
    shape = torch.Size((theirs.shape[0], theirs.shape[-1], *theirs.shape[1:-1]))
    aligned = first if align is None else _run("align", align, first, shape)
    made = _run("generation", generation, aligned * (keep != 0).unsqueeze(1), shape)
    return reduce((made.movedim(1, -1) - theirs).square().mean(-1), valid, reduction)


class FactorState(nn.Module):
    """Paraphraser (with its decoder) and translator: three 3×3 convolutions with leaky ReLU each.

    Args:
        rate: channels of the factor, as a share of the teacher's.
        paraphraser: one that is trained already; it is frozen, and there is no decoder then.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        rate: float = 0.5,
        paraphraser: nn.Module | None = None,
        dim: int | None = None,
    ) -> None:
        super().__init__()
        ours, theirs = _widths("factor_transfer", student, teacher, dim)
        convolution = _convolution("factor_transfer", student)
        factors = max(round(theirs * rate), 1)

        def block(*widths: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for before, after in itertools.pairwise(widths):
                layers += [convolution(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
            return nn.Sequential(*layers)

        self.decoder = None if paraphraser else block(factors, factors, theirs, theirs)
        self.paraphraser = paraphraser.requires_grad_(False) if paraphraser else block(theirs, theirs, factors, factors)
        self.translator = block(ours, ours, factors, factors)


@register_loss("factor_transfer", compares="relations", per="sample", state=FactorState)
def factor_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    paraphraser: Map,
    translator: Map,
    decoder: Map | None = None,
    reconstruction: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    dim: int | None = None,
) -> Tensor:
    """Absolute difference of two factors, each a vector of length one per sample: ``translator(student)`` and
    ``paraphraser(teacher)``; the mean over the entries.

    The paraphraser gets no gradient from that. It is the encoder of an autoencoder of the teacher, which the paper trains
    beforehand. Given a ``decoder``, ``reconstruction`` times the mean square of ``decoder(factor) - teacher`` is added, so that
    it is trained alongside. All maps are called with ``[batch, channels, *grid]``. The value is that of one sample. Kim et al.,
    *Paraphrasing Complex Network: Network Compression via Factor Transfer*, 2018, arXiv 1802.04977, with p = 1.
    """
    ours, theirs, valid = place_pair("factor_transfer", student, teacher, mask=mask, dim=dim)
    counted = None if valid is None else valid.unsqueeze(1)
    first, target = ours.movedim(-1, 1), theirs.movedim(-1, 1)
    factor = _run("paraphraser", paraphraser, target)
    translated = _run("translator", translator, first, factor.shape)

    def unit(maps: Tensor) -> Tensor:
        return unit_vectors((maps if counted is None else maps.masked_fill(~counted, 0)).flatten(1))

    values = (unit(translated) - unit(factor.detach())).abs().mean(-1)
    if decoder is not None:
        squares = (_run("decoder", decoder, factor, target.shape) - target).square().mean(1)
        squares = squares if valid is None else squares.masked_fill(~valid, 0)
        places = squares[0].numel() if valid is None else valid.flatten(1).sum(-1).clamp_min(1)
        values = values + reconstruction * squares.flatten(1).sum(-1) / places
    return reduce(values, None if valid is None else valid.flatten(1).any(-1), reduction)


class Fusion(nn.Module):
    """The student's stages, deepest first, each with what the deeper ones hand down: attention-based fusion.

    Args:
        widths: channels of the student's stages, deepest first.
        targets: channels of the teacher's.
        mid: channels in which stages are fused.
    """

    def __init__(self, widths: Sequence[int], targets: Sequence[int], mid: int) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Sequential(nn.Conv2d(width, mid, 1, bias=False), nn.BatchNorm2d(mid)) for width in widths)
        self.share = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * mid, 2, 1), nn.Sigmoid()) for _ in widths[1:])
        self.leave = nn.ModuleList(
            nn.Sequential(nn.Conv2d(mid, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)) for width in targets
        )

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Args: ``[batch, channels, height, width]`` of each stage, deepest first. Returns the fused ones, in that order."""
        fused, carried = [], None
        for position, stage in enumerate(stages):
            entered = self.enter[position](stage)
            if carried is not None:
                handed = functional.interpolate(carried, entered.shape[2:], mode="nearest")
                share = self.share[position - 1](torch.cat([entered, handed], 1))
                entered = entered * share[:, :1] + handed * share[:, 1:]
            carried = entered
            fused.append(self.leave[position](entered))
        return fused


class ReviewState(nn.Module):
    """The fusion of as many stages as there are; ``mid`` is by default the deepest student's channels, at most 512."""

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        students: Sequence[Tensor] = (),
        teachers: Sequence[Tensor] = (),
        mid: int | None = None,
    ) -> None:
        super().__init__()
        stages, targets = _stages(student, teacher, students, teachers)
        widths = [stage.shape[1] for stage in stages]
        self.fusion = Fusion(widths, [target.shape[1] for target in targets], mid or min(widths[0], 512))


@register_loss("reviewkd", compares="relations", per="sample", state=ReviewState)
def reviewkd(
    student: Tensor,
    teacher: Tensor,
    *,
    fusion: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    students: Sequence[Tensor] = (),
    teachers: Sequence[Tensor] = (),
    levels: Sequence[int] = (4, 2, 1),
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Hierarchical context loss of each stage after the knowledge review, summed over the stages.

    ``student`` and ``teacher`` are the deepest stage ``[batch, channels, height, width]``; ``students`` and ``teachers`` the
    shallower ones, from deep to shallow. ``fusion`` maps the list of all student stages to as many maps of the teacher's
    widths. Each is compared by the mean square, at full size with weight 1 and pooled to each of the ``levels`` that is
    smaller with weights 1/2, 1/4, …, divided by the sum of the weights. The value is that of one sample; the mask is
    ``[batch]``. Chen et al., *Distilling Knowledge via Knowledge Review*, 2021, arXiv 2104.09044, section 3; the weights are
    those of their code.

    Also raises ``LossError`` for different numbers of stages.
    """
    stages, targets = _stages(student, teacher, students, teachers)
    if isinstance(mask, Tensor) and mask.ndim != 1:
        raise LossError(f"reviewkd takes a mask [batch] of samples, as stages differ in size; got {list(mask.shape)}.")
    samples = None if mask is None else fit_mask(mask, student.shape[:1])

    def clean(maps: Tensor) -> Tensor:
        first = maps.movedim(-1, 1)
        return first if samples is None else zero_invalid(first, samples)

    both = [features_last("reviewkd", stage, target, 1) for stage, target in zip(stages, targets, strict=True)]
    ours, theirs = [clean(stage) for stage, _ in both], [clean(target) for _, target in both]
    weight = next(fusion.parameters(), None) if isinstance(fusion, nn.Module) else None
    fused = fusion([stage if weight is None else stage.to(weight.dtype) for stage in ours])
    values = [_hierarchical(made.to(target.dtype), target, levels) for made, target in zip(fused, theirs, strict=True)]
    return reduce(torch.stack(values).sum(0), samples, reduction)


def _hierarchical(ours: Tensor, theirs: Tensor, levels: Sequence[int]) -> Tensor:
    ours, theirs = (side.movedim(-1, 1) for side in place_pair("reviewkd", ours, theirs, mask=None, dim=1)[:2])
    if ours.shape != theirs.shape:
        raise LossError(f"reviewkd: the fusion gave {list(ours.shape)} for a teacher stage {list(theirs.shape)}.")
    total, weight, weights = (ours - theirs).square().flatten(1).mean(-1), 1.0, 1.0
    for level in levels:
        if level >= ours.shape[2]:
            continue
        weight /= 2
        small = [functional.adaptive_avg_pool2d(side, (level, level)) for side in (ours, theirs)]
        total, weights = total + weight * (small[0] - small[1]).square().flatten(1).mean(-1), weights + weight
    return total / weights


def _stages(
    student: Tensor, teacher: Tensor, students: Sequence[Tensor], teachers: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    stages, targets = [student, *students], [teacher, *teachers]
    if len(stages) != len(targets):
        raise LossError(f"reviewkd compares stage by stage; students= holds {len(students)} and teachers= {len(teachers)}.")
    for role, maps in (("student", stages), ("teacher", targets)):
        if wrong := [stage for stage in maps if not isinstance(stage, Tensor) or stage.ndim != 4]:
            shape = list(wrong[0].shape) if isinstance(wrong[0], Tensor) else type(wrong[0]).__name__
            raise LossError(f"reviewkd compares stages [batch, channels, height, width]; one of the {role} is {shape}.")
    return stages, targets


def _widths(loss: str, student: Tensor, teacher: Tensor, dim: int | None) -> tuple[int, int]:
    ours, theirs = features_last(loss, student, teacher, dim)
    return ours.shape[-1], theirs.shape[-1]


def _convolution(loss: str, student: Tensor) -> Callable[..., nn.Module]:
    if student.ndim not in _CONVOLUTIONS:
        raise LossError(
            f"{loss} convolves over places, [batch, channels, *grid] or [batch, tokens, width]; got {list(student.shape)}."
        )
    return _CONVOLUTIONS[student.ndim]


def _run(name: str, module: Map, given: Tensor, shape: torch.Size | None = None) -> Tensor:
    """What the map makes of ``given``, in the dtype of its own parameters, checked for the shape that is expected."""
    weight = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    made = module(given if weight is None else given.to(weight.dtype))
    if not isinstance(made, Tensor) or (shape is not None and made.shape != shape):
        got = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise LossError(f"{name} maps {list(given.shape)} to {got}" + (f", not to {list(shape)}." if shape else "."))
    return made.to(given.dtype)
