"""What every test of a training needs."""

import os
import tempfile
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path_factory):
    """In memory where there is such a place: checkpoints wait for the disk, and there are many of them in these tests."""
    if not os.access(_MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("run")
        return
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        yield Path(folder)
