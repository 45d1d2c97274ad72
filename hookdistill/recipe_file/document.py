"""A YAML or JSON file as plain data, with the line of every key, and the overrides laid over it."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import HookDistillError, RecipeError, did_you_mean, listing

Key = str | int
Location = tuple[Key, ...]
"""Where in the data: ``("matches", 0, "loss")``."""

PREFIX = "HOOKDISTILL__"
"""Of environment variables that override: ``HOOKDISTILL__TRAINER__LR=3e-5``."""


class PlacedError(RecipeError):
    """One that has its place in the recipe in the message."""


@dataclass(slots=True)
class Document:
    """What a recipe file says."""

    name: str
    """The file as the user wrote it, for messages."""
    folder: Path
    """Relative paths in the recipe start here."""
    data: Any
    text: list[str] = field(default_factory=list)
    lines: dict[Location, int] = field(default_factory=dict)
    """Of each key, counted from 1."""
    overridden: dict[Location, str] = field(default_factory=dict)
    """Where a value that is not the file's comes from, for messages."""

    def where(self, location: Location) -> str:
        """``recipe.yaml, line 12``; or the override that the value comes from."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.overridden:
                return self.overridden[location[:end]]
            if location[:end] in self.lines:
                return f"{self.name}, line {self.lines[location[:end]]}"
        return self.name

    def line_number(self, location: Location) -> int:
        """Of the key, or of what it would stand in; 0 for an override."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.overridden:
                return 0
            if location[:end] in self.lines:
                return self.lines[location[:end]]
        return 0

    def line(self, location: Location) -> str:
        """The line of the file with its number, indented, for a message; empty for an override."""
        number = self.lines.get(location)
        if number is None or location in self.overridden:
            return ""
        return f"\n    {number} | {self.text[number - 1].rstrip()}"

    @contextlib.contextmanager
    def at(self, *location: Key) -> Iterator[None]:
        """Errors raised inside say which part of the recipe they come from."""
        try:
            yield
        except PlacedError:
            raise
        except HookDistillError as error:
            raise PlacedError(f"{self.where(location)}: {dotted(location)}: {error}{self.line(location)}") from error


def read(path: str | Path) -> Document:
    """Read a recipe; files ending in ``.json`` are JSON, all others YAML.

    Numbers and booleans are those of YAML 1.2: ``3e-5`` is a number, ``no`` is a word.

    Raises:
        RecipeError: there is no such file, or it is no YAML or JSON; the message has the line.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {str(path)!r}: {error.strerror or error}{_nearby(file)}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no text in UTF-8: {error}") from error
    document = Document(str(path), file.absolute().parent, None, text.splitlines())
    if file.suffix.lower() == ".json":
        document.data = _from_json(document, text)
        text = text.replace("\t", " ")  # outside strings, where JSON allows tabs and YAML does not
        _read_yaml(document, text)
    else:
        document.data = _read_yaml(document, text)
    if not isinstance(document.data, dict):
        kind = "empty" if document.data is None else f"a {_kind(document.data)}"
        raise RecipeError(f"{path} is {kind}; a recipe is a mapping with keys such as student, data, matches, trainer")
    return document


def override(document: Document, assignments: Iterable[str], environment: Mapping[str, str]) -> None:
    """Lay environment variables, then ``trainer.lr=3e-5`` assignments, over the data.

    Raises:
        RecipeError: an assignment has no ``=``, its value is no YAML, or it goes through something that is no mapping or list.
    """
    for name in sorted(environment):
        if name.startswith(PREFIX):
            keys = name.removeprefix(PREFIX).lower().split("__")
            _assign(document, keys, environment[name], f"environment variable {name}")
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise RecipeError(f"--set {assignment!r} is no assignment; write it as --set trainer.lr=3e-5")
        _assign(document, path.strip().split("."), value, f"--set {assignment}")


def dotted(location: Location) -> str:
    """``matches.0.loss``."""
    return ".".join(map(str, location))


def parse_value(text: str) -> Any:
    """One value in YAML, as after ``--set``."""
    return yaml.load(text, _Loader)  # a SafeLoader


def dump(data: Any) -> str:
    """Plain data as YAML that `read` reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _assign(document: Document, keys: list[str], text: str, source: str) -> None:
    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: {text!r} is no YAML value: {_problem(error)}") from error
    place: Any = document.data
    location: Location = ()
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise RecipeError(f"{source}: {dotted(location)} is a list of {len(place)}; {key!r} is no position in it")
            step: Key = int(key)
        elif isinstance(place, dict):
            step = key
            if not last and place.get(step) is None:
                place[step] = {}
        else:
            raise RecipeError(f"{source}: {dotted(location)} is {place!r}, which has no {key!r} in it")
        location = (*location, step)
        if last:
            place[step] = value
            document.overridden[location] = source
        else:
            place = place[step]


def _from_json(document: Document, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise RecipeError(f"{document.name}: the key {twice[0]!r} stands twice in one object; leave one")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{document.name}, line {error.lineno}: no JSON: {error.msg}{_shown(document, error.lineno)}"
        ) from error


def _read_yaml(document: Document, text: str) -> Any:
    """The data; the lines go into the document."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _note_lines(document, loader, node, (), ())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        raise RecipeError(f"{document.name}, line {line}: no YAML: {_problem(error)}{_shown(document, line)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{document.name}: no YAML: {error}") from error
    finally:
        loader.dispose()


def _note_lines(document: Document, loader: _Loader, node: yaml.Node, location: Location, above: tuple[int, ...]) -> None:
    if id(node) in above:
        raise RecipeError(f"{document.name}, line {node.start_mark.line + 1}: {dotted(location)} contains itself")
    above = (*above, id(node))
    document.lines.setdefault(location, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for position, child in enumerate(node.value):
            _note_lines(document, loader, child, (*location, position), above)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[Any, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in seen:
            raise RecipeError(
                f"{document.name}, line {line}: the key {key.value!r} stands here and in line {seen[key.value]}; leave one"
            )
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise RecipeError(f"{document.name}, line {line}: the key {key.value!r} is no word; put it in quotes")
        seen[key.value] = line
    loader.flatten_mapping(node)
    for key, child in node.value:
        document.lines[(*location, key.value)] = key.start_mark.line + 1
        _note_lines(document, loader, child, (*location, key.value), above)


def _problem(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    return " ".join(part for part in (error.context, error.problem) if part)


def _shown(document: Document, line: int) -> str:
    return f"\n    {line} | {document.text[line - 1].rstrip()}" if 0 < line <= len(document.text) else ""


def _nearby(file: Path) -> str:
    try:
        there = sorted(each.name for each in file.absolute().parent.iterdir() if each.suffix in (".yaml", ".yml", ".json"))
    except OSError:
        return ""
    return f".{did_you_mean(file.name, there)} In that folder there are {listing(there)}" if there else ""


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "truth value", int: "number", float: "number"}.get(type(value), "value")


class _Loader(yaml.SafeLoader):
    """Plain data alone, and words are words: of YAML 1.1's readings of plain text, those of YAML 1.2's core schema stay."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # add_implicit_resolver fills it below


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader`, or a reader of YAML 1.1, would not read as the string it is."""


_DIGITS = r"(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)"

for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        rf"[-+]?{_DIGITS}(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), list(_first))
