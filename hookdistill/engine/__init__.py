"""Matches + captured tensors + batch → the losses of one step."""

from . import fast as fast
from .blame import in_match as in_match
from .fast import IMPLEMENTATIONS as IMPLEMENTATIONS
from .fast import Choice as Choice
from .lookup import Captures as Captures
from .lookup import Passing as Passing
from .stage import DistillationLoss as DistillationLoss
from .step import STUDENT as STUDENT
from .step import Losses as Losses
from .step import Shares as Shares
from .step import Step as Step
from .terms import Compared as Compared
from .terms import student_inputs as student_inputs
from .terms import teacher_inputs as teacher_inputs
