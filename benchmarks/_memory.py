"""Peak memory of two steps in a row under an approach, in a process of its own; prints the rows as JSON.

On CUDA the allocator's peak. On the CPU the peak of the resident set over what was resident before, which Linux lets a process
reset; with a low threshold for mmap, so that freed tensors leave the resident set at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from _approaches import APPROACHES, NONE, Approach
from _models import WORKLOADS, capture_set
from _steps import MODES, set_mode, step_of

MEMORY_SETS = ("12 layers", "every module")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measured_apart(approaches: Sequence[str], workload: str, device: str, threads: int) -> list[dict[str, object]]:
    """The rows of the approaches, from one process beside this one.

    Raises:
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    command = [sys.executable, __file__, workload, device, str(threads), *approaches]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def can_measure(device: str) -> bool:
    return device == "cuda" or CLEAR.exists()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The peak while ``run`` runs, over what was held before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    CLEAR.write_text("5")  # the peak is now what is resident
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def measure(approach: Approach, workload_name: str, device: torch.device) -> list[dict[str, object]]:
    workload = WORKLOADS[workload_name]
    model = workload.model(device)
    subject = approach.prepare(model) if approach.prepare else model
    ids = workload.ids(device, workload.memory_batch)
    sets = {name: capture_set(name, model, ids) for name in MEMORY_SETS}
    plain = APPROACHES[NONE]
    rows = []
    for mode in (mode for mode in MODES if mode in approach.modes):
        set_mode(mode, model)
        set_mode(mode, subject)
        if subject is model:
            with plain.attach(model, []) as attached:
                step_of(mode, attached, ids)()  # what a first step allocates for good: gradients, scratch memory
        for captured, names in sets.items():
            if approach.layers_only and captured != "12 layers":
                continue
            if subject is not model:
                with approach.attach(subject, names) as attached:
                    step_of(mode, attached, ids)()
            with approach.attach(subject, names) as attached:
                step = step_of(mode, attached, ids)
                peak = peak_bytes(lambda step=step: (step(), step()), device)
            where = {"approach": approach.name, "device": device.type, "model": workload_name, "mode": mode}
            rows.append({**where, "captured": captured, "modules": len(names), "peak_bytes": peak})
            del attached, step
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    parser.add_argument("approaches", nargs="+", choices=APPROACHES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(json.dumps([row for name in options.approaches for row in measure(APPROACHES[name], options.workload, device)]))


if __name__ == "__main__":
    main()
