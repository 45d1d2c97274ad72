"""One term of a step: its tensors, its adapter, and what its loss is called with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter, feature_dim, fit_adapter
from ..addresses import Address
from ..attention import AttentionCall
from ..errors import MatchError
from ..fused.head import Head
from ..inputs import Source
from ..matches import Match
from .blame import at_step, user_code
from .lookup import Captures, attention_call, captured, captures_of, head_at, sourced
from .states import with_state


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """What one entry compares: the student's tensor; that of the teacher, or a target; and which positions count."""

    student: Tensor
    origin: Tensor
    """The teacher's tensor or the target, as it was found."""
    other: Tensor
    """The same, detached and on the student's device."""
    mask: Tensor | None


def compared(term: Match, teacher_captures: Any, student_captures: Captures, batch: Any) -> Compared:
    """The tensors of an entry, all on the student's device.

    Raises:
        HookDistillError: one of them is not there.
    """
    student = captured(student_captures, term.student_address, "student")
    if term.teacher_address is None:
        assert term.target is not None
        other = sourced("target", term.target, batch, student_captures)
    else:
        other = captured(captures_of(teacher_captures, term.teacher_model), term.teacher_address, "teacher")
    if other.is_meta and not student.is_meta:
        raise MatchError("the teacher tensor is on the meta device and holds no values; load the teacher's weights first")
    mask = None if term.mask is None else sourced("mask", term.mask, batch, student_captures)
    return Compared(student, other, other.detach().to(student.device), None if mask is None else mask.to(student.device))


def sketched(term: Match, teacher_captures: Any, student_captures: Captures, batch: Any) -> Compared:
    """`compared`, for looking at rather than computing: what is not made is stood for by a tensor on the meta device."""
    if term.teacher_address is not None:
        ours = attention_call(student_captures, term.student_address)
        theirs = attention_call(captures_of(teacher_captures, term.teacher_model), term.teacher_address)
        if ours is not None and theirs is not None:
            return _sketch(term, _map_without_values(ours), _map_without_values(theirs), batch, student_captures)
    student = head_at(student_captures, term.student_address)
    if student is not None:
        if term.teacher_address is None:
            assert term.target is not None
            other = sourced("target", term.target, batch, student_captures)
        else:
            teacher = head_at(captures_of(teacher_captures, term.teacher_model), term.teacher_address)
            assert teacher is not None
            other = torch.empty(teacher.shape, dtype=teacher.hidden.dtype, device="meta")
        logits = torch.empty(student.shape, dtype=student.hidden.dtype, device="meta")
        return _sketch(term, logits, other, batch, student_captures)
    return compared(term, teacher_captures, student_captures, batch)


def _sketch(term: Match, student: Tensor, other: Tensor, batch: Any, student_captures: Captures) -> Compared:
    mask = None if term.mask is None else sourced("mask", term.mask, batch, student_captures)
    return Compared(student, other, other, mask)


def _map_without_values(call: AttentionCall) -> Tensor:
    shape = (*call.query.shape[:-1], call.key.shape[-2])
    return torch.empty(shape, dtype=call.query.dtype, device="meta")


def check_trains(term: Match, student: Tensor) -> None:
    """Raise unless a loss on ``student`` trains something, where gradients are on at all."""
    if torch.is_grad_enabled() and not student.requires_grad:
        raise MatchError(
            f"the student tensor {str(term.student_address)!r} carries no gradient, so this term would train nothing. "
            "Its parameters may be frozen, or it was made under no_grad or by a detach; unfreeze them or drop the entry"
        )


def check_head_trains(term: Match, head: Head) -> None:
    """Raise unless a loss on the logits of ``head`` trains something, where gradients are on at all."""
    parts = (head.hidden, head.weight, *([] if head.bias is None else [head.bias]))
    check_trains(term, next((part for part in parts if part.requires_grad), head.hidden))


def trainable(call: AttentionCall) -> bool:
    """Whether a loss on the map of an attention trains something."""
    return call.query.requires_grad or call.key.requires_grad


def teacher_inputs(term: Match) -> list[Address]:
    """The addresses in the teacher of an entry's further inputs."""
    return [source for each in term.further for source in each.sources if isinstance(source, Address)]


def student_inputs(term: Match) -> dict[str, Source]:
    """What an entry looks up in the batch or in the student besides its own tensor, by what it is for."""
    named: dict[str, Source] = {}
    for each in term.further:
        for number, source in enumerate(each.sources):
            if not isinstance(source, Address):
                named[f"inputs[{each.name!r}]" + (f"[{number}]" if each.several else "")] = source
    return named


def further_tensors(
    term: Match, teacher_captures: Any, student_captures: Captures, batch: Any, device: torch.device
) -> dict[str, Tensor | list[Tensor]]:
    """The further inputs of an entry by the loss's keyword, on ``device``; those of the teacher detached."""
    found: dict[str, Tensor | list[Tensor]] = {}
    for each in term.further:
        tensors = []
        for source in each.sources:
            if isinstance(source, Address):
                tensors.append(captured(captures_of(teacher_captures, term.teacher_model), source, "teacher").detach())
            else:
                tensors.append(sourced(f"inputs[{each.name!r}]", source, batch, student_captures))
        moved = [tensor.to(device) for tensor in tensors]
        found[each.name] = moved if each.several else moved[0]
    return found


