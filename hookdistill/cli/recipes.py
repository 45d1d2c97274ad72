"""Commands on a recipe file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .shared import AsJson, Assignments, RecipeFile, command, finite, is_main_process, result, rows, say

if TYPE_CHECKING:
    from ..training import TrainResult


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "plan", plan)
    command(app, "train", train)
    command(app, "cache", cache)
    command(app, "similarity", similarity)
    command(app, "recipes", recipes)
    command(app, "schema", schema)


def plan(recipe: RecipeFile, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Check a recipe and show what would be compared, from one dry forward; nothing is trained.

    hookdistill plan examples/recipes/digits.yaml
    """
    from ..recipe_file import load

    made = load(recipe, overrides=assignments or ()).check()
    matches = [{**dataclasses.asdict(row), "value": finite(row.value)} for row in made]
    result(lambda: str(made), {"matches": matches, "inputs": list(made.inputs)}, as_json=as_json)


def train(recipe: RecipeFile, assignments: Assignments = None, as_json: AsJson = False) -> None:
    """Train the student of a recipe.

    hookdistill train examples/recipes/digits.yaml --set trainer.max_steps=100
    accelerate launch -m hookdistill.cli train recipe.yaml
    torchrun --nproc-per-node 2 -m hookdistill.cli train recipe.yaml
    """
    from ..recipe_file import load

    run = load(recipe, overrides=assignments or ())
    trainer = run.trainer
    if is_main_process() and (saved := run.save()) is not None:
        say(f"every setting is in {saved}")
    data = summary(trainer.train(), run.output_dir)
    result(lambda: rows(shown(data)), data, as_json=as_json)


def cache(
    what: Annotated[str, typer.Argument(metavar="RECIPE|info|verify", help="A recipe file; or info or verify, of a STORE.")],
    store: Annotated[Path | None, typer.Argument(metavar="STORE", help="The folder of a store, after info or verify.")] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """Run the teacher once and write what the matches need of it to the recipe's store; or look at a store.

    hookdistill cache recipe.yaml
    hookdistill cache info stores/mine
    hookdistill cache verify stores/mine
    """
    from ..errors import RecipeError
    from ..store import info, verify

    if what in ("info", "verify") and store is None:
        raise RecipeError(f"hookdistill cache {what} needs the folder of a store")
    if what == "verify" and store is not None:
        checked = verify(store)
        result(lambda: str(checked), dataclasses.asdict(checked), as_json=as_json)
        return
    if what != "info":
        from ..recipe_file import load

        store = load(what, overrides=assignments or ()).cache(progress=is_main_process()).path
    assert store is not None
    found = info(store)
    result(lambda: str(found), found.as_dict(), as_json=as_json)


def similarity(
    recipe: RecipeFile,
    batches: Annotated[int | None, typer.Option(help="Batches to look at. Default: all.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it to this file, .png or .svg.")] = None,
    assignments: Assignments = None,
    as_json: AsJson = False,
) -> None:
    """How alike the layers of teacher and student are: linear CKA over the rows to train on, before any training.

    hookdistill similarity recipe.yaml --batches 20 --plot cka.png
    """
    from ..recipe_file import load

    found = load(recipe, overrides=assignments or ()).similarity(batches=batches)
    if plot is not None and is_main_process():
        found.plot(plot)
        say(f"drawn to {plot}")
    result(lambda: str(found), found.as_dict(), as_json=as_json)


def recipes(as_json: AsJson = False) -> None:
    """The ready lists of matches, for `matches: {recipe: NAME, arguments: {…}}` in a recipe file.

    hookdistill recipes
    """
    from ..recipes import catalogue

    found = [{"name": e.name, "paper": e.paper, "summary": e.summary, "options": list(e.options)} for e in catalogue().values()]
    lines = [
        f"{e['name']}\n    {e['summary']}\n    {e['paper']}\n    options: {', '.join(e['options']) or 'none'}" for e in found
    ]
    result("\n\n".join(lines), found, as_json=as_json)


def schema(
    output: Annotated[Path | None, typer.Option(help="Write it to this file instead of stdout.")] = None,
) -> None:
    """The JSON Schema of recipe files, by which editors complete and check.

        hookdistill schema --output recipe.schema.json

    In VS Code with the YAML extension, write on the first line of a recipe:
    # yaml-language-server: $schema=recipe.schema.json
    """
    from ..recipe_file.editors import json_schema

    text = json.dumps(json_schema(), indent=1)
    if output is None:
        typer.echo(text)
    else:
        output.write_text(f"{text}\n", encoding="utf-8")


def summary(done: TrainResult, output_dir: Path | None) -> dict[str, Any]:
    """What a training did, for JSON."""
    last = done.history[-1] if done.history else None
    return {
        "steps": done.steps,
        "epochs": done.epochs,
        "seconds": round(done.seconds, 3),
        "loss": finite(done.loss),
        "losses": {name: finite(value) for name, value in done.losses.items()},
        "metrics": {} if last is None else {name: finite(value) for name, value in last.metrics.items()},
        "best": None if done.best is None else {"step": done.best.step, "metrics": dict(done.best.metrics)},
        "output_dir": None if output_dir is None else str(output_dir),
    }


def shown(data: dict[str, Any]) -> list[tuple[str, Any]]:
    """The same for a person."""
    lines = [("steps", data["steps"]), ("seconds", data["seconds"]), ("loss", data["loss"])]
    lines += [(f"  {name}", value) for name, value in data["losses"].items() if len(data["losses"]) > 1]
    lines += list(data["metrics"].items())
    if data["best"] is not None:
        lines.append(("best at step", data["best"]["step"]))
    if data["output_dir"] is not None:
        lines.append(("students in", data["output_dir"]))
    return lines
