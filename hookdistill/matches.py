"""One entry of the distillation config: which tensors are compared, by which loss, with which weight and mask."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

from torch import Tensor, nn

from .adapters import check_adapter_name
from .addresses import Address, parse
from .errors import AddressError, HookDistillError, LossError, MatchError, did_you_mean, listing
from .inputs import Input, Source, read_inputs
from .layer_maps import LAYER_MAPS
from .losses.registry import LossSpec, loss_spec

Schedule = Callable[[int], float]

_OLD_KINDS = ("ts_distill", "hard_distill")
_OLD_LOSSES = {"cos": "cosine", "mse_with_mask": "mse", "attention_mse_with_mask": "attention_mse"}
_OLD_MASK = "attention_mask"


@dataclass(frozen=True, init=False, eq=False)
class Match:
    """A student tensor, what it is compared with, and how.

    Args:
        teacher: address of the teacher tensor; ``None`` when the student is compared with ``target`` alone.
        student: address of the student tensor. Wildcards on both sides are paired by ``layer_map``.
        loss: name of a registered loss, or a callable ``(student, teacher, mask=None, **loss_args)`` that returns a scalar.
        weight: factor in the total: a finite number, or a function of the step.
        mask: valid positions: key or index of the batch, address in the student, or a function of the batch.
        target: what the loss gets instead of, or (as ``target=``) beside, the teacher tensor; given as ``mask`` is.
        selector: the selector of both addresses, where they have none.
        adapter: ``"auto"``, ``"none"``, ``"linear"``, ``"conv"``, ``"resize"``, or a module that is called with the
            student tensor.
        temperature: for losses that take one; positive, or a function of the step.
        teacher_model: which of several teachers.
        layer_map: how wildcards are paired.
        inputs: further tensors for keywords of the loss, by name: what begins with ``teacher`` is an address in the teacher,
            any other is given as ``mask`` is. A list gives the loss a list of tensors.
        name: key of the value in ``losses.parts``; default ``student <- teacher: loss``.
        loss_args: further keyword arguments of the loss, or of its state.

    Raises:
        MatchError: anything that is wrong on its face; what depends on the models is found when the plan is made.
    """

    teacher: str | None
    student: str
    loss: str | Callable[..., Tensor]
    weight: float | Schedule
    mask: Source | None
    target: Source | None
    selector: str | None
    adapter: str | nn.Module
    temperature: float | Schedule
    teacher_model: str | None
    layer_map: str
    inputs: Mapping[str, Any] | None
    name: str | None
    loss_args: Mapping[str, Any]
    spec: LossSpec = field(repr=False)
    teacher_address: Address | None = field(repr=False)
    student_address: Address = field(repr=False)
    further: tuple[Input, ...] = field(repr=False)
    """``inputs``, as they were read."""

    def __init__(
        self,
        teacher: str | None,
        student: str,
        *,
        loss: str | Callable[..., Tensor] = "mse",
        weight: float | Schedule = 1.0,
        mask: Source | None = None,
        target: Source | None = None,
        selector: str | None = None,
        adapter: str | nn.Module = "auto",
        temperature: float | Schedule = 1.0,
        teacher_model: str | None = None,
        layer_map: str = "uniform",
        inputs: Mapping[str, Any] | None = None,
        name: str | None = None,
        **loss_args: Any,
    ) -> None:
        for key, value in {**locals()}.items():
            if key not in ("self", "key", "value"):
                object.__setattr__(self, key, value)
        try:
            self._check()
        except HookDistillError as error:
            raise MatchError(f"Match({teacher!r}, {student!r}, loss={_loss_name(loss)!r}): {error}") from error

    def _check(self) -> None:
        object.__setattr__(self, "student_address", _address(self.student, self.selector))
        teacher = None if self.teacher is None else _address(self.teacher, self.selector)
        object.__setattr__(self, "teacher_address", teacher)
        object.__setattr__(self, "spec", _spec(self))
        if self.name is not None and not (isinstance(self.name, str) and self.name):
            raise MatchError(f"name= must be a non-empty string, got {self.name!r}")
        check_adapter_name(self.adapter)
        _check_number("weight", self.weight, lowest=-math.inf)
        _check_number("temperature", self.temperature, lowest=0.0)
        _check_sources(self)
        keywords = dict.fromkeys((*self.spec.parameters, *self.spec.state_parameters))
        further = read_inputs(self.inputs, loss=self.spec.name, keywords=keywords, anything=self.spec.accepts_any)
        object.__setattr__(self, "further", further)
        _check_loss_args(self)
        _check_required(self)
        if not isinstance(self.layer_map, str) or self.layer_map not in LAYER_MAPS:
            hint = did_you_mean(str(self.layer_map), LAYER_MAPS)
            raise MatchError(f"unknown layer_map {self.layer_map!r}.{hint} Known are {listing(LAYER_MAPS)}")
        for address in (self.student_address, self.teacher_address):
            if address is not None and address.call == "*":
                raise MatchError(f"{str(address)!r} is a list of tensors; a match compares one: choose a call, as in @-1")

    def at(
        self,
        teacher: Address | None,
        student: Address,
        *,
        name: str | None = None,
        teacher_model: str | None = None,
        further: tuple[Input, ...] | None = None,
    ) -> Match:
        """The same comparison of other tensors: what a wildcard entry becomes for each pair of layers."""
        twin = copy.copy(self)
        changed: dict[str, Any] = {"teacher_address": teacher, "student_address": student, "teacher_model": teacher_model}
        changed["further"] = self.further if further is None else further
        for key, value in {**changed, "name": name or self.name}.items():
            object.__setattr__(twin, key, value)
        return twin

    @property
    def label(self) -> str:
        """The name, or ``student <- teacher: loss``."""
        if self.name is not None:
            return self.name
        source = self.teacher_address if self.teacher_address is not None else self.target
        if self.teacher_address is not None and self.teacher_model is not None:
            source = f"{self.teacher_model}/{source}"
        shown = source if isinstance(source, (str, int, Address)) else getattr(source, "__name__", "target")
        return f"{self.student_address} <- {shown}: {self.spec.name}"


def _spec(match: Match) -> LossSpec:
    """The loss meant by its name, which depends on what is compared."""
    spec = loss_spec(match.loss)
    if not isinstance(match.loss, str) or match.teacher_address is None:
        return spec
    if spec.name == "cross_entropy":
        return loss_spec("soft_cross_entropy")  # a teacher's logits are no class indices
    maps = [each.selector.word for each in (match.student_address, match.teacher_address)]
    if spec.name == "kl" and maps == ["attention", "attention"]:
        return loss_spec("attention_kl")  # probabilities are no logits
    if spec.name == "mse" and maps[0] == maps[1] and maps[0] in ("attention", "attention_scores"):
        return loss_spec("attention_mse")  # a token mask there means query and key
    return spec


def as_matches(entries: Iterable[Match | Mapping[str, Any]]) -> list[Match]:
    """The entries as `Match` records; dicts of the older library's config are read too.

    Raises:
        MatchError: an entry is neither, or a dict has a wrong, missing or misspelt key; the message has its position.
    """
    if isinstance(entries, (Match, Mapping, str)) or not isinstance(entries, Iterable):
        raise MatchError(f"matches= is a list of Match entries, got {type(entries).__name__}; write [Match(…)]")
    matches = []
    for position, entry in enumerate(entries):
        try:
            matches.append(_as_match(entry))
        except HookDistillError as error:
            raise MatchError(f"entry {position}: {error}") from error
    if not matches:
        raise MatchError("matches= is empty, so there is nothing to train on; give at least one Match")
    return matches


def _as_match(entry: object) -> Match:
    if isinstance(entry, Match):
        return entry
    if isinstance(entry, Mapping):
        return _from_dict(entry)
    raise MatchError(f"an entry is a Match or a dict of the older library's config, got {type(entry).__name__}: {entry!r:.60}")


def _from_dict(item: Mapping[str, Any]) -> Match:
    kind = item.get("type")
    if kind not in _OLD_KINDS:
        raise MatchError(f"'type' is {kind!r}; it must be one of {listing(_OLD_KINDS)}.{did_you_mean(str(kind), _OLD_KINDS)}")
    sides = ("teacher", "student") if kind == "ts_distill" else ("student",)
    needed = [f"{side}_layer_{part}" for side in sides for part in ("name", "output_name")] + ["loss"]
    ignored = {"type", "teacher_layer_name", "teacher_layer_output_name"}
    passed_on = ("weight", "target", "mask", "name", "adapter", "temperature", "teacher_model", "layer_map", "inputs")
    if unknown := [key for key in item if key not in {*needed, *ignored, *passed_on}]:
        known = ["type", *needed, *passed_on]
        raise MatchError(f"unknown key {unknown[0]!r}.{did_you_mean(str(unknown[0]), known)} Known are {listing(known)}")
    if missing := [key for key in needed if key not in item]:
        raise MatchError(f"a {kind!r} item needs the keys {listing(missing)}; it has {listing(map(str, item))}")
    loss, args = _old_loss(item["loss"])
    options = {key: item[key] for key in passed_on if key in item}
    if kind == "hard_distill":
        options.setdefault("target", "labels")
    if str(item["loss"]["loss_function"]).endswith("_with_mask"):
        options.setdefault("mask", _OLD_MASK)
    addresses = {side: f"{item[f'{side}_layer_name']}:{item[f'{side}_layer_output_name']}" for side in sides}
    if clash := set(args) & {*options, "teacher", "student", "loss"}:
        raise MatchError(f"{listing(sorted(clash))} cannot stand in the loss args: it is said by the item itself")
    return Match(addresses.get("teacher"), addresses["student"], loss=loss, **options, **args)


def _old_loss(loss: object) -> tuple[str | Callable[..., Tensor], dict[str, Any]]:
    if not isinstance(loss, Mapping) or "loss_function" not in loss or set(loss) - {"loss_function", "args"}:
        raise MatchError(f"'loss' must be {{'loss_function': name, 'args': {{…}}}}, got {loss!r:.80}")
    args = loss.get("args") or {}
    if not isinstance(args, Mapping):
        raise MatchError(f"'args' of 'loss' must be a dict of keyword arguments, got {args!r:.80}")
    if wrong := [key for key in args if not isinstance(key, str)]:
        raise MatchError(f"'args' of 'loss' must have strings as keys, got {wrong[0]!r}")
    function = loss["loss_function"]
    return _OLD_LOSSES.get(function, function) if isinstance(function, str) else function, dict(args)


def _address(text: object, selector: str | None) -> Address:
    if not isinstance(text, str):
        raise AddressError(
            f"an address is a string such as 'encoder.layer.3' or ':logits', got {type(text).__name__}: {text!r}"
        )
    address = parse(text)
    if selector is None:
        return address
    if not isinstance(selector, str):
        raise MatchError(f"selector= is a string such as 'attention', got {selector!r}")
    if ":" in text:
        raise MatchError(f"selector={selector!r} and the address {text!r} both name a selector; write it in one place")
    return replace(address, selector=parse(f":{selector}").selector)


def _check_number(what: str, value: object, *, lowest: float) -> None:
    if callable(value):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= lowest:
        above = "" if lowest == -math.inf else f" above {lowest:g}"
        raise MatchError(f"{what}= must be a finite number{above} or a function of the step, got {value!r}")


def _check_sources(match: Match) -> None:
    for what, value in (("mask", match.mask), ("target", match.target)):
        if value is not None and (isinstance(value, bool) or not (isinstance(value, (str, int)) or callable(value))):
            raise MatchError(
                f"{what}= is a key or index of the batch, an address in the student, or a function of the batch; got "
                f"{type(value).__name__}"
            )
    if match.teacher is None and match.target is None:
        raise MatchError("there is nothing to compare with: give a teacher address, or target= (a key of the batch)")
    if match.teacher is None and match.teacher_model is not None:
        raise MatchError(f"teacher_model={match.teacher_model!r} without a teacher address")
    if match.mask is not None and not match.spec.accepts_mask:
        raise MatchError(f"mask= is given, but the loss {match.spec.name!r} takes no keyword 'mask'")


def _check_loss_args(match: Match) -> None:
    spec = match.spec
    known = [name for name in spec.parameters if name not in ("temperature", "target")]
    known += ["reduction"] if spec.accepts_reduction else []
    known += [name for name in spec.state_parameters if name not in known]
    unknown = [name for name in match.loss_args if name not in known] if not spec.accepts_any else []
    if unknown:
        options = (
            "weight",
            "mask",
            "target",
            "selector",
            "adapter",
            "temperature",
            "teacher_model",
            "layer_map",
            "inputs",
            "name",
        )
        raise MatchError(
            f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0], (*known, *options))} The loss {spec.name!r} takes "
            f"{listing(known)}; a match takes {listing(options)}"
        )
    if "dim" in match.loss_args and "dim" in spec.parameters and not isinstance(match.loss_args["dim"], int):
        raise MatchError(f"dim= is the number of a dimension, got {match.loss_args['dim']!r}")
    if match.temperature != 1.0 and not spec.accepts_temperature:
        raise MatchError(f"temperature={match.temperature!r} is given, but the loss {spec.name!r} takes no temperature")
    takes_both = spec.accepts_any or ("target" in spec.parameters and match.loss != "cross_entropy")
    if match.teacher is not None and match.target is not None and not takes_both:
        raise MatchError(
            f"both a teacher address and target={match.target!r} are given, but the loss {_loss_name(match.loss)!r} is against "
            "one of them. Write two entries: one against the teacher, one with teacher None against the target"
        )


def _check_required(match: Match) -> None:
    """The keywords of the loss that have no default are given; those that a state gives are found when it is made."""
    inputs = [each.name for each in match.further]
    if twice := [name for name in inputs if name in match.loss_args or (name == "target" and match.target is not None)]:
        raise MatchError(f"{twice[0]!r} is given twice, by inputs= and as an argument; give it once")
    if match.teacher is None and (of_teacher := [each.name for each in match.further if each.of_teacher]):
        raise MatchError(f"inputs[{of_teacher[0]!r}] is an address in the teacher, but the entry has no teacher")
    given = {"temperature", "dim", *match.loss_args, *inputs, *(["target"] if match.target is not None else [])}
    missing = [] if match.spec.state is not None else [name for name in match.spec.required if name not in given]
    if missing:
        ways = ["as an argument", "by inputs={…}, an item of the batch or an address"]
        ways = ["by target=, a key of the batch", *ways[1:]] if missing[0] == "target" else ways
        raise MatchError(f"the loss {match.spec.name!r} needs {missing[0]!r}; give it {' or '.join(ways)}")


def _loss_name(loss: object) -> str:
    try:
        return loss_spec(loss).name  # type: ignore[arg-type]
    except LossError:
        return loss if isinstance(loss, str) else type(loss).__name__
