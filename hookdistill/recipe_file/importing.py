"""``package.module:name`` in a recipe: found, imported and called, with errors that say what is there."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from ..errors import RecipeError, did_you_mean, listing


def import_object(path: str, folder: Path) -> Any:
    """What ``package.module:name`` names; ``folder``, that of the recipe, comes first on the module path from then on.

    Raises:
        RecipeError: it is no such path, the module cannot be imported, or has no such name.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise RecipeError(f"{path!r} is no import path; write package.module:name, as in my_models:build")
    look_in(folder)
    _forget_namesake(module_name.partition(".")[0], folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise RecipeError(f"importing {module_name!r} failed: {error}") from error
        there = [each.stem for each in folder.glob("*.py")]
        hint = did_you_mean(module_name, there)
        raise RecipeError(f"there is no module {module_name!r}, also not in the folder of the recipe.{hint}") from error
    except Exception as error:
        raise RecipeError(f"importing {module_name!r} failed: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")]
            raise RecipeError(f"{module_name!r} has no {part!r}.{did_you_mean(part, public)} It has {listing(public)}")
        found = getattr(found, part)
    return found


def look_in(folder: Path) -> None:
    """Let modules be imported from a folder, before all others."""
    if sys.path[:1] != [str(folder)]:
        sys.path[:] = [str(folder), *(each for each in sys.path if each != str(folder))]


def _forget_namesake(name: str, folder: Path) -> None:
    """A module of another recipe's folder must not stand for the one of that name beside this recipe."""
    own = next((file for file in (folder / f"{name}.py", folder / name / "__init__.py") if file.exists()), None)
    there = getattr(sys.modules.get(name), "__file__", None)
    if own is not None and there is not None and Path(there).resolve() != own.resolve():
        for each in [each for each in sys.modules if each == name or each.startswith(f"{name}.")]:
            del sys.modules[each]
        importlib.invalidate_caches()


def call(path: str, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """Import a function or class and call it with ``arguments``.

    Raises:
        RecipeError: it cannot be called so, or raises.
    """
    function = import_object(path, folder)
    if not callable(function):
        raise RecipeError(f"{path!r} is no function or class but a {type(function).__name__}")
    check_arguments(function, arguments, path)
    try:
        return function(**arguments)
    except Exception as error:
        raise RecipeError(f"{path}({_spelled(arguments)}) raised {type(error).__name__}: {error}") from error


def check_arguments(
    function: Callable[..., Any], arguments: Mapping[str, Any], name: str, *, given: tuple[str, ...] = ()
) -> None:
    """Whether ``function`` can be called with these keywords, beside those ``given`` by the library.

    Raises:
        RecipeError: it cannot; the message has the nearest keyword.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a builtin that does not tell
    parameters = [each for each in signature.parameters.values() if each.name not in given]
    keywords = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not takes_any and (unknown := [key for key in arguments if key not in keywords]):
        hint = did_you_mean(unknown[0], keywords)
        raise RecipeError(f"{name} takes no argument {unknown[0]!r}.{hint} It takes {listing(keywords)}")
    needed = [p.name for p in parameters if p.name in keywords and p.default is p.empty and p.name not in arguments]
    if needed:
        has = f"which have {listing(arguments)}.{did_you_mean(needed[0], arguments)}"
        raise RecipeError(f"{name} needs the argument {needed[0]!r}: give it in arguments, {has}")
    check_types(function, arguments, name)


def check_types(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> None:
    """Whether the values are of the types that the function's annotations say, as far as a file can hold such types.

    Raises:
        RecipeError: one is not.
    """
    try:
        hints = typing.get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    except Exception:
        return  # annotations that cannot be evaluated say nothing
    for key, value in arguments.items():
        try:
            adapter = TypeAdapter(hints[key])
        except (KeyError, PydanticSchemaGenerationError, PydanticUserError):
            continue
        try:
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            hint = hints[key]
            wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"\b(\w+\.)+", "", str(hint))
            reason = error.errors()[0]["msg"].lower()
            raise RecipeError(f"{name}: {key} is {value!r:.60}, but it must be {wanted}: {reason}") from error


def _spelled(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r:.40}" for key, value in arguments.items())
