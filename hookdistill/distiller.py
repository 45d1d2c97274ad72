"""Teacher, student and matches in one module: ``distiller(batch)`` gives the losses."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .addresses import Address, parse
from .batches import BatchAdaptor, BatchKey, Inputs, check_fits, contents, given_inputs, has_item, model_inputs
from .capture import Captured
from .engine import DistillationLoss, Losses, in_match
from .errors import AddressError, BatchError, HookDistillError, MatchError
from .export import save_student
from .matches import Match, as_matches
from .paths import resolve, unwrap
from .plan import Plan, check_values, expand, row
from .recorder import Recorder, Recorders
from .running import device_of, teaching, undisturbed


class Distiller(nn.Module):
    """Student, adapters and losses as one module, with the teacher beside it.

        distiller = Distiller(teacher, student, matches)
        print(distiller.plan(batch))
        losses = distiller(batch)
        losses.total.backward()

    The teacher runs in eval mode without gradients; it is in neither ``parameters()`` nor ``state_dict()``, and its own
    training mode and ``requires_grad`` flags are left as they are. ``distiller.to(device)`` takes it along.

    Args:
        teacher: a module; several by name for ``Match(..., teacher_model=name)``; or ``None``, for a student that is compared
            with targets alone.
        student: the module to train.
        matches: `Match` entries, or dicts of the older library's config.
        example_batch: makes the plan, and with it the adapters, at once.
        batch_adaptor: ``(device, batch) -> (teacher_inputs, student_inputs)``, where the models' ``forward`` signatures do
            not tell which item of the batch goes where.
        impl: which implementation of the losses, see `DistillationLoss`.

    Raises:
        MatchError: an entry cannot be carried out on these models.
    """

    def __init__(
        self,
        teacher: nn.Module | Mapping[str, nn.Module] | None,
        student: nn.Module,
        matches: Iterable[Match | Mapping[str, Any]],
        *,
        example_batch: Any = None,
        batch_adaptor: BatchAdaptor | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        # In a dict, so that the teachers are no submodules: they are not trained, saved or wrapped with the student.
        self._teachers: dict[str | None, nn.Module] = {}
        if teacher is not None:
            self._teachers.update(teacher.items() if isinstance(teacher, Mapping) else [(None, teacher)])
        _check_models(self._teachers, student)
        self.student = student
        entries = [each for match in as_matches(matches) for each in expand(match, self._teachers, student)]
        self.loss = DistillationLoss(entries, impl=impl)
        if batch_adaptor is not None and not callable(batch_adaptor):
            raise BatchError(f"batch_adaptor= is a function (device, batch), got {type(batch_adaptor).__name__}")
        self.batch_adaptor = batch_adaptor
        self._recorders: Recorders | None = None
        self._step = 0
        if example_batch is not None:
            self.plan(example_batch)

    @property
    def teacher(self) -> nn.Module | dict[str, nn.Module] | None:
        """The teacher, or the teachers by name; ``None`` where there is none."""
        if None in self._teachers or not self._teachers:
            return self._teachers.get(None)
        return {str(name): module for name, module in self._teachers.items()}

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters that exist so far, by the name of their match (with ``/`` for dots)."""
        return self.loss.adapters

    def plan(self, batch: Any) -> Plan:
        """One dry forward of both models: every match resolved, and the adapters made that are needed.

        The models are left as they were: the forward runs in eval mode, without gradients, on a fork of the random state.

        Raises:
            HookDistillError: what would go wrong in training, by entry.
        """
        return self._dry_run(batch, make_adapters=True)

    def forward(self, batch: Any, *, step: int | None = None) -> Losses:
        """The losses of one batch.

        Args:
            batch: dict, ``BatchEncoding``, dataclass, tuple, list or tensor; with a `BatchAdaptor`, anything.
            step: what schedules are asked for; by default the number of training forwards so far.

        Raises:
            MatchError: a term cannot be computed or would train nothing.
        """
        if self._recorders is None:
            self._dry_run(batch, make_adapters=False)
        if step is None:
            step = self._step
            self._step += int(self.training and torch.is_grad_enabled())
        with self._captured(batch) as (teachers, student):
            losses: Losses = self.loss(teachers, student, batch, step=step)
        return losses

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the student alone to the folder ``path``: ``save_pretrained`` where it has that, else ``model.safetensors``."""
        save_student(self.student, path)

    def close(self) -> None:
        """Take every hook off the models; the next forward puts them on again."""
        if self._recorders is not None:
            self._recorders.close()
            self._recorders = None

    def _dry_run(self, batch: Any, *, make_adapters: bool) -> Plan:
        opened_here, adapters = self._recorders is None, set(self.adapters)
        try:
            with self._captured(batch, dry=True) as (teachers, student):
                compared = {}
                for name, term in self.loss.terms.items():
                    with in_match(name):
                        compared[name] = ours, theirs, mask = self.loss.tensors(name, teachers, student, batch)
                        check_values(term, ours, theirs, mask)
                        if make_adapters:
                            self.loss.add_adapter(name, ours, theirs)
                parts = self.loss(teachers, student, batch, step=self._step).parts
                rows = tuple(
                    row(name, self.loss.terms[name], ours, theirs, self.loss.adapter(name), float(parts[name]))
                    for name, (ours, theirs, _) in compared.items()
                )
        except BaseException:
            if opened_here:
                self.close()
            for key in set(self.adapters) - adapters:
                del self.adapters[key]
            raise
        return Plan(rows=rows, inputs=self._inputs(batch).lines())

    @contextlib.contextmanager
    def _captured(self, batch: Any, *, dry: bool = False) -> Iterator[tuple[Any, Captured]]:
        """Both models run on ``batch``: the captures of teacher (or teachers by name) and student, cleared afterwards."""
        if self._recorders is None:
            self._open(batch)
        recorders = self._recorders
        assert recorders is not None
        inputs = self._inputs(batch)
        home = device_of(self.student)
        try:
            with undisturbed(self.student) if dry else contextlib.nullcontext():
                teachers = {}
                for name, recorder in recorders.teachers.items():
                    with teaching(recorder.model):
                        device = device_of(recorder.model, otherwise=home)
                        teachers[name] = _run(recorder, inputs.teachers[name].to(device), dry=dry)
                yield teachers.get(None, teachers), _run(recorders.student, inputs.student.to(home), dry=dry)
        finally:
            recorders.clear()

    def _open(self, batch: Any) -> None:
        """Put the hooks on, now that the batch tells which masks and targets are addresses in the student."""
        terms = self.loss.terms
        ours = [term.student_address for term in terms.values()]
        for name, term in terms.items():
            for what, source in (("mask", term.mask), ("target", term.target)):
                if isinstance(source, (str, int)) and not has_item(batch, source):
                    with in_match(name):
                        ours.append(self._source_address(what, source, batch))
        student = Recorder(self.student, ours)
        try:
            # A teacher of which no match wants a tensor is not run at all.
            wanted = {name: addresses for name in self._teachers if (addresses := self._teacher_addresses(name))}
            teachers = {name: Recorder(self._teachers[name], each, stop=True) for name, each in wanted.items()}
        except BaseException:
            student.close()
            raise
        self._recorders = Recorders(student, teachers)
        weakref.finalize(self, self._recorders.close)

    def _teacher_addresses(self, name: str | None) -> list[Address]:
        terms = self.loss.terms.values()
        return [each.teacher_address for each in terms if each.teacher_address and each.teacher_model == name]

    def _source_address(self, what: str, source: BatchKey, batch: Any) -> Address:
        try:
            if isinstance(source, int):
                raise AddressError("an address is a string")
            address = parse(source)
            resolve(self.student, address)
            return address
        except AddressError as error:
            raise MatchError(
                f"{what}={source!r} is neither an item of the batch, which has {contents(batch)}, nor an address in the "
                f"student: {error}"
            ) from error

    def _inputs(self, batch: Any) -> _AllInputs:
        running = {name: model for name, model in self._teachers.items() if self._teacher_addresses(name)}
        if self.batch_adaptor is not None:
            return _adapted(self.batch_adaptor, device_of(self.student), batch, running, self.student)
        terms = self.loss.terms.values()
        targets = {each.target for each in terms if isinstance(each.target, (str, int))}
        masks = {each.mask for each in terms if isinstance(each.mask, (str, int))}
        return _AllInputs(
            {name: model_inputs(model, batch, targets=targets, masks=masks) for name, model in running.items()},
            model_inputs(self.student, batch, targets=targets, masks=masks),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        for teacher in self._teachers.values():
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to these models; a copy puts its own on at its first forward.
        return {**self.__dict__, "_recorders": None, "_compiled_call_impl": None}


class _AllInputs(NamedTuple):
    """What each teacher, by name, and the student are called with."""

    teachers: dict[str | None, Inputs]
    student: Inputs

    def lines(self) -> tuple[str, ...]:
        """A line for each model, for the plan."""
        named = {**{name or "teacher": inputs for name, inputs in self.teachers.items()}, "student": self.student}
        return tuple(f"{name} is called with {inputs}" for name, inputs in named.items())


def _run(recorder: Recorder, inputs: Inputs, *, dry: bool) -> Captured:
    """Call the model; in a dry run, what it raises says which model it was and what it was called with."""
    if not dry:
        return recorder.run(inputs)
    try:
        return recorder.run(inputs, whole=True)
    except (HookDistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = type(unwrap(recorder.model)).__name__
        raise BatchError(
            f"{kind}.forward raised {type(error).__name__}: {error}\nIt was called with {inputs.described()}"
        ) from error


def _adapted(
    adaptor: BatchAdaptor, device: torch.device, batch: Any, teachers: Mapping[str | None, nn.Module], student: nn.Module
) -> _AllInputs:
    try:
        adapted = adaptor(device, batch)
    except Exception as error:
        raise BatchError(f"batch_adaptor(device, batch) raised {type(error).__name__}: {error}") from error
    if not isinstance(adapted, (tuple, list)) or len(adapted) != 2:
        raise BatchError(
            "batch_adaptor(device, batch) must return a pair (teacher_inputs, student_inputs), each a dict of keywords, a "
            f"tuple or a tensor; it returned {type(adapted).__name__}"
        )
    for_teacher, for_student = adapted
    return _AllInputs(
        {name: _given(for_teacher, model, name or "teacher") for name, model in teachers.items()},
        _given(for_student, student, "student"),
    )


def _given(inputs: Any, model: nn.Module, role: str) -> Inputs:
    try:
        given = given_inputs(inputs)
        check_fits(given, model)
    except BatchError as error:
        raise BatchError(f"what batch_adaptor returned for the {role}: {error}") from error
    return given


def _check_models(teachers: Mapping[str | None, nn.Module], student: nn.Module) -> None:
    for role, model in {**{name or "teacher": each for name, each in teachers.items()}, "student": student}.items():
        if not isinstance(model, nn.Module):
            what = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__}"
            raise MatchError(f"{role} must be a torch.nn.Module, got {what}")
