"""The modules of losses with parameters or memory: made once, when the plan is made, and handed to the loss with each call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MatchError, listing
from ..matches import Match
from .blame import user_code


def needs_state(term: Match) -> bool:
    """Whether an entry needs a module made: its loss has a state, and not all that it requires is given."""
    given = {*term.loss_args, *(each.name for each in term.further), *(["target"] if term.target is not None else [])}
    return term.spec.state is not None and not given.issuperset(term.spec.required)


def make_state(term: Match, student: Tensor, other: Tensor, arguments: Mapping[str, Any]) -> nn.Module:
    """What the loss's ``state`` makes of the first tensors, on the student's device.

    Args:
        arguments: all that is given for the loss and for its state.

    Raises:
        MatchError: it fails, makes no module, or one that lacks what the loss requires.
    """
    spec = term.spec
    assert spec.state is not None
    kept = {name: arguments[name] for name in spec.state_parameters if name in arguments}
    with user_code(f"state= of the loss {spec.name!r}"), torch.inference_mode(False), torch.enable_grad():
        # Parameters made in inference mode could never be trained.
        state = spec.state(student.detach().clone(), other.detach().clone(), **kept)
    if not isinstance(state, nn.Module):
        raise MatchError(f"state= of the loss {spec.name!r} must make a torch.nn.Module, it made a {type(state).__name__}")
    held = {name for name in spec.parameters if held_by(state, name)}
    if missing := [name for name in spec.required if name not in held and name not in arguments]:
        raise MatchError(
            f"the loss {spec.name!r} needs {listing(missing)}, which neither the entry gives nor {type(state).__name__} has "
            "under that name (as a submodule, parameter, buffer or attribute)"
        )
    return state.to(student.device)


def with_state(term: Match, given: dict[str, Any], state: nn.Module | None) -> dict[str, Any]:
    """The arguments of a loss that has a state, completed from it; what only the state takes is left out.

    Raises:
        MatchError: the state is needed and does not exist yet.
    """
    spec = term.spec
    if state is None:
        if needs_state(term):
            raise MatchError(
                f"the loss {spec.name!r} has parameters or a memory of its own, which do not exist yet, so no optimizer would "
                "train them. Make them before the optimizer: distiller.plan(batch), or Distiller(…, example_batch=batch)"
            )
        return {name: value for name, value in given.items() if name in _taken(term, given)}
    taken = {name: value for name, value in given.items() if name in _taken(term, given)}
    for name in spec.parameters:
        consumed = name in spec.state_parameters  # what was given went into the state
        if held_by(state, name) and (name not in taken or (consumed and name in term.loss_args)):
            taken[name] = getattr(state, name)
    return taken


def held_by(state: nn.Module, name: str) -> bool:
    """Whether the module has a submodule, parameter, buffer or attribute of its own by that name."""
    return any(name in held for held in (state._modules, state._parameters, state._buffers)) or (
        name in vars(state) and name != "training"
    )


def given_modules(term: Match) -> nn.ModuleDict | None:
    """The modules among the arguments of a loss, to be trained and saved with it; a state keeps those that it takes."""
    kept = term.spec.state_parameters if needs_state(term) else ()
    modules = {name: value for name, value in term.loss_args.items() if isinstance(value, nn.Module) and name not in kept}
    return nn.ModuleDict({f"{name}/": module for name, module in modules.items()}) if modules else None


def _taken(term: Match, given: Mapping[str, Any]) -> set[str]:
    if term.spec.accepts_any:
        return set(given)
    return {"mask", "reduction", *term.spec.parameters}
