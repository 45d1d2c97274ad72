"""What an evaluator gets, what it may return, and what is saved of the student."""

import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hookdistill import Distiller, Evaluation, HeldOutLosses, Match, StudentMetric, Trainer, TrainerError
from hookdistill.evaluation import Measurement, measure, save
from pairs import hooks, mlps, points, same, state

MATCHES = [Match("head", "head", loss="kl", name="logits"), Match("second", "second", name="hidden", weight=0.5)]


def distiller(student_width=8):
    return Distiller(*mlps(student_width=student_width), MATCHES)


def rows(count=10):
    batch = points(count)
    return DataLoader([{key: value[row] for key, value in batch.items()} for row in range(count)], batch_size=4)


def evaluation(made, loader=None, step=0):
    accelerator = Accelerator()
    return Evaluation(
        student=made.student,
        distiller=made,
        loader=loader,
        device=accelerator.device,
        accelerator=accelerator,
        step=step,
        epoch=0,
    )


def measured_by(evaluator, made=None, **settings):
    """The history of a training of 3 steps in one pass, measured before and after."""
    trainer = Trainer(made or distiller(), rows(), epochs=1, evaluators=[evaluator], progress=False, **settings)
    return trainer.train().history


def test_an_evaluator_gets_the_models_in_eval_mode_and_the_place_in_the_training():
    made, held_out, seen = distiller(), rows(), []

    def look(evaluation):
        assert evaluation.distiller is made
        assert evaluation.student is made.student
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in made.modules())
        assert evaluation.device == next(made.student.parameters()).device
        assert [len(batch["x"]) for batch in evaluation.loader] == [4, 4, 2]
        seen.append((evaluation.step, evaluation.epoch))
        return {"seen": len(seen)}

    history = measured_by(look, made, eval_loader=held_out, evaluate_every=2)
    assert seen == [(0, 0), (2, 1), (3, 1)]
    assert history == tuple(
        Measurement(step=step, epoch=epoch, metrics={"seen": count}) for count, (step, epoch) in enumerate(seen, 1)
    )


def test_the_student_is_measured_as_it_is_after_the_step():
    made = distiller()
    before = state(made.student)
    seen = []
    measured_by(lambda evaluation: seen.append(state(evaluation.student)) or {}, made)
    assert same(seen[0], before)
    assert same(seen[-1], state(made.student))
    assert not same(seen[0], seen[-1])


def test_a_student_metric_is_a_function_of_student_and_loader():
    def accuracy(student, batches):
        hits = [student(batch["x"]).argmax(-1) == batch["labels"] for batch in batches]
        return torch.cat(hits).double().mean()

    made = distiller()
    history = measured_by(StudentMetric("accuracy", accuracy), made, eval_loader=rows())
    expected = accuracy(made.student.eval(), [points(10)])
    assert history[-1].metrics == {"accuracy": float(expected)}


def test_held_out_losses_are_means_over_all_examples():
    made = distiller()
    made.plan(points(10))
    whole = points(10)
    with torch.no_grad():
        ours, theirs = (each.eval().spelled_out(whole["x"]) for each in (made.student, made.teacher))
    logits = F.kl_div(ours["head"].log_softmax(-1), theirs["head"].log_softmax(-1), log_target=True, reduction="batchmean")
    hidden = F.mse_loss(ours["second"], theirs["second"])
    with torch.no_grad():
        made.eval()
        found = HeldOutLosses()(evaluation(made, rows()))
    names = {"eval/loss": logits + 0.5 * hidden, "eval/loss/logits": logits, "eval/loss/hidden": hidden}
    assert found == pytest.approx({name: float(value) for name, value in names.items()}, rel=1e-5)


def test_held_out_losses_are_measured_where_there_is_only_an_eval_loader():
    result = Trainer(distiller(), rows(), epochs=1, eval_loader=rows(), progress=False).train()
    assert list(result.history[-1].metrics) == ["eval/loss", "eval/loss/logits", "eval/loss/hidden"]


def test_held_out_losses_can_have_another_prefix():
    history = measured_by(HeldOutLosses(prefix="test/"), eval_loader=rows())
    assert list(history[0].metrics) == ["test/loss", "test/loss/logits", "test/loss/hidden"]


def test_a_list_of_batches_is_an_eval_loader():
    history = measured_by(HeldOutLosses(), eval_loader=[points()])
    assert len(history) == 2


