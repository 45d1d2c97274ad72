"""Which terms can be computed while the teacher still runs, as soon as their tensor of the teacher comes by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from ..addresses import Address
from ..attention import MAP_WORDS
from ..fused.forms import FORMS
from ..matches import Match
from .terms import teacher_inputs

Streams = Mapping[tuple[str | None, Address], Sequence[str]]
"""Entries by the teacher, and the address in it, whose tensor completes all that they wait for."""


def streams(terms: Mapping[str, Match]) -> Streams:
    """The entries that can be computed within the teacher's hooks.

    A teacher's tensor that is used up at once need not be kept. So all terms of a student tensor, which are computed together,
    must wait for the same one; and each must have a closed form, since eager ones keep what they compare.
    """
    origins = defaultdict(set)
    kept = set()
    for term in terms.values():
        if term.teacher_address is not None:
            origin = (term.teacher_model, term.teacher_address)
            origins[term.student_address].add(origin)
            if not _has_form(term) or isinstance(term.adapter, nn.Module) or term.further:
                kept.add(origin)
            kept.update((term.teacher_model, each) for each in teacher_inputs(term))
    for several in origins.values():
        if len(several) > 1:
            kept |= several
    found: dict[tuple[str | None, Address], list[str]] = {}
    for name, term in terms.items():
        if term.teacher_address is not None and (origin := (term.teacher_model, term.teacher_address)) not in kept:
            found.setdefault(origin, []).append(name)
    return found


def _has_form(term: Match) -> bool:
    maps = term.spec.compares == "attention" and term.student_address.selector.word in MAP_WORDS
    return maps or term.spec.name in FORMS or term.spec.name == "relation_kl"