def own_options(
    term: Match, mask: Tensor | None, batch: Any, student_captures: Captures, step: int, device: torch.device
) -> dict[str, Any]:
    """The keyword arguments of the loss that need neither the student's tensor nor further ones."""
    given = dict(term.loss_args)
    if mask is not None:
        given["mask"] = mask
    if term.spec.accepts_temperature:
        given["temperature"] = at_step("temperature", term.temperature, step, lowest=0.0)
    if term.teacher_address is not None and term.target is not None:
        given["target"] = sourced("target", term.target, batch, student_captures).to(device)
    return given


def options(
    term: Match,
    tensors: Compared,
    teacher_captures: Any,
    student_captures: Captures,
    batch: Any,
    step: int,
    state: nn.Module | None,
) -> dict[str, Any]:
    """The keyword arguments of the loss.

    Raises:
        HookDistillError: one of its tensors is not there, or its state.
    """
    device = tensors.student.device
    given = own_options(term, tensors.mask, batch, student_captures, step, device)
    given |= further_tensors(term, teacher_captures, student_captures, batch, device)
    if "dim" in term.spec.parameters and "dim" not in given:
        given["dim"] = features_at(term, tensors.student)
    return given if term.spec.state is None else with_state(term, given, state)


def adapted(term: Match, adapter: nn.Module | None, tensors: Compared) -> Tensor:
    """The student's tensor, brought to the shape of the other where that is the adapter's business.

    Raises:
        MatchError: an adapter with parameters is needed and does not exist yet.
    """
    student, other = tensors.student, tensors.other
    if adapter is not None:
        if isinstance(adapter, Adapter):
            return adapter(student, other)  # type: ignore[no-any-return]
        with user_code(f"the adapter {type(adapter).__name__}", described(student, other)):
            result = adapter(student)
        if not isinstance(result, Tensor):
            raise MatchError(f"the adapter {type(adapter).__name__} returned a {type(result).__name__}, not a tensor")
        return result
    if not isinstance(term.adapter, str) or not is_adapted(term, student, other):
        return student
    if student.shape == other.shape and term.adapter not in ("linear", "conv"):
        return student  # the usual step: nothing to bridge
    fitted = fit_adapter(term.adapter, student, other, dim=features_at(term, other))
    if fitted is None:
        return student
    if fitted.project is not None:
        raise MatchError(
            f"student {list(student.shape)} and teacher {list(other.shape)} differ in width, and the adapter between "
            "them does not exist yet, so no optimizer would train it. Make it before the optimizer: "
            "distiller.plan(batch), or Distiller(…, example_batch=batch)"
        )
    return fitted(student, other)  # type: ignore[no-any-return]


def is_adapted(term: Match, student: Tensor, other: Tensor) -> bool:
    """Whether shapes are the adapter's business here: between features, not between logits or maps, or against labels."""
    if term.teacher_address is None or term.spec.compares in ("logits", "labels", "attention"):
        return False
    if term.spec.compares == "relations":  # which take other widths as they are, unless the user wants a map
        return term.adapter not in ("auto", "none")
    if term.spec.compares == "any":  # the user's own loss may bridge other shapes by itself
        return term.adapter != "none" and student.dim() == other.dim() and student.shape[0] == other.shape[0]
    return True


def features_at(term: Match, tensor: Tensor) -> int:
    """The dimension of ``tensor`` that holds features or classes."""
    dim = term.loss_args.get("dim", feature_dim(tensor.shape))
    if isinstance(dim, bool) or not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        raise MatchError(f"dim={dim!r} is no dimension of a tensor of shape {list(tensor.shape)}")
    return -1 if dim == tensor.dim() - 1 else dim


def eager_value(term: Match, student: Tensor, other: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What the loss says, as a scalar attached to the graph.

    Raises:
        MatchError: it fails, gives no scalar, or a value without gradient.
    """
    with user_code(f"the loss {term.spec.name!r}", described(student, other)):
        value = term.spec.function(student, other, **arguments)
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise MatchError(
            f"the loss {term.spec.name!r} returned {got}, not a scalar tensor. Reduce it, with "
            "hookdistill.losses.masked_mean(values, mask) for a mean over valid positions"
        )
    if torch.is_grad_enabled() and not value.requires_grad:
        raise MatchError(f"the loss {term.spec.name!r} returned a value without gradient, which would train nothing")
    return value


def described(student: Tensor, other: Tensor) -> str:
    """Both tensors for the end of a message."""
    ours, theirs = f"{list(student.shape)} {student.dtype}", f"{list(other.shape)} {other.dtype}"
    return f" (student {ours}, compared with {theirs})"


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
