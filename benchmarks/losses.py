"""What a loss costs: forward and backward of the loss stage alone, time and peak memory, per family of losses.

Compared, in shuffled rounds within one process: the loss by hand in PyTorch, the same under torch.compile, hookdistill's eager
definition, hookdistill, and Liger where it is installed. Prints a table, writes losses_DEVICE.json and, with matplotlib, a
picture. The targets are reported, not enforced. Under ten minutes.

    python benchmarks/losses.py --device cpu
    python benchmarks/losses.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from _conditions import conditions
from _families import CONTENDERS, HAND, OURS, Family, Run, families
from _memory import can_measure, peak_bytes
from _timing import percentile, ratio, take_turns, timed

Row = dict[str, Any]
MEBIBYTE = 2**20


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    chosen = [each for each in families(device.type, quick=options.quick) if options.only in each.key]
    if options.memory_of:
        family = next(each for each in chosen if each.key == options.memory_of[0])
        print(json.dumps(peak_of(family, options.memory_of[1], device, dtype)))
        return
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    found = conditions([device], threads=options.threads, dtype=options.dtype, rounds=options.rounds, quick=options.quick)
    found["copy_gb_s"] = copied_per_second(device)
    console.print(", ".join(f"{key} {value}" for key, value in found.items() if value is not None), soft_wrap=True)
    rows: list[Row] = []
    until = time.monotonic() + options.minutes * 60
    for family in chosen:
        if time.monotonic() > until:
            console.print(f"left out for time: {family.key}")
            continue
        timings = measure(family, device, dtype, options, found["copy_gb_s"], console)
        add_memory(timings, options, console)
        print_rows(family, timings, console)
        rows += timings
    result = {"conditions": found, "rows": rows, "targets": verdicts(chosen, rows, device.type)}
    print_verdicts(result["targets"], console)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"losses_{device.type}_{options.dtype}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {path}")
    draw(path, console)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=9.0, help="no family is begun after that")
    parser.add_argument("--only", default="", help="only families whose name contains this")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out", choices=CONTENDERS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", nargs=2, metavar=("FAMILY", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    if options.quick:
        options.rounds = 2
    return options


def measure(
    family: Family, device: torch.device, dtype: torch.dtype, options: argparse.Namespace, copy: float, console: Console
) -> list[Row]:
    runs, first = warmed(family.make(device, dtype), options, console)
    contenders = {name: lambda steps, warm, run=run: timed(run, steps, warm, device) for name, run in runs.items()}
    rounds = take_turns(contenders, HAND, rounds=options.rounds, steps=1, warm=1)
    floor = family.floor(torch.finfo(dtype).bits // 8) / (copy * 1e9)
    rows = []
    for name in runs:
        seconds = median(second for block in rounds[name].values() for second in block)
        rows.append(
            {
                "family": family.key,
                "contender": name,
                "median_ms": seconds * 1e3,
                "p20_ms": percentile(rounds[name], 20) * 1e3,
                "p80_ms": percentile(rounds[name], 80) * 1e3,
                "times_as_fast_as_by_hand": list(ratio(rounds[HAND], rounds[name])),
                "of_copy_bandwidth": floor / seconds if floor else None,
                "first_call_s": first[name],
            }
        )
    return rows


def warmed(runs: Mapping[str, Run], options: argparse.Namespace, console: Console) -> tuple[dict[str, Run], dict[str, float]]:
    """Those that run, and the seconds of their first call, in which they compile; all must give the same value."""
    running, first, values = {}, {}, {}
    for name, run in runs.items():
        if name in options.without:
            continue
        start = time.perf_counter()
        try:
            values[name] = run().item()
        except Exception as error:  # a peer that does not run here is left out, not the whole benchmark
            console.print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}", markup=False)
            continue
        running[name], first[name] = run, time.perf_counter() - start
    for name, value in values.items():
        if abs(value - values[HAND]) > 0.02 * abs(values[HAND]) + 1e-4:
            raise RuntimeError(f"{name} gives {value}, by hand it is {values[HAND]}")
    return running, first


def copied_per_second(device: torch.device) -> float:
    """Gigabytes that a copy reads and writes in a second."""
    source = torch.empty(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    seconds = median(timed(lambda: target.copy_(source), 9, 2, device))
    return 2 * source.numel() * 4 / seconds / 1e9


# Memory, each contender in a process of its own


def add_memory(rows: Sequence[Row], options: argparse.Namespace, console: Console) -> None:
    if not can_measure(options.device) or options.quick:
        return
    for row in rows:
        command = [sys.executable, __file__, "--memory-of", row["family"], row["contender"]]
        command += ["--device", options.device, "--dtype", options.dtype, "--threads", str(options.threads)]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["?"])[-1]
            console.print(f"no peak memory of {row['contender']}: {reason}", markup=False)
        else:
            row["peak_bytes"] = json.loads(done.stdout.splitlines()[-1])


def peak_of(family: Family, contender: str, device: torch.device, dtype: torch.dtype) -> int:
    """The peak of a second forward and backward, beyond the inputs; what compiling takes does not count."""
    run = family.make(device, dtype)[contender]
    run()
    leaves = [leaf for leaf in _leaves(run) if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    return peak_bytes(run, device)


def _leaves(run: Run) -> list[torch.Tensor]:
    return [
        tensor
        for cell in run.__closure__ or ()
        for tensor in getattr(cell.cell_contents, "leaves", [])
        if isinstance(tensor, torch.Tensor)
    ]


# Output


def verdicts(chosen: Sequence[Family], rows: Sequence[Row], device: str) -> list[Row]:
    found = []
    for family in chosen:
        here = {row["contender"]: row for row in rows if row["family"] == family.key}
        if OURS not in here or device not in family.targets:
            continue
        faster, share = family.targets[device]
        figures = here[OURS]["times_as_fast_as_by_hand"]
        found.append(
            {
                "what": f"{family.key}: time",
                "figures": figures,
                "wanted": f"at least {faster} times",
                "met": figures[0] >= faster,
            }
        )
        peaks = [here[name].get("peak_bytes") for name in (OURS, HAND)]
        if share is not None and all(peaks):
            less = peaks[1] / peaks[0]
            wanted = f"at least {1 / share:g} times less"
            found.append({"what": f"{family.key}: memory", "figures": [less], "wanted": wanted, "met": less >= 1 / share})
    return found


def print_rows(family: Family, rows: Sequence[Row], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, title=family.key, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("median ms", "p20-p80", "times as fast as by hand", "of copy bandwidth", "peak MiB", "first call s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        middle, low, high = row["times_as_fast_as_by_hand"]
        share = row["of_copy_bandwidth"]
        table.add_row(
            row["contender"],
            f"{row['median_ms']:.2f}",
            f"{row['p20_ms']:.2f}-{row['p80_ms']:.2f}",
            escape(f"{middle:.2f} [{low:.2f}, {high:.2f}]"),
            "" if share is None else f"{share:.0%}",
            f"{row['peak_bytes'] / MEBIBYTE:.0f}" if row.get("peak_bytes") else "",
            f"{row['first_call_s']:.1f}",
        )
    console.print(table)


def print_verdicts(targets: Sequence[Row], console: Console) -> None:
    for each in targets:
        value = f"{each['figures'][0]:.2f}"
        line = f"{'met' if each['met'] else 'missed':6} {each['what']}: {value} ({each['wanted']})"
        console.print(line, markup=False, soft_wrap=True)


def draw(path: Path, console: Console) -> None:
    try:
        from _plot_losses import plot
    except ImportError as error:
        console.print(f"no plot: {error}")
        return
    console.print(f"wrote {plot(path)}")


if __name__ == "__main__":
    main()
