"""The JSON Schema of recipe files: what editors complete and check by."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..layer_maps import LAYER_MAPS
from ..losses.registry import registered_losses
from ..recipes import catalogue
from .document import dump
from .problems import allowed
from .schema import (
    Data,
    Evaluator,
    Image,
    KeepItem,
    Labels,
    MatchItem,
    Model,
    NamedMatches,
    Optimizer,
    Recipe,
    Schedule,
    Scheduler,
    Source,
    Start,
    Store,
    Text,
    Training,
)


def json_schema() -> dict[str, Any]:
    """The schema, with the losses and layer maps that are there."""
    schema = Recipe.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "hookdistill recipe"}
    match = schema["$defs"]["MatchItem"]["properties"]
    own = {"type": "string", "pattern": "^[\\w.]+:[\\w.]+$"}
    match["loss"] = _or(match["loss"], {"enum": sorted(registered_losses())}, own)
    schema["$defs"]["NamedMatches"]["properties"]["recipe"]["enum"] = list(catalogue())
    match["layer_map"] = _or(match["layer_map"], {"enum": sorted(LAYER_MAPS)})
    return schema


def _or(given: dict[str, Any], *choices: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in given.items() if key != "type"}, "anyOf": list(choices)}


def reference() -> str:
    """Every key of a recipe as Markdown tables: what the page on recipe files shows."""
    parts = []
    for path, kind in _SECTIONS.items():
        rows = [
            f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {_help(field)} |"
            for name, field in kind.model_fields.items()
        ]
        heading = f"### {path}\n\n{_first_line(kind)}\n\n| key | value | default | |\n|---|---|---|---|"
        parts.append("\n".join([heading, *rows]))
    return "\n\n".join(parts) + "\n"


_SECTIONS: dict[str, type[BaseModel]] = {
    "the recipe": Recipe,
    "`teacher`, `student`, each of `teachers`": Model,
    "`data`": Data,
    "`data.train`, `data.eval`": Source,
    "`data.text`": Text,
    "`data.image`": Image,
    "`data.labels`": Labels,
    "each of `matches`": MatchItem,
    "`matches` by name": NamedMatches,
    "`weight` or `temperature` that changes": Schedule,
    "`initialize`": Start,
    "`store`": Store,
    "each of `store.keep`": KeepItem,
    "`trainer`": Training,
    "`trainer.optimizer`": Optimizer,
    "`trainer.scheduler`": Scheduler,
    "each of `evaluators`": Evaluator,
}


def _first_line(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0].replace("``", "`")


def _type(annotation: Any, metadata: Any) -> str:
    words = re.sub(r" with keys such as [\w, ]*?(?= or |\)|$)", "", allowed(annotation, metadata))
    return words.removesuffix(" or null").replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ({}, []):
        return ""
    return f"`{dump(value).strip().removesuffix('...').strip()}`"


def _help(field: FieldInfo) -> str:
    text = (field.description or "").replace("|", "\\|")
    return f"{text} Example: `{json.dumps(field.examples[0])}`" if field.examples else text
