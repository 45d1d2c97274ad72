"""Teacher tensors on disk, so that the teacher need not run again."""

from .keep import Keep as Keep
from .report import Checked as Checked
from .report import Info as Info
from .report import info as info
from .report import verify as verify
from .store import TeacherStore as TeacherStore
