"""The matches that a recipe lists."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import RecipeError, did_you_mean, listing
from ..losses.registry import loss_spec
from ..matches import Match, as_matches
from ..recipes import catalogue
from ..schedules import Cosine, Linear
from .importing import check_arguments, check_types, import_object
from .schema import MatchItem, NamedMatches, OldMatch, Schedule


def build_match(item: MatchItem | OldMatch, folder: Path) -> Match:
    """The entry; what depends on the models is found when the plan is made.

    Raises:
        HookDistillError: an unknown loss or argument, an address that does not parse, contradictions.
    """
    given = item.model_dump(include=item.model_fields_set & {*type(item).model_fields} - {"weight", "temperature"})
    for name in ("weight", "temperature"):
        if name in item.model_fields_set:
            given[name] = _course(getattr(item, name))
    if isinstance(item, OldMatch):
        loss = {**given["loss"], "loss_function": _loss(given["loss"]["loss_function"], folder)}
        (match,) = as_matches([{**given, "loss": loss}])
        return match
    if "loss" in given:
        given["loss"] = _loss(given["loss"], folder)
    return Match(given.pop("teacher", None), given.pop("student"), **given, **(item.model_extra or {}))


def unknown_keys(item: MatchItem | OldMatch, folder: Path) -> dict[str, str]:
    """Keys that are neither those of a match nor arguments of its loss, each with what to say about it.

    Raises:
        HookDistillError: an unknown loss, or an argument of another type.
    """
    extra = item.model_extra or {}
    if not isinstance(item, MatchItem) or not extra:
        return {}
    spec = loss_spec(_loss(item.loss, folder))
    check_types(spec.function, extra, spec.name)
    known = [*spec.parameters, *(["reduction"] if spec.accepts_reduction else []), *spec.state_parameters]
    own = [name for name in known if name not in MatchItem.model_fields]
    return {
        key: f"neither a key of a match nor an argument of the loss {spec.name!r}."
        f"{did_you_mean(key, [*MatchItem.model_fields, *own])} Keys of a match are {listing(MatchItem.model_fields, most=20)}; "
        f"arguments of {spec.name} are {listing(own)}"
        for key in extra
        if key not in known and not spec.accepts_any
    }


def named_matches(spec: NamedMatches, teacher: Any, student: nn.Module) -> list[Match]:
    """The list that a recipe of `hookdistill.recipes` gives for these models.

    Raises:
        HookDistillError: there is no such recipe, it takes no such option, or it does not find its layers.
    """
    found = catalogue()
    if spec.recipe not in found:
        hint = did_you_mean(spec.recipe, found)
        raise RecipeError(f"no recipe is called {spec.recipe!r}.{hint} There are {listing(found, most=30)}")
    if not isinstance(teacher, nn.Module):
        raise RecipeError(f"the recipe {spec.recipe!r} compares the student with one teacher; there is none, or several")
    function = found[spec.recipe].function
    models = tuple(inspect.signature(function).parameters)[:2]
    check_arguments(function, spec.arguments, f"the recipe {spec.recipe}", given=models)
    return list(function(teacher, student, **spec.arguments))


def _course(value: float | Schedule) -> Any:
    if not isinstance(value, Schedule):
        return value
    return (Cosine if value.shape == "cosine" else Linear)(value.start, value.end, value.steps)


def _loss(name: str, folder: Path) -> Any:
    return import_object(name, folder) if ":" in name else name
