"""The losses of one step, put together as tensors come in.

Terms of one student tensor that have a closed form wait for each other and are computed in one pass, as soon as the last of
them has what it is compared with. The others are computed by their eager definition, at the end, when both models have run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..addresses import Address
from ..errors import MatchError
from ..fused.head import Head, HeadTask
from ..fused.relations import RelationTask
from ..fused.rows import RowTask, RowTerm
from ..matches import Match
from . import fast
from .blame import at_step, in_match
from .fast import Choice, Task
from .lookup import Captures, attention_call, captures_of, head_at, sourced
from .terms import adapted, check_head_trains, check_trains, compared, eager_value, options, own_options, trainable
from .total import attach

Shares = Mapping[str, float | Tensor]
STUDENT = ":student"  # no name that a teacher can have


class Losses(NamedTuple):
    """The losses of one step.

    ``total`` is the scalar Σ weight · part, attached to the graph. ``parts`` are the values of the matches by name:
    scalars, detached, unweighted.
    """

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What the eager definition of a term is called with. It holds no tensor of either model, so that they can go."""

    name: str
    term: Match
    student: weakref.ref[Tensor] | None
    origin: weakref.ref[Tensor] | None
    arguments: dict[str, Any]
    weight: float | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """The terms of one student tensor that are computed in one pass."""

    task: RowTask | HeadTask
    calls: list[_Call] = field(default_factory=list)


