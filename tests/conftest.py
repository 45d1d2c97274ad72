"""Tests use tiny models, for which a second thread is a hindrance and, on a busy machine, a long wait."""

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and without a network asking it takes long

torch.set_num_threads(1)
