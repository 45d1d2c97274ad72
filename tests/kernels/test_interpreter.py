"""The cases under Triton's interpreter. It must be asked for before Triton is imported, so that they have their own process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process runs under the interpreter already")
def test_kernels_under_the_interpreter():
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails with numpy {np.__version__}; that of 3.7 does not")
    older = ["-W", "ignore:Conversion of an array:DeprecationWarning"]  # of Triton 3.6, with numpy before 2.4
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *older]
    command.append(str(ROOT / "tests" / "kernels" / "cases"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1]) if " passed" in done.stdout else 0
    assert passed > 100 or done.stdout.count(".") > 100
