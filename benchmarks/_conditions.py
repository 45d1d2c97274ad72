"""Under which conditions figures were measured."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import hookdistill


def conditions(devices: Iterable[torch.device], **more: Any) -> dict[str, Any]:
    """Date, machine and versions, and whatever the benchmark adds."""
    cuda = torch.cuda.get_device_name() if any(device.type == "cuda" for device in devices) else None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor(),
        "cuda": cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hookdistill": hookdistill.__version__,
        **more,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
