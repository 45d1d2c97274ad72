"""Distil one PyTorch model into another: name tensors by module path, say what is compared with what, train."""

from . import layer_maps as layer_maps
from . import losses as losses
from . import recipes as recipes
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
from .errors import StoreError as StoreError
from .errors import StructureError as StructureError
from .errors import TrainerError as TrainerError
from .evaluation import Evaluation as Evaluation
from .evaluation import Evaluator as Evaluator
from .evaluation import HeldOutLosses as HeldOutLosses
from .evaluation import StudentMetric as StudentMetric
from .initialization import Initialization as Initialization
from .initialization import initialize_student as initialize_student
from .layer_similarity import Similarity as Similarity
from .layer_similarity import similarity as similarity
from .losses import register_loss as register_loss
from .matches import Match as Match
from .outline import outline as outline
from .plan import Plan as Plan
from .sources import CaptureSource as CaptureSource
from .store import Keep as Keep
from .store import TeacherStore as TeacherStore
from .trainer import Trainer as Trainer
from .trainer import TrainResult as TrainResult

__version__ = "0.1.0"
