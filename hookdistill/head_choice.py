"""Which logits are not to be made at all: their losses are computed from what the heads get."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .addresses import Address
from .engine import STUDENT, Compared, DistillationLoss, fast, in_match
from .engine.terms import compared, features_at, own_options, teacher_inputs
from .errors import MatchError
from .fused.forms import FORMS
from .heads import FoundHead, Seen, find_head
from .matches import Match

HEADS = ("auto", "fused", "whole")
FUSED_FROM = 64 << 20
"""Bytes of a student's logits in float32 from which on they are not made, if that is left to the plan."""

Heads = Mapping[str | None, Mapping[Address, FoundHead]]
"""By teacher, or `STUDENT`: the addresses of logits that are not made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """One dry forward of all models: what was captured, and what their linear layers did."""

    models: Mapping[str | None, nn.Module]
    seen: Mapping[str | None, Seen]
    teachers: Any
    student: Any
    batch: Any


def choose_heads(loss: DistillationLoss, run: Watched, *, mode: str, elsewhere: Collection[Address]) -> Heads:
    """The heads that are computed together with their losses.

    Args:
        mode: one of `HEADS`: ``"auto"`` where it saves much memory, ``"fused"`` for all logits.
        elsewhere: addresses in the student that serve as masks or targets, and so must be captured.

    Raises:
        MatchError: ``mode`` is ``"fused"``, and some logits cannot do without being made.
    """
    terms: dict[Address, dict[str, Match]] = {}
    for name, term in loss.terms.items():
        terms.setdefault(term.student_address, {})[name] = term
    chosen: dict[Address, _Candidate] = {}
    for address, here in terms.items():
        found = _candidate(address, here, run, mode, elsewhere, {each.student_address for each in loss.terms.values()})
        if isinstance(found, _Candidate):
            chosen[address] = found
        elif found is not None and mode == "fused":
            raise MatchError(f"{next(iter(here))}: head='fused', but {found}; use head='auto' or 'whole'")
    _drop_shared(loss, chosen, mode)
    heads: dict[str | None, dict[Address, FoundHead]] = {}
    for address, candidate in chosen.items():
        heads.setdefault(STUDENT, {})[address] = candidate.student
        for (teacher, theirs), head in candidate.teachers.items():
            heads.setdefault(teacher, {})[theirs] = head
    return heads


@dataclass(frozen=True, slots=True)
class _Candidate:
    student: FoundHead
    teachers: Mapping[tuple[str | None, Address], FoundHead]


def _candidate(
    address: Address, terms: Mapping[str, Match], run: Watched, mode: str, elsewhere: Collection[Address], ours: set[Address]
) -> _Candidate | str | None:
    """The heads behind the logits at ``address``; or why they must be made; or ``None`` if that need not be said."""
    families = {FORMS[term.spec.name].family if term.spec.name in FORMS else None for term in terms.values()}
    if not families & {"distributions", "labels"}:
        return None
    tensors: dict[str, Compared] = {}
    for name, term in terms.items():
        with in_match(name):
            tensors[name] = compared(term, run.teachers, run.student, run.batch)
    logits = next(iter(tensors.values())).student
    if mode == "auto" and logits.numel() * 4 < FUSED_FROM:
        return None
    if reason := _why_whole(address, terms, tensors, run, elsewhere):
        return reason
    student = find_head(run.models[STUDENT], logits, run.seen[STUDENT])
    if isinstance(student, str):
        return f"of the student, {student}"
    if student.input in ours:
        return f"{str(student.input)!r} is compared too"
    teachers = {}
    for name, term in terms.items():
        if term.teacher_address is not None:
            origin = (term.teacher_model, term.teacher_address)
            found = find_head(run.models[term.teacher_model], tensors[name].origin, run.seen[term.teacher_model])
            if isinstance(found, str):
                return f"of the teacher, {found}"
            teachers[origin] = found
    return _Candidate(student, teachers)


def _why_whole(
    address: Address, terms: Mapping[str, Match], tensors: Mapping[str, Compared], run: Watched, elsewhere: Collection[Address]
) -> str | None:
    if address in elsewhere:
        return "the logits serve as a mask or target"
    if address.call is not None:
        return f"{str(address)!r} names one of several calls"
    for name, term in terms.items():
        with in_match(name):
            each = tensors[name]
            device = each.student.device
            arguments = own_options(term, each.mask, run.batch, run.student, 0, device)
            row = fast.row_term(term.spec, each.student, each.other, arguments, 1.0)
        if isinstance(row, str):
            return f"{name} has {row}"
        if term.further:
            return f"{name} has inputs="
        if row[0].form.family == "features" or features_at(term, each.student) != -1:
            return f"{name} does not compare logits with their classes last"
        if isinstance(term.adapter, nn.Module):
            return f"{name} has an adapter"
    return None


def _drop_shared(loss: DistillationLoss, chosen: dict[Address, _Candidate], mode: str) -> None:
    """A teacher's logits that another term needs whole are made anyway, and then serve all."""
    inputs = {(term.teacher_model, each) for term in loss.terms.values() for each in teacher_inputs(term)}
    while True:
        whole = inputs.union(_origins(term for term in loss.terms.values() if term.student_address not in chosen))
        blocked = [
            address
            for address, candidate in chosen.items()
            if any(origin in whole or (origin[0], head.input) in whole for origin, head in candidate.teachers.items())
        ]
        if not blocked:
            return
        if mode == "fused":
            raise MatchError(f"head='fused', but the teacher's logits for {str(blocked[0])!r} are compared elsewhere too")
        for address in blocked:
            del chosen[address]


def _origins(terms: Iterable[Match]) -> Iterable[tuple[str | None, Address]]:
    return ((term.teacher_model, term.teacher_address) for term in terms if term.teacher_address is not None)
