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
    done = trainer.train()
    data = _summary(done, run.output_dir)
    result(lambda: rows(_shown(data)), data, as_json=as_json)


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


def _summary(done: TrainResult, output_dir: Path | None) -> dict[str, Any]:
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


def _shown(data: dict[str, Any]) -> list[tuple[str, Any]]:
    lines = [("steps", data["steps"]), ("seconds", data["seconds"]), ("loss", data["loss"])]
    lines += [(f"  {name}", value) for name, value in data["losses"].items() if len(data["losses"]) > 1]
    lines += list(data["metrics"].items())
    if data["best"] is not None:
        lines.append(("best at step", data["best"]["step"]))
    if data["output_dir"] is not None:
        lines.append(("students in", data["output_dir"]))
    return lines
