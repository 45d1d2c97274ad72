"""The picture of capture_overhead.json: a panel per device, model and mode, a row per approach, a mark per set of modules."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from _approaches import APPROACHES, BARE, CONTROL, NONE, OURS
from _models import SETS
from _steps import MODES

# Okabe and Ito's colours, told apart by shape as well
MARKS = dict(zip(SETS, (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D")), strict=True))
BASELINES = {"forward": (NONE, "ratio_to_none"), "training step": (BARE, "ratio_to_bare")}
MEBIBYTE = 2**20
OFF_SCALE = 8.0  # a ratio beyond this is written at the edge, so that those near 1 can be told apart


def plot(path: Path) -> Path:
    """Draw beside the JSON; gives the path of the picture."""
    result = json.loads(path.read_text(encoding="utf-8"))
    timings, memory = result["timings"], result["memory"]
    columns = list(dict.fromkeys((row["device"], row["model"]) for row in timings))
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in timings)]
    measured = {row["approach"] for row in [*timings, *memory]}
    approaches = [name for name in APPROACHES if name in measured]
    height = 0.42 * len(approaches) + 1.1
    kinds = list(dict.fromkeys((row["device"], row["mode"]) for row in memory))
    lines, width = len(modes) + bool(memory), max(len(columns), len(kinds))
    figure, axes = pyplot.subplots(
        lines, width, figsize=(2.2 + 5.0 * width, height * lines), squeeze=False, sharey="row", layout="constrained"
    )
    for line, mode in zip(axes, modes, strict=False):
        for panel in line[len(columns) :]:
            panel.set_visible(False)
        for panel, (device, model) in zip(line, columns, strict=False):
            rows = [row for row in timings if (row["device"], row["model"], row["mode"]) == (device, model, mode)]
            draw_ratios(panel, rows, [name for name in approaches if mode in APPROACHES[name].modes], mode)
            panel.set_title(f"{model}, {mode}, {device}", loc="left", fontsize=10, fontweight="bold")
    if memory:
        for panel in axes[-1][len(kinds) :]:
            panel.set_visible(False)
        for panel, (device, mode) in zip(axes[-1], kinds, strict=False):
            shown = [name for name in approaches if any(row["approach"] == name for row in memory)]
            draw_memory(panel, [row for row in memory if (row["device"], row["mode"]) == (device, mode)], shown)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, title="captured")
    figure.supxlabel(caption(result["conditions"]), fontsize=8, color="0.35")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return picture


def draw_ratios(panel: Axes, rows: list[dict[str, Any]], approaches: list[str], mode: str) -> None:
    baseline, key = BASELINES[mode]
    shown = [name for name in approaches if name != baseline and not (mode == "training step" and name in (NONE, CONTROL))]
    panel.axvline(1.0, color="0.4", linewidth=1, linestyle="--")
    for offset, captured in zip((-0.22, 0.0, 0.22), SETS, strict=True):
        found = {row["approach"]: row[key] for row in rows if row["captured"] == captured}
        places = [(shown.index(name) + offset, *found[name]) for name in shown if name in found]
        if not places:
            continue
        colour, shape = MARKS[captured]
        far = [place for place in places if place[1] > OFF_SCALE]
        heights, middle, low, high = zip(*(place for place in places if place[1] <= OFF_SCALE), strict=True)
        panel.hlines(heights, low, high, color=colour, linewidth=1.6)
        panel.plot(middle, heights, shape, color=colour, markersize=5, label=captured)
        for height, ratio, *_ in far:
            where = {"xy": (1, height), "xycoords": panel.get_yaxis_transform(), "ha": "right", "va": "center"}
            panel.annotate(f"{ratio:,.0f} ×  ▸", **where, color=colour, fontsize=8)
    name_rows(panel, shown)
    panel.set_xlabel(f"time, ratio to {baseline} (median of paired rounds, 95 % interval)", fontsize=9)
    if max((row[key][0] for row in rows if row[key][0] <= OFF_SCALE), default=1.0) > 2.5:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 8)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(6))


def draw_memory(panel: Axes, rows: list[dict[str, Any]], shown: list[str]) -> None:
    for offset, captured in zip((-0.2, 0.2), SETS[1:], strict=True):
        found = {row["approach"]: row["peak_bytes"] / MEBIBYTE for row in rows if row["captured"] == captured}
        places = [(shown.index(name) + offset, found[name]) for name in shown if name in found]
        heights, peaks = zip(*places, strict=True)
        panel.barh(heights, peaks, height=0.36, color=MARKS[captured][0])
        for height, peak in places:
            panel.annotate(f"{peak:,.0f}", (peak, height), (3, 0), textcoords="offset points", va="center", fontsize=7)
    name_rows(panel, shown)
    panel.margins(x=0.12)
    panel.set_xlabel("peak over idle, MiB (two steps)", fontsize=9)
    first = rows[0]
    title = f"{first['model']}, memory of a {first['mode']}, {first['device']}"
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")


def name_rows(panel: Axes, names: list[str]) -> None:
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    for label in panel.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith(OURS) else "normal")
    panel.grid(axis="x", color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def caption(found: dict[str, Any]) -> str:
    machine = f"{found['cpu']}, {found['threads']} thread{'s' * (found['threads'] != 1)}"
    where = f"{machine}, {found['cuda']}" if found["cuda"] else machine
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "hookdistill"))
    return f"{where}; {versions}; {found['date']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    print(plot(parser.parse_args().json))


if __name__ == "__main__":
    main()
