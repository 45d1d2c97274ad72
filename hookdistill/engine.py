"""Matches + captured tensors + batch → the losses of one step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import Adapter, feature_dim, fit_adapter
from .addresses import Address, parse
from .batches import contents, has_item, pick
from .errors import AddressError, BatchError, HookDistillError, MatchError, listing
from .matches import Match, Schedule, Source, as_matches

Captures = Mapping[str, Mapping[str, Tensor]]
"""``{layer: {output: tensor}}``: a `Captured`, or a dictionary written by hand."""

IMPLEMENTATIONS = ("auto", "eager")


class Losses(NamedTuple):
    """The losses of one step.

    ``total`` is the scalar Σ weight · part, attached to the graph. ``parts`` are the values of the matches by name:
    scalars, detached, unweighted.
    """

    total: Tensor
    parts: dict[str, Tensor]


class DistillationLoss(nn.Module):
    """The loss stage alone: ``loss(teacher_captures, student_captures, batch)`` for any loop and any source of tensors.

    Args:
        matches: `Match` entries or dicts of the older library's config. Without models there is nothing that a wildcard
            could be expanded against, so every address names one tensor.
        impl: ``"auto"`` or ``"eager"``.

    Raises:
        MatchError: an entry is wrong on its face.
    """

    def __init__(self, matches: Iterable[Match | Mapping[str, Any]], *, impl: str = "auto") -> None:
        super().__init__()
        if impl not in IMPLEMENTATIONS:
            raise MatchError(f"impl={impl!r} is not known here; it is one of {listing(IMPLEMENTATIONS)}")
        self.impl = impl
        self.terms = named_terms(as_matches(matches))
        self.adapters = nn.ModuleDict()
        self.loss_modules = nn.ModuleDict()
        for name, term in self.terms.items():
            if isinstance(term.adapter, nn.Module):
                self.adapters[module_key(name)] = term.adapter
            if isinstance(term.loss, nn.Module):
                self.loss_modules[module_key(name)] = term.loss

    def forward(
        self,
        teacher_captures: Captures | Mapping[str, Captures],
        student_captures: Captures,
        batch: Any = None,
        *,
        step: int = 0,
    ) -> Losses:
        """The losses of one step.

        Args:
            teacher_captures: ``{layer: {output: tensor}}``; with ``teacher_model=`` in the matches, one such mapping for
                each teacher by name.
            student_captures: ``{layer: {output: tensor}}``.
            batch: where masks and targets are looked up.
            step: what schedules of weights and temperatures are asked for.

        Raises:
            MatchError: a term cannot be computed, or would train nothing; the message names the entry.
        """
        total, parts = None, {}
        for name, term in self.terms.items():
            with in_match(name):
                value = self._value(name, term, teacher_captures, student_captures, batch, step)
                weight = at_step("weight", term.weight, step)
            weighted = value * weight
            total = weighted if total is None else total + weighted
            parts[name] = value.detach()
        assert total is not None  # as_matches refuses an empty list
        return Losses(total, parts)

    def adapter(self, name: str) -> nn.Module | None:
        """The adapter of entry ``name``, if it has one."""
        return self.adapters[key] if (key := module_key(name)) in self.adapters else None

    def add_adapter(self, name: str, student: Tensor, other: Tensor) -> None:
        """Make the adapter that entry ``name`` needs between these two tensors, if it needs one and has none yet."""
        term, key = self.terms[name], module_key(name)
        if key not in self.adapters and isinstance(term.adapter, str) and _adapts(term, student, other):
            with torch.inference_mode(False):  # parameters made in inference mode could never be trained
                adapter = fit_adapter(term.adapter, student, other, dim=_feature_dim(term, other))
            if adapter is not None:
                self.adapters[key] = adapter

    def tensors(
        self, name: str, teacher_captures: Any, student_captures: Captures, batch: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What entry ``name`` compares: student tensor, teacher tensor or target (detached), mask."""
        term = self.terms[name]
        student = _look_up(student_captures, term.student_address, "student")
        if term.teacher_address is None:
            other = _source("target", term.target, batch, student_captures)
        else:
            other = _look_up(_of_teacher(teacher_captures, term.teacher_model), term.teacher_address, "teacher")
        if other.is_meta and not student.is_meta:
            raise MatchError("the teacher tensor is on the meta device and holds no values; load the teacher's weights first")
        mask = None if term.mask is None else _source("mask", term.mask, batch, student_captures)
        return student, other.detach().to(student.device), None if mask is None else mask.to(student.device)

    def _value(
        self, name: str, term: Match, teacher_captures: Any, student_captures: Captures, batch: Any, step: int
    ) -> Tensor:
        student, other, mask = self.tensors(name, teacher_captures, student_captures, batch)
        trains = torch.is_grad_enabled()
        if trains and not student.requires_grad:
            raise MatchError(
                f"the student tensor {str(term.student_address)!r} carries no gradient, so this term would train nothing. "
                "Its parameters may be frozen, or it was made under no_grad or by a detach; unfreeze them or drop the entry"
            )
        options = self._options(term, student, other, mask, batch, student_captures, step)
        adapted = self._adapt(name, term, student, other)
        value = _call(term, adapted, other, options)
        if trains and not value.requires_grad:
            raise MatchError(f"the loss {term.spec.name!r} returned a value without gradient, which would train nothing")
        return value

    def _adapt(self, name: str, term: Match, student: Tensor, other: Tensor) -> Tensor:
        key = module_key(name)
        if key in self.adapters:
            adapter = self.adapters[key]
            if isinstance(adapter, Adapter):
                return adapter(student, other)  # type: ignore[no-any-return]
            with user_code(f"the adapter {type(adapter).__name__}", _compared(student, other)):
                adapted = adapter(student)
            if not isinstance(adapted, Tensor):
                raise MatchError(f"the adapter {type(adapter).__name__} returned a {type(adapted).__name__}, not a tensor")
            return adapted
        if not isinstance(term.adapter, str) or not _adapts(term, student, other):
            return student
        if student.shape == other.shape and term.adapter not in ("linear", "conv"):
            return student  # the usual step: nothing to bridge
        fitted = fit_adapter(term.adapter, student, other, dim=_feature_dim(term, other))
        if fitted is None:
            return student
        if fitted.project is not None:
            raise MatchError(
                f"student {list(student.shape)} and teacher {list(other.shape)} differ in width, and the adapter between "
                "them does not exist yet, so no optimizer would train it. Make it before the optimizer: "
                "distiller.plan(batch), or Distiller(…, example_batch=batch)"
            )
        return fitted(student, other)  # type: ignore[no-any-return]

    def _options(
        self,
        term: Match,
        student: Tensor,
        other: Tensor,
        mask: Tensor | None,
        batch: Any,
        captures: Captures,
        step: int,
    ) -> dict[str, Any]:
        options = dict(term.loss_args)
        if mask is not None:
            options["mask"] = mask
        if term.spec.accepts_temperature:
            options["temperature"] = at_step("temperature", term.temperature, step, lowest=0.0)
        if "dim" in term.spec.parameters and "dim" not in options:
            options["dim"] = _feature_dim(term, student)
        if term.teacher_address is not None and term.target is not None:
            options["target"] = _source("target", term.target, batch, captures).to(student.device)
        return options


