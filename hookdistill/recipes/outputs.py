"""Recipes that compare logits, or the vectors that logits are made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import MatchError
from ..matches import Match, Schedule
from .catalogue import Matches, recipe
from .finding import AUTO, Mask, feature_pair, label_terms, logit_mask, logit_pairs


@recipe("Hinton et al. 2015, arXiv 1503.02531")
def kd(
    teacher: nn.Module,
    student: nn.Module,
    *,
    temperature: float = 4.0,
    weight: float = 0.9,
    label_weight: float = 0.1,
    labels: Mask = "labels",
    logits: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """Plain distillation: the KL divergence of the softened logits, and the labels.

    Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531, section 2, which gives the labels the
    "considerably lower weight"; the numbers are the usual ones of benchmarks on CIFAR-100.
    """
    pairs = logit_pairs(teacher, student, logits)
    options = logit_mask(mask, teacher, student)
    soft = [Match(t, s, loss="kl", temperature=temperature, weight=weight, **options) for t, s in pairs]
    return Matches([*label_terms(student, pairs, labels, label_weight), *soft])


@recipe("Zhao et al. 2022, arXiv 2203.08679")
def dkd(
    teacher: nn.Module,
    student: nn.Module,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    warmup_steps: int = 0,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """Decoupled KD: the share of the labelled class and the shares among the others, weighted apart.

    Zhao et al., *Decoupled Knowledge Distillation*, 2022, arXiv 2203.08679, eq. 7, beside the cross-entropy with the labels.
    alpha 1, beta 8 and temperature 4 are the paper's for most pairs on CIFAR-100; beta is to grow with the teacher's certainty.
    The authors raise the weight
    linearly during the first 20 epochs: ``warmup_steps``. Without labels there is no DKD; positions labelled -100 do not count.
    """
    if labels is None:
        raise MatchError("the loss needs the labels: labels='labels' is the item of the batch; without any take recipes.kd")
    pairs = logit_pairs(teacher, student, logits)
    options = logit_mask(mask, teacher, student)
    weight = 1.0 if warmup_steps <= 0 else linear_warmup(warmup_steps)
    terms: dict[str, Any] = {"temperature": temperature, "weight": weight, "alpha": alpha, "beta": beta, "target": labels}
    soft = [Match(t, s, loss="dkd", **terms, **options) for t, s in pairs]
    return Matches([*label_terms(student, pairs, labels, label_weight), *soft])


@recipe("Huang et al. 2022, arXiv 2205.10536")
def dist(
    teacher: nn.Module,
    student: nn.Module,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 1.0,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """DIST: the correlation of the two predictions for each item, and over the batch for each class.

    Huang et al., *Knowledge Distillation from A Stronger Teacher*, 2022, arXiv 2205.10536, section 4, beside the cross-entropy
    with the labels. The authors take temperature 1 for ImageNet and 4 for CIFAR-100. Couples the batch.
    """
    pairs = logit_pairs(teacher, student, logits)
    options = logit_mask(mask, teacher, student)
    terms: dict[str, Any] = {"temperature": temperature, "beta": beta, "gamma": gamma}
    soft = [Match(t, s, loss="dist", **terms, **options) for t, s in pairs]
    return Matches([*label_terms(student, pairs, labels, label_weight), *soft])


@recipe("Agarwal et al. 2023, arXiv 2306.13649")
def gkd_losses(
    teacher: nn.Module,
    student: nn.Module,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
) -> Matches:
    """The losses of GKD: the generalised Jensen-Shannon divergence of two language models on the labelled tokens.

    Agarwal et al., *On-Policy Distillation of Language Models*, 2023, arXiv 2306.13649, section 3. ``beta=0`` is the forward
    KL, 1 the reverse one. Tokens whose label is -100, such as the prompt, do not count; ``labels=None`` counts all tokens of
    the attention mask.

    Besides: GKD trains on what the student itself has written. Sampling is the loader's business: let it generate completions
    with the student now and then, and give their tokens as ``input_ids`` with labels -100 on the prompt.
    """
    if not 0 <= beta <= 1:
        raise MatchError(f"beta={beta} must lie between 0, the forward KL, and 1, the reverse KL")
    ends: dict[float, dict[str, Any]] = {0: {"loss": "kl"}, 1: {"loss": "reverse_kl"}}
    loss = ends.get(beta, {"loss": "js", "beta": beta})
    options = logit_mask(AUTO if labels is None else None, teacher, student)
    if labels is not None:
        options["target"] = labels
    pairs = logit_pairs(teacher, student, logits)
    matches = [Match(t, s, temperature=temperature, **loss, **options) for t, s in pairs]
    return Matches(matches, besides=["GKD's data: completions sampled from the student, by your loader"])


@recipe("Park et al. 2019, arXiv 1904.05068")
def rkd(
    teacher: nn.Module,
    student: nn.Module,
    *,
    distance: float = 25.0,
    angle: float = 50.0,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_features: str | None = None,
    student_features: str | None = None,
) -> Matches:
    """Relational KD: distances and angles between the feature vectors of a batch.

    Park et al., *Relational Knowledge Distillation*, 2019, arXiv 1904.05068, section 3.2, on what enters the classifier, beside
    the cross-entropy with the labels; the weights are the paper's for classification. Widths may differ. Couples the batch:
    angles cost its size cubed.
    """
    features = feature_pair(teacher, student, teacher_features, student_features)
    matches = _labels(teacher, student, logits, labels, label_weight)
    if distance:
        matches.append(Match(*features, loss="rkd_distance", weight=distance))
    if angle:
        matches.append(Match(*features, loss="rkd_angle", weight=angle))
    return Matches(matches)


@recipe("Tian et al. 2019, arXiv 1910.10699")
def crd(
    teacher: nn.Module,
    student: nn.Module,
    *,
    samples: int | None = None,
    index: str | int = "index",
    weight: float = 0.8,
    k: int = 16384,
    label_weight: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_features: str | None = None,
    student_features: str | None = None,
) -> Matches:
    """CRD: tell a sample's teacher features from those of others, with a memory of all training samples.

    Tian et al., *Contrastive Representation Distillation*, 2019, arXiv 1910.10699, section 3, on what enters the classifier,
    beside the cross-entropy with the labels; weight and ``k`` negatives are the authors' for CIFAR-100.

    Args:
        samples: how many samples the training set has; their embeddings take 2 · samples · 128 floats.
        index: item of the batch that says which samples these are, from 0.
    """
    if samples is None:
        raise MatchError("samples= is missing, the size of the training set: the loss keeps an embedding of every sample in it")
    features = feature_pair(teacher, student, teacher_features, student_features)
    matches = _labels(teacher, student, logits, labels, label_weight)
    options: dict[str, Any] = {"inputs": {"index": index}, "samples": samples, "k": min(k, samples)}
    matches.append(Match(*features, loss="crd", weight=weight, **options))
    return Matches(matches, besides=[f"every batch has the positions of its samples in the training set as {index!r}"])


def linear_warmup(steps: int) -> Schedule:
    """A weight that rises from 1 / steps to 1 over that many steps."""

    def warmup(step: int) -> float:
        return min((step + 1) / steps, 1.0)

    return warmup


def _labels(teacher: nn.Module, student: nn.Module, logits: str | None, labels: Mask, weight: float) -> list[Match]:
    return [] if labels is None else label_terms(student, logit_pairs(teacher, student, logits), labels, weight)
