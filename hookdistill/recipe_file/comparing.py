"""The matches that a recipe lists."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError, did_you_mean, listing
from ..matches import Match, as_matches
from .importing import import_object
from .schema import MatchItem, OldMatch, Schedule


@dataclass(frozen=True, slots=True)
class Course:
    """A weight or temperature at a step: from ``start`` to ``end`` over ``steps``, then ``end``."""

    start: float
    end: float
    steps: int
    shape: str

    def __call__(self, step: int) -> float:
        done = min(1.0, step / self.steps)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


def build_match(item: MatchItem | OldMatch, folder: Path) -> Match:
    """The entry; what depends on the models is found when the plan is made.

    Raises:
        HookDistillError: an unknown loss or argument, an address that does not parse, contradictions.
    """
    given = item.model_dump(include=item.model_fields_set, exclude={"weight", "temperature"})
    for name in ("weight", "temperature"):
        if name in item.model_fields_set:
            given[name] = _course(getattr(item, name))
    if isinstance(item, OldMatch):
        loss = {**given["loss"], "loss_function": _loss(given["loss"]["loss_function"], folder)}
        (match,) = as_matches([{**given, "loss": loss}])
        return match
    if "loss" in given:
        given["loss"] = _loss(given["loss"], folder)
    extra = [key for key in item.model_extra or {} if not key.isidentifier()]
    if extra:
        raise RecipeError(f"{extra[0]!r} is no key of a match.{did_you_mean(extra[0], MatchItem.model_fields)}")
    if unfit := sorted({"inputs"} & set(given)):
        raise RecipeError(f"{listing(unfit)} cannot stand in a recipe")
    return Match(given.pop("teacher", None), given.pop("student"), **given, **(item.model_extra or {}))


def _course(value: float | Schedule) -> Any:
    return Course(value.start, value.end, value.steps, value.shape) if isinstance(value, Schedule) else value


def _loss(name: str, folder: Path) -> Any:
    return import_object(name, folder) if ":" in name else name
