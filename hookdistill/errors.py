"""The exceptions a user can catch, and the helper that finds what a misspelt name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HookDistillError(Exception):
    """Base of every error that hookdistill raises for a user's mistake."""


class AddressError(HookDistillError, ValueError):
    """An address that does not parse, or that names nothing in the model."""


class CaptureError(HookDistillError, RuntimeError):
    """A tensor that was asked for and cannot be handed over truthfully."""


class CaptureKeyError(CaptureError, KeyError):
    """A look-up of something that was never asked for.

    A tensor that was asked for and is missing is a plain `CaptureError`: ``Mapping.get`` must not turn it into ``None``.
    """

    def __str__(self) -> str:  # KeyError prints the repr of its message
        return Exception.__str__(self)


class LossError(HookDistillError, ValueError):
    """Arguments that a loss cannot work with, or an unknown loss."""


class MatchError(HookDistillError, ValueError):
    """An entry of the distillation config that cannot be carried out."""


class StructureError(HookDistillError, ValueError):
    """A model in which a part that was looked for by structure is not found."""


class BatchError(HookDistillError, ValueError):
    """A batch from which the inputs of a model, a mask or a target cannot be taken."""


class TrainerError(HookDistillError, RuntimeError):
    """A training run that cannot start or go on."""


class StoreError(HookDistillError, RuntimeError):
    """A store that cannot be written or read, or that holds something else than what is asked of it."""


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, found, read, or that belongs to another run."""


class ExportError(HookDistillError, OSError):
    """A student that cannot be written to a folder, or read from one."""


class TrainerInterrupted(SystemExit):
    """Ctrl-C or SIGTERM ended a training between two steps, after a checkpoint was saved where there is an ``output_dir``.

    A ``SystemExit``, no `HookDistillError`: nobody made a mistake, and a script that does not catch it ends without a
    traceback with the exit code that shells give for the signal, 130 for Ctrl-C and 143 for SIGTERM.
    """


class RecipeError(HookDistillError, ValueError):
    """A recipe file that cannot be read or carried out; the message has file, line and key."""


def nearest(name: str, candidates: Iterable[str], *, count: int = 3) -> list[str]:
    """The candidates that look most like ``name``, best first; empty when nothing comes near."""
    return difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.5)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`` Did you mean 'a', 'b'?`` with a leading space, or nothing."""
    found = nearest(name, candidates)
    return f" Did you mean {', '.join(map(repr, found))}?" if found else ""


def listing(names: Iterable[str], *, most: int = 12) -> str:
    """Names for the end of a message: quoted, comma-separated, cut after ``most``."""
    names = list(names)
    shown = ", ".join(map(repr, names[:most])) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
