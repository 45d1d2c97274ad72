"""Distil one PyTorch model into another: name tensors by module path, say what is compared with what, train."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import compat as compat
    from . import layer_maps as layer_maps
    from . import losses as losses
    from . import recipes as recipes
    from . import schedules as schedules
    from .balancing import GradNormBalance as GradNormBalance
    from .balancing import MagnitudeBalance as MagnitudeBalance
    from .capture import Capture as Capture
    from .distiller import Distiller as Distiller
    from .ema import EMA as EMA
    from .engine import DistillationLoss as DistillationLoss
    from .engine import Losses as Losses
    from .errors import AddressError as AddressError
    from .errors import BatchError as BatchError
    from .errors import CaptureError as CaptureError
    from .errors import CheckpointError as CheckpointError
    from .errors import ExportError as ExportError
    from .errors import HookDistillError as HookDistillError
    from .errors import LossError as LossError
    from .errors import MatchError as MatchError
    from .errors import RecipeError as RecipeError
    from .errors import StoreError as StoreError
    from .errors import StructureError as StructureError
    from .errors import TrainerError as TrainerError
    from .errors import TrainerInterrupted as TrainerInterrupted
    from .evaluation import Evaluation as Evaluation
    from .evaluation import Evaluator as Evaluator
    from .evaluators import ExampleMetric as ExampleMetric
    from .evaluators import Fidelity as Fidelity
    from .evaluators import HeldOutLosses as HeldOutLosses
    from .evaluators import StudentMetric as StudentMetric
    from .evaluators import evaluate as evaluate
    from .export import load_student as load_student
    from .initialization import Initialization as Initialization
    from .initialization import initialize_student as initialize_student
    from .layer_similarity import Similarity as Similarity
    from .layer_similarity import similarity as similarity
    from .losses import register_loss as register_loss
    from .matches import Match as Match
    from .optimization import parameter_groups as parameter_groups
    from .plan import Plan as Plan
    from .sources import CaptureSource as CaptureSource
    from .store import Keep as Keep
    from .store import TeacherStore as TeacherStore
    from .survey import outline as outline
    from .training import Trainer as Trainer
    from .training import TrainResult as TrainResult

__version__ = "0.1.0"

# Where each name lives: it is imported when it is first used, since torch takes seconds, and `hookdistill --help` needs none
# of it. No module may bear the name of a function here: importing the module would put it in the function's place.
_HOMES = {
    "AddressError": "errors",
    "BatchError": "errors",
    "Capture": "capture",
    "CaptureError": "errors",
    "CaptureSource": "sources",
    "CheckpointError": "errors",
    "DistillationLoss": "engine",
    "Distiller": "distiller",
    "EMA": "ema",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "ExampleMetric": "evaluators",
    "ExportError": "errors",
    "Fidelity": "evaluators",
    "GradNormBalance": "balancing",
    "HeldOutLosses": "evaluators",
    "HookDistillError": "errors",
    "Initialization": "initialization",
    "Keep": "store",
    "LossError": "errors",
    "Losses": "engine",
    "MagnitudeBalance": "balancing",
    "Match": "matches",
    "MatchError": "errors",
    "Plan": "plan",
    "RecipeError": "errors",
    "Similarity": "layer_similarity",
    "StoreError": "errors",
    "StructureError": "errors",
    "StudentMetric": "evaluators",
    "TeacherStore": "store",
    "TrainResult": "training",
    "Trainer": "training",
    "TrainerError": "errors",
    "TrainerInterrupted": "errors",
    "evaluate": "evaluators",
    "initialize_student": "initialization",
    "load_student": "export",
    "outline": "survey",
    "parameter_groups": "optimization",
    "register_loss": "losses",
    "similarity": "layer_similarity",
}
_MODULES = ("compat", "layer_maps", "losses", "recipes", "schedules")


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