def test_metrics_of_several_evaluators_stand_side_by_side():
    evaluators = [lambda evaluation: {"a": torch.tensor(1.5)}, lambda evaluation: {"b": 2}]
    assert measure(evaluators, evaluation(distiller())).metrics == {"a": 1.5, "b": 2.0}


def test_an_evaluator_can_save_the_student(tmp_path):
    made = distiller(student_width=6)

    def every_time(evaluation):
        evaluation.save_student(tmp_path / f"step-{evaluation.step}")
        return {}

    before = state(made.student)
    measured_by(every_time, made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-3"]
    for name, expected in (("step-0", before), ("step-3", state(made.student))):
        found = load_file(tmp_path / name / "model.safetensors")
        assert same([found[key] for key in made.student.state_dict()], expected)
        assert (tmp_path / name / "adapters.safetensors").exists()


def test_adapters_are_never_in_the_student_and_stale_ones_go(tmp_path):
    wide, narrow = distiller(student_width=6), distiller()
    for made in (wide, narrow):
        made.plan(points())
    save(wide, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(wide.student.state_dict())
    assert set(load_file(tmp_path / "adapters.safetensors")) == set(wide.adapters.state_dict())
    save(narrow, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_shared_weights_are_saved(tmp_path):
    teacher, student = (nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2))
    student[2].weight = student[0].weight
    save(Distiller(teacher, student, [Match("2", "2")]), tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["0.weight"], student[0].weight)


# What is refused


@pytest.mark.parametrize(
    ("evaluators", "message"),
    [
        ([lambda evaluation: 0.5], r"lambda.* returned float, not a mapping.*StudentMetric\(name, function\)"),
        ([lambda evaluation: {"a": "high"}], r"'a' = 'high', which is no number"),
        ([lambda evaluation: {"a": torch.zeros(2)}], r"'a' = tensor\(\[0., 0.\]\), which is no number"),
        ([lambda evaluation: {"a": 1.0}, lambda evaluation: {"a": 1.0}], r"two evaluators measure 'a'"),
        ([HeldOutLosses()], r"HeldOutLosses\(\) measures on held-out batches.*eval_loader="),
        ([StudentMetric("x", lambda student, batches: 0.0)], r"StudentMetric\('x'\) measures .*eval_loader="),
    ],
)
def test_a_wrong_evaluator_is_an_error_that_names_it(evaluators, message):
    with pytest.raises(TrainerError, match=message):
        measure(evaluators, evaluation(distiller()))


def test_an_eval_loader_that_can_be_read_only_once_is_an_error():
    with pytest.raises(TrainerError, match=r"no batch at step 3.*only once"):
        measured_by(HeldOutLosses(), eval_loader=iter([points()]))


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones():
    now = Measurement(step=1, epoch=1, metrics={"accuracy": 0.5, "loss": 1.0})
    with pytest.raises(TrainerError, match=r"best='acuracy'.*Did you mean 'accuracy'\?.*'accuracy', 'loss'"):
        now.beats(None, "acuracy", higher=None)


@pytest.mark.parametrize(
    ("name", "higher", "value", "beats"),
    [
        ("accuracy", None, 0.6, True),
        ("accuracy", None, 0.5, False),
        ("accuracy", False, 0.4, True),
        ("eval/loss", None, 0.4, True),
        ("eval/loss/logits", None, 0.6, False),
        ("eval/loss", True, 0.6, True),
        ("lossless", None, 0.6, True),
        ("accuracy", None, math.nan, False),
    ],
)
def test_which_of_two_measurements_is_better(name, higher, value, beats):
    before = Measurement(step=1, epoch=1, metrics={name: 0.5})
    assert Measurement(step=2, epoch=1, metrics={name: value}).beats(before, name, higher=higher) is beats


def test_the_first_measurement_is_the_best_so_far_unless_it_is_nan():
    assert Measurement(step=0, epoch=0, metrics={"a": -1.0}).beats(None, "a", higher=None)
    assert not Measurement(step=0, epoch=0, metrics={"a": math.nan}).beats(None, "a", higher=None)


def test_nothing_is_left_on_the_models():
    made = distiller()
    measured_by(HeldOutLosses(), made, eval_loader=rows())
    assert hooks(made.student, made.teacher) == 0
