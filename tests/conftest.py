"""Tests use tiny models, for which a second thread is a hindrance and, on a busy machine, a long wait."""

import torch

torch.set_num_threads(1)
