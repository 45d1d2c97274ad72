"""What every test needs: one thread, no network, and an accelerate that knows nothing of the test before.

Tests use tiny models, for which a second thread is a hindrance and, on a busy machine, a long wait.
"""

import os
import sys

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and without a network asking it takes long

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's state is one for the process; a test that makes an Accelerator must not decide for the next."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()
        state.GradientState._reset_state()
