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
from ..fused.rows import RowTask, RowTerm
from ..matches import Match
from . import fast
from .blame import at_step, in_match
from .fast import Choice
from .lookup import Captures
from .terms import Compared, adapted, check_trains, compared, eager_value, options
from .total import attach

Shares = Mapping[str, float | Tensor]


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
    student: weakref.ref[Tensor]
    origin: weakref.ref[Tensor]
    arguments: dict[str, Any]
    weight: float | Tensor


@dataclass(slots=True, eq=False)
class _Group:
    """The terms of one student tensor that are computed in one pass."""

    task: RowTask
    calls: list[_Call] = field(default_factory=list)
    gradient: Tensor | None = None


class Step:
    """One step of a `DistillationLoss`.

    Args:
        terms: the entries by name.
        adapter: gives the adapter of an entry.
        student_captures: ``{layer: {output: tensor}}``, complete.
        batch: where masks and targets are looked up.
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
        step: int = 0,
        shares: Shares | None = None,
        impl: str = "auto",
    ) -> None:
        self.terms, self.adapter, self.student_captures, self.batch = terms, adapter, student_captures, batch
        self.step, self.shares, self.impl = step, shares or {}, impl
        self.choices: dict[str, Choice] = {}
        self._outside = _Outside()
        self._open = dict.fromkeys(terms)
        self._waiting = Counter(term.student_address for term in terms.values())
        self._groups: dict[Address, dict[tuple[int, int], _Group]] = {}
        self._done: list[_Group] = []
        self._eager: list[tuple[_Call, Tensor, Tensor]] = []
        self._values: dict[str, Tensor] = {}
        self._total: Tensor | None = None

    def take(self, name: str, teacher_captures: Any) -> None:
        """Compute an entry, or line it up, now that all it compares is there.

        Raises:
            MatchError: it cannot be computed, or would train nothing; the message names the entry.
        """
        term = self.terms[name]
        with in_match(name):
            self._take(name, term, compared(term, teacher_captures, self.student_captures, self.batch))

    def offer(self, names: Sequence[str], teacher_captures: Any) -> None:
        """Compute entries in the middle of the teacher's forward, which may overwrite its tensors as soon as this returns.

        Each must be one of those that `Streams` found.

        Raises:
            MatchError: as `take` does.
        """
        with self._outside.restored():
            for name in names:
                term = self.terms[name]
                with in_match(name):
                    tensors = compared(term, teacher_captures, self.student_captures, self.batch)
                    self._take(name, term, tensors, transient=True)

    def finish(self, teacher_captures: Any) -> Losses:
        """Take the entries that are left, and give the losses of all.

        Raises:
            MatchError: as `take` does.
        """
        for name in list(self._open):
            self.take(name, teacher_captures)
        total = self._total
        if self._done and torch.is_grad_enabled():
            assert total is not None
            students = [group.task.student for group in self._done]
            gradients = [group.gradient for group in self._done if group.gradient is not None]
            calls = [call for group in self._done for call in group.calls]
            total = attach(total, students, gradients, partial(_again, calls, [weakref.ref(each) for each in students]))
        for call, student, other in self._eager:
            with in_match(call.name):
                value = eager_value(call.term, student, other, call.arguments)
            weighted = value * call.weight
            total = weighted if total is None else total + weighted
            self._values[call.name] = value.detach()
        assert total is not None  # as_matches refuses an empty list
        return Losses(total, {name: self._values[name] for name in self.terms})

    def _take(self, name: str, term: Match, tensors: Compared, *, transient: bool = False) -> None:
        check_trains(term, tensors.student)
        arguments = options(term, tensors, self.batch, self.student_captures, self.step)
        student = adapted(term, self.adapter(name), tensors)
        weight = at_step("weight", term.weight, self.step) * self.shares.get(name, 1.0)
        call = _Call(name, term, weakref.ref(student), weakref.ref(tensors.origin), arguments, weight)
        row = self._row_term(call, student, tensors.other)
        if isinstance(row, str):
            self.choices[name] = Choice("eager", row)
            self._eager.append((call, student, tensors.other.clone() if transient else tensors.other))
        else:
            groups = self._groups.setdefault(term.student_address, {})
            group = groups.setdefault((id(student), row[1]), _Group(RowTask(student=student, dim=row[1])))
            group.task.terms.append(row[0])
            group.calls.append(call)
        del self._open[name]
        self._waiting[term.student_address] -= 1
        if not self._waiting[term.student_address]:
            for group in self._groups.pop(term.student_address, {}).values():
                self._run(group)

    def _row_term(self, call: _Call, student: Tensor, other: Tensor) -> tuple[RowTerm, int] | str:
        if reason := fast.inactive(self.impl):
            return reason
        if torch.is_grad_enabled() and not student.requires_grad:
            return "no gradient"  # which the eager path refuses
        return fast.row_term(call.term.spec, student, other, call.arguments, call.weight)

    def _run(self, group: _Group) -> None:
        choice = fast.choose(group.task, self.impl)
        result = fast.run(group.task, choice, gradient=torch.is_grad_enabled())
        group.gradient = result.gradient
        group.task.terms.clear()  # and with them the teacher's tensors
        for call, value in zip(group.calls, result.values.unbind(), strict=True):
            self.choices[call.name] = choice
            self._values[call.name] = value
        self._total = result.total if self._total is None else self._total + result.total
        self._done.append(group)


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
        student, origin = call.student(), call.origin()
        if student is None or origin is None:
            raise MatchError(
                f"{call.name}: backward(create_graph=True) needs the tensors that were compared, and they were let go when the "
                "loss was computed. Use impl='eager', which keeps them"
            )
        value = eager_value(call.term, student, origin.detach().to(student.device), call.arguments)
        total = total + value * call.weight
    return total, [student for each in students if (student := each()) is not None]
