"""Distil one PyTorch model into another: name tensors by module path, say what is compared with what, train."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import compat as compat
    from . import losses as losses
    from .capture import Capture as Capture
    from .distiller import Distiller as Distiller
    from .engine import DistillationLoss as DistillationLoss
    from .engine import Losses as Losses
    from .errors import AddressError as AddressError
    from .errors import BatchError as BatchError
    from .errors import CaptureError as CaptureError
    from .errors import HookDistillError as HookDistillError
    from .errors import LossError as LossError
    from .errors import MatchError as MatchError
    from .errors import RecipeError as RecipeError
    from .errors import TrainerError as TrainerError
    from .evaluation import Evaluation as Evaluation
    from .evaluation import Evaluator as Evaluator
    from .evaluation import HeldOutLosses as HeldOutLosses
    from .evaluation import StudentMetric as StudentMetric
    from .losses import register_loss as register_loss
    from .matches import Match as Match
    from .plan import Plan as Plan
    from .survey import outline as outline
    from .trainer import Trainer as Trainer
    from .trainer import TrainResult as TrainResult

__version__ = "0.1.0"

# Where each name lives: it is imported when it is first used, since torch takes seconds, and `hookdistill --help` needs none
# of it. No module may bear the name of a function here: importing the module would put it in the function's place.
_HOMES = {
    "AddressError": "errors",
    "BatchError": "errors",
    "Capture": "capture",
    "CaptureError": "errors",
    "DistillationLoss": "engine",
    "Distiller": "distiller",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "HeldOutLosses": "evaluation",
    "HookDistillError": "errors",
    "LossError": "errors",
    "Losses": "engine",
    "Match": "matches",
    "MatchError": "errors",
    "Plan": "plan",
    "RecipeError": "errors",
    "StudentMetric": "evaluation",
    "TrainResult": "trainer",
    "Trainer": "trainer",
    "TrainerError": "errors",
    "outline": "survey",
    "register_loss": "losses",
}
_MODULES = ("compat", "losses")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
