"""Losses by name, and what a loss can be called with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from ..errors import LossError, did_you_mean, listing

Compares = Literal["features", "logits", "labels", "attention", "relations", "any"]
Per = Literal["position", "sample"]
AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])

_BY_NAME: dict[str, LossSpec] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """A loss, and what it can be called with.

    ``compares`` says whether an automatic adapter makes sense: for ``"features"`` it does, for ``"logits"`` never, for
    ``"labels"`` the second argument is a target rather than a teacher, ``"attention"`` is of maps and needs no adapter either,
    ``"relations"`` bridges different widths by itself, ``"any"`` is for the user to decide.

    ``parameters`` are the keywords beside the two tensors, ``mask`` and ``reduction``, in the order of the signature,
    without those that a ``functools.partial`` has already bound. ``accepts_any`` means ``**kwargs``.
    ``accepts_mask`` is also true for ``**kwargs``; ``accepts_temperature`` is not, since every match has a temperature
    and a loss that does not name it has not asked for it. ``required`` are those of the parameters that have no default.

    ``per`` is what the loss has one value for, and its mean is over: each position, or each sample of the batch.

    ``state`` makes the module that a loss with parameters or memory needs: ``(student, teacher, **options) -> nn.Module``,
    called with the first tensors. What the module has under the names of the loss's keywords is handed to the loss.
    ``state_parameters`` are the names of its options.
    """

    name: str
    function: Callable[..., Any]
    compares: Compares
    parameters: tuple[str, ...]
    accepts_mask: bool
    accepts_reduction: bool
    accepts_temperature: bool
    accepts_any: bool
    required: tuple[str, ...] = ()
    per: Per = "position"
    state: Callable[..., nn.Module] | None = None
    state_parameters: tuple[str, ...] = ()


def register_loss(
    name: str, *, compares: Compares = "any", per: Per = "position", state: Callable[..., nn.Module] | None = None
) -> Callable[[AnyCallable], AnyCallable]:
    """A decorator that makes a callable ``(student, teacher, mask=None, **args)`` known by a name.

    The callable comes back unchanged; registering it again under the same name may only change the options.

    Args:
        compares: what kind of tensors, see `LossSpec`.
        per: what its mean is over, each ``"position"`` or each ``"sample"``: what means over several batches are weighted by.
        state: for a loss with parameters or memory: a class or function ``(student, teacher, **options) -> nn.Module``. A
            `Match` calls it with the first tensors, when the plan is made, keeps the module, and hands what it has under the
            names of the loss's keywords (submodules, parameters, buffers, attributes) to the loss with each call.

    Raises ``LossError`` if the name stands for another loss, if ``compares`` or ``per`` is unknown, or if the callable or
    ``state`` cannot be called with a student and a teacher.
    """
    if not isinstance(name, str) or not name:
        raise LossError(f'A loss is registered under a name, as in @register_loss("my_loss"); got {name!r}.')
    if compares not in get_args(Compares):
        raise LossError(f"The loss {name!r} cannot compare {compares!r}; compares= is one of {listing(get_args(Compares))}.")

    if per not in get_args(Per):
        raise LossError(f"The loss {name!r} has no value per {per!r}; per= is one of {listing(get_args(Per))}.")
    options = () if state is None else _state_options(name, state)

    def register(loss: AnyCallable) -> AnyCallable:
        known = _BY_NAME.get(name)
        if known is not None and not _is_redefinition(known.function, loss):
            raise LossError(
                f"The name {name!r} already stands for the loss {_describe(known.function)}; "
                f"register {_describe(loss)} under another name."
            )
        _BY_NAME[name] = replace(_inspect(loss), name=name, compares=compares, per=per, state=state, state_parameters=options)
        return loss

    return register


def loss_spec(loss: str | Callable[..., Any]) -> LossSpec:
    """What is known about a loss, given by its registered name or as a callable.

    A callable is a function, a ``functools.partial``, an ``nn.Module`` instance (its ``forward`` is looked at) or any
    object with ``__call__``. A registered function keeps its name and ``compares``, also inside a ``partial``, after
    ``torch.compile`` and under a decorator that uses ``functools.wraps``.

    Raises ``LossError`` for an unknown name, a class, and what cannot be called with a student and a teacher.
    """
    if not isinstance(loss, str):
        return _registered(loss) or _inspect(loss)
    if loss not in _BY_NAME:
        known = sorted(_BY_NAME)
        raise LossError(
            f"No loss is called {loss!r}.{did_you_mean(loss, known)} Known losses: {listing(known, most=len(known))}. "
            "A loss of your own is given as a callable, or made known with @register_loss."
        )
    return _BY_NAME[loss]


def registered_losses() -> dict[str, LossSpec]:
    """All losses that have a name, in order of registration; a copy."""
    return dict(_BY_NAME)


def _state_options(name: str, state: Callable[..., nn.Module]) -> tuple[str, ...]:
    if not callable(state) or isinstance(state, nn.Module):
        raise LossError(
            f"state= of the loss {name!r} is a class or function (student, teacher, **options) that makes a module; "
            f"got {state!r}."
        )
    try:
        return tuple(_keywords(state)[0])
    except LossError as error:
        message = str(error).replace(f"The loss {_describe(state)}", f"state= of the loss {name!r}")
        raise LossError(message) from error


def _is_redefinition(known: Callable[..., Any], loss: Callable[..., Any]) -> bool:
    if known is loss:
        return True
    names = [(getattr(each, "__module__", None), getattr(each, "__qualname__", None)) for each in (known, loss)]
    return names[0] == names[1] and names[0][1] is not None and names[0][1] != "<lambda>"


def _inspect(loss: Callable[..., Any]) -> LossSpec:
    """The spec of a callable, which takes name and meaning from the registry if it wraps something registered."""
    if inspect.isclass(loss):
        raise LossError(f"{loss.__name__} is a class; a loss is an instance of it: {loss.__name__}().")
    if not callable(loss):
        raise LossError(
            "A loss is a registered name or a callable (student, teacher, mask=None, ...); "
            f"got {loss!r}, a {type(loss).__name__}."
        )
    keywords, accepts_any = _keywords(loss)
    parameters = _signature(loss).parameters
    registered = _registered(_unwrap(loss))
    return LossSpec(
        name=registered.name if registered else _name(loss),
        function=loss,
        compares=registered.compares if registered else "any",
        parameters=tuple(keyword for keyword in keywords if keyword not in ("mask", "reduction")),
        accepts_mask="mask" in keywords or (accepts_any and "mask" not in _bound(loss)),
        accepts_reduction="reduction" in keywords,
        accepts_temperature="temperature" in keywords,
        accepts_any=accepts_any,
        required=tuple(name for name in keywords if parameters[name].default is inspect.Parameter.empty),
        per=registered.per if registered else "position",
        state=registered.state if registered else None,
        state_parameters=registered.state_parameters if registered else (),
    )


def _registered(loss: Callable[..., Any]) -> LossSpec | None:
    return next((spec for spec in _BY_NAME.values() if spec.function is loss), None)


def _keywords(loss: Callable[..., Any]) -> tuple[list[str], bool]:
    """The keywords that may be given beside the two tensors, and whether there is a ``**kwargs``."""
    parameters = _signature(loss).parameters.values()
    bound = _bound(loss)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise LossError(
            f"The loss {_describe(loss)} takes {len(positional)} positional arguments; "
            "it is called with two, the student's tensor and the teacher's."
        )
    named = [
        p.name
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in positional[:2] and p.name not in bound
    ]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _signature(loss: Callable[..., Any]) -> inspect.Signature:
    # The __call__ of a module is (*args, **kwargs); the names are those of its forward.
    partial = loss if isinstance(loss, functools.partial) else functools.partial(loss)
    module = _unwrap(loss)
    target = module.forward if isinstance(module, nn.Module) else partial.func
    try:
        return inspect.signature(functools.partial(target, *partial.args, **partial.keywords))
    except (ValueError, TypeError) as error:
        raise LossError(
            f"The arguments of the loss {_describe(loss)} cannot be read; wrap it in a function (student, teacher, mask=None)."
        ) from error


def _bound(loss: Callable[..., Any]) -> frozenset[str]:
    """Keywords that a partial has decided: a default must not overrule them."""
    return frozenset(loss.keywords) if isinstance(loss, functools.partial) else frozenset()


def _unwrap(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function or module inside a partial, ``torch.compile`` and decorators that use ``functools.wraps``."""
    inner = inspect.unwrap(loss.func if isinstance(loss, functools.partial) else loss)
    return getattr(inner, "_orig_mod", inner) if isinstance(inner, nn.Module) else inner


def _name(loss: Callable[..., Any]) -> str:
    function = _unwrap(loss)
    return str(getattr(function, "__name__", type(function).__name__))


def _describe(loss: Callable[..., Any]) -> str:
    module = getattr(_unwrap(loss), "__module__", None)
    return f"{module}.{_name(loss)}" if module else _name(loss)
