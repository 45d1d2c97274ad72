"""Teacher, student and matches in one module: ``distiller(batch)`` gives the losses."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .addresses import Address, parse
from .attention import AttentionCall
from .batches import BatchAdaptor, BatchKey, Inputs, check_fits, contents, given_inputs, has_item, model_inputs
from .engine import (
    STUDENT,
    Compared,
    DistillationLoss,
    Losses,
    Passing,
    Shares,
    Step,
    batch_items,
    compared,
    in_match,
    student_inputs,
    teacher_inputs,
)
from .errors import AddressError, BatchError, HookDistillError, MatchError, listing
from .export import save_student
from .fused.head import Head
from .head_choice import HEADS, Heads, Watched, choose_heads
from .heads import Seen
from .heads import watching as watched_layers
from .matches import Match, as_matches
from .paths import is_compiled, resolve, unwrap
from .plan import Plan, check_values, expand, row
from .recorder import Receiver, Recorded, Recorder, Recorders
from .running import device_of, evaluating, teaching, undisturbed
from .sharding import gather_for_backward, is_sharded, reshard
from .side_stream import SideStream, has_streams
from .sources import CaptureSource, adjusted

ORDERS = ("student first", "teacher first", "overlapped")


class Distiller(nn.Module):
    """Student, adapters and losses as one module, with the teacher beside it.

        distiller = Distiller(teacher, student, matches)
        print(distiller.plan(batch))
        losses = distiller(batch)
        losses.total.backward()

    The teacher runs in eval mode without gradients; it is in neither ``parameters()`` nor ``state_dict()``, and its own
    training mode and ``requires_grad`` flags are left as they are. ``distiller.to(device)`` takes it along.

    Args:
        teacher: a module, or what hands over its tensors (a `TeacherStore`, a `CaptureSource` of your own); several by name for
            ``Match(..., teacher_model=name)``; or ``None``, for a student that is compared with targets alone.
        student: the module to train.
        matches: `Match` entries, or dicts of the older library's config.
        example_batch: makes the plan, and with it the adapters, at once.
        batch_adaptor: ``(device, batch) -> (teacher_inputs, student_inputs)``, where the models' ``forward`` signatures do
            not tell which item of the batch goes where.
        impl: which implementation of the losses, see `DistillationLoss`.
        head: ``"fused"``: losses between logits are computed together with the heads that make these, block by block, so that
            the logits of neither model are ever whole in memory. ``"auto"``: where that saves much memory. ``"whole"``: never.
        order: ``"student first"``: losses are computed as the teacher's tensors come by, and each is let go at once, so that
            no more than one of them is held. ``"teacher first"``: both models run, then the losses are computed; that is how it
            goes in any case where student and teacher share buffers. ``"overlapped"``: that too, but a CUDA device gets the
            teacher's forward on a side stream, to run beside the student's where neither fills it alone; plain teacher first
            on other devices, for models that share weights, and for sharded ones.

    Raises:
        MatchError: an entry cannot be carried out on these models.
    """

    def __init__(
        self,
        teacher: nn.Module | CaptureSource | Mapping[str, nn.Module | CaptureSource] | None,
        student: nn.Module,
        matches: Iterable[Match | Mapping[str, Any]],
        *,
        example_batch: Any = None,
        batch_adaptor: BatchAdaptor | None = None,
        impl: str = "auto",
        head: str = "auto",
        order: str = "student first",
    ) -> None:
        super().__init__()
        for what, given, known in (("order", order, ORDERS), ("head", head, HEADS)):
            if given not in known:
                raise MatchError(f"{what}={given!r} is not known; it is one of {listing(known)}")
        if head == "fused" and impl == "eager":
            raise MatchError("head='fused' is no eager definition; use another impl=, or head='whole'")
        self.order, self.head = order, head
        self._heads: Heads | None = None if head != "whole" and impl != "eager" else {}
        # In a dict, so that the teachers are no submodules: they are not trained, saved or wrapped with the student.
        self._teachers: dict[str | None, nn.Module] = {}
        self._sources: dict[str | None, CaptureSource] = {}
        for name, each in _by_name(teacher).items():
            if isinstance(each, nn.Module):
                self._teachers[name] = each
            elif isinstance(each, CaptureSource):
                self._sources[name] = each
            else:
                raise _no_model(name or "teacher", each, " or a source of its tensors, such as a TeacherStore")
        if not isinstance(student, nn.Module):
            raise _no_model("student", student)
        self.student = student
        teachers: dict[str | None, nn.Module | CaptureSource] = {**self._teachers, **self._sources}
        entries = [each for match in as_matches(matches) for each in expand(match, teachers, student)]
        self.loss = DistillationLoss([adjusted(entry, self._sources) for entry in entries], impl=impl)
        if batch_adaptor is not None and not callable(batch_adaptor):
            raise BatchError(f"batch_adaptor= is a function (device, batch), got {type(batch_adaptor).__name__}")
        self.batch_adaptor = batch_adaptor
        self._recorders: Recorders | None = None
        self._disturbs_teachers, self._overlaps = False, False
        self._side: SideStream | None = None
        self._step = 0
        if example_batch is not None:
            self.plan(example_batch)

    @property
    def teacher(self) -> nn.Module | CaptureSource | dict[str, nn.Module | CaptureSource] | None:
        """The teacher, or the teachers by name; ``None`` where there is none."""
        teachers: dict[str | None, nn.Module | CaptureSource] = {**self._teachers, **self._sources}
        if None in teachers or not teachers:
            return teachers.get(None)
        return {str(name): each for name, each in teachers.items()}

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

    def forward(self, batch: Any, *, step: int | None = None, shares: Shares | None = None) -> Losses:
        """The losses of one batch.

        Args:
            batch: dict, ``BatchEncoding``, dataclass, tuple, list or tensor; with a `BatchAdaptor`, anything.
            step: what schedules are asked for; by default the number of training forwards so far.
            shares: a factor on the weight of matches, by name: the batch's share in a mean over several, see `counts`.

        Raises:
            MatchError: a term cannot be computed or would train nothing.
        """
        if self._recorders is None:
            self._dry_run(batch, make_adapters=False)
        if self.training and torch.is_grad_enabled() and self.loss.settle():
            self.close()  # other layers are needed now
        if step is None:
            step = self._step
            self._step += int(self.training and torch.is_grad_enabled())
        with self._running(batch) as run:
            if self.order == "student first" and not self._disturbs_teachers:
                losses = self.loss.begin(run.student(), batch, step=step, shares=shares)
                return losses.finish(run.teachers(partial(self._receive, losses)))
            if self._overlaps and has_streams(run.home):
                teachers, student = run.both(self._side_stream(run.home))
            else:
                teachers, student = run.teachers(), run.student()
            return self.loss(teachers, student, batch, step=step, shares=shares)  # type: ignore[no-any-return]

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """For each match that is a mean, the number of valid positions in ``batch``: see `DistillationLoss.counts`."""
        return self.loss.counts(batch)

    def compared(self, batch: Any, names: Iterable[str]) -> dict[str, Compared]:
        """What the matches of these names compare on ``batch``, without adapters: for evaluations, not for training."""
        heads = self._heads
        if heads:  # logits that training does without are made here
            self.close()
            self._heads = {}
        try:
            with self._running(batch) as run:
                teachers, student = run.teachers(), run.student()
                return {name: compared(self.loss.terms[name], teachers, student, batch) for name in names}
        finally:
            if heads:
                self.close()
                self._heads = heads

    def run_student(self, batch: Any) -> Any:
        """What the student returns, called with what `forward` calls it with."""
        inputs = self._inputs(batch).student.to(device_of(self.student))
        return self.student(*inputs.args, **inputs.kwargs)

    def run_teacher(self, batch: Any, name: str | None = None) -> Any:
        """What a teacher returns, called with what `forward` calls it with: in eval mode, without gradients."""
        model = self._teachers[name]
        inputs = self._inputs(batch, {name: model}).teachers[name].to(device_of(model, otherwise=device_of(self.student)))
        with teaching(model):
            return model(*inputs.args, **inputs.kwargs)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the student alone to the folder ``path``: ``save_pretrained`` where it has that, else ``model.safetensors``."""
        save_student(self.student, path)

    def close(self) -> None:
        """Take every hook off the models; the next forward puts them on again."""
        if self._recorders is not None:
            self._recorders.close()
            self._recorders = None

    def _receive(self, losses: Step, teacher: str | None, address: Address, value: Tensor | AttentionCall | Head) -> bool:
        """Compute what waits for this tensor of a teacher, if that can be done at once."""
        names = self.loss.streams.get((teacher, address))
        if names is None:
            return False
        passing = Passing(address, value)
        return losses.offer(names, passing if teacher is None else {teacher: passing})

    def _dry_run(self, batch: Any, *, make_adapters: bool) -> Plan:
        if self.loss.settle() or self.loss.undecided:
            self.close()
        if self.loss.undecided:
            self._choose(batch)
        opened_here, adapters, states = self._recorders is None, set(self.adapters), set(self.loss.loss_modules)
        try:
            with self._running(batch, dry=True) as run, undisturbed(self.student), evaluating(self.loss):
                with contextlib.ExitStack() as watching:
                    seen = self._watched(watching)
                    teachers, student = run.teachers(), run.student()
                if self._heads is None:
                    models = {**self._teachers, STUDENT: self.student}
                    watched = Watched(models=models, seen=seen, teachers=teachers, student=student, batch=batch)
                    self._heads = choose_heads(self.loss, watched, mode=self.head, elsewhere=run.recorders.elsewhere)
                if self._heads and not run.recorders.student.heads:
                    del teachers, student, seen
                    self.close()
                    return self._dry_run(batch, make_adapters=make_adapters)
                losses = self.loss.begin(student, batch, step=self._step)
                found = {}
                for name, term in self.loss.terms.items():
                    with in_match(name):
                        found[name] = tensors = self.loss.tensors(name, teachers, student, batch)
                        check_values(term, tensors.student, tensors.other, tensors.mask)
                        if make_adapters:
                            self.loss.add_adapters(name, teachers, student, batch)
                            self.loss.add_state(name, teachers, student, batch)
                parts = losses.finish(teachers).parts
                rows = tuple(
                    row(
                        name,
                        self.loss.terms[name],
                        tensors,
                        self.loss.adapter(name),
                        losses.choices[name],
                        float(parts[name]),
                        state=self.loss.state(name),
                    )
                    for name, tensors in found.items()
                )
        except BaseException:
            if opened_here:
                self.close()
            for key in set(self.adapters) - adapters:
                del self.adapters[key]
            for key in set(self.loss.loss_modules) - states:
                del self.loss.loss_modules[key]
            raise
        finally:
            reshard(self.student)
            for key in set(self.loss.loss_modules) - states:  # made in a dry run, which is in eval mode
                self.loss.loss_modules[key].train(self.training)
        return Plan(rows=rows, inputs=(*self._sources_lines(), *self._inputs(batch).lines()))

    def _choose(self, batch: Any) -> None:
        """Both models run to their ends once, so that entries can choose among all their teacher layers."""
        try:
            with self._running(batch, dry=True) as run, undisturbed(self.student):
                self.loss.choose(run.teachers(), run.student(), batch)
        finally:
            reshard(self.student)
            self.close()  # fewer layers are needed from now on

    def _watched(self, watching: contextlib.ExitStack) -> dict[str | None, Seen]:
        """What the linear layers of all models do, as long as it is not known which of them are heads."""
        models = {**self._teachers, STUDENT: self.student}
        if self._heads is None and self.head == "auto" and any(is_compiled(model) for model in models.values()):
            self._heads = {}  # a compiled model takes no hook that comes after those of a capture
        if self._heads is not None:
            return {}
        return {name: watching.enter_context(watched_layers(model)) for name, model in models.items()}

    @contextlib.contextmanager
    def _running(self, batch: Any, *, dry: bool = False) -> Iterator[_Run]:
        """Both models, ready to run on ``batch``; what they capture is let go afterwards."""
        if self._heads and not all(found.is_plain for heads in self._heads.values() for found in heads.values()):
            self.close()
            self._heads = {}  # sharded since: the weight of a head is whole only while the head itself runs
        if self._recorders is None:
            self._open(batch)
        recorders = self._recorders
        assert recorders is not None
        try:
            yield _Run(recorders, self._inputs(batch), device_of(self.student), dry, partial(self._read, batch))
        finally:
            recorders.clear()

    def _open(self, batch: Any) -> None:
        """Put the hooks on, now that the batch tells which masks and targets are addresses in the student."""
        terms, heads = self.loss.terms, self._heads or {}
        elsewhere = []
        for name, term in terms.items():
            for what, source in {"mask": term.mask, "target": term.target, **student_inputs(term)}.items():
                if isinstance(source, (str, int)) and not has_item(batch, source):
                    with in_match(name):
                        elsewhere.append(self._source_address(what, source, batch))
        ours = [*(address for term in terms.values() for address in term.student_addresses), *elsewhere]
        # With heads of its own a student need not come to its end either.
        student = Recorder(self.student, ours, stop=STUDENT in heads, heads=heads.get(STUDENT))
        try:
            # A teacher of which no match wants a tensor is not run at all.
            wanted = {name: addresses for name in self._teachers if (addresses := self._teacher_addresses(name))}
            teachers = {
                name: Recorder(self._teachers[name], each, stop=True, hands_over=True, heads=heads.get(name))
                for name, each in wanted.items()
            }
        except BaseException:
            student.close()
            raise
        self._recorders = Recorders(student, teachers, elsewhere)
        # Statistics of a batch norm that both use would be those after the student's forward.
        running = [self._teachers[name] for name in wanted]
        buffers, parameters = set(map(id, self.student.buffers())), set(map(id, self.student.parameters()))
        self._disturbs_teachers = any(id(each) in buffers for model in running for each in model.buffers())
        shares = self._disturbs_teachers or any(id(each) in parameters for model in running for each in model.parameters())
        # Casts of weights that both use would be made on one stream and read on the other; shards are gathered on streams of
        # their own.
        self._overlaps = self.order == "overlapped" and not shares and not any(map(is_sharded, [*running, self.student]))
        weakref.finalize(self, self._recorders.close)

    def _side_stream(self, home: torch.device) -> SideStream:
        if self._side is None or self._side.device != home:
            self._side = SideStream(home)
        return self._side

    def _read(self, batch: Any) -> dict[str | None, Any]:
        """What the sources among the teachers hand over for ``batch``."""
        wanted = {name: list(dict.fromkeys(self._teacher_addresses(name))) for name in self._sources}
        with torch.no_grad():
            return {name: self._sources[name].captures(batch, each) for name, each in wanted.items() if each}

    def _sources_lines(self) -> list[str]:
        return [f"{name or 'teacher'} is read from {source!r}" for name, source in self._sources.items()]

    def _teacher_addresses(self, name: str | None) -> list[Address]:
        terms = [each for each in self.loss.terms.values() if each.teacher_addresses and each.teacher_model == name]
        named = [address for each in terms for address in each.teacher_addresses]
        return [*named, *(address for each in terms for address in teacher_inputs(each))]

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

    def _inputs(self, batch: Any, running: Mapping[str | None, nn.Module] | None = None) -> _AllInputs:
        if running is None:
            running = {name: model for name, model in self._teachers.items() if self._teacher_addresses(name)}
        if self.batch_adaptor is not None:
            return _adapted(self.batch_adaptor, device_of(self.student), batch, running, self.student)
        targets, masks = batch_items(self.loss.terms.values())
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
        return {**self.__dict__, "_recorders": None, "_side": None, "_compiled_call_impl": None}


