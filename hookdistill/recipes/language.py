"""Recipes that compare the blocks of two transformers."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from ..errors import MatchError, StructureError
from ..matches import Match
from ..structure import attention_widths
from .catalogue import Matches, recipe
from .finding import AUTO, Mask, Pair, block_pairs, first_token, label_terms, logit_mask, logit_pairs

_START = "start the student from the teacher: hookdistill.initialize_student(teacher, student)"


@recipe("Sanh et al. 2019, arXiv 1910.01108")
def distilbert(
    teacher: nn.Module,
    student: nn.Module,
    *,
    temperature: float = 2.0,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: str | None = None,
    student_layers: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """DistilBERT: soft and hard cross-entropy of masked tokens, and the direction of the last hidden state.

    Sanh et al., *DistilBERT, a distilled version of BERT*, 2019, arXiv 1910.01108, section 2. Compared are the logits (KL,
    which has the gradient of the paper's cross-entropy with the teacher), the student's logits with ``labels`` (-100 where a
    token was not masked; ``None`` leaves it out), and the output of the last block (cosine). Temperature and ``weights``, in
    this order, are those of the authors' published command line.

    Besides: the student starts as every second layer of the teacher, and the paper has dynamic masking and no next-sentence
    prediction.
    """
    pairs = logit_pairs(teacher, student, logits)
    matches = [
        Match(t, s, loss="kl", temperature=temperature, weight=weights[0], **logit_mask(mask, teacher, student))
        for t, s in pairs
    ]
    matches += label_terms(student, pairs, labels, weights[1])
    for blocks in block_pairs(teacher, student, teacher_layers, student_layers, mask):
        last = blocks.teacher.blocks[-1], blocks.student.blocks[-1]
        matches.append(Match(*last, loss="cosine", weight=weights[2], mask=blocks.mask))
    return Matches(matches, besides=[_START])


@recipe("Jiao et al. 2019, arXiv 1909.10351")
def tinybert(
    teacher: nn.Module,
    student: nn.Module,
    *,
    stage: Literal["intermediate", "prediction"] = "intermediate",
    layer_map: str = "uniform",
    temperature: float = 1.0,
    labels: Mask = None,
    logits: str | None = None,
    teacher_layers: str | None = None,
    student_layers: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """TinyBERT: embeddings, hidden states and attention scores of evenly spread layers; then the logits.

    Jiao et al., *TinyBERT: Distilling BERT for Natural Language Understanding*, 2019, arXiv 1909.10351, section 4.1. The stage
    ``"intermediate"`` compares, by mean squared error, what enters the first block (eq. 9), the output of each block (eq. 8)
    and its attention scores before the softmax (eq. 7); a learned linear map where widths differ. The stage ``"prediction"``
    compares the logits (eq. 10), with the ``labels`` too where they are given.

    Both sides need the same number of heads. Besides: the paper first runs the intermediate stage on a general corpus, then
    both stages one after the other on augmented data of the task.
    """
    if stage == "prediction":
        pairs = logit_pairs(teacher, student, logits)
        options = logit_mask(mask, teacher, student)
        matches = [Match(t, s, loss="kl", temperature=temperature, **options) for t, s in pairs]
        return Matches([*matches, *label_terms(student, pairs, labels, 1.0)], besides=["this is the second stage"])
    if stage != "intermediate":
        raise MatchError(f"stage={stage!r} is not known; it is 'intermediate' or 'prediction'")
    matches = []
    for blocks in block_pairs(teacher, student, teacher_layers, student_layers, mask):
        entry = f"{blocks.teacher.blocks[0]}:input", f"{blocks.student.blocks[0]}:input"
        matches.append(Match(*entry, loss="mse", mask=blocks.mask))
        matches.append(Match(*blocks.inside(("", "")), loss="mse", mask=blocks.mask, layer_map=layer_map))
        attention = blocks.inside(blocks.attention())
        scores: dict[str, Any] = {"selector": "attention_scores", "loss": "attention_mse"}
        matches.append(Match(*attention, mask=blocks.mask, layer_map=layer_map, **scores))
    return Matches(matches, besides=["this is the first stage; recipes.tinybert(…, stage='prediction') is the second"])


@recipe("Wang et al. 2020, arXiv 2002.10957")
def minilm(
    teacher: nn.Module,
    student: nn.Module,
    *,
    teacher_layer: int = -1,
    teacher_layers: str | None = None,
    student_layers: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """MiniLM: the last block's attention, and how its values relate to each other.

    Wang et al., *MiniLM: Deep Self-Attention Distillation*, 2020, arXiv 2002.10957, sections 3.1 and 3.2: KL of the attention
    probabilities (eq. 4) and of the value relation (eq. 6) between the teacher's and the student's last block. Widths and
    depths may differ, the numbers of heads may not; `minilm_v2` has no such limit.

    Besides: trained on unlabelled text before any task; a student much smaller than the teacher learns from a teaching
    assistant of the teacher's depth and its own width (section 3.3).
    """
    matches = []
    for blocks in block_pairs(teacher, student, teacher_layers, student_layers, mask):
        last = _attentions_at(blocks, teacher_layer)
        matches.append(Match(*last, selector="attention", loss="attention_kl", mask=blocks.mask))
        matches.append(Match(*last, selector="value", loss="relation_kl", mask=blocks.mask))
    return Matches(matches, besides=["trained on unlabelled text, before the task"])


@recipe("Wang et al. 2020, arXiv 2012.15828")
def minilm_v2(
    teacher: nn.Module,
    student: nn.Module,
    *,
    relation_heads: int | Literal["auto"] | None = AUTO,
    teacher_layer: int = -1,
    teacher_layers: str | None = None,
    student_layers: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """MiniLMv2: how the queries, the keys and the values of one teacher block relate, learnt by the student's last block.

    Wang et al., *MiniLMv2: Multi-Head Self-Attention Relation Distillation*, 2020, arXiv 2012.15828, section 3.1. All heads of
    a side are regrouped into as many ``relation_heads``, so width, depth and number of heads may differ. ``"auto"`` takes
    relation heads 16 wide in the teacher, as the paper does (48 for a width of 768, 64 for 1024), or as near as divides all
    widths; ``None`` keeps the heads as they are.

    Args:
        teacher_layer: position of the teacher's block. The paper takes the last of 12 but the 21st of BERT-large's 24 (``20``).

    Besides: trained on unlabelled text before any task.
    """
    matches = []
    for blocks in block_pairs(teacher, student, teacher_layers, student_layers, mask):
        last = _attentions_at(blocks, teacher_layer)
        heads = _relation_heads(teacher, student, last) if relation_heads == AUTO else relation_heads
        options: dict[str, Any] = {} if heads is None else {"heads": heads}
        for what in ("query", "key", "value"):
            matches.append(Match(*last, selector=what, loss="relation_kl", mask=blocks.mask, **options))
    return Matches(matches, besides=["trained on unlabelled text, before the task"])


@recipe("Sun et al. 2019, arXiv 1908.09355")
def patient_kd(
    teacher: nn.Module,
    student: nn.Module,
    *,
    layer_map: str = "skip",
    alpha: float = 0.5,
    beta: float = 100.0,
    temperature: float = 10.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: str | None = None,
    student_layers: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """Patient KD: the [CLS] vectors of intermediate layers at length one, the logits, and the labels.

    Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019, arXiv 1908.09355, sections 3.2 and 3.3: total
    = (1 - alpha) · cross-entropy + alpha · KL + beta · Σ ‖·‖² of the normalised [CLS] vectors (eq. 7 and 8). ``layer_map`` is
    ``"skip"`` (every k-th layer) or ``"last"``. The last block of either side is left out, since the logits teach it. alpha,
    beta and temperature lie within the paper's search grid, whose best point depends on the task; here the KL carries its
    factor temperature².

    Args:
        mask: which tokens are compared; by default the first one alone.

    Besides: the student starts as the teacher's first layers: ``initialize_student(teacher, student, layers="first")``.
    """
    pairs = logit_pairs(teacher, student, logits)
    matches = label_terms(student, pairs, labels, 1 - alpha)
    if alpha:
        options = logit_mask(AUTO, teacher, student)
        matches += [Match(t, s, loss="kl", temperature=temperature, weight=alpha, **options) for t, s in pairs]
    for blocks in block_pairs(teacher, student, teacher_layers, student_layers, None):
        if min(len(blocks.teacher), len(blocks.student)) < 2:
            raise StructureError("the last block of each side is left out, so both need two blocks at least")
        theirs = blocks.teacher.address(names=blocks.teacher.names[:-1])
        ours = blocks.student.address(names=blocks.student.names[:-1])
        tokens = first_token if mask == AUTO else mask
        matches.append(Match(theirs, ours, loss="normalized_mse", weight=beta, mask=tokens, layer_map=layer_map))
    return Matches(matches, besides=["start the student from the teacher: initialize_student(…, layers='first')"])


@recipe("Sun et al. 2020, arXiv 2004.02984")
def mobilebert(
    teacher: nn.Module,
    student: nn.Module,
    *,
    stage: Literal["transfer", "pretraining"] = "transfer",
    layer: int | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    labels: Mask = "labels",
    logits: str | None = None,
    teacher_layers: str | None = None,
    student_layers: str | None = None,
    mask: Mask = AUTO,
) -> Matches:
    """MobileBERT: the feature map and the attention of every block from the block at the same depth; then the logits.

    Sun et al., *MobileBERT: a Compact Task-Agnostic BERT for Resource-Limited Devices*, 2020, arXiv 2004.02984, sections 3.3
    and 3.4. The stage ``"transfer"`` compares, block by block, the outputs (mean squared error, eq. 2) and the attention
    probabilities (KL, eq. 3); ``layer`` chooses one block, for the progressive schedule that the paper prefers: train block 0,
    then block 1 with those below frozen, and so on. The stage ``"pretraining"`` is alpha · cross-entropy with ``labels`` + (1 -
    alpha) · KL of the logits (eq. 4).

    Both sides need equally many blocks and heads; widths that differ get a learned map, which the paper avoids by a student of
    the teacher's inter-block width.
    """
    if stage == "pretraining":
        pairs = logit_pairs(teacher, student, logits)
        options = logit_mask(mask, teacher, student)
        soft = [Match(t, s, loss="kl", temperature=temperature, weight=1 - alpha, **options) for t, s in pairs]
        return Matches([*label_terms(student, pairs, labels, alpha), *soft], besides=["this is the second stage"])
    if stage != "transfer":
        raise MatchError(f"stage={stage!r} is not known; it is 'transfer' or 'pretraining'")
    matches = []
    for blocks in block_pairs(teacher, student, teacher_layers, student_layers, mask):
        if len(blocks.teacher) != len(blocks.student):
            raise StructureError(
                f"every block learns from the one at its depth, but the teacher has {len(blocks.teacher)} blocks and the "
                f"student {len(blocks.student)}. Take recipes.tinybert, or choose as many with teacher_layers="
            )
        if layer is not None and not -len(blocks.student) <= layer < len(blocks.student):
            raise MatchError(f"layer={layer}, but there are {len(blocks.student)} blocks")
        theirs, ours = (stack.names if layer is None else (stack.names[layer],) for stack in (blocks.teacher, blocks.student))
        inside = blocks.attention()
        pair = blocks.teacher.address(names=theirs), blocks.student.address(names=ours)
        maps = blocks.teacher.address(inside[0], names=theirs), blocks.student.address(inside[1], names=ours)
        matches.append(Match(*pair, loss="mse", mask=blocks.mask))
        matches.append(Match(*maps, selector="attention", loss="attention_kl", mask=blocks.mask))
    besides = ["this is the first stage; recipes.mobilebert(…, stage='pretraining') is the second"]
    return Matches(
        matches, besides=besides if layer is not None else [*besides, "the paper trains block by block: layer=0, 1, …"]
    )


def _attentions_at(blocks: Pair, teacher_layer: int) -> tuple[str, str]:
    """The attention of the teacher's block at ``teacher_layer`` and that of the student's last block."""
    if not -len(blocks.teacher) <= teacher_layer < len(blocks.teacher):
        raise MatchError(f"teacher_layer={teacher_layer}, but the teacher has {len(blocks.teacher)} blocks")
    theirs, ours = blocks.attention()
    return f"{blocks.teacher.blocks[teacher_layer]}.{theirs}", f"{blocks.student.blocks[-1]}.{ours}"


def _relation_heads(teacher: nn.Module, student: nn.Module, attentions: tuple[str, str]) -> int | None:
    """The most relation heads that divide all widths without being narrower than 16 in the teacher's queries."""
    widths = [attention_widths(model, path) for model, path in zip((teacher, student), attentions, strict=True)]
    if widths[0] is None or widths[1] is None:
        return None
    shared = math.gcd(*widths[0], *widths[1])
    return max(count for count in range(1, shared + 1) if shared % count == 0 and count <= max(widths[0][0] // 16, 1))
