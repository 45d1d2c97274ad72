"""Commands on the folder of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import AsJson, Assignments, RunFolder, command, finite, result, rows, say

Which = Annotated[
    str | None, typer.Option(metavar="best|last", help="Which student of the run. Default: best, where there is one.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "resume", resume)
    command(app, "evaluate", evaluate)
    command(app, "export", export)
    command(app, "report", report)


def resume(run: RunFolder, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Go on with a run that was cut off, from its newest whole checkpoint; it ends as if it had never been.

    hookdistill resume runs/digits
    """
    from ..recipe_file import load
    from ..recipe_file.finished import recipe_of
    from .recipes import shown, summary

    going_on = load(recipe_of(run), overrides=assignments or (), environment={})
    data = summary(going_on.trainer.train(resume=True), going_on.output_dir)
    result(lambda: rows(shown(data)), data, as_json=as_json)


def report(run: RunFolder, as_json: AsJson = False) -> None:
    """Write a run, finished or not, as one page to look at: curves, metrics, layers, plan, settings.

    hookdistill report runs/digits
    """
    from ..report import write_report

    page = write_report(Path(run))
    result(str(page), {"report": str(page)}, as_json=as_json)


def evaluate(run: RunFolder, which: Which = None, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Measure a student of a run on the rows that its recipe keeps for that.

    hookdistill evaluate runs/digits --which last
    """
    from ..recipe_file.finished import Finished

    finished = Finished(run, which=which, overrides=assignments or ())
    metrics = {name: finite(value) for name, value in finished.measure().items()}
    result(lambda: rows(metrics.items()), {"student": str(finished.folder), "metrics": metrics}, as_json=as_json)


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; it is made.")],
    which: Which = None,
    dtype: Annotated[str | None, typer.Option(metavar="float32|bfloat16|float16", help="Convert the parameters.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a student of a run, with its tokenizer or image processor, to a folder to be used or published from.

    hookdistill export runs/digits my-student --dtype bfloat16
    """
    from ..recipe_file.finished import Finished

    finished = Finished(run, which=which)
    say(f"reading {finished.folder}")
    written = finished.export(folder, dtype=dtype)
    result(lambda: "\n".join(map(str, written)), {"files": [str(each) for each in written]}, as_json=as_json)
