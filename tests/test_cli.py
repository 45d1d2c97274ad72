"""The command line as a user meets it: in a process of its own."""

import json
import subprocess
import sys

import pytest
from transformers import BertConfig, ViTConfig


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hookdistill.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=_offline())


def _offline() -> dict[str, str]:
    import os

    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    BertConfig(**sizes, architectures=["BertForMaskedLM"]).save_pretrained(path)
    return path


def test_outline_of_a_configuration_as_a_table(folder):
    done = run("outline", str(folder), "--pattern", "bert.encoder.layer.*")
    assert done.returncode == 0, done.stderr
    assert "bert.encoder.layer.1:attention" in done.stdout
    assert "[1, 2, 8, 8]" in done.stdout
    assert done.stderr == ""


def test_outline_as_json_is_json_and_nothing_else(folder):
    done = run("outline", str(folder / "config.json"), "--json", "--inputs")
    assert done.returncode == 0, done.stderr
    rows = {row["address"]: row for row in json.loads(done.stdout)["addresses"]}
    assert rows[":output.logits"]["shape"] == [1, 8, 50]
    assert rows["bert.encoder.layer.0:input.hidden_states"]["module"] == "BertLayer"


def test_outline_of_a_vision_model(tmp_path):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    ViTConfig(**sizes, image_size=16, patch_size=8).save_pretrained(tmp_path)
    done = run("outline", str(tmp_path), "--pattern", "layers.0")
    assert done.returncode == 0, done.stderr
    assert "layers.0:query" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--pattern", "bert.encoder.layers.0"), "Did you mean 'bert.encoder.layer.0'?"),
        (("--pattern", "bert..x"), "expected the name of a module"),
    ],
)
def test_a_mistake_is_a_message_and_no_traceback(folder, arguments, says):
    done = run("outline", str(folder), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_model_that_is_not_there():
    done = run("outline", "./no-such-model")
    assert done.returncode == 2
    assert "There is no file or folder of that name" in done.stderr
    assert "Traceback" not in done.stderr
