"""The page about a run: what it shows is what is in the log, and it stands on its own."""

import base64
import re
import sys
from dataclasses import replace

import pytest
import torch

import hookdistill
from hookdistill import Match, StudentMetric, TrainerError
from hookdistill.report import write_report
from hookdistill.report.figures import gauge_curves, layer_maps, loss_curves, metric_curves
from hookdistill.report.story import read_story
from runs import HIDDEN, LOGITS, Calls, distiller, loader, trainer

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


class Matrix:
    """What `hookdistill.similarity` gives, as far as the trainer goes."""

    def __init__(self, value):
        self.value = value

    def as_dict(self):
        layers = {"teacher_layers": ["0", "2"], "student_layers": ["0", "1", "2"]}
        return {**layers, "cka": [[self.value, 0.1, None], [0.2, 0.3, 0.4]], "count": 4}


@pytest.fixture
def similar(monkeypatch):
    """Stands for `hookdistill.similarity`; each call finds the layers more alike."""
    calls = []

    def similarity(teacher, student, data, **options):
        assert not torch.is_grad_enabled()
        assert not student.training
        calls.append((list(data), options))
        return Matrix(0.5 * len(calls))

    monkeypatch.setattr("hookdistill.training.layers.similarity", similarity)
    return calls


def run(folder, *matches, **settings):
    made = distiller(*(matches or (LOGITS, HIDDEN)))
    metric = StudentMetric("weight", lambda network, _: float(network[0].weight.abs().mean()))
    options = {"evaluators": [metric, Calls(1, 3, 2)], "best": "score", "eval_loader": loader(), "log_every": 2, "seed": 0}
    result = trainer(made, output_dir=folder, **{"epochs": 2, "report": False, **options, **settings}).train()
    return result, read_story(folder)


def drawn(figure):
    """The titles of the panels and the points in them."""
    shown = [axis for axis in figure.axes if axis.get_visible() and axis.lines]
    return {axis.get_title(loc="left").replace("\n", " "): axis for axis in shown}


