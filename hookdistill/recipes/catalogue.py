"""What a recipe returns, and the list of all recipes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import HookDistillError, StructureError
from ..matches import Match
from ..structure import stacks
from ..tables import table

Function = TypeVar("Function", bound=Callable[..., Any])


class Matches(list[Match]):
    """A list of matches like any other, to be edited, added to and given to a `Distiller`; printed, it is a table.

    ``besides`` says what the method asks for that is no match: stages of training, other data, a special student.
    """

    def __init__(self, matches: Iterable[Match] = (), *, besides: Iterable[str] = ()) -> None:
        super().__init__(matches)
        self.besides = tuple(besides)

    def __str__(self) -> str:
        headings = ("student", "teacher / target", "loss", "weight", "mask", "layers")
        shown = table(headings, [_row(match) for match in self], right=("weight",))
        return "\n".join([shown, *(f"besides: {each}" for each in self.besides)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A recipe as it stands in the catalogue."""

    name: str
    function: Callable[..., Matches]
    paper: str
    summary: str
    """The first paragraph of the docstring."""

    @property
    def options(self) -> tuple[str, ...]:
        """The names of the options, after teacher and student."""
        return tuple(inspect.signature(self.function).parameters)[2:]


_DECODER = (
    "batches hold decoder_input_ids, as DataCollatorForSeq2Seq(…, model=student) makes them: labels that are a target are not "
    "passed to the models"
)
_RECIPES: dict[str, Recipe] = {}


def recipe(paper: str) -> Callable[[Function], Function]:
    """A decorator: the function becomes part of the catalogue, and what it does not find names the recipe."""

    def register(function: Function) -> Function:
        name = function.__name__

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Matches:
            try:
                found: Matches = function(*args, **kwargs)
            except HookDistillError as error:
                raise type(error)(f"recipes.{name}: {error}") from error
            if not found:
                raise StructureError(f"recipes.{name}: every term was left out, so there is nothing to train on")
            if any(stack.cross for stack in stacks(inspect.signature(function).bind(*args, **kwargs).arguments["student"])):
                found.besides += (_DECODER,)
            return found

        summary = " ".join((function.__doc__ or "").strip().split("\n\n")[0].split())
        _RECIPES[name] = Recipe(name=name, function=wrapped, paper=paper, summary=summary)
        return wrapped  # type: ignore[return-value]

    return register


def catalogue() -> dict[str, Recipe]:
    """All recipes by name."""
    return dict(_RECIPES)


def _row(match: Match) -> tuple[str, ...]:
    options = [f"{key}={value!r}" for key, value in match.loss_args.items()]
    if match.temperature != 1.0:
        options.insert(0, f"T={match.temperature:g}" if not callable(match.temperature) else "T=schedule")
    theirs = str(match.teacher_address) if match.teacher_address is not None else f"batch: {_source(match.target)}"
    several = match.student_address.several and match.teacher_address is not None and match.teacher_address.several
    return (
        str(match.student_address),
        theirs,
        match.spec.name + (f"({', '.join(options)})" if options else ""),
        "schedule" if callable(match.weight) else f"{match.weight:g}",
        "" if match.mask is None else _source(match.mask),
        str(match.layer_map) if several else "",
    )


def _source(source: object) -> str:
    return getattr(source, "__name__", "function") if callable(source) else str(source)
