"""What all commands have in common: options, where results go, how mistakes end."""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

USER_MISTAKE, INTERRUPTED = 2, 130

EPILOG = "Exit codes: 0 done, 1 a bug or a broken machine, 2 something in the command or the recipe is wrong, 130 interrupted."

AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe, as in --set trainer.lr=3e-5. Repeatable."),
]
RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, YAML or JSON.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The output_dir of a run; recipe.yaml is in it.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a mistake.")]


class Program(TyperGroup):
    """Commands in the order in which they were added, which is that of use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


def command(app: typer.Typer, name: str, function: Callable[..., None], **options: Any) -> None:
    """Add a command with ``--debug``; a user's mistake in it is a message on stderr and exit code 2."""

    @functools.wraps(function)
    def run(*args: Any, debug: bool = False, **kwargs: Any) -> None:
        from ..errors import HookDistillError

        try:
            _quiet_libraries()
            function(*args, **kwargs)
        except HookDistillError as error:
            if debug:
                traceback.print_exc()
            sys.stderr.write(f"error: {error}\n")
            raise typer.Exit(USER_MISTAKE) from error
        except KeyboardInterrupt as error:
            sys.stderr.write("interrupted\n")
            raise typer.Exit(INTERRUPTED) from error

    signature = inspect.signature(function, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    app.command(name, **options)(run)


def is_main_process() -> bool:
    """Whether this is the first of the processes that torchrun or accelerate launch has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def result(text: str | Callable[[], str], data: Any, *, as_json: bool) -> None:
    """Print the result of a command to stdout, once for all processes."""
    if is_main_process():
        typer.echo(json.dumps(data, indent=1, allow_nan=False) if as_json else text() if callable(text) else text)


def say(line: str) -> None:
    """Tell the person who waits, on stderr."""
    if is_main_process():
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def finite(value: float) -> float | None:
    """A number as JSON can hold it."""
    return value if value == value and abs(value) != float("inf") else None


def rows(pairs: Iterable[tuple[str, Any]]) -> str:
    """Names and values, aligned."""
    listed = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in pairs]
    width = max((len(name) for name, _ in listed), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in listed)


def _quiet_libraries() -> None:
    """What transformers would tell about its inner life is no part of a command's result."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or it warns in every loading process
