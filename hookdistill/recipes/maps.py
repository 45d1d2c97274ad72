"""Recipes that compare feature maps: stages of conv nets, and the blocks of a transformer where the method allows."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ..errors import MatchError
from ..matches import Match
from ..structure import stacks
from .catalogue import Matches, recipe
from .finding import AUTO, Layers, Mask, label_terms, layer_pairs, logit_mask, logit_pairs, stage_pairs, token_mask


@recipe("Romero et al. 2014, arXiv 1412.6550")
def fitnet(
    teacher: nn.Module,
    student: nn.Module,
    *,
    stage: Literal["joint", "hint", "kd"] = "joint",
    weight: float = 100.0,
    temperature: float = 4.0,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: Layers = None,
    student_layers: Layers = None,
    mask: Mask = AUTO,
) -> Matches:
    """FitNets: the middle of the student, through a learned map, is to be the middle of the teacher.

    Romero et al., *FitNets: Hints for Thin Deep Nets*, 2014, arXiv 1412.6550, section 2: mean squared error between the middle
    stages (or blocks), the student's through a 1×1 convolution where channels differ. The paper trains in two stages: first
    ``"hint"`` alone, then ``"kd"``, logits and labels. ``"joint"`` trains hint and labels at once, as later comparisons do,
    whose weight this is.
    """
    matches: list[Match] = []
    if stage not in ("joint", "hint", "kd"):
        raise MatchError(f"stage={stage!r} is not known; it is 'joint', 'hint' or 'kd'")
    if stage != "hint":
        pairs = logit_pairs(teacher, student, logits)
        matches += label_terms(student, pairs, labels, label_weight)
        if stage == "kd":
            options = logit_mask(mask, teacher, student)
            matches += [Match(t, s, loss="kl", temperature=temperature, **options) for t, s in pairs]
    if stage != "kd":
        found = layer_pairs(teacher, student, teacher_layers, student_layers)
        tokens = _mask(mask, teacher, student)
        matches.append(
            Match(*found[(len(found) - 1) // 2], loss="mse", weight=weight if stage == "joint" else 1.0, mask=tokens)
        )
    second = ["this is the first stage; recipes.fitnet(…, stage='kd') is the second"] if stage == "hint" else []
    return Matches(matches, besides=second)


@recipe("Zagoruyko and Komodakis 2016, arXiv 1612.03928")
def attention_transfer(
    teacher: nn.Module,
    student: nn.Module,
    *,
    weight: float = 1000.0,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: Layers = None,
    student_layers: Layers = None,
) -> Matches:
    """Attention transfer: where each stage of a conv net is active.

    Zagoruyko and Komodakis, *Paying More Attention to Attention*, 2016, arXiv 1612.03928, section 3.1: the squared activations
    summed over the channels, at length one, compared stage by stage (the last with the last), beside the cross-entropy with the
    labels. The weight is that of later comparisons for a mean over places, as here.
    """
    pairs = logit_pairs(teacher, student, logits) if labels is not None else []
    matches = label_terms(student, pairs, labels, label_weight) if pairs else []
    for t, s in stage_pairs(teacher, student, teacher_layers, student_layers):
        matches.append(Match(t, s, loss="attention_transfer", weight=weight))
    return Matches(matches)


@recipe("Chen et al. 2021, arXiv 2104.09044")
def reviewkd(
    teacher: nn.Module,
    student: nn.Module,
    *,
    weight: float = 1.0,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: Layers = None,
    student_layers: Layers = None,
) -> Matches:
    """ReviewKD: each stage of the student, fused with its deeper ones, is to be the teacher's stage.

    Chen et al., *Distilling Knowledge via Knowledge Review*, 2021, arXiv 2104.09044, section 3, on all stages of two conv nets
    (the last with the last), beside the cross-entropy with the labels. The fusion modules are made with the plan, train with
    the student and are never exported. The authors choose the weight for each pair of models.
    """
    pairs = logit_pairs(teacher, student, logits) if labels is not None else []
    matches = label_terms(student, pairs, labels, label_weight) if pairs else []
    deep_first = stage_pairs(teacher, student, teacher_layers, student_layers)[::-1]
    (theirs, ours), shallower = deep_first[0], deep_first[1:]
    options: dict[str, Any] = {}
    if shallower:
        options["inputs"] = {"teachers": [t for t, _ in shallower], "students": [s for _, s in shallower]}
    matches.append(Match(theirs, ours, loss="reviewkd", weight=weight, **options))
    return Matches(matches)


@recipe("Kornblith et al. 2019, arXiv 1905.00414; as a loss Zhou et al. 2024, arXiv 2401.11824")
def cka(
    teacher: nn.Module,
    student: nn.Module,
    *,
    weight: float = 1.0,
    layer_map: str = "uniform",
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: Layers = None,
    student_layers: Layers = None,
    mask: Mask = AUTO,
) -> Matches:
    """CKA: blocks or stages are to tell the samples of a batch apart in the same way, up to rotation and scale.

    One minus the linear CKA (Kornblith et al., 2019, arXiv 1905.00414, section 3) of each pair of layers, beside the cross-
    entropy with the labels; as a distillation loss e.g. Zhou et al., *Rethinking Centered Kernel Alignment in Knowledge
    Distillation*, 2024, arXiv 2401.11824. Tokens are the samples where both models are transformers, whole items otherwise.
    Widths and grids may differ. Couples the batch.
    """
    pairs = logit_pairs(teacher, student, logits) if labels is not None else []
    matches = label_terms(student, pairs, labels, label_weight) if pairs else []
    tokens = bool(stacks(teacher) and stacks(student))
    options: dict[str, Any] = {"samples": "positions", "mask": _mask(mask, teacher, student)} if tokens else {}
    for t, s in layer_pairs(teacher, student, teacher_layers, student_layers, layer_map):
        matches.append(Match(t, s, loss="cka", weight=weight, **options))
    return Matches(matches)


def _mask(mask: Mask, teacher: nn.Module, student: nn.Module) -> Mask:
    """The mask of tokens between transformers of one stack; the stages of conv nets have none."""
    found = stacks(student)
    return token_mask(mask, teacher, student, decodes=False) if len(found) == 1 or mask != AUTO else None