class Step:
    """One step of a `DistillationLoss`.

    Args:
        terms: the entries by name.
        adapter: gives the adapter of an entry.
        student_captures: ``{layer: {output: tensor}}``, complete.
        batch: where masks, targets and further inputs are looked up.
        state: gives the module of an entry whose loss has one.
        step: what schedules are asked for.
        shares: a factor on the weight of entries, by name.
        impl: see `DistillationLoss`.
    """

    def __init__(
        self,
        terms: Mapping[str, Match],
        adapter: Callable[[str], nn.Module | None],
        student_captures: Captures,
        batch: Any,
        *,
        state: Callable[[str], nn.Module | None],
        step: int = 0,
        shares: Shares | None = None,
        impl: str = "auto",
    ) -> None:
        self.state = state
        self.terms, self.adapter, self.student_captures, self.batch = terms, adapter, student_captures, batch
        self.step, self.shares, self.impl = step, shares or {}, impl
        self.choices: dict[str, Choice] = {}
        self._outside = _Outside()
        self._open = dict.fromkeys(terms)
        self._waiting = Counter(term.student_address for term in terms.values())
        self._groups: dict[Address, dict[tuple[int, int], _Group]] = {}
        self._done: list[_Call] = []
        self._slopes: list[tuple[Tensor, Tensor]] = []
        self._heads: dict[tuple[str | None, Address], Head | None] = {}
        self._eager: list[tuple[_Call, Tensor, Tensor]] = []
        self._values: dict[str, Tensor] = {}
        self._total: Tensor | None = None

    def take(self, name: str, teacher_captures: Any) -> None:
        """Compute an entry, or line it up, now that all it compares is there.

        Raises:
            MatchError: it cannot be computed, or would train nothing; the message names the entry.
        """
        with in_match(name):
            self._take(name, teacher_captures)

    def offer(self, names: Sequence[str], teacher_captures: Any) -> None:
        """Compute entries in the middle of the teacher's forward, which may overwrite its tensors as soon as this returns.

        Each must be one of those that `Streams` found.

        Raises:
            MatchError: as `take` does.
        """
        with self._outside.restored():
            for name in names:
                with in_match(name):
                    self._take(name, teacher_captures, transient=True)

    def finish(self, teacher_captures: Any) -> Losses:
        """Take the entries that are left, and give the losses of all.

        Raises:
            MatchError: as `take` does.
        """
        for name in list(self._open):
            self.take(name, teacher_captures)
        total = self._total
        if self._slopes:
            assert total is not None
            tensors, gradients = zip(*self._slopes, strict=True)
            total = attach(total, tensors, gradients, partial(_again, self._done, [weakref.ref(each) for each in tensors]))
        for call, student, other in self._eager:
            with in_match(call.name):
                value = eager_value(call.term, student, other, call.arguments)
            weighted = value * call.weight
            total = weighted if total is None else total + weighted
            self._values[call.name] = value.detach()
        assert total is not None  # as_matches refuses an empty list
        return Losses(total, {name: self._values[name] for name in self.terms})

    def _take(self, name: str, teacher_captures: Any, *, transient: bool = False) -> None:
        term = self.terms[name]
        if not self._take_head(name, term, teacher_captures) and not self._take_attention(name, term, teacher_captures):
            self._take_tensors(name, term, teacher_captures, transient)
        del self._open[name]
        self._waiting[term.student_address] -= 1
        if not self._waiting[term.student_address]:
            for group in self._groups.pop(term.student_address, {}).values():
                self._run(group.task, group.calls)

    def _take_head(self, name: str, term: Match, teacher_captures: Any) -> bool:
        """Line up a loss on logits that are not made, if that is how the student's are captured."""
        student = self._head(STUDENT, self.student_captures, term.student_address)
        if student is None:
            return False
        other: Tensor | Head | None
        if term.teacher_address is None:
            assert term.target is not None
            other = sourced("target", term.target, self.batch, self.student_captures).to(student.hidden.device)
        else:
            captures = captures_of(teacher_captures, term.teacher_model)
            other = self._head(term.teacher_model, captures, term.teacher_address)
        check_head_trains(term, student)
        arguments = self._own_options(term, student.hidden.device)
        weight = self._weight(name, term)
        row = "the teacher's logits are whole" if other is None else fast.row_term(term.spec, student, other, arguments, weight)
        if isinstance(row, str):
            raise MatchError(f"the loss cannot be computed together with the head here ({row}); use head='whole'")
        groups = self._groups.setdefault(term.student_address, {})
        group = groups.setdefault((id(student), -1), _Group(HeadTask(student=student)))
        group.task.terms.append(row[0])
        group.calls.append(_Call(name, term, None, None, arguments, weight))
        return True

    def _head(self, owner: str | None, captures: Any, address: Address) -> Head | None:
        key = (owner, address)
        if key not in self._heads:
            self._heads[key] = head_at(captures, address)
        return self._heads[key]

    def _take_attention(self, name: str, term: Match, teacher_captures: Any) -> bool:
        """Compute a loss between attentions without their maps, if that can be done."""
        if term.teacher_address is None or term.further or fast.inactive(self.impl):
            return False
        ours = attention_call(self.student_captures, term.student_address)
        theirs = attention_call(captures_of(teacher_captures, term.teacher_model), term.teacher_address)
        if ours is None or theirs is None or (torch.is_grad_enabled() and not trainable(ours)):
            return False
        arguments = self._own_options(term, ours.query.device)
        weight = self._weight(name, term)
        word = term.student_address.selector.word
        if word != term.teacher_address.selector.word:
            return False
        task = fast.attention_task(term.spec, word, ours, theirs, arguments, weight)
        if isinstance(task, str):
            return False
        self._run(task, [_Call(name, term, None, None, arguments, weight)])
        return True

    def _take_tensors(self, name: str, term: Match, teacher_captures: Any, transient: bool) -> None:
        tensors = compared(term, teacher_captures, self.student_captures, self.batch)
        check_trains(term, tensors.student)
        arguments = options(term, tensors, teacher_captures, self.student_captures, self.batch, self.step, self.state(name))
        student = adapted(term, self.adapter(name), tensors)
        call = _Call(name, term, weakref.ref(student), weakref.ref(tensors.origin), arguments, self._weight(name, term))
        found = self._fast_form(call, student, tensors.other)
        if isinstance(found, str):
            self.choices[name] = Choice("eager", found)
            self._eager.append((call, student, tensors.other.clone() if transient else tensors.other))
        elif isinstance(found, RelationTask):
            self._run(found, [call])
        else:
            row, dim = found
            groups = self._groups.setdefault(term.student_address, {})
            group = groups.setdefault((id(student), dim), _Group(RowTask(student=student, dim=dim)))
            group.task.terms.append(row)
            group.calls.append(call)

    def _fast_form(self, call: _Call, student: Tensor, other: Tensor) -> tuple[RowTerm, int] | RelationTask | str:
        if reason := fast.inactive(self.impl):
            return reason
        if torch.is_grad_enabled() and not student.requires_grad:
            return "no gradient"  # which the eager path refuses
        form = fast.relation_task if call.term.spec.name == "relation_kl" else fast.row_term
        return form(call.term.spec, student, other, call.arguments, call.weight)

    def _weight(self, name: str, term: Match) -> float | Tensor:
        return at_step("weight", term.weight, self.step) * self.shares.get(name, 1.0)

    def _own_options(self, term: Match, device: torch.device) -> dict[str, Any]:
        mask = None if term.mask is None else sourced("mask", term.mask, self.batch, self.student_captures).to(device)
        return own_options(term, mask, self.batch, self.student_captures, self.step, device)

    def _run(self, task: Task, calls: Sequence[_Call]) -> None:
        choice = fast.choose(task, self.impl)
        result = fast.run(task, choice, gradient=torch.is_grad_enabled())
        for call, value in zip(calls, result.values, strict=True):
            self.choices[call.name] = choice
            self._values[call.name] = value
        self._total = result.total if self._total is None else self._total + result.total
        self._slopes += [(tensor, slope) for tensor, slope in result.slopes if tensor.requires_grad]
        self._done += calls


class _Outside:
    """Gradient mode and autocast as they are outside of both models' forwards."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, enabled, dtype in self.autocast:
                if torch.is_autocast_enabled(kind) != enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield


def _again(calls: Sequence[_Call], students: Sequence[weakref.ref[Tensor]]) -> tuple[Tensor, Sequence[Tensor]]:
    """The total of fast terms by the eager definition.

    Raises:
        MatchError: a tensor has been let go since.
    """
    total: Any = 0.0
    for call in calls:
        student, origin = (None if ref is None else ref() for ref in (call.student, call.origin))
        if student is None or origin is None:
            raise MatchError(
                f"{call.name}: backward(create_graph=True) needs the tensors that were compared, and they were let go when the "
                "loss was computed. Use impl='eager', which keeps them"
            )
        value = eager_value(call.term, student, origin.detach().to(student.device), call.arguments)
        total = total + value * call.weight
    return total, [student for each in students if (student := each()) is not None]
