"""From a batch of the user's loader to the inputs of a model, a mask or a target."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from .errors import BatchError, listing
from .paths import forward_signature, unwrap

BatchKey = str | int
BatchAdaptor = Callable[[torch.device, Any], tuple[Any, Any]]
"""``(device, batch) -> (teacher_inputs, student_inputs)``; inputs are a dict of keywords, a tuple, or one tensor."""


@dataclasses.dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    taken: Mapping[str, BatchKey] = dataclasses.field(default_factory=dict)
    """Parameter of ``forward`` → where in the batch its value came from, for the plan."""

    def __str__(self) -> str:
        return ", ".join(f"{name} = batch[{key!r}]" for name, key in self.taken.items()) or "nothing"

    def described(self) -> str:
        """The arguments with their shapes and dtypes, for a message."""
        values = dict(zip([*self.taken][: len(self.args)], self.args, strict=False)) | dict(self.kwargs)
        return ", ".join(f"{name}: {_described(value)}" for name, value in values.items()) or "nothing"

    def to(self, device: torch.device) -> Inputs:
        """The same inputs with every tensor on ``device``."""
        return Inputs(tuple(to_device(self.args, device)), to_device(dict(self.kwargs), device), self.taken)


def _described(value: Any) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def named_items(batch: Any) -> dict[str, Any] | None:
    """The batch by name, where it has names: mapping, ``BatchEncoding``, dataclass, named tuple."""
    if isinstance(batch, Mapping):
        return {str(key): value for key, value in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return dict(zip(batch._fields, batch, strict=True))
    return None


def positional_items(batch: Any) -> tuple[Any, ...]:
    """The batch by position; a single tensor is a batch of one item."""
    if isinstance(batch, torch.Tensor):
        return (batch,)
    if isinstance(batch, (tuple, list)):
        return tuple(batch)
    named = named_items(batch)
    if named is None:
        raise BatchError(
            f"a batch is a dict, a BatchEncoding, a dataclass, a tuple, a list or a tensor; got {type(batch).__name__}. "
            "Turn it into one of these in the loader's collate_fn, or pass batch_adaptor= to the Distiller."
        )
    return tuple(named.values())


def pick(batch: Any, key: BatchKey) -> Any:
    """One item of the batch by key or position.

    Raises:
        BatchError: the batch has no such item; the message lists what it has.
    """
    named = named_items(batch)
    if isinstance(key, str) and named is not None and key in named:
        return named[key]
    items = positional_items(batch)
    if isinstance(key, int) and -len(items) <= key < len(items):
        return items[key]
    raise BatchError(f"the batch has no item {key!r}; it has {contents(batch)}")


def has_item(batch: Any, key: BatchKey) -> bool:
    """Whether `pick` would find it."""
    try:
        pick(batch, key)
    except BatchError:
        return False
    return True


def contents(batch: Any) -> str:
    """What a batch holds, for a message."""
    named = named_items(batch)
    if named is not None:
        return listing(named)
    return f"{len(positional_items(batch))} items by position (0 to {len(positional_items(batch)) - 1})"


def model_inputs(model: nn.Module, batch: Any, *, targets: Collection[BatchKey], masks: Collection[BatchKey]) -> Inputs:
    """The part of ``batch`` that ``model.forward`` takes, chosen by its signature.

    Named batches go by parameter name; a ``forward(**kwargs)`` takes them whole. Batches without names fill the parameters
    in order. Items used only as a target are withheld.

    Raises:
        BatchError: a parameter without a default is not in the batch, or nothing in it is a parameter.
    """
    parameters = forward_signature(model).parameters
    named = named_items(batch)
    if named is None:
        return _by_position(model, parameters, positional_items(batch), targets)
    main = _main_inputs(model, parameters)
    kwargs = {
        key: value for key, value in named.items() if key in parameters and (key not in targets or key in main or key in masks)
    }
    if not kwargs and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        withheld = {*targets, *masks, *(key for key in named if not key.isidentifier())}
        kwargs = {key: value for key, value in named.items() if key not in withheld}
    if not kwargs:
        raise BatchError(
            f"no item of the batch is a parameter of {type(unwrap(model)).__name__}.forward, which takes "
            f"{listing(parameters)}; the batch has {contents(batch)}. Rename items in the loader, or pass batch_adaptor="
        )
    _check_required(model, parameters, set(kwargs), batch)
    by_position = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    args = tuple(kwargs.pop(name) for name in by_position if name in kwargs)
    return Inputs(args, kwargs, {key: key for key in (*by_position[: len(args)], *kwargs)})


def given_inputs(inputs: Any) -> Inputs:
    """Inputs that the user has put together: a dict of keywords, a tuple or list of arguments, or one tensor.

    Raises:
        BatchError: they are something else.
    """
    if isinstance(inputs, Mapping):
        return Inputs(kwargs=dict(inputs), taken={str(key): str(key) for key in inputs})
    if not isinstance(inputs, (tuple, list, torch.Tensor)):
        raise BatchError(f"inputs are a dict of keywords, a tuple of arguments, or one tensor; got {type(inputs).__name__}")
    items = positional_items(inputs)
    return Inputs(args=items, taken={f"argument {i}": i for i in range(len(items))})


def check_fits(inputs: Inputs, model: nn.Module) -> None:
    """Raise a `BatchError` unless ``model.forward`` can be called with ``inputs``."""
    signature = forward_signature(model)
    try:
        signature.bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        given = [f"{len(inputs.args)} arguments"] * bool(inputs.args) + list(inputs.kwargs)
        raise BatchError(
            f"{type(unwrap(model)).__name__}.forward takes {listing(signature.parameters)} and cannot be called with "
            f"{listing(given)}: {error}"
        ) from error


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``; containers of other kinds are left as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(child, device) for key, child in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(to_device(child, device) for child in value)
    return value


def _by_position(
    model: nn.Module, parameters: Mapping[str, inspect.Parameter], items: tuple[Any, ...], targets: Collection[BatchKey]
) -> Inputs:
    withheld = {key % len(items) for key in targets if isinstance(key, int) and -len(items) <= key < len(items)}
    kept = [(position, item) for position, item in enumerate(items) if position not in withheld]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [name for name, p in parameters.items() if p.kind in positional]
    if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        kept = kept[: len(names)]
    taken = {names[i] if i < len(names) else f"argument {i}": position for i, (position, _) in enumerate(kept)}
    _check_required(model, parameters, set(taken), items)
    return Inputs(args=tuple(item for _, item in kept), taken=taken)


def _main_inputs(model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    """Parameters that a model needs even when the item is a target too (``input_ids`` of a language model)."""
    required = {name for name, p in parameters.items() if _is_required(p)}
    return required | {str(getattr(unwrap(model), "main_input_name", next(iter(parameters), "")))}


def _is_required(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is inspect.Parameter.empty and parameter.kind not in variadic


def _check_required(model: nn.Module, parameters: Mapping[str, inspect.Parameter], given: Collection[str], batch: Any) -> None:
    missing = [name for name, p in parameters.items() if _is_required(p) and name not in given]
    if missing:
        kind = type(unwrap(model)).__name__
        raise BatchError(
            f"{kind}.forward needs {listing(missing)}, which the batch does not have under that name; it has "
            f"{contents(batch)}. Rename the item in the loader, or pass batch_adaptor=(device, batch) -> "
            "(teacher_inputs, student_inputs) to the Distiller."
        )
