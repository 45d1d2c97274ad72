"""Cases run where kernels do: on a CUDA device, or under Triton's interpreter, which has a process of its own.

`test_interpreter.py` starts that; elsewhere the cases are not even collected.
"""

import os

import torch

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["cases"]
