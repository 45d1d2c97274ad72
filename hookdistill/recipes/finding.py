"""What recipes look for in a pair of models, and what they say where it is not there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..batches import BatchKey, has_item, pick
from ..errors import MatchError, StructureError, listing
from ..layer_maps import STATIC, chosen
from ..matches import Match
from ..paths import forward_signature
from ..structure import Stack, described, heads, layers, logits, output_fields, predicts, stack_at, stacks, stages

Mask = BatchKey | Callable[[Any], Tensor] | None
Layers = str | Sequence[str] | None
_MEDIA = {"pixel_values", "input_values", "input_features"}
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True)
class Pair:
    """The blocks of a teacher and those of a student that learn from them, with the mask of their tokens."""

    teacher: Stack
    student: Stack
    mask: Mask

    def inside(self, suffixes: tuple[str, str]) -> tuple[str, str]:
        """The addresses, teacher and student, of the module at these paths in every block."""
        return self.teacher.address(suffixes[0]), self.student.address(suffixes[1])

    def attention(self) -> tuple[str, str]:
        """The paths of the self-attention inside a teacher's and a student's block.

        Raises:
            StructureError: the blocks of a side do not all have one at the same place.
        """
        for role, stack in (("teacher", self.teacher), ("student", self.student)):
            if stack.attention is None:
                raise StructureError(
                    f"the blocks {stack.address()!r} of the {role} do not all hold one self-attention at the same place. "
                    f"Choose those that do with {role}_layers=, or write the matches yourself"
                )
        return str(self.teacher.attention), str(self.student.attention)


def block_pairs(
    teacher: nn.Module, student: nn.Module, teacher_layers: str | None, student_layers: str | None, mask: Mask
) -> list[Pair]:
    """The stacks of transformer blocks of both models, first with first: encoder with encoder, decoder with decoder.

    Raises:
        StructureError: a model has none, or not as many as the other.
    """
    theirs = _stacks("teacher", teacher, teacher_layers)
    ours = _stacks("student", student, student_layers)
    if len(theirs) != len(ours):
        raise StructureError(
            f"the teacher has blocks in {listing(each.path for each in theirs)}, the student in "
            f"{listing(each.path for each in ours)}. Choose with teacher_layers= and student_layers=, as in "
            f"teacher_layers={theirs[0].address()!r}"
        )
    return [Pair(t, s, token_mask(mask, teacher, student, decodes=s.cross)) for t, s in zip(theirs, ours, strict=True)]


def layer_pairs(
    teacher: nn.Module, student: nn.Module, teacher_layers: Layers, student_layers: Layers, layer_map: str = "uniform"
) -> list[tuple[str, str]]:
    """Pairs (teacher layer, student layer) of blocks or stages, in the order of depth, each layer at most once.

    Where the student has more layers than the teacher, ``layer_map`` chooses among the student's.

    Raises:
        StructureError: no layers are found.
        MatchError: there is no such map.
    """
    theirs, ours = _layers("teacher", teacher, teacher_layers), _layers("student", student, student_layers)
    if layer_map not in STATIC:
        raise MatchError(f"layer_map={layer_map!r} does not depend on the numbers of layers alone, as {listing(STATIC)} do")
    if len(theirs) >= len(ours):
        return [(theirs[i], layer) for i, layer in zip(chosen(layer_map, len(theirs), len(ours)), ours, strict=True)]
    return [(layer, ours[i]) for i, layer in zip(chosen(layer_map, len(ours), len(theirs)), theirs, strict=True)]


def stage_pairs(
    teacher: nn.Module, student: nn.Module, teacher_layers: Layers, student_layers: Layers
) -> list[tuple[str, str]]:
    """Pairs of stages of two conv nets, the last with the last.

    Raises:
        StructureError: a model has no stages.
    """
    sides = []
    for role, model, given in (("teacher", teacher, teacher_layers), ("student", student, student_layers)):
        found = _listed(given) if given is not None else [] if stacks(model) else stages(model)
        if not found:
            raise StructureError(
                f"looked for stages in the {role}, convolutions between steps down in resolution; {described(model)}. Name "
                f"their last modules: {role}_layers=['layer1', 'layer2', …]"
            )
        sides.append(found)
    count = min(map(len, sides))
    return list(zip(sides[0][-count:], sides[1][-count:], strict=True))


def feature_pair(
    teacher: nn.Module, student: nn.Module, teacher_features: str | None, student_features: str | None
) -> tuple[str, str]:
    """The addresses of the vectors from which both models make their logits.

    Raises:
        StructureError: a model has no head, or its head makes logits for each token.
    """
    found = []
    for role, model, given in (("teacher", teacher, teacher_features), ("student", student, student_features)):
        behind = heads(model) if logits(model) and predicts(model) == "item" else []
        if given is None and not behind:
            raise StructureError(
                f"looked for one vector per item in the {role}, the input of the linear map that makes the logits; "
                f"{described(model)}. Name it: {role}_features='…:input', or any address that gives [batch, width]"
            )
        found.append(given if given is not None else f"{behind[-1]}:input")
    return found[0], found[1]


def logit_pairs(teacher: nn.Module, student: nn.Module, given: str | None = None) -> list[tuple[str, str]]:
    """The addresses of the logits of both models; several pairs where the outputs have several.

    Raises:
        StructureError: a model has none, or not as many as the other.
    """
    if given is not None:
        return [(given, given)]
    sides = []
    for role, model in (("teacher", teacher), ("student", student)):
        found = logits(model)
        if not found:
            raise StructureError(
                f"looked for logits in the output of the {role}, {type(model).__name__}, which has "
                f"{listing(output_fields(model))}. Take a model with a head, or give the address of what stands for them: "
                "logits='…'"
            )
        sides.append(found)
    if len(sides[0]) != len(sides[1]):
        raise StructureError(
            f"the teacher has the logits {listing(sides[0])}, the student {listing(sides[1])}; give logits='…'"
        )
    return list(zip(*sides, strict=True))


def label_terms(student: nn.Module, pairs: Sequence[tuple[str, str]], labels: Mask, weight: float) -> list[Match]:
    """Cross-entropy of the student's logits with the labels, unless ``labels`` is ``None``, the weight zero, or there are
    several logits, of which a recipe cannot know the labels."""
    if labels is None or weight == 0 or len(pairs) > 1:
        return []
    shift: dict[str, Any] = {"causal_shift": True} if predicts(student) == "next token" else {}
    return [Match(None, pairs[0][1], loss="cross_entropy", target=labels, weight=weight, **shift)]


def logit_mask(mask: Mask, teacher: nn.Module, student: nn.Module) -> dict[str, Any]:
    """The options of a match between logits that say which positions count: those of real tokens."""
    if predicts(student) == "item":
        return {} if mask in (None, AUTO) else {"mask": mask}
    decodes = any(stack.cross for stack in stacks(student))
    options: dict[str, Any] = {"causal_shift": True} if predicts(student) == "next token" else {}
    found = token_mask(mask, teacher, student, decodes=decodes)
    return options if found is None else {**options, "mask": found}


def token_mask(mask: Mask, teacher: nn.Module, student: nn.Module, *, decodes: bool) -> Mask:
    """Which tokens count: what the user says, else the attention mask of models of text, else all."""
    if mask != AUTO:
        return mask
    takes = [_takes_mask(forward_signature(model).parameters) for model in (teacher, student)]
    if decodes:
        return decoded_tokens if all(takes) else None
    return "attention_mask" if all(takes) else None


def _takes_mask(parameters: Collection[str]) -> bool:
    """Whether batches are likely to have an attention mask of the tokens; images have none, and audio one of the samples."""
    return "attention_mask" in parameters and ("input_ids" in parameters or not _MEDIA.intersection(parameters))


def decoded_tokens(batch: Any) -> Tensor:
    """The valid tokens of the decoder: its attention mask where the batch has it, else the labels that are not -100."""
    if has_item(batch, "decoder_attention_mask"):
        found: Tensor = pick(batch, "decoder_attention_mask")
        return found
    return torch.as_tensor(pick(batch, "labels") != -100)


def first_token(batch: Any) -> Tensor:
    """The first token of each item alone, which is where BERT-like models put ``[CLS]``."""
    ids: Tensor = pick(batch, "input_ids")
    mask = torch.zeros(ids.shape[:2], dtype=torch.bool, device=ids.device)
    mask[:, 0] = True
    return mask


def _stacks(role: str, model: nn.Module, given: str | None) -> list[Stack]:
    if given is not None:
        return [stack_at(model, given)]
    found = stacks(model)
    if not found:
        raise StructureError(
            f"looked for transformer blocks in the {role}, a list of modules with one self-attention each; {described(model)}. "
            f"Name them: {role}_layers='encoder.layer.*'"
        )
    return found


def _layers(role: str, model: nn.Module, given: Layers) -> list[str]:
    if given is not None:
        return _listed(given)
    try:
        return layers(model)
    except StructureError as error:
        raise StructureError(f"{error}. Name those of the {role}: {role}_layers=['…']") from error


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)