@contextlib.contextmanager
def in_match(name: str) -> Iterator[None]:
    """Errors raised inside say which entry they come from."""
    try:
        yield
    except HookDistillError as error:
        raise MatchError(f"{name}: {error}") from error
    except torch.OutOfMemoryError as error:
        error.add_note(f"raised in the match {name!r}")
        raise


def at_step(what: str, value: float | Schedule, step: int, *, lowest: float = -math.inf) -> float:
    """A weight or temperature at ``step``.

    Raises:
        MatchError: a schedule raises, or gives no finite number above ``lowest``.
    """
    if not callable(value):
        return value
    with user_code(f"the schedule of {what}= (at step {step})"):
        number = value(step)
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number) or number <= lowest:
        above = "" if lowest == -math.inf else f" above {lowest:g}"
        raise MatchError(f"the schedule of {what}= must give a finite number{above}; at step {step} it gave {number!r}")
    return float(number)


@contextlib.contextmanager
def user_code(what: str, context: str = "") -> Iterator[None]:
    """Errors of the user's own code become a `MatchError` that says whose they are, and on what it was called."""
    try:
        yield
    except (HookDistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise MatchError(f"{what} raised {type(error).__name__}: {error}{context}") from error


def named_terms(matches: Iterable[Match]) -> dict[str, Match]:
    """The matches by their label, made unique by a number where two are alike.

    Raises:
        MatchError: two entries were given the same ``name=``.
    """
    matches = list(matches)
    given = [match.name for match in matches if match.name is not None]
    if twice := [name for name in given if given.count(name) > 1]:
        raise MatchError(f"two entries are called {twice[0]!r}; name= must be unique, as losses.parts is keyed by it")
    terms: dict[str, Match] = {}
    for match in matches:
        label, number = match.label, 2
        while match.name is None and (label in terms or label in given):
            label, number = f"{match.label} #{number}", number + 1
        terms[label] = match
    return terms


def module_key(name: str) -> str:
    """A name as a key of a ``ModuleDict``, which allows neither dots nor its own attributes: ``/`` for each dot."""
    key = name.replace("/", "//").replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) else key


