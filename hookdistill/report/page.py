"""The page: one HTML file with everything in it, which can be mailed."""

from __future__ import annotations

import html
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import TrainerError
from ..files import write_text
from .story import Story, read_story

REPORT = "report.html"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22262b; background: #fff; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .6rem; }
p.note, caption { color: #676d76; } p.note { margin: .2rem 0 .8rem; }
ul.tiles { display: flex; flex-wrap: wrap; gap: .7rem; padding: 0; margin: 1.2rem 0 0; list-style: none; }
ul.tiles li { background: #f5f6f8; border-radius: .5rem; padding: .6rem .9rem; min-width: 7rem; }
ul.tiles span { display: block; color: #676d76; font-size: .8rem; } ul.tiles b { font-size: 1.15rem; }
img { max-width: 100%; height: auto; display: block; margin-bottom: 1rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; } caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eceef1; vertical-align: top; }
th { color: #676d76; font-weight: 600; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font-size: .85em; }
details > summary { cursor: pointer; font-size: 1.15rem; font-weight: 700; margin: 2.6rem 0 .6rem; }
"""


def write_report(folder: Path, *, required: bool = True) -> Path | None:
    """Write `REPORT` into the output folder of a run, finished or not; returns its path.

    Args:
        required: whether it is an error that matplotlib is missing; otherwise nothing is written then.

    Raises:
        TrainerError: the folder is none of a run, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        if required:
            raise TrainerError("the report draws with matplotlib, which is not installed: pip install 'hookdistill[report]'")
        return None
    story = read_story(Path(folder))
    file = Path(folder) / REPORT
    write_text(file, page(story))
    return file


def page(story: Story) -> str:
    """The page as HTML."""
    from . import figures

    title = html.escape(story.name)
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="note">{html.escape(_headline(story))}</p>',
        _tiles(story),
        _picture("Losses", figures.loss_curves(story), "Each part unweighted; means over the steps between two points."),
        _picture("Metrics", figures.metric_curves(story), _metrics_note(story)),
        _metrics_table(story),
        _picture("Layers", figures.layer_maps(story), "How alike the layers are: 1 where one is a rotation of the other."),
        _picture("The run", figures.gauge_curves(story), ""),
        _plan(story),
        _folded("Settings", _pairs({name: value for name, value in story.run["settings"].items() if value is not None})),
        _folded("Versions and machine", _pairs({**story.run["versions"], **story.run["machine"]})),
        _folded("Events", _events(story)),
    ]
    body = "\n".join(part for part in parts if part)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n'


def _headline(story: Story) -> str:
    run = story.run
    student, teachers = run["student"], run["teachers"]
    taught = " and ".join(f"{each['class']} ({each['parameters']:,} parameters)" for each in teachers) or "targets alone"
    return f"{student['class']} ({student['parameters']:,} parameters) taught by {taught}. {story.state.capitalize()}."


def _tiles(story: Story) -> str:
    tiles = {"optimizer steps": f"{story.steps:,} of {story.total:,}"}
    if story.seconds is not None:
        tiles["time"] = _duration(story.seconds)
    if story.loss:
        tiles["last loss"] = f"{story.loss[-1][1]:.4g}"
    if story.run["processes"] > 1:
        tiles["processes"] = str(story.run["processes"])
    if story.best is not None:
        step, value = story.best
        name = story.run["best"]
        tiles[f"best {name}"] = f"{value:.4g} at step {step:,}"
        if name in story.teacher:
            tiles[f"{name} of the teacher"] = f"{story.teacher[name]:.4g}"
    items = "".join(f"<li><span>{html.escape(name)}</span><b>{html.escape(value)}</b></li>" for name, value in tiles.items())
    return f'<ul class="tiles">{items}</ul>'


def _picture(title: str, figure: Any, note: str) -> str:
    if figure is None:
        return ""
    from .figures import as_png

    under = f'<p class="note">{html.escape(note)}</p>' if note else ""
    source, width = as_png(figure)
    return f'<h2>{title}</h2>{under}<img alt="{title}" width="{width}" src="{source}">'


def _metrics_note(story: Story) -> str:
    return "The dashed line is the teacher's level." if story.teacher else ""


def _metrics_table(story: Story) -> str:
    if not story.metrics:
        return ""
    headings = ("metric", "before", "after", *(("teacher",) if story.teacher else ()))
    rows = []
    for name, curve in story.metrics.items():
        level = [_number(story.teacher.get(name))] if story.teacher else []
        rows.append((name, _number(curve[0][1]), _number(curve[-1][1]) if len(curve) > 1 else "", *level))
    return _table(headings, rows, numbers=range(1, len(headings)))


def _plan(story: Story) -> str:
    headings = ("match", "student", "shape", "teacher / target", "shape", "adapter", "loss", "weight", "mask")
    keys = ("name", "student", "student_shape", "teacher", "teacher_shape", "adapter", "loss", "weight", "mask")
    rows = [[str(row[key]) for key in keys] for row in story.run["plan"]]
    inputs = "".join(f'<p class="note">{html.escape(line)}</p>' for line in story.run["inputs"])
    return f"<h2>Plan</h2>{_table(headings, rows)}{inputs}"


def _events(story: Story) -> str:
    rows = []
    for line in story.events:
        about = {key: value for key, value in line.items() if key not in ("kind", "time", "step")}
        told = ", ".join(f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in about.items() if value is not None)
        rows.append((line["time"][:19].replace("T", " "), str(line.get("step", "")), line["kind"], told))
    return _table(("UTC", "step", "event", ""), rows, numbers=(1,))


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(("", ""), [(name, str(value)) for name, value in values.items()], headed=False)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = (), headed: bool = True) -> str:
    right = {*numbers}

    def cell(kind: str, position: int, text: str) -> str:
        style = ' class="number"' if position in right else ""
        return f"<{kind}{style}>{html.escape(text)}</{kind}>"

    head = "<tr>" + "".join(cell("th", i, text) for i, text in enumerate(headings)) + "</tr>" if headed else ""
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table>{head}{body}</table></div>'


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if math.isfinite(value) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
