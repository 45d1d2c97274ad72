"""The pictures of the page. matplotlib is imported by the caller's first use, and no window is ever opened."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .story import Curve, Matrix, Story

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, INK = "#2a6fbb", "#d1661c", "#8a8f98", "#22262b"
Panel = tuple[str, Curve, float | None]
"""Title, curve, and the level of the teacher."""

_MOST = 24
"""Panels of one picture."""
_COLUMNS = 3
_LOG_FROM = 30.0
"""Ratio of the largest to the smallest value from which on a scale is logarithmic."""


def loss_curves(story: Story) -> Figure | None:
    """The total and every part."""
    parts = [(name, curve, None) for name, curve in story.parts.items()]
    total: list[Panel] = [("total, weighted", story.loss, None)] if len(parts) > 1 else []
    return _panels([*total, *parts], label="loss")


def metric_curves(story: Story) -> Figure | None:
    """Every metric with the level of the teacher, and where the best one was."""
    best = story.run["best"]
    first = sorted(story.metrics, key=lambda name: (name != best, name not in story.teacher))
    panels = [(name, story.metrics[name], story.teacher.get(name)) for name in first]
    return _panels(panels, marked=None if story.best is None else (best, *story.best), label="", dots=True)


def gauge_curves(story: Story) -> Figure | None:
    """Rate, norm of the gradient, speed, memory."""
    names = {
        "lr": "learning rate",
        "gradient_norm": "gradient norm",
        "examples_per_second": "examples per second",
        "memory_mib": "peak memory, MiB",
    }
    panels = [(names[name], curve, None) for name, curve in story.gauges.items()]
    return _panels(panels, label="", columns=4, colour=GREY, size=(2.6, 1.9), from_zero=True)


def layer_maps(story: Story) -> Figure | None:
    """The CKA of every teacher layer with every student layer, before and after."""
    if not story.layers:
        return None
    maps = [(when, story.layers[when]) for when in ("before", "after") if when in story.layers]
    rows, columns = len(maps[0][1].teacher), len(maps[0][1].student)
    figure = _figure((2.2 + len(maps) * max(1.8, 0.5 * columns), 1.5 + max(1.6, 0.32 * rows)))
    shown: Any = None
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for number, (axis, (when, matrix)) in enumerate(zip(axes, maps, strict=True)):
        shown = _heat_map(axis, matrix, labelled=number == 0)
        axis.set_title(f"{when} training", fontsize=10, color=INK)
    bar = figure.colorbar(shown, ax=list(axes), shrink=0.9)
    bar.set_label("linear CKA", fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=7.5, colors=GREY)
    bar.outline.set_visible(False)
    return figure


def as_png(figure: Figure) -> tuple[str, int]:
    """The picture as a data URL, and the width in pixels at which all pictures have letters of one size."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii"), round(105 * figure.get_figwidth())


def _panels(
    panels: Sequence[Panel],
    *,
    label: str,
    marked: tuple[str, int, float] | None = None,
    dots: bool = False,
    columns: int = _COLUMNS,
    colour: str = BLUE,
    size: tuple[float, float] = (3.5, 2.3),
    from_zero: bool = False,
) -> Figure | None:
    drawn = [panel for panel in panels if any(math.isfinite(value) for _, value in panel[1])][:_MOST]
    if not drawn:
        return None
    columns = min(columns, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = _figure((size[0] * columns, size[1] * rows), layout=None)  # a layout engine takes seconds for many panels
    width, height = figure.get_size_inches()
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.subplots_adjust(
        left=0.55 / width,
        right=1 - 0.08 / width,
        bottom=0.42 / height,
        top=1 - 0.38 / height,
        wspace=0.62 / (size[0] - 0.62),
        hspace=0.72 / (size[1] - 0.72),
    )
    for axis, (name, curve, level) in zip(axes, drawn, strict=False):
        _curve(axis, curve, colour=colour, dots=dots, level=level)
        if from_zero and axis.get_yscale() != "log":
            axis.set_ylim(0, 1.12 * max(value for _, value in curve if math.isfinite(value)) or 1)
        axis.set_title("\n".join(textwrap.wrap(name, 42)), fontsize=9, color=INK, loc="left")
        if marked is not None and marked[0] == name:
            step, best = marked[1:]
            axis.plot([step], [best], marker="*", markersize=11, color=ORANGE, linestyle="", label=f"best: {best:.4g}")
        if level is not None or (marked is not None and marked[0] == name):
            axis.legend(fontsize=7.5, frameon=False, loc="best")
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(drawn) - columns) : len(drawn)]:
        axis.set_xlabel("optimizer step", fontsize=8, color=GREY)
    for axis in axes[: len(drawn) : columns]:
        axis.set_ylabel(label, fontsize=8, color=GREY)
    return figure


def _curve(axis: Axes, curve: Curve, *, colour: str, dots: bool, level: float | None) -> None:
    points = [(step, value) for step, value in curve if math.isfinite(value)]
    steps, values = zip(*points, strict=True)
    marker = "o" if dots or len(points) == 1 else None
    axis.plot(steps, values, color=colour, linewidth=1.4, marker=marker, markersize=3)
    if level is not None and math.isfinite(level):
        axis.axhline(level, color=ORANGE, linewidth=1.1, linestyle=(0, (5, 3)), label=f"teacher: {level:.4g}")
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_FROM:
        axis.set_yscale("log")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#c9ccd1")
    axis.grid(visible=True, axis="y", color="#eceef1", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7.5, colors=GREY, length=2)
    axis.margins(x=0.02, y=0.12)


def _heat_map(axis: Axes, matrix: Matrix, *, labelled: bool) -> Any:
    values = [[math.nan if value is None else value for value in row] for row in matrix.values]
    shown = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(matrix.student)), matrix.student, rotation=40, ha="right", fontsize=7.5)
    axis.set_yticks(range(len(matrix.teacher)), matrix.teacher if labelled else [""] * len(matrix.teacher), fontsize=7.5)
    axis.tick_params(length=0, colors=INK)
    for spine in axis.spines.values():
        spine.set_color("#c9ccd1")
    axis.set_xlabel("student", fontsize=8, color=GREY)
    if labelled:
        axis.set_ylabel("teacher", fontsize=8, color=GREY)
    if len(matrix.teacher) * len(matrix.student) <= 160:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                text = "–" if math.isnan(value) else f"{value:.2f}"
                tone = "white" if value > 0.6 else INK
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=tone)
    return shown


def _figure(size: tuple[float, float], *, layout: str | None = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout=layout, facecolor="white")  # type: ignore[arg-type]
