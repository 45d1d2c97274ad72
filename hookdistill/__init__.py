"""Distil one PyTorch model into another: name tensors by module path, say what is compared with what, train."""

from . import losses as losses
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
from .losses import register_loss as register_loss
from .matches import Match as Match
from .optimization import parameter_groups as parameter_groups
from .outline import outline as outline
from .plan import Plan as Plan
from .training import Trainer as Trainer
from .training import TrainResult as TrainResult

__version__ = "0.1.0"
