"""Training: the loop, its checkpoints, its log."""

from .trainer import Trainer as Trainer
from .trainer import TrainResult as TrainResult
