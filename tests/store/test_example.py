"""examples/cached_teacher.py trains from a store whose teacher is gone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_example_runs(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    command = [
        sys.executable,
        str(ROOT / "examples" / "cached_teacher.py"),
        "--epochs",
        "1",
        "--store",
        str(tmp_path / "store"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the teacher is gone from memory" in done.stdout
    assert re.search(r"on disk .*\d\.\dx", done.stdout)
    differ = re.search(r"differ by (\S+) at most", done.stdout)
    assert differ and float(differ[1]) < 1e-5
    assert (tmp_path / "store" / "manifest.json").exists()
