"""Whose mistake it was: errors that name the entry of the config, and the user's own code where it is that."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from numbers import Real

import torch

from ..errors import HookDistillError, MatchError
from ..matches import Schedule


@contextlib.contextmanager
def in_match(name: str) -> Iterator[None]:
    """Errors raised inside say which entry they come from."""
    try:
        yield
    except HookDistillError as error:
        raise MatchError(f"{name}: {error}") from error
    except torch.OutOfMemoryError as error:
        error.add_note(f"raised in the match {name!r}")
        raise


@contextlib.contextmanager
def user_code(what: str, context: str = "") -> Iterator[None]:
    """Errors of the user's own code become a `MatchError` that says whose they are, and on what it was called."""
    try:
        yield
    except (HookDistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise MatchError(f"{what} raised {type(error).__name__}: {error}{context}") from error


def at_step(what: str, value: float | Schedule, step: int, *, lowest: float = -math.inf) -> float:
    """A weight or temperature at ``step``.

    Raises:
        MatchError: a schedule raises, or gives no finite number above ``lowest``.
    """
    if not callable(value):
        return value
    with user_code(f"the schedule of {what}= (at step {step})"):
        number = value(step)
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number) or number <= lowest:
        above = "" if lowest == -math.inf else f" above {lowest:g}"
        raise MatchError(f"the schedule of {what}= must give a finite number{above}; at step {step} it gave {number!r}")
    return float(number)
