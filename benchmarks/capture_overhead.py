"""What capturing costs: time per forward and per training step, and peak memory.

Compared, in shuffled rounds within one process: no hooks, bare hooks that store a reference, hookdistill, and other libraries
where they are installed. On a 12-layer encoder so small that every call shows, and on BERT-base, where it should not; capturing
one layer, twelve, and every module. Random weights, nothing is downloaded. Prints tables, writes capture_overhead.json and,
with matplotlib, capture_overhead.png. The targets are reported, not enforced.

A training step has one loss term more for every captured tensor; judge it against bare hooks, not against no hooks.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from transformers import BertModel

from _approaches import APPROACHES, BARE, CONTROL, NONE, OURS, Approach, installed, no_hooks
from _conditions import conditions
from _memory import MEMORY_SETS, can_measure, measured_apart
from _models import SETS, WORKLOADS, Workload, capture_set
from _steps import MODES, set_mode, step_of
from _timing import Interval, Rounds, difference, percentile, ratio, ratio_of_differences, take_turns, timed

Row = dict[str, Any]
MEBIBYTE = 2**20


@dataclass
class Report:
    """What the run says on the terminal, and who could not take part."""

    console: Console
    left_out: dict[str, str] = field(default_factory=dict)

    def leave_out(self, who: str, reason: str) -> None:
        self.left_out[who] = reason
        self.console.print(f"left out: {who}: {reason}", markup=False, soft_wrap=True)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    report = Report(Console(width=None if Console().is_terminal else 150, highlight=False))
    settings = {"threads": options.threads, "rounds": options.rounds, "quick": options.quick}
    found = conditions(options.devices, transformers=transformers.__version__, **settings)
    report.console.print(", ".join(f"{key} {value}" for key, value in found.items() if value is not None), soft_wrap=True)
    approaches = those_that_run(options, report)

    timings, memory = [], []
    for device in options.devices:
        for name in options.models:
            timings += time_workload(WORKLOADS[name], approaches, device, options, report)
        memory += measure_memory(approaches, device, options, report)
    targets = [*time_targets(timings), *memory_targets(memory)]
    print_targets(targets, report.console)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "capture_overhead.json"
    result = {"conditions": found, "timings": timings, "memory": memory, "targets": targets, "left_out": report.left_out}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    report.console.print(f"wrote {path}", soft_wrap=True)
    draw(path, report.console)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), default="all", help="all: cuda as well where there is one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="on the tiny encoder, 120 by default; BERT-base gets a quarter of them")
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the JSON and the plot")
    parser.add_argument("--quick", action="store_true", help="a few rounds on the tiny encoder: does it run")
    options = parser.parse_args()
    if options.quick:
        options.models = ["tiny"]
    options.rounds = options.rounds or (2 if options.quick else 120)
    there = ["cpu", *["cuda"] * torch.cuda.is_available()]
    options.devices = [torch.device(name) for name in there if options.device in (name, "all")]
    if not options.devices:
        parser.error(f"no {options.device} device here; torch {torch.__version__} sees {', '.join(there)}")
    return options


def those_that_run(options: argparse.Namespace, report: Report) -> list[Approach]:
    usable, missing = installed()
    for name, reason in missing.items():
        report.leave_out(name, reason)
    return [approach for approach in usable if not (options.quick and approach.needs)]


# Time


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A model on a device, its batch, and for each approach the model it works on: that one, or a copy it may change."""

    workload: Workload
    device: torch.device
    model: BertModel
    ids: Tensor
    subjects: dict[str, Any]

    @classmethod
    def of(cls, workload: Workload, approaches: Sequence[Approach], device: torch.device) -> Bench:
        model, ids = workload.model(device), workload.ids(device)
        subjects = {approach.name: approach.prepare(model) if approach.prepare else model for approach in approaches}
        return cls(workload=workload, device=device, model=model, ids=ids, subjects=subjects)

    def set_mode(self, mode: str) -> None:
        for subject in self.subjects.values():
            set_mode(mode, subject)

    def block(self, approach: Approach, mode: str, names: Sequence[str]) -> Callable[[int, int], list[float]]:
        """Attach, a few steps, detach; only the steps are timed."""

        def block(steps: int, warm: int) -> list[float]:
            with approach.attach(self.subjects[approach.name], names) as attached:
                return timed(step_of(mode, attached, self.ids), steps, warm, self.device)

        return block


