"""hookdistill inside other trainers: a module for each, which imports its framework, and is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import TrainerError, did_you_mean

if TYPE_CHECKING:
    from .lightning_module import DistillationModule as DistillationModule
    from .transformers_trainer import DistillationTrainer as DistillationTrainer

_HOMES = {
    "DistillationModule": ("lightning_module", "lightning", "lightning"),
    "DistillationTrainer": ("transformers_trainer", "transformers", "transformers"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{did_you_mean(name, _HOMES)}")
    module, framework, package = _HOMES[name]
    try:
        return getattr(import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != framework:
            raise
        raise TrainerError(f"{name} needs {framework}, which is not installed: pip install {package}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
