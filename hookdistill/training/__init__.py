"""Training: the loop, its checkpoints, its log."""

from .resume import load_checkpoint as load_checkpoint
from .trainer import Trainer as Trainer
from .trainer import TrainResult as TrainResult
