"""Entries that choose among teacher layers by the data: in each step, or once, when the plan is made.

They are computed by the eager definition, when both models have run. Nothing is read on the host in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MatchError
from ..hsic import FEWEST, MinibatchCKA, item_features, same_tokens, token_features
from ..layer_maps import Attention, Cka, Emd, LayerMap, cost_attention, matching, mix, transport
from ..matches import Match
from .terms import Compared, adapted, check_trains, compared, eager_value, features_at, options

Adapters = Callable[[str], nn.Module | None]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one student layer compares with each of the teacher layers."""

    members: Sequence[Match]
    student: Tensor
    others: Sequence[Tensor]
    arguments: dict[str, Any]

    @property
    def mask(self) -> Tensor | None:
        """The valid positions."""
        return self.arguments.get("mask")


class LayerWeights(nn.Module):
    """How much each layer of either side weighs in the transport of BERT-EMD."""

    teacher: Tensor
    student: Tensor

    def __init__(self, teacher: int, student: int) -> None:
        super().__init__()
        self.register_buffer("teacher", torch.full((teacher,), 1 / teacher))
        self.register_buffer("student", torch.full((student,), 1 / student))


def row_name(name: str, term: Match, number: int) -> str:
    """The name under which a row of entry ``name`` has its adapter."""
    return name if len(term.members) == 1 else f"{name}.{number}"


def rows_of(
    name: str, term: Match, adapter: Adapters | None, teacher_captures: Any, student_captures: Any, batch: Any, step: int
) -> list[Row]:
    """The tensors of entry ``name``, one row for each of its student layers; adapted, unless ``adapter`` is ``None``.

    Raises:
        HookDistillError: one is not there, cannot be adapted, or would train nothing.
    """
    rows = []
    for number, members in enumerate(term.members):
        tensors = [compared(member, teacher_captures, student_captures, batch) for member in members]
        student = tensors[0].student
        check_trains(members[0], student)
        if isinstance(term.paired_by, Cka):
            given: dict[str, Any] = {"mask": tensors[0].mask}
        else:
            given = options(members[0], tensors[0], teacher_captures, student_captures, batch, step, None)
        if adapter is not None:
            _check_one_shape(term, tensors)
            student = adapted(members[0], adapter(row_name(name, term, number)), tensors[0])
        rows.append(Row(members, student, [each.other for each in tensors], given))
    return rows


def _check_one_shape(term: Match, tensors: Sequence[Compared]) -> None:
    shapes = list(dict.fromkeys(tuple(each.other.shape) for each in tensors))
    if len(shapes) > 1 and (term.spec.compares != "relations" or isinstance(term.paired_by, Attention)):
        raise MatchError(
            f"layer_map='{term.paired_by}' compares a student layer with all teacher layers, which must have one shape; "
            f"there are {', '.join(str(list(shape)) for shape in shapes)}. Name layers of one shape, or take layer_map='cka'"
        )


def value_of(kind: LayerMap, rows: Sequence[Row], state: nn.Module | None, *, learns: bool) -> Tensor:
    """The value of an entry whose teacher layers are chosen anew in each step, attached to the graph.

    ``learns`` says that this is a step of training, in which the state may move.

    Raises:
        MatchError: the loss fails, or the teacher's tensors cannot be mixed.
    """
    if isinstance(kind, Emd):
        return _transported(kind, rows, state, learns=learns)
    (row,) = rows
    if isinstance(kind, Attention):
        return _attended(row)
    return _least(row)


def choice_of(kind: LayerMap, rows: Sequence[Row]) -> list[int]:
    """For each student layer the position of the teacher layer that it is to learn from. Reads values on the host.

    Raises:
        MatchError: the choice cannot be made on these tensors.
    """
    with torch.no_grad():
        if isinstance(kind, Cka):
            return _most_alike(kind, rows)
        for row in rows:
            wrong = [other for other in row.others if other.shape != row.student.shape]
            if wrong and row.members[0].spec.compares != "relations":
                raise MatchError(
                    f"layer_map='min_loss_fixed' compares losses before any training, but student {list(row.student.shape)} "
                    f"and teacher {list(wrong[0].shape)} need a map between them, which is random until then. Take 'cka', "
                    "which needs no equal shapes, or 'min_loss', which chooses in each step"
                )
        return [int(torch.stack(_values(row)).argmin()) for row in rows]


def _values(row: Row) -> list[Tensor]:
    pairs = zip(row.members, row.others, strict=True)
    return [eager_value(member, row.student, other, row.arguments) for member, other in pairs]


def _least(row: Row) -> Tensor:
    """The least of the losses; where the teacher's tensors are of one shape, the graph holds that one alone."""
    if any(other.shape != row.others[0].shape for other in row.others):
        return torch.stack(_values(row)).amin()
    with torch.no_grad():
        best = torch.stack(_values(row)).argmin()
    on_host = best.device.type == "cpu"
    other = row.others[int(best)] if on_host else torch.stack(list(row.others)).index_select(0, best[None])[0]
    return eager_value(row.members[0], row.student, other, row.arguments)


def _attended(row: Row) -> Tensor:
    """The loss against the mixture of the teacher's layers; gradients flow through the shares of the mixture too."""
    dim = features_at(row.members[0], row.others[0])
    last = [each.movedim(dim, -1) for each in (row.student, *row.others)]
    mask = row.mask
    if mask is not None and mask.dim() >= last[0].dim():
        raise MatchError(f"layer_map='attention' needs a mask of the positions; this one is {list(mask.shape)}")
    mixed, _ = mix(last[0], last[1:], mask)
    return eager_value(row.members[0], row.student, mixed.movedim(-1, dim), row.arguments)


def _transported(kind: Emd, rows: Sequence[Row], state: nn.Module | None, *, learns: bool) -> Tensor:
    """Σ flow · loss over all pairs; the flow adds up to one and carries no gradient (BERT-EMD, eq. 9)."""
    values = torch.stack([torch.stack(_values(row)) for row in rows], dim=1)  # [teacher, student]
    costs = values.detach()
    weights = state if isinstance(state, LayerWeights) else LayerWeights(*values.shape).to(values.device)
    flow = transport(costs, weights.teacher, weights.student)
    if learns and kind.cost_attention and isinstance(state, LayerWeights):
        new = (cost_attention(f, c, w, temperature=kind.temperature) for f, c, w in _sides(flow, costs, weights))
        for old, moved in zip((weights.teacher, weights.student), new, strict=True):
            old.copy_(moved)
    return (flow * values).sum()


def _sides(flow: Tensor, costs: Tensor, weights: LayerWeights) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(flow, costs, weights.teacher), (flow.T, costs.T, weights.student)]


def _most_alike(kind: Cka, rows: Sequence[Row]) -> list[int]:
    everything = [*rows[0].others, *(row.student for row in rows)]
    valid = None if rows[0].mask is None else rows[0].mask != 0
    if same_tokens(everything):
        features = token_features(everything, valid)
    else:
        features = [item_features(each, valid) for each in everything]
    if len(features[0]) < FEWEST:
        raise MatchError(f"layer_map='cka' needs {FEWEST} examples at least to choose by; this batch has {len(features[0])}")
    sums = MinibatchCKA()
    sums.add(features[: len(rows[0].others)], features[len(rows[0].others) :])
    return [position for position, _ in matching(sums.result(), order=kind.order)]
