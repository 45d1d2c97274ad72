"""From what a module returned, or was called with, to the one tensor that a selector names."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .addresses import Selector, Step
from .errors import CaptureError, listing

_MISSING = object()


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf below ``value``, depth first in field order, with the steps that lead to it as text."""
    if isinstance(value, Tensor) or not (fields := _fields(value)):
        yield prefix, value
        return
    for step, child in fields:
        yield from leaves(child, prefix + str(step))


def tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """The leaves that are tensors."""
    return ((where, leaf) for where, leaf in leaves(value) if isinstance(leaf, Tensor))


def select_output(output: Any, selector: Selector) -> Tensor:
    """The tensor that ``selector`` names in a module's output.

    Raises:
        CaptureError: there is no such leaf, it is ``None`` or no tensor, or the choice is ambiguous.
    """
    if not selector.steps:
        return _first_tensor(output, "output")
    return _descend(output, selector.steps, "output", "output")


@dataclasses.dataclass(frozen=True, slots=True)
class Parameters:
    """The named parameters of a ``forward``, in the order of its signature."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...]

    @classmethod
    def of(cls, signature: inspect.Signature) -> Parameters:
        """Those of a signature, without ``*args`` and ``**kwargs``."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = signature.parameters.values()
        return cls(
            tuple(p.name for p in parameters if p.kind in positional),
            tuple(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY),
        )


def select_input(args: Sequence[Any], kwargs: Mapping[str, Any], selector: Selector, names: Parameters) -> Tensor:
    """The tensor that ``selector`` names in what a module was called with.

    Raises:
        CaptureError: the argument was not passed in this call, or there is no such tensor in it.
    """
    if not selector.steps:
        for _, value in _arguments(args, kwargs, names):
            for _, tensor in tensors(value):
                return tensor
        raise CaptureError(f"no tensor among the arguments of this call, which were {_passed(args, kwargs, names)}")
    first, rest = selector.steps[0], selector.steps[1:]
    value = _argument(first, args, kwargs, names)
    if value is _MISSING:
        raise CaptureError(f"input{first} was not passed in this call, which had {_passed(args, kwargs, names)}")
    if not rest:
        return _one_tensor(value, f"input{first}")
    return _descend(value, rest, f"input{first}", "input")


def describe(value: Any, *, most: int = 8) -> str:
    """A short picture of a container for a message: ``(Tensor[2, 6, 32], None)``."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    fields = _fields(value)
    if not fields:
        return "None" if value is None else type(value).__name__
    shown = [f"{str(step).removeprefix('.')}: {describe(child, most=most)}" for step, child in fields[:most]]
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        shown = [describe(child, most=most) for _, child in fields[:most]]
    inside = ", ".join(shown) + (f", … {len(fields) - most} more" if len(fields) > most else "")
    return f"({inside})" if isinstance(value, tuple) else f"{type(value).__name__}({inside})"


def _first_tensor(output: Any, where: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if _is_plain_mapping(output):
        found = list(tensors(output))
        if len(found) > 1:
            names = ", ".join(f"{where}{step}" for step, _ in found[:12])
            raise CaptureError(
                f"{where} is a {type(output).__name__} with {len(found)} tensors, and a plain dict has no first one. "
                f"Choose: {names}"
            )
    for step, child in _fields(output):
        if isinstance(child, Tensor):
            return child
        if child is not None and any(True for _ in tensors(child)):
            return _first_tensor(child, f"{where}{step}")
    raise CaptureError(f"{where} holds no tensor: it is {describe(output)}")


def _descend(value: Any, steps: Sequence[Step], where: str, word: str) -> Tensor:
    for step in steps:
        child = _take(value, step)
        if child is _MISSING:
            raise CaptureError(_no_leaf(value, step, where, word))
        value, where = child, f"{where}{step}"
    return _one_tensor(value, where)


def _one_tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if value is None:
        raise CaptureError(f"{where} is None in this forward, so there is nothing to capture")
    inside = [f"{where}{step}" for step, _ in tensors(value)]
    if inside:
        raise CaptureError(f"{where} is a {type(value).__name__} of tensors, not one tensor. Choose: {listing(inside)}")
    raise CaptureError(f"{where} is no tensor but {describe(value)}")


def _no_leaf(value: Any, step: Step, where: str, word: str) -> str:
    if isinstance(value, Tensor):
        if step.kind == "index":
            return (
                f"{where} is a bare tensor of shape {list(value.shape)}, so {where}{step} would be row {step.value} "
                f"of the batch, not an output of the module. Write {where!r}"
            )
        return f"{where} is a bare tensor of shape {list(value.shape)} and has no leaf {step}. Write {where!r}"
    names = [f"{where}{each}" for each, _ in _fields(value)]
    return f"{where} has no leaf {step}: it is {describe(value)}. It offers: {listing(names)}"


def _take(value: Any, step: Step) -> Any:
    if isinstance(value, Tensor) or value is None:
        return _MISSING
    if isinstance(value, Mapping) and (step.kind != "index" or _is_plain_mapping(value)):
        return value.get(step.value, _MISSING)
    if step.kind == "name":
        return getattr(value, str(step.value), _MISSING)
    if step.kind == "index":
        try:
            return value[step.value]
        except (IndexError, KeyError, TypeError):
            return _MISSING
    return _MISSING


def _fields(value: Any) -> list[tuple[Step, Any]]:
    if isinstance(value, Mapping):  # also transformers' ModelOutput, which is an ordered dict of its fields
        return [(_key_step(key), child) for key, child in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(Step("name", field.name), getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(Step("name", name), getattr(value, name)) for name in value._fields]
    if isinstance(value, (tuple, list)):
        return [(Step("index", index), child) for index, child in enumerate(value)]
    return []


def _key_step(key: Any) -> Step:
    if isinstance(key, int):
        return Step("index", key)
    return Step("name", key) if isinstance(key, str) and key.isidentifier() else Step("key", str(key))


def _is_plain_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and not dataclasses.is_dataclass(value)


def _argument(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any], names: Parameters) -> Any:
    positional = names.positional
    if step.kind == "index":
        position = int(step.value)
        if -len(args) <= position < len(args):
            return args[position]
        return kwargs.get(positional[position], _MISSING) if 0 <= position < len(positional) else _MISSING
    if step.value in kwargs:
        return kwargs[str(step.value)]
    position = positional.index(str(step.value)) if step.value in positional else len(args)
    return args[position] if position < len(args) else _MISSING


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any], names: Parameters) -> Iterator[tuple[str, Any]]:
    positional = names.positional
    yield from ((positional[i] if i < len(positional) else str(i), value) for i, value in enumerate(args))
    by_signature = [name for name in (*positional, *names.keyword_only) if name in kwargs]
    yield from ((name, kwargs[name]) for name in by_signature)
    yield from ((name, value) for name, value in kwargs.items() if name not in by_signature)


def _passed(args: Sequence[Any], kwargs: Mapping[str, Any], names: Parameters) -> str:
    passed = [f"{name}: {describe(value)}" for name, value in _arguments(args, kwargs, names)]
    return ", ".join(passed) or "no arguments"
