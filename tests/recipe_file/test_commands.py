"""Commands on recipes and runs, as a user meets them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import is_initialized
from safetensors.torch import load_file
from typer.testing import CliRunner

from hookdistill.cli import app

ROOT = Path(__file__).parent.parent

NETS = """
from torch import nn, randn, Generator, randint

class Net(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

def rows():
    draw = Generator().manual_seed(0)
    return [{"input": randn(6, generator=draw), "labels": randint(3, (), generator=draw)} for _ in range(24)]

def broken():
    raise KeyError("a bug in code of the user's")
"""

RECIPE = """\
teacher: {factory: "nets:Net", arguments: {width: 8}}
student: {factory: "nets:Net", arguments: {width: 4}}
data:
  train: {factory: "nets:rows"}
  hold_out: 8
  batch_size: 4
matches:
  - {teacher: "0", student: "0", loss: mse, name: hidden}
  - {teacher: "2", student: "2", loss: kl, name: logits}
trainer: {max_steps: 6, best: eval/loss, output_dir: OUT}
evaluators:
  - {metric: accuracy, logits: "2"}
  - {metric: losses}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return file


def call(*arguments):
    """A command in this process: its exit code, stdout and stderr."""
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def program(*arguments, **environment):
    """A command in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_plan_is_a_table_or_json(recipe):
    done = call("plan", recipe)
    assert done.exit_code == 0
    assert re.search(r"^0 +\[4, 4\] +0 +\[4, 8\]", done.stdout, re.MULTILINE)
    found = json.loads(call("plan", recipe, "--json", "--set", "data.batch_size=2").stdout)
    assert [match["name"] for match in found["matches"]] == ["hidden", "logits"]
    assert found["matches"][1]["student_shape"] == [2, 3]
    assert found["inputs"] == ["teacher is called with input = batch['input']", "student is called with input = batch['input']"]


def test_train_evaluate_export(recipe, tmp_path):
    done = call("train", recipe, "--json", "--set", "trainer.progress=false")
    assert done.exit_code == 0, done.stderr
    assert "every setting is in" in done.stderr
    found = json.loads(done.stdout)
    assert (found["steps"], {*found["losses"]}) == (6, {"hidden", "logits"})
    assert {"accuracy", "eval/loss", "eval/loss/hidden"} <= {*found["metrics"]}
    assert {"best", "last", "recipe.yaml"} <= {each.name for each in (tmp_path / "run").iterdir()}

    measured = json.loads(call("evaluate", tmp_path / "run", "--which", "last", "--json").stdout)
    assert measured["metrics"] == pytest.approx(found["metrics"])
    assert not is_initialized()  # nothing of accelerate's stays for what comes after
    best = json.loads(call("evaluate", tmp_path / "run", "--json").stdout)
    assert best["metrics"]["eval/loss"] == pytest.approx(found["best"]["metrics"]["eval/loss"])

    done = call("export", tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16", "--which", "last")
    assert str(tmp_path / "out" / "model.safetensors") in done.stdout.splitlines()
    theirs, ours = (load_file(tmp_path / each / "model.safetensors") for each in ("run/last", "out"))
    assert {name: value.bfloat16().tolist() for name, value in theirs.items()} == {
        name: value.tolist() for name, value in ours.items()
    }


def test_export_writes_the_tokenizer_too(tmp_path, tiny_bert, sentences):
    recipe = tmp_path / "recipe.json"
    layer = {"teacher": "encoder.layer.-1", "student": "encoder.layer.-1"}
    model = {"pretrained": str(tiny_bert)}
    data = {"train": {"files": str(sentences), "rows": 8}, "text": {}, "batch_size": 4}
    trainer = {"max_steps": 1, "output_dir": str(tmp_path / "run"), "progress": False}
    student = {**model, "keep_layers": {"encoder.layer": [1, 4]}}
    recipe.write_text(json.dumps({"teacher": model, "student": student, "data": data, "matches": [layer], "trainer": trainer}))
    assert call("train", recipe).exit_code == 0
    done = call("export", tmp_path / "run", tmp_path / "out", "--json")
    names = {Path(each).name for each in json.loads(done.stdout)["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(model.encoder.layer) == 2
    assert model(**tokenizer("the cat sat", return_tensors="pt")).last_hidden_state.shape == (1, 5, 16)


def test_schema_to_stdout_and_to_a_file(tmp_path):
    printed = json.loads(call("schema").stdout)
    assert "student" in printed["required"]
    assert call("schema", "--output", tmp_path / "s.json").stdout == ""
    assert json.loads((tmp_path / "s.json").read_text()) == printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "RECIPE", "--set", "trainer.max_step=3"], "Did you mean 'max_steps'"),
        (["plan", "nowhere.yaml"], "cannot read the recipe"),
        (["train", "RECIPE", "--set", "student={factory: 'nets:broken'}"], "a bug in code of the user's"),
        (["evaluate", "nowhere"], "there is no such folder"),
        (["export", "RUN", "out"], "there is no such folder"),
    ],
)
def test_a_mistake_ends_in_a_message_and_code_2(recipe, arguments, says):
    places = {"RECIPE": recipe, "RUN": recipe.parent / "nets"}
    done = call(*(places.get(each, each) for each in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(recipe):
    done = call("plan", recipe, "--set", "student={factory: 'nets:broken'}", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert 'raise KeyError("a bug in code of the user\'s")' in done.stderr


def test_evaluating_what_has_no_held_out_rows_or_no_such_student(recipe, tmp_path):
    call("train", recipe, "--set", "data.hold_out=null", "--set", "evaluators=[]", "--set", "trainer.best=null")
    done = call("evaluate", tmp_path / "run")
    assert (done.exit_code, "no rows to measure on" in done.stderr) == (2, True)
    done = call("evaluate", tmp_path / "run", "--which", "best")
    assert (done.exit_code, "it has 'last'" in done.stderr) == (2, True)
    done = call("export", tmp_path / "run", tmp_path / "out", "--dtype", "float8")
    assert (done.exit_code, "It is one of 'float32'" in done.stderr) == (2, True)


def test_help_needs_nothing_heavy():
    """So that it comes at once; the time itself depends on the machine."""
    code = "import sys; sys.argv[1:] = ['train', '--help']\ntry:\n  from hookdistill.cli import main; main()\nfinally:\n  " + (
        "heavy = {'torch', 'numpy', 'transformers', 'yaml', 'accelerate'} & set(sys.modules); print(sorted(heavy))"
    )
    done = program("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")
    assert "--set" in done.stdout
    assert "accelerate launch -m hookdistill.cli train" in done.stdout


def test_every_command_has_an_example_and_help_for_its_options():
    import typer

    group = typer.main.get_command(app)
    for name, command in group.commands.items():
        assert f"hookdistill {name}" in command.help, name
        for option in command.params:
            if option.name != "help":
                assert option.help, (name, option.name)


def test_shell_completion_knows_the_commands():
    done = program("-m", "hookdistill.cli", _HOOKDISTILL_COMPLETE="complete_bash", COMP_WORDS="hookdistill tr", COMP_CWORD="1")
    # Whichever shell the tests are run from.
    named = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = program("-m", "hookdistill.cli", "--show-completion", "bash", **named)
    assert done.stdout.split() == ["train"]
    assert "_HOOKDISTILL_COMPLETE" in script.stdout


def test_two_processes_train_one_student_and_print_once(recipe, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hookdistill.cli"]
    done = program(*torchrun, "train", recipe, "--json", "--set", "trainer.progress=false", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 6
    assert (tmp_path / "run" / "last" / "model.safetensors").exists()
    assert (tmp_path / "run" / "recipe.yaml").exists()
