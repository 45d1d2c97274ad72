"""All matches resolved on both models: what is compared with what, as a table and as records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .addresses import Address, Segment
from .engine import Choice, Compared
from .errors import AddressError, MatchError, listing
from .inputs import Input
from .layer_maps import LAYER_MAPS
from .matches import Match
from .paths import Found, resolve
from .tables import table


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRow:
    """One comparison of the plan; shapes and dtypes are those of the dry forward."""

    name: str
    teacher: str
    teacher_shape: tuple[int, ...]
    student: str
    student_shape: tuple[int, ...]
    dtypes: str
    adapter: str
    loss: str
    weight: str
    mask: str
    implementation: str
    """What computes the loss in training, and why that."""
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a `Distiller` will do with every batch; ``print(plan)`` shows it as a table."""

    rows: tuple[PlanRow, ...]
    inputs: tuple[str, ...]
    """For each model, which of its parameters are filled from which items of the batch."""

    def __iter__(self) -> Iterator[PlanRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        headings = ("student", "shape", "teacher / target", "shape", "dtype", "adapter", "loss", "weight", "mask", "by", "now")
        cells = [
            (
                *(row.student, str(list(row.student_shape)), row.teacher, str(list(row.teacher_shape)), row.dtypes),
                *(row.adapter, row.loss, row.weight, row.mask, row.implementation, f"{row.value:.4g}"),
            )
            for row in self.rows
        ]
        return "\n".join([table(headings, cells, right=("now",)), "", *self.inputs])


def expand(match: Match, teachers: Mapping[str | None, nn.Module], student: nn.Module) -> list[Match]:
    """One match for each pair of tensors that an entry names: itself with full paths, or several where it has wildcards.

    Raises:
        MatchError: an address names nothing, the teacher is not known, or the wildcards cannot be paired.
    """
    try:
        students = resolve(student, match.student_address)
    except AddressError as error:
        raise MatchError(f"{match.label}: student: {error}") from error
    ours = [_concrete(found, match.student_address) for found in students]
    if match.teacher_address is None:
        return [_at(match, None, address, index, len(ours), None) for index, address in enumerate(ours)]
    teacher_name = _teacher_name(match, teachers)
    try:
        found_teachers = resolve(teachers[teacher_name], match.teacher_address)
    except AddressError as error:
        raise MatchError(f"{match.label}: teacher: {error}") from error
    theirs = [_concrete(found, match.teacher_address) for found in found_teachers]
    pairs = _pairs(match, theirs, ours)
    further = tuple(_resolved(match, each, teachers[teacher_name]) for each in match.further)
    return [_at(match, t, s, index, len(pairs), teacher_name, further) for index, (t, s) in enumerate(pairs)]


def check_values(term: Match, student: Tensor, other: Tensor, mask: Tensor | None) -> None:
    """Look for values that would train nonsense. Reads tensors on the host, so for the dry forward only.

    Raises:
        MatchError: a mask that is not 0 and 1, or labels that are no classes.
    """
    allowed = None if mask is None else (mask == 0) | (mask == 1) if mask.is_floating_point() else mask >= 0
    if mask is not None and allowed is not None and not bool(allowed.all()):
        low, high = float(mask.min()), float(mask.max())
        raise MatchError(
            f"mask={term.mask!r} holds values between {low:g} and {high:g}; a mask is 1 where a position is valid and "
            "0 elsewhere. For an additive attention mask write mask=lambda batch: batch[…] == 0"
        )
    if term.spec.name == "cross_entropy" and not other.is_floating_point():
        dim = int(term.loss_args.get("dim", 1 if student.dim() in (4, 5) else -1))
        classes, ignored = student.shape[dim], int(term.loss_args.get("ignore_index", -100))
        wrong = other[(other != ignored) & ((other < 0) | (other >= classes))]
        if wrong.numel():
            raise MatchError(
                f"target={term.target!r} holds the label {int(wrong.flatten()[0])}, but the student tensor "
                f"{list(student.shape)} has classes 0 to {classes - 1}; {ignored} marks positions to ignore"
            )


def row(
    name: str,
    term: Match,
    tensors: Compared,
    adapter: nn.Module | None,
    choice: Choice,
    value: float,
    *,
    state: nn.Module | None = None,
) -> PlanRow:
    """The line of the plan for one comparison."""
    student, other = tensors.student, tensors.other
    spec, temperature = term.spec, term.temperature
    options = [*map(str, term.further), *(f"{key}={_setting(setting)}" for key, setting in term.loss_args.items())]
    if spec.accepts_temperature and temperature != 1.0:
        options.insert(0, f"T={temperature:g}" if not callable(temperature) else "T=schedule")
    if "dim" in spec.parameters and student.dim() in (4, 5) and "dim" not in term.loss_args:
        options.append("dim=1")
    teacher = str(term.teacher_address) if term.teacher_address is not None else f"batch: {_source_name(term.target)}"
    if term.teacher_model is not None:
        teacher = f"{term.teacher_model}/{teacher}"
    return PlanRow(
        name=name,
        teacher=teacher,
        teacher_shape=tuple(other.shape),
        student=str(term.student_address),
        student_shape=tuple(student.shape),
        dtypes=_short(student.dtype) if student.dtype == other.dtype else f"{_short(student.dtype)}/{_short(other.dtype)}",
        adapter=" + ".join(filter(None, [_adapter_name(adapter), "" if state is None else type(state).__name__])),
        loss=spec.name + (f"({', '.join(options)})" if options else ""),
        weight="schedule" if callable(term.weight) else f"{term.weight:g}",
        mask="" if term.mask is None else _source_name(term.mask),
        implementation=str(choice),
        value=value,
    )


def _concrete(found: Found, address: Address) -> Address:
    segments = tuple(Segment(name) for name in found.path.split(".")) if found.path else ()
    return Address(segments, address.selector, address.call)


def _resolved(match: Match, given: Input, teacher: nn.Module) -> Input:
    """Addresses in the teacher with their full paths, so that one tensor has one spelling."""
    if not given.of_teacher:
        return given
    try:
        found = [(resolve(teacher, each), each) for each in given.sources if isinstance(each, Address)]
    except AddressError as error:
        raise MatchError(f"{match.label}: inputs[{given.name!r}]: {error}") from error
    return replace(given, sources=tuple(_concrete(one[0], address) for one, address in found))


def _at(
    match: Match,
    teacher: Address | None,
    student: Address,
    index: int,
    count: int,
    teacher_name: str | None,
    further: tuple[Input, ...] | None = None,
) -> Match:
    name = f"{match.name}.{index}" if match.name is not None and count > 1 else None
    return match.at(teacher, student, name=name, teacher_model=teacher_name, further=further)


def _teacher_name(match: Match, teachers: Mapping[str | None, nn.Module]) -> str | None:
    if not teachers:
        raise MatchError(f"{match.label}: the entry needs a teacher, but the distiller has none")
    known = [name for name in teachers if name is not None]
    if match.teacher_model in teachers:
        return match.teacher_model
    if match.teacher_model is None and len(teachers) == 1:
        return next(iter(teachers))
    if match.teacher_model is None:
        raise MatchError(f"{match.label}: there are several teachers; choose one with teacher_model=, of {listing(known)}")
    way_out = f"there are {listing(known)}" if known else "there is one teacher without a name; leave teacher_model= out"
    raise MatchError(f"{match.label}: no teacher is called {match.teacher_model!r}; {way_out}")


def _pairs(match: Match, teachers: list[Address], students: list[Address]) -> list[tuple[Address, Address]]:
    if len(teachers) == 1:  # one teacher tensor for every student layer
        return [(teachers[0], student) for student in students]
    if len(students) > len(teachers) or (len(students) == 1 and not match.student_address.several):
        raise MatchError(
            f"{match.label}: the teacher address names {len(teachers)} tensors ({listing(map(str, teachers), most=4)}) and "
            f"the student address {len(students)} ({listing(map(str, students), most=4)}), which cannot be paired. Name one "
            "teacher tensor, or use wildcards on both sides with no more student layers than teacher layers"
        )
    chosen = LAYER_MAPS[match.layer_map](len(teachers), len(students))
    return [(teachers[position], student) for position, student in zip(chosen, students, strict=True)]


def _adapter_name(adapter: nn.Module | None) -> str:
    if adapter is None:
        return ""
    project = getattr(adapter, "project", adapter)
    parts = [] if project is None else [_module_name(project)]
    if getattr(adapter, "resize", False) is True:
        parts.append("resize")
    return " + ".join(parts)


def _setting(value: object) -> str:
    """An argument of a loss, short."""
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def _module_name(module: nn.Module) -> str:
    widths = [getattr(module, f"{end}_{kind}", None) for kind in ("features", "channels") for end in ("in", "out")]
    shown = [str(width) for width in widths if width is not None]
    return f"{type(module).__name__}({'→'.join(shown)})" if shown else type(module).__name__


def _source_name(source: object) -> str:
    return getattr(source, "__name__", type(source).__name__) if callable(source) else str(source)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