def points(line):
    return [(int(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_a_page_is_written_at_the_end_and_stands_on_its_own(tmp_path, similar):
    result, _ = run(tmp_path, report="auto")
    text = (tmp_path / "report.html").read_text()
    for title in ("Losses", "Metrics", "Layers", "The run", "Plan", "Settings", "Versions and machine", "Events"):
        assert f">{title}<" in text
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 4
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in text
    assert "12 of 12" in text
    assert f"{result.best.metrics['score']:.4g} at step 6" in text
    assert torch.__version__ in text
    assert "Finished" in text


def test_curves_are_those_of_the_log(tmp_path):
    _, story = run(tmp_path)
    panels = drawn(loss_curves(story))
    assert list(panels) == ["total, weighted", "logits", "hidden"]
    assert points(panels["hidden"].lines[0]) == story.parts["hidden"]
    assert [step for step, _ in story.parts["hidden"]] == [2, 4, 6, 8, 10, 12]
    gauges = drawn(gauge_curves(story))
    assert list(gauges) == ["learning rate", "gradient norm", "examples per second", "peak memory, MiB"]


def test_metrics_have_the_level_of_the_teacher_and_the_best_is_marked(tmp_path):
    result, story = run(tmp_path)
    panels = drawn(metric_curves(story))
    assert list(panels) == ["score", "weight"]
    curve, level = panels["weight"].lines
    assert points(curve) == [(each.step, each.metrics["weight"]) for each in result.history]
    assert set(level.get_ydata()) == {result.teacher["weight"]}
    curve, star = panels["score"].lines
    assert points(star) == [(6, 3.0)]
    assert panels["score"].get_legend_handles_labels()[1] == ["best: 3"]


def test_layers_are_compared_before_and_after(tmp_path, similar, monkeypatch):
    monkeypatch.setattr("hookdistill.training.loop.write_report", lambda folder: None)
    _, story = run(tmp_path, report="auto")
    assert [len(batches) for batches, _ in similar] == [6, 6]
    assert similar[0][1]["batches"] == 4
    assert [story.layers[when].values[0][0] for when in ("before", "after")] == [0.5, 1.0]
    figure = layer_maps(story)
    maps = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in maps] == ["before training", "after training"]
    assert [axis.images[0].get_array()[0, 0] for axis in maps] == [0.5, 1.0]
    assert "–" in [text.get_text() for text in maps[0].texts]


def test_where_layers_cannot_be_compared_the_log_says_why(tmp_path, monkeypatch):
    def similarity(*_, **options):
        if "teacher_layers" in options:
            raise hookdistill.CaptureError("neither these")
        raise hookdistill.CaptureError("no layers are found")

    monkeypatch.setattr("hookdistill.training.layers.similarity", similarity)
    monkeypatch.setattr("hookdistill.training.loop.write_report", lambda folder: None)
    _, story = run(tmp_path, report="auto")
    notes = [event["note"] for event in story.events if event["kind"] == "note"]
    assert notes == [f"no picture of the layers {when} the training: no layers are found" for when in ("before", "after")]
    assert layer_maps(story) is None


def test_where_no_layers_are_found_those_of_the_matches_are_compared(tmp_path, monkeypatch):
    def similarity(*_, teacher_layers=None, student_layers=None, **options):
        if teacher_layers is None:
            raise hookdistill.CaptureError("no layers are found")
        return Matrix(float(len(teacher_layers) == 2 and student_layers == ["2", "0"]))

    monkeypatch.setattr("hookdistill.training.layers.similarity", similarity)
    monkeypatch.setattr("hookdistill.training.loop.write_report", lambda folder: None)
    _, story = run(tmp_path, report="auto")
    assert story.layers["before"].values[0][0] == 1.0


def test_the_picture_is_that_of_the_models(tmp_path, monkeypatch):
    monkeypatch.setattr("hookdistill.training.loop.write_report", lambda folder: None)
    _, story = run(tmp_path, report="auto")
    before, after = (story.layers[when] for when in ("before", "after"))
    layers = ["2", "0"]  # those of the matches
    assert [(each.teacher, each.student) for each in (before, after)] == [(layers, layers)] * 2
    assert before.values != after.values
    assert all(-1 <= value <= 1 for matrix in (before, after) for row in matrix.values for value in row)


def test_one_match_needs_no_total_and_small_numbers_a_logarithm(tmp_path):
    _, story = run(tmp_path, Match("2", "2", name="<b>bold</b>"), epochs=None, max_steps=1)
    (panel,) = drawn(loss_curves(story)).values()
    assert panel.lines[0].get_marker() == "o"
    text = write_report(tmp_path).read_text()
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text


def test_a_run_that_is_still_going_on_or_was_cut_off_has_a_page(tmp_path):
    class Cut(Calls):
        def __call__(self, evaluation):
            if evaluation.step == 6:
                raise KeyError("cut")
            return super().__call__(evaluation)

    with pytest.raises(KeyError):
        run(tmp_path, evaluators=[Cut(1, 2)])
    assert not (tmp_path / "report.html").exists()
    assert write_report(tmp_path) == tmp_path / "report.html"
    text = (tmp_path / "report.html").read_text()
    assert "Running, or cut off" in text
    assert "6 of 12" in text


@pytest.mark.parametrize("wanted", [False, "auto", True])
def test_a_report_is_written_where_it_is_wanted(wanted, tmp_path, monkeypatch):
    monkeypatch.setattr("hookdistill.training.loop.write_report", lambda folder: (folder / "report.html").touch())
    run(tmp_path, report=wanted)
    assert (tmp_path / "report.html").exists() is bool(wanted)
    assert trainer(distiller(), report=False if wanted is True else wanted).train().steps == 6


def test_without_matplotlib_there_is_none_or_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("hookdistill.training.loop", "hookdistill.training.checks"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(TrainerError, match=r"pip install 'hookdistill\[report\]'"):
        write_report(tmp_path)
    assert write_report(tmp_path, required=False) is None
    with pytest.raises(TrainerError, match=r"report=True .* pip install 'hookdistill\[report\]'"):
        trainer(distiller(), report=True, output_dir=tmp_path)


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(TrainerError, match="is no output folder of a Trainer"):
        write_report(tmp_path)


def test_metrics_that_are_not_finite_are_left_out_of_the_curve(tmp_path):
    _, story = run(tmp_path, evaluators=[Calls(float("nan"), 2, 3), StudentMetric("none", lambda *_: float("inf"))])
    panels = drawn(metric_curves(story))
    assert list(panels) == ["score"]
    assert points(panels["score"].lines[0]) == [(6, 2.0), (12, 3.0)]


def test_a_gauge_that_falls_a_hundredfold_has_a_logarithmic_scale(tmp_path):
    _, story = run(tmp_path)
    figure = gauge_curves(replace(story, gauges={"gradient_norm": [(1, 1.0), (2, 0.01)]}))
    assert drawn(figure)["gradient norm"].get_yscale() == "log"
