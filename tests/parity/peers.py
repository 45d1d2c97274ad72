"""Other libraries' losses, wherever they are installed, without running more of these libraries than the losses need."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PEERS = {
    "torch": "torch",
    "torchdistill": "torchdistill",
    "TextBrewer": "textbrewer",
    "MMRazor": "mmrazor",
    "ModelOpt": "nvidia-modelopt",
    "TRL": "trl",
    "sentence-transformers": "sentence-transformers",
    "LightlyTrain": "lightly-train",
    "KD_Lib": "KD-Lib",
}
"""The peers by the name of the table, and the distribution that ``pip install --no-deps`` knows them by."""


def version(peer: str) -> str | None:
    """The installed version, or ``None``."""
    try:
        return importlib.metadata.version(PEERS[peer])
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def module(name: str) -> Any:
    """A module of a peer; the packages above it are not run, as they import whole frameworks.

    Raises:
        ImportError: it is not installed, or needs what is not.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.split(".")[0] not in ("sentence_transformers", "torchdistill", "trl", "torch"):
            _bare_packages(name)
        if name == "torchdistill.models.wrapper":
            _stub("torchdistill.models.util", "wrap_if_distributed load_module_ckpt save_module_ckpt redesign_model")
            _stub("torchdistill.models.registry", "register_auxiliary_model_wrapper get_auxiliary_model_wrapper")
            _bare_packages(name)
        if name.startswith("mmrazor."):
            _stub("mmrazor.registry", "MODELS").MODELS.register_module = lambda: lambda made: made
        return importlib.import_module(name)


def _bare_packages(name: str) -> None:
    """Every package above a module, found but not executed."""
    parts = name.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {parts[0]!r}", name=parts[0])
    folder = Path(next(iter(spec.submodule_search_locations)))
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package not in sys.modules:
            bare = types.ModuleType(package)
            bare.__path__ = [str(folder.joinpath(*parts[1:depth]))]
            bare.__spec__ = importlib.machinery.ModuleSpec(package, None, is_package=True)
            bare.__spec__.submodule_search_locations = bare.__path__
            sys.modules[package] = bare


def _stub(name: str, contents: str) -> Any:
    """A module that holds decorators and functions which do nothing, for imports at the top of a file."""

    class Nothing:
        def __call__(self, given: Callable[..., Any]) -> Callable[..., Any]:
            return given

    stub = types.ModuleType(name)
    for each in contents.split():
        setattr(stub, each, Nothing())
    sys.modules.setdefault(name, stub)
    return sys.modules[name]
