"""The command line. Results go to stdout, everything else to stderr; heavy imports wait for the command that needs them."""

from .main import app as app
from .main import main as main
