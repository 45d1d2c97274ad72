"""The loss stage alone, for any loop and any source of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import fit_adapter
from ..errors import MatchError, did_you_mean, listing
from ..matches import Match, as_matches
from .counts import counts
from .fast import IMPLEMENTATIONS
from .lookup import Captures
from .states import given_modules, make_state, needs_state
from .step import Losses, Shares, Step
from .streams import streams
from .terms import (
    Compared,
    adapted,
    compared,
    features_at,
    further_tensors,
    is_adapted,
    module_key,
    named_terms,
    sketched,
)


class DistillationLoss(nn.Module):
    """The loss stage alone: ``loss(teacher_captures, student_captures, batch)`` for any loop and any source of tensors.

    Args:
        matches: `Match` entries or dicts of the older library's config. Without models there is nothing that a wildcard
            could be expanded against, so every address names one tensor.
        impl: ``"auto"`` takes the fastest that there is for each term; ``"eager"`` the definition, under autograd;
            ``"compiled"`` closed forms, compiled by Inductor where there is a compiler; ``"triton"`` the kernels for CUDA. A
            term that has no fast form is computed by its definition in any case. Gradients of gradients
            (``create_graph=True``) take the definition too; where the teacher's tensor has been let go by then,
            ``impl="eager"`` keeps it.

    Raises:
        MatchError: an entry is wrong on its face.
    """

    def __init__(self, matches: Iterable[Match | Mapping[str, Any]], *, impl: str = "auto") -> None:
        super().__init__()
        if impl not in IMPLEMENTATIONS:
            hint = did_you_mean(str(impl), IMPLEMENTATIONS)
            raise MatchError(f"impl={impl!r} is not known.{hint} It is one of {listing(IMPLEMENTATIONS)}")
        self.impl = impl
        self.terms = named_terms(as_matches(matches))
        self.streams = streams(self.terms)
        self.adapters = nn.ModuleDict()
        self.loss_modules = nn.ModuleDict()
        for name, term in self.terms.items():
            if isinstance(term.adapter, nn.Module):
                self.adapters[module_key(name)] = term.adapter
            if isinstance(term.loss, nn.Module):
                self.loss_modules[module_key(name)] = term.loss
            if (given := given_modules(term)) is not None:
                self.loss_modules[module_key(f"{name} arguments")] = given

    def forward(
        self,
        teacher_captures: Captures | Mapping[str, Captures],
        student_captures: Captures,
        batch: Any = None,
        *,
        step: int = 0,
        shares: Shares | None = None,
    ) -> Losses:
        """The losses of one step.

        Args:
            teacher_captures: ``{layer: {output: tensor}}``; with ``teacher_model=`` in the matches, one such mapping for
                each teacher by name.
            student_captures: ``{layer: {output: tensor}}``.
            batch: where masks and targets are looked up.
            step: what schedules of weights and temperatures are asked for.
            shares: a factor on the weight of entries, by name: the batch's share in a mean over several, see `counts`.

        Raises:
            MatchError: a term cannot be computed, or would train nothing; the message names the entry.
        """
        return self.begin(student_captures, batch, step=step, shares=shares).finish(teacher_captures)

    def begin(self, student_captures: Captures, batch: Any = None, *, step: int = 0, shares: Shares | None = None) -> Step:
        """A step whose entries are taken one by one, as the teacher's tensors come in; arguments as in `forward`."""
        return Step(
            self.terms, self.adapter, student_captures, batch, state=self.state, step=step, shares=shares, impl=self.impl
        )

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """For each entry that is a mean, the number of valid positions in ``batch``, up to a factor that all batches share.

        With ``shares = {name: count / sum of the counts of all batches}`` the totals of several batches add up to that of all
        their positions together.

        Raises:
            MatchError: a mask is an address in the student, so that it is not known before the forward.
        """
        return counts(self.terms, batch)

    def adapter(self, name: str) -> nn.Module | None:
        """The adapter of entry ``name``, if it has one."""
        return self.adapters[key] if (key := module_key(name)) in self.adapters else None

    def add_adapter(self, name: str, student: Tensor, other: Tensor) -> None:
        """Make the adapter that entry ``name`` needs between these two tensors, if it needs one and has none yet."""
        term, key = self.terms[name], module_key(name)
        if key not in self.adapters and isinstance(term.adapter, str) and is_adapted(term, student, other):
            with torch.inference_mode(False):  # parameters made in inference mode could never be trained
                adapter = fit_adapter(term.adapter, student, other, dim=features_at(term, other))
            if adapter is not None:
                self.adapters[key] = adapter

    def state(self, name: str) -> nn.Module | None:
        """The module that keeps the parameters or the memory of the loss of entry ``name``, if that has been made."""
        key = module_key(name)
        return self.loss_modules[key] if self.terms[name].spec.state is not None and key in self.loss_modules else None

    def add_state(self, name: str, teacher_captures: Any, student_captures: Captures, batch: Any) -> None:
        """Make the module that the loss of entry ``name`` needs, if it needs one and has none yet; its adapter comes first."""
        term = self.terms[name]
        if not needs_state(term) or self.state(name) is not None:
            return
        tensors = compared(term, teacher_captures, student_captures, batch)
        student = adapted(term, self.adapter(name), tensors)
        further = further_tensors(term, teacher_captures, student_captures, batch, student.device)
        arguments = {"dim": features_at(term, student), **term.loss_args, **further}
        self.loss_modules[module_key(name)] = make_state(term, student, tensors.other, arguments).train(self.training)

    def tensors(self, name: str, teacher_captures: Any, student_captures: Captures, batch: Any) -> Compared:
        """What entry ``name`` compares; maps of attention that are not made are stood for by ones without values."""
        return sketched(self.terms[name], teacher_captures, student_captures, batch)
