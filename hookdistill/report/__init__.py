"""A run as one page to look at."""

from .page import REPORT as REPORT
from .page import write_report as write_report