def _adapts(term: Match, student: Tensor, other: Tensor) -> bool:
    """Whether shapes are the adapter's business here: between features, not between logits or maps, or against labels."""
    if term.teacher_address is None or term.spec.compares in ("logits", "labels", "attention", "relations"):
        return False
    if term.spec.compares == "any":  # the user's own loss may bridge other shapes by itself
        return term.adapter != "none" and student.dim() == other.dim() and student.shape[0] == other.shape[0]
    return True


def _feature_dim(term: Match, tensor: Tensor) -> int:
    dim = term.loss_args.get("dim", feature_dim(tensor.shape))
    if isinstance(dim, bool) or not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        raise MatchError(f"dim={dim!r} is no dimension of a tensor of shape {list(tensor.shape)}")
    return -1 if dim == tensor.dim() - 1 else dim


def _of_teacher(captures: Any, name: str | None) -> Any:
    if name is None:
        return captures
    if not isinstance(captures, Mapping) or name not in captures:
        there = listing(captures) if isinstance(captures, Mapping) else f"a {type(captures).__name__}"
        raise MatchError(f"there are no captures of the teacher {name!r}; the teacher captures have {there}")
    return captures[name]


def _look_up(captures: Any, address: Address, side: str) -> Tensor:
    if not isinstance(captures, Mapping):
        raise MatchError(f"the {side} captures must be {{layer: {{output: tensor}}}}, got {type(captures).__name__}")
    if address.path not in captures:
        raise MatchError(f"the {side} captures have no layer {address.path!r}; they have {listing(captures)}")
    layer = captures[address.path]
    if not isinstance(layer, Mapping):
        kind = type(layer).__name__
        raise MatchError(f"layer {address.path!r} of the {side} captures must be {{output: tensor}}, got a {kind}")
    if address.key not in layer:
        raise MatchError(f"layer {address.path!r} of the {side} captures has no {address.key!r}; it has {listing(layer)}")
    tensor = layer[address.key]
    if not isinstance(tensor, Tensor):
        raise MatchError(f"{str(address)!r} of the {side} captures is no tensor but a {type(tensor).__name__}")
    return tensor


def _source(what: str, source: Source | None, batch: Any, student_captures: Captures) -> Tensor:
    assert source is not None
    if callable(source):
        with user_code(f"the function {what}= of the batch"):
            found = source(batch)
    elif batch is not None and has_item(batch, source):
        found = pick(batch, source)
    elif isinstance(source, str) and (address := _captured_address(source, student_captures)) is not None:
        found = _look_up(student_captures, address, "student")
    else:
        has = "there is no batch" if batch is None else f"the batch has {contents(batch)}"
        raise BatchError(f"{what}={source!r} is neither in the batch nor a captured address of the student; {has}")
    if not isinstance(found, Tensor):
        raise BatchError(f"{what}={source!r} gives no tensor but a {type(found).__name__}")
    return found


def _captured_address(source: str, captures: Captures) -> Address | None:
    try:
        address = parse(source)
    except AddressError:
        return None
    return address if address.path in captures else None


def _compared(student: Tensor, other: Tensor) -> str:
    ours, theirs = f"{list(student.shape)} {student.dtype}", f"{list(other.shape)} {other.dtype}"
    return f" (student {ours}, compared with {theirs})"


def _call(term: Match, student: Tensor, other: Tensor, options: dict[str, Any]) -> Tensor:
    with user_code(f"the loss {term.spec.name!r}", _compared(student, other)):
        value = term.spec.function(student, other, **options)
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MatchError(
            f"the loss {term.spec.name!r} returned {got}, not a scalar tensor. Reduce it, with "
            "hookdistill.losses.masked_mean(values, mask) for a mean over valid positions"
        )
    return value