class _AllInputs(NamedTuple):
    """What each teacher, by name, and the student are called with."""

    teachers: dict[str | None, Inputs]
    student: Inputs

    def lines(self) -> tuple[str, ...]:
        """A line for each model, for the plan."""
        named = {**{name or "teacher": inputs for name, inputs in self.teachers.items()}, "student": self.student}
        return tuple(f"{name} is called with {inputs}" for name, inputs in named.items())


@dataclass(frozen=True, slots=True)
class _Run:
    """The models of one step with their inputs; in a dry run to their ends, and errors say which model was called with what."""

    recorders: Recorders
    inputs: _AllInputs
    home: torch.device
    dry: bool
    read: Callable[[], dict[str | None, Any]]

    def both(self, side: SideStream) -> tuple[Any, Recorded]:
        """Run the teachers on a side stream and the student beside them; what both captured can be read afterwards."""
        with side.fork():
            teachers = self.teachers()
        try:
            student = self.student()
        finally:
            side.join()
        return teachers, student

    def student(self) -> Recorded:
        """Run the student."""
        captured = self._run(self.recorders.student, self.inputs.student.to(self.home))
        gather_for_backward(self.recorders.student.model, captured)
        return captured

    def teachers(self, receive: Callable[[str | None, Address, Tensor | AttentionCall | Head], bool] | None = None) -> Any:
        """Run the teachers: their captures, by name where they have one. ``receive`` is offered each tensor first."""
        captures: dict[str | None, Any] = self.read()
        for name, recorder in self.recorders.teachers.items():
            with teaching(recorder.model):
                inputs = self.inputs.teachers[name].to(device_of(recorder.model, otherwise=self.home))
                captures[name] = self._run(recorder, inputs, None if receive is None else partial(receive, name))
        return captures.get(None, captures)

    def _run(self, recorder: Recorder, inputs: Inputs, receiver: Receiver | None = None) -> Recorded:
        if not self.dry:
            return recorder.run(inputs, receiver=receiver)
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


def _by_name(teacher: Any) -> dict[str | None, Any]:
    if teacher is None:
        return {}
    return dict(teacher) if isinstance(teacher, Mapping) else {None: teacher}


def _no_model(role: str, model: object, otherwise: str = "") -> MatchError:
    what = f"the class {model.__name__}" if isinstance(model, type) else f"{type(model).__name__}"
    return MatchError(f"{role} must be a torch.nn.Module{otherwise}, got {what}")
