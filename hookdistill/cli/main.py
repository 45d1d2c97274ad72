"""All commands in one program."""

from __future__ import annotations

from typing import Annotated

import typer

from . import models, recipes, runs
from .shared import EPILOG, Program

app = typer.Typer(
    name="hookdistill",
    cls=Program,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distil one PyTorch model into another: name tensors by module path, compare them, train.",
    epilog=EPILOG,
)


@app.callback()
def commands(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Commands of hookdistill."""
    if version:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


for module in (recipes, runs, models):
    module.register(app)


def main() -> None:
    """Run the command line; a mistake of the user's ends in its message and exit code 2, not in a traceback."""
    app(prog_name="hookdistill")
