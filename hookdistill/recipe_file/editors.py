"""The JSON Schema of recipe files: what editors complete and check by."""

from __future__ import annotations

from typing import Any

from ..layer_maps import LAYER_MAPS
from ..losses.registry import registered_losses
from .schema import Recipe


def json_schema() -> dict[str, Any]:
    """The schema, with the losses and layer maps that are there."""
    schema = Recipe.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "hookdistill recipe"}
    match = schema["$defs"]["MatchItem"]["properties"]
    own = {"type": "string", "pattern": "^[\\w.]+:[\\w.]+$"}
    match["loss"] = _or(match["loss"], {"enum": sorted(registered_losses())}, own)
    match["layer_map"] = _or(match["layer_map"], {"enum": sorted(LAYER_MAPS)})
    return schema


def _or(given: dict[str, Any], *choices: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in given.items() if key != "type"}, "anyOf": list(choices)}
