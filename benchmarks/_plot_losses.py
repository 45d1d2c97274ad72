"""The picture of losses_*.json: a panel of speed and one of memory, a row per family, a mark per contender."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullFormatter

from _families import COMPILED, HAND, LIGER, OURS

# Okabe and Ito's colours, told apart by shape as well
MARKS = {OURS: ("#0072B2", "o"), COMPILED: ("#D55E00", "s"), LIGER: ("#009E73", "^")}


def plot(path: Path) -> Path:
    """Draw beside the JSON; gives the path of the picture."""
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = {(row["family"], row["contender"]): row for row in result["rows"]}
    families = list(dict.fromkeys(row["family"] for row in result["rows"]))[::-1]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, 0.45 * len(families) + 1.8), sharey=True, layout="constrained")
    for name, (colour, shape) in MARKS.items():
        for place, family in enumerate(families):
            row, hand = rows.get((family, name)), rows[family, HAND]
            if row is None:
                continue
            middle, low, high = row["times_as_fast_as_by_hand"]
            label = name if place == 0 else None
            speed.plot([low, high], [place, place], color=colour, linewidth=1.5, alpha=0.6)
            speed.plot(middle, place, shape, color=colour, label=label)
            if row.get("peak_bytes") and hand.get("peak_bytes"):
                memory.plot(hand["peak_bytes"] / row["peak_bytes"], place, shape, color=colour)
    for panel, title in ((speed, "times as fast as by hand"), (memory, "times less peak memory than by hand")):
        panel.axvline(1, color="0.6", linewidth=1)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    speed.set_yticks(range(len(families)), families)
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    conditions = result["conditions"]
    where = conditions["cuda"] or conditions["cpu"]
    note = f"{where}, {conditions['dtype']}, torch {conditions['torch']}, forward and backward, {conditions['date'][:10]}"
    figure.supxlabel(note, fontsize=8, color="0.35")
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=150)
    pyplot.close(figure)
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    print(plot(parser.parse_args().path))