def time_workload(
    workload: Workload, approaches: Sequence[Approach], device: torch.device, options: argparse.Namespace, report: Report
) -> list[Row]:
    """One row per mode, set of modules and approach; prints a table for each mode."""
    bench = Bench.of(workload, approaches, device)
    rounds = max(2, round(options.rounds * workload.share_of_rounds))
    steps, warm = (1, 0) if options.quick else (workload.steps, workload.warm)
    sound = {captured: sound_approaches(bench, approaches, captured, report) for captured in SETS}
    rows = []
    for mode in options.modes:
        bench.set_mode(mode)
        fresh = []
        for captured, (names, contenders) in sound.items():
            blocks = {each.name: bench.block(each, mode, names) for each in contenders if mode in each.modes}
            seconds = take_turns(blocks, NONE, rounds=rounds, steps=steps, warm=warm)
            where = {"device": device.type, "model": workload.name, "mode": mode, "captured": captured, "modules": len(names)}
            fresh += [{**where, **timing_row(name, seconds)} for name in blocks]
        print_timings(f"{workload.name} ({workload.describe()}), {mode}, {device.type}", fresh, report.console)
        rows += fresh
    return rows


def sound_approaches(
    bench: Bench, approaches: Sequence[Approach], captured: str, report: Report
) -> tuple[list[str], list[Approach]]:
    """The modules of the set, and the approaches that hand over for them what bare hooks see."""
    names = capture_set(captured, bench.model, bench.ids)
    possible = [approach for approach in approaches if not approach.layers_only or captured == "12 layers"]
    with APPROACHES[BARE].attach(bench.model, names) as attached, torch.no_grad():
        attached.forward(bench.ids)
        reference = attached.tensors()
    sound = []
    for approach in possible:
        reason = None if approach.attach is no_hooks else what_is_wrong(bench, approach, names, reference)
        if reason:
            report.leave_out(f"{approach.name} ({bench.device.type}, {bench.workload.name}, {captured})", reason)
        else:
            sound.append(approach)
    return names, sound


def what_is_wrong(bench: Bench, approach: Approach, names: Sequence[str], reference: Sequence[Tensor]) -> str | None:
    """Why the approach cannot be compared: it raises, or gives something else than ``reference``."""
    try:
        with torch.no_grad(), approach.attach(bench.subjects[approach.name], names) as attached:
            attached.forward(bench.ids)
            got = list(attached.tensors())
    except Exception as error:  # a peer that fails is a line in the report
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if len(got) != len(reference):
        return f"gave {len(got)} tensors where {len(reference)} were asked for"
    same = all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(got, reference, strict=True))
    return None if same else "gave other values than bare hooks"


def timing_row(name: str, seconds: dict[str, Rounds]) -> Row:
    mine, none, bare = seconds[name], seconds[NONE], seconds[BARE]
    return {
        "approach": name,
        "rounds": len(mine),
        "steps": sum(map(len, mine.values())),
        "median_ms": percentile(mine, 50) * 1e3,
        "p10_ms": percentile(mine, 10) * 1e3,
        "p90_ms": percentile(mine, 90) * 1e3,
        "added_us": interval(difference(mine, none), 1e6),
        "ratio_to_none": interval(ratio(mine, none)),
        "ratio_to_bare": interval(ratio(mine, bare)),
        "added_over_bare": interval(ratio_of_differences(mine, bare, none)),
    }


def interval(value: Interval, scale: float = 1.0) -> list[float]:
    return [each * scale for each in value]


# Memory


def measure_memory(
    approaches: Sequence[Approach], device: torch.device, options: argparse.Namespace, report: Report
) -> list[Row]:
    """One row per approach, mode and set; each approach in a process of its own."""
    if not can_measure(device.type):
        report.console.print(f"peak memory: not measured, {platform.system()} cannot reset the peak of a process")
        return []
    workload = options.models[-1]
    names = [[approach.name] for approach in approaches if approach.name != CONTROL]
    rows = []
    for together in [[BARE, OURS]] if options.quick else names:
        try:
            rows += measured_apart(together, workload, device.type, options.threads)
        except RuntimeError as error:
            report.leave_out(f"{', '.join(together)} ({device.type}, memory)", str(error))
    print_memory(rows, report.console)
    return rows


# Targets


