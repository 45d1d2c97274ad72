"""What entries keep that choose among teacher layers: the choice once it is made, or the weights that move with the steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layer_maps import Cka, Emd, MinLoss
from ..matches import Match
from .blame import in_match
from .layers import LayerWeights, choice_of, rows_of
from .lookup import Captures
from .terms import module_key


class Position(nn.Module):
    """Which teacher layer was chosen, for the state dict: -1 before that."""

    position: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("position", torch.tensor(-1))


class Choices(nn.ModuleDict):
    """The state of all entries that choose, by `module_key`. Entries that choose once are undecided until the plan is made.

    Args:
        terms: the entries by name.
    """

    def __init__(self, terms: Mapping[str, Match]) -> None:
        super().__init__()
        self.once = {name: term for name, term in terms.items() if is_undecided(term)}
        """The entries that choose once, as they were before."""
        self.settled = False
        for name, term in terms.items():
            if name in self.once:
                self[module_key(name)] = Position()
            elif isinstance(term.paired_by, Emd) and term.paired_by.cost_attention and term.members:
                self[module_key(name)] = LayerWeights(len(term.members[0]), len(term.members))
        self.register_load_state_dict_post_hook(_unsettle)  # type: ignore[no-untyped-call]

    def state(self, name: str) -> nn.Module | None:
        """The state of entry ``name``, if it has any."""
        return self[key] if (key := module_key(name)) in self else None

    def choose(
        self, terms: Mapping[str, Match], teacher_captures: Any, student_captures: Captures, batch: Any
    ) -> dict[str, Match]:
        """What the undecided ones among ``terms`` become, by these tensors of all layers among which they may choose.

        Raises:
            MatchError: an entry cannot choose by them.
        """
        entries: dict[int, list[str]] = {}
        for name in self.once:
            if is_undecided(terms[name]):
                entries.setdefault(id(terms[name].entry), []).append(name)
        decided = {}
        for names in entries.values():
            with in_match(names[0]), torch.no_grad():
                rows = [
                    row
                    for name in names
                    for row in rows_of(name, terms[name], None, teacher_captures, student_captures, batch, 0)
                ]
                positions = choice_of(terms[names[0]].paired_by, rows)
            for name, position in zip(names, positions, strict=True):
                self._position(name).fill_(position)
                decided[name] = self.once[name].members[0][position]
        self.settled = False  # what is shared among processes comes later, when DDP wraps the model
        return decided

    def settle(self, terms: Mapping[str, Match]) -> dict[str, Match]:
        """What entries become whose buffer holds another choice, which a state dict or another process has written.

        Reads the buffers on the host, once until the next state dict is loaded.
        """
        if self.settled or not self.once:
            return {}
        self.settled = True
        held = {name: int(self._position(name)) for name in self.once}
        chosen = {name: self.once[name].members[0][position] for name, position in held.items() if position >= 0}
        return {name: term for name, term in chosen.items() if terms[name] is not term}

    def _position(self, name: str) -> Tensor:
        state = self[module_key(name)]
        assert isinstance(state, Position)
        return state.position


def is_undecided(term: Match) -> bool:
    """Whether the entry is to choose its teacher layer once and has not yet."""
    return bool(term.members) and (isinstance(term.paired_by, Cka) or term.paired_by == MinLoss(each_step=False))


def _unsettle(choices: Choices, _: Any) -> None:
    choices.settled = False
