"""What is wrong with a recipe, in the words of its author: where, which value, what is allowed, the nearest spelling."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, Discriminator, Tag, ValidationError
from pydantic.fields import FieldInfo

from ..errors import did_you_mean, listing
from .document import Document, Location, dotted
from .schema import Recipe

_MOST = 5
_SCREEN = 18  # keys listed


def explain(error: ValidationError, document: Document) -> str:
    """Every mistake of a recipe, at most five, each with file, line, key, value, what is allowed and the nearest spelling."""
    found: dict[Location, str] = {}
    strangers: set[tuple[Location, str]] = set()
    details = sorted(error.errors(include_url=False), key=lambda each: each["type"] == "missing")
    for detail in details:
        location = _in_data(detail["loc"], document.data)
        key = str(detail["loc"][-1]) if detail["loc"] else ""
        if detail["type"] == "extra_forbidden":
            keys = _keys(location[:-1], document.data)
            strangers.update((location[:-1], near) for near in keys if did_you_mean(key, [near]))
            found.setdefault(location, _stranger(location, keys))
        elif detail["type"] == "missing":
            if (location, key) not in strangers:  # or it is there, misspelt
                found.setdefault((*location, key), _missing(location, key, document.data))
        elif detail["type"] == "value_error":
            found.setdefault(location, f"{dotted(location) or 'the recipe'}: {detail['ctx']['error']}.")
        else:
            found.setdefault(location, _wrong(location, detail["input"], document.data))
    ordered = sorted(found, key=document.line_number)
    entries = [f"{document.where(each)}: {found[each]}{document.line(each)}" for each in ordered]
    if len(entries) == 1:
        return entries[0]
    more = f"\n… and {len(entries) - _MOST} more" if len(entries) > _MOST else ""
    return f"{len(entries)} mistakes in {document.name}\n" + "\n".join(entries[:_MOST]) + more


def fields_of(location: Location, data: Any) -> Mapping[str, FieldInfo]:
    """The keys that may stand at a place of the recipe; none where any may, or where there is no mapping."""
    kind = _bare(_annotation(location, data))
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _keys(location: Location, data: Any) -> list[str]:
    return list(fields_of(location, data))


def _stranger(location: Location, keys: list[str]) -> str:
    key = str(location[-1])
    where = dotted(location[:-1]) or "a recipe"
    return (
        f"{dotted(location)} is no key of a recipe.{did_you_mean(key, keys)} Keys of {where} are {listing(keys, most=_SCREEN)}"
    )


def _missing(location: Location, key: str, data: Any) -> str:
    field = fields_of(location, data).get(key)
    help_text = f": {field.description.removesuffix('.')}." if field is not None and field.description else ""
    example = f" For example {key}: {field.examples[0]}" if field is not None and field.examples else ""
    here = _at(data, location)
    strange = [each for each in here if each not in fields_of(location, data)] if isinstance(here, dict) else []
    near = next((each for each in strange if did_you_mean(str(each), [key])), None)
    misspelt = f" It has {near!r}; did you mean {key!r}?" if near is not None else ""
    return f"{dotted(location) or 'the recipe'} needs the key {key!r}{help_text}{misspelt}{example}"


def _at(data: Any, location: Location) -> Any:
    step: Any
    for step in location:
        data = data[step]
    return data


def _wrong(location: Location, value: Any, data: Any) -> str:
    annotation, field = _annotation(location, data), _field(location, data)
    may_be = allowed(annotation, field.metadata if field is not None else ())
    words = [each for each in _literals(annotation) if isinstance(each, str)]
    hint = did_you_mean(value, words) if isinstance(value, str) else ""
    help_text = f" {field.description}" if field is not None and field.description else ""
    return f"{dotted(location)} is {_shown(value)}; it must be {may_be}.{hint}{help_text}"


def _shown(value: Any) -> str:
    text = repr(value)
    kind = {dict: "a mapping", list: "a list", str: "a string", type(None): "nothing"}.get(type(value), "")
    text = text if len(text) <= 60 else f"{text[:57]}…"
    return f"{text} ({kind})" if kind else text


def _in_data(loc: Iterable[Any], data: Any) -> Location:
    """A pydantic location without what pydantic adds: names of union members, and keys that are missing."""
    location: Location = ()
    for step in loc:
        inside = (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and 0 <= step < len(data)
        )
        if inside:
            data = data[step]
            location = (*location, step)
    return location


def _field(location: Location, data: Any) -> FieldInfo | None:
    if not location:
        return None
    return fields_of(location[:-1], data).get(str(location[-1]))


def _annotation(location: Location, data: Any) -> Any:
    """The type of what stands at a place, as far as the recipe's models know it."""
    annotation: Any = Recipe
    for step in location:
        annotation = _bare(_member(annotation, data))
        data = _at(data, (step,)) if isinstance(data, (dict, list)) else None
        origin = get_origin(annotation)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(str(step))
            if field is None:
                return Any
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        elif origin is list:
            annotation = get_args(annotation)[0]
        elif origin is dict:
            annotation = get_args(annotation)[1]
        else:
            return Any
    return _member(annotation, data)


def _member(annotation: Any, value: Any) -> Any:
    """Of a union, the mapping or list that a value must have been meant for; anything else as it is."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        chooser = next((each for each in metadata if isinstance(each, Discriminator)), None)
        if chooser is None:
            return _member(inner, value) if _is_union(inner) and isinstance(value, (dict, list)) else annotation
        choose = typing.cast(Callable[[Any], str], chooser.discriminator)
        tags = {_tag(each): get_args(each)[0] for each in get_args(inner)}
        return tags[choose(value)] if isinstance(value, dict) else annotation
    if _is_union(annotation) and isinstance(value, (dict, list)):
        for member in get_args(annotation):
            bare = get_args(member)[0] if get_origin(member) is Annotated else member
            wanted = dict if isinstance(bare, type) and issubclass(bare, BaseModel) else get_origin(bare)
            if wanted is type(value):
                return bare
    return annotation


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _tag(annotation: Any) -> str:
    return next(each.tag for each in get_args(annotation)[1:] if isinstance(each, Tag))


def _literals(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for member in get_args(annotation) for word in _literals(member)]


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null", Any: "anything"}


def allowed(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a value may be, in words: ``a whole number above 0 or null``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], [*arguments[1:], *metadata])
    if _is_union(annotation):
        return " or ".join(dict.fromkeys(allowed(each, metadata) for each in arguments))
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(each) for each in arguments)
    if origin is list:
        return f"a list (of each {allowed(arguments[0])})"
    if origin is dict:
        return "a mapping" + ("" if arguments[1] is Any else f" (of each {allowed(arguments[1])})")
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with keys such as {', '.join(list(annotation.model_fields)[:4])}"
    return _WORDS.get(annotation, str(annotation)) + _limits(annotation, metadata)


def _limits(annotation: Any, metadata: Iterable[Any]) -> str:
    if annotation not in (int, float):
        return ""
    limits = []
    for each in metadata:
        inner = each.metadata if isinstance(each, FieldInfo) else [each]
        limits += [f" above {one.gt}" for one in inner if isinstance(one, annotated_types.Gt)]
        limits += [f" from {one.ge} up" for one in inner if isinstance(one, annotated_types.Ge)]
    return "".join(dict.fromkeys(limits))