def time_targets(timings: Sequence[Row]) -> list[Row]:
    """On the tiny encoder against bare hooks, on BERT-base against none; forward only."""
    targets = []
    rows = {(row["device"], row["model"], row["captured"], row["approach"]): row for row in timings if row["mode"] == "forward"}
    for (device, model, captured, approach), row in rows.items():
        if approach != OURS:
            continue
        where = f"{device}, {model}, {captured}"
        if model == "tiny":
            whole, added = row["ratio_to_bare"], row["added_over_bare"]
            bare_adds = rows[device, model, captured, BARE]["added_us"]
            met = added[0] <= 2.5 if bare_adds[1] > 0 else None  # what bare hooks add must show before it can be a measure
            targets.append(target(f"{where}: forward, to bare hooks", whole, "at most 1.10", whole[0] <= 1.10))
            targets.append(target(f"{where}: added time, to that of bare hooks", added, "at most 2.5", met))
        else:
            none, control = row["ratio_to_none"], rows[device, model, captured, CONTROL]["ratio_to_none"]
            wanted = f"interval contains 1.00; no hooks again: {spread(control)}"
            targets.append(target(f"{where}: forward, to no hooks", none, wanted, Interval(*none).contains_one))
    return targets


def memory_targets(memory: Sequence[Row]) -> list[Row]:
    """No more than bare hooks hold, within 1 % or 1 MiB."""
    peaks = {(row["device"], row["mode"], row["captured"], row["approach"]): row["peak_bytes"] for row in memory}
    targets = []
    for (device, mode, captured, approach), mine in peaks.items():
        bare = peaks.get((device, mode, captured, BARE))
        if approach != OURS or not bare:
            continue
        what = f"{device}, {mode}, {captured}: peak memory, to that of bare hooks"
        met = mine <= bare + max(0.01 * bare, MEBIBYTE)
        targets.append(target(what, [mine / bare], "at most 1.00, within 1 % or 1 MiB", met))
    return targets


def target(what: str, figures: Sequence[float], wanted: str, met: bool | None) -> Row:
    """``met`` is ``None`` where the noise leaves no verdict."""
    return {"what": what, "figures": list(figures), "wanted": wanted, "met": met}


# Output


def print_timings(title: str, rows: Sequence[Row], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("approach", no_wrap=True)
    for heading in ("median ms", "p10 ms", "added µs", "ratio to no hooks", "ratio to bare hooks", "rounds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for captured in dict.fromkeys(row["captured"] for row in rows):
        group = [row for row in rows if row["captured"] == captured]
        table.add_row(f"[italic]{captured} ({group[0]['modules']})")
        for row in group:
            times = [f"{row[key]:.3f}" for key in ("median_ms", "p10_ms")]
            added = f"{row['added_us'][0]:+,.0f}"
            ratios = [escape(spread(row[key])) for key in ("ratio_to_none", "ratio_to_bare")]
            table.add_row(f"  {row['approach']}", *times, added, *ratios, str(row["rounds"]))
        table.add_section()
    console.print(table)


def print_memory(rows: Sequence[Row], console: Console) -> None:
    columns = [(mode, captured) for mode in MODES for captured in MEMORY_SETS]
    title = f"peak memory of two steps over idle, MiB ({rows[0]['model']}, {rows[0]['device']})" if rows else "peak memory"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("approach", no_wrap=True)
    for mode, captured in columns:
        table.add_column(f"{mode}, {captured}", justify="right")
    for name in dict.fromkeys(row["approach"] for row in rows):
        peaks = {(row["mode"], row["captured"]): row["peak_bytes"] for row in rows if row["approach"] == name}
        table.add_row(name, *(f"{peaks[key] / MEBIBYTE:.1f}" if key in peaks else "" for key in columns))
    console.print(table)


def spread(figures: Sequence[float]) -> str:
    middle, low, high = figures
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def print_targets(targets: Sequence[Row], console: Console) -> None:
    verdicts = {True: "met", False: "missed", None: "noise"}
    for each in targets:
        figures = each["figures"]
        value = spread(figures) if len(figures) == 3 else f"{figures[0]:.3f}"
        line = f"{verdicts[each['met']]:6} {each['what']}: {value} ({each['wanted']})"
        console.print(line, markup=False, soft_wrap=True)


def draw(path: Path, console: Console) -> None:
    try:
        from _plot import plot
    except ImportError as error:
        console.print(f"no plot: {error}")
        return
    console.print(f"wrote {plot(path)}")


if __name__ == "__main__":
    main()
