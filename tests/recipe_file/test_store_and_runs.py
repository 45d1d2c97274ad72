"""Recipes with a store, a ready list of matches, a student that starts as its teacher's layers; runs that go on."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hookdistill import RecipeError
from hookdistill.cli import app
from hookdistill.recipe_file import load

LAYERS = [{"teacher": "encoder.layer.{1,3}", "student": "encoder.layer.*", "mask": "attention_mask"}]


@pytest.fixture
def recipe(tmp_path, tiny_bert, sentences):
    """Writes a recipe with some sections changed, and gives its path."""

    def writes(**sections):
        data = {
            "teacher": {"pretrained": str(tiny_bert)},
            "student": {"config": str(tiny_bert), "arguments": {"num_hidden_layers": 2}},
            "data": {"train": {"files": str(sentences), "rows": 24}, "text": {}, "hold_out": 8, "batch_size": 4},
            "matches": LAYERS,
            "trainer": {"max_steps": 4, "output_dir": str(tmp_path / "run"), "progress": False, "report": False},
            **sections,
        }
        file = tmp_path / "recipe.json"
        file.write_text(json.dumps(data), encoding="utf-8")
        return file

    return writes


def call(*arguments):
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_training_from_a_store_is_training_with_the_teacher(recipe, tmp_path):
    live = load(recipe(), environment={}).trainer.train()
    stored = {"path": str(tmp_path / "store")}
    with pytest.raises(RecipeError, match=r"there is no store .* hookdistill cache"):
        load(recipe(store=stored), environment={}).plan()
    done = call("cache", recipe(store=stored), "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 24
    run = load(recipe(store=stored), environment={})
    found = run.trainer.train()
    assert "teacher" not in vars(run)
    for name, value in live.losses.items():
        assert found.losses[name] == pytest.approx(value, rel=1e-5)
    assert "as they were written" in call("cache", "verify", tmp_path / "store").stdout
    assert "encoder.layer.3" in call("cache", "info", tmp_path / "store").stdout
    assert call("cache", "info").exit_code == 2


def test_a_run_goes_on_where_it_was_cut_off(recipe, tmp_path):
    whole = load(recipe(), environment={}).trainer.train()
    trainer = {"max_steps": 4, "output_dir": str(tmp_path / "cut"), "progress": False, "report": False, "save_every": 1}
    run = load(recipe(trainer=trainer), environment={})
    run.save()

    def stop(evaluation):
        if evaluation.step == 2:
            raise KeyboardInterrupt
        return {}

    cut = run.trainer
    object.__setattr__(cut, "evaluators", [stop])
    object.__setattr__(cut, "evaluate_every", 1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cut.train()
    done = call("resume", tmp_path / "cut", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["steps"] == 4
    assert found["losses"] == pytest.approx(dict(whole.losses))


def test_matches_by_name(recipe):
    run = load(recipe(matches={"recipe": "minilm"}), environment={})
    assert {row.loss.partition("(")[0] for row in run.plan()} >= {"attention_kl"}
    with pytest.raises(RecipeError, match=r"no recipe is called 'minlm'\. Did you mean 'minilm'"):
        load(recipe(matches={"recipe": "minlm"}), environment={}).plan()
    with pytest.raises(RecipeError, match=r"takes no argument 'maks'\. Did you mean 'mask'"):
        load(recipe(matches={"recipe": "minilm", "arguments": {"maks": 1}}), environment={}).plan()
    listed = json.loads(call("recipes", "--json").stdout)
    assert "minilm" in {each["name"] for each in listed}


def test_the_student_starts_as_layers_of_the_teacher(recipe):
    run = load(recipe(initialize={"layers": [1, 4]}), environment={})
    for ours, theirs in zip(run.student.encoder.layer, (1, 4), strict=True):
        assert torch.equal(ours.output.dense.weight, run.teacher.encoder.layer[theirs].output.dense.weight)


def test_similarity_and_report(recipe, tmp_path):
    done = call("similarity", recipe(), "--batches", 2, "--json", "--plot", tmp_path / "cka.png")
    assert done.exit_code == 0, done.stderr
    assert len(json.loads(done.stdout)["cka"]) == 6
    assert (tmp_path / "cka.png").stat().st_size > 0
    assert call("train", recipe()).exit_code == 0
    assert call("report", tmp_path / "run").stdout.strip().endswith("report.html")
    assert call("resume", tmp_path / "nowhere").exit_code == 2
