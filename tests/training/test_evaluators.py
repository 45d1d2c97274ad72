"""The evaluators that come along, and what follows from what they measure: the best, the end, the level of the teacher."""

import math

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hookdistill import (
    Distiller,
    Evaluation,
    ExampleMetric,
    Fidelity,
    HeldOutLosses,
    Match,
    StudentMetric,
    Trainer,
    TrainerError,
    evaluate,
)
from hookdistill.evaluation import Measurement, measure
from pairs import flags, hooks, mlps, points, readers, same, seeded, state, tokens
from runs import LOGITS, Calls, distiller, loader, model, trainer


def evaluation(made, batches):
    accelerator = Accelerator()
    settings = {"device": accelerator.device, "accelerator": accelerator, "step": 0, "epoch": 0}
    return Evaluation(student=made.student, distiller=made, loader=batches, **settings)


@torch.no_grad()
def measured(evaluator, made, batches):
    made.eval()
    return dict(measure([evaluator], evaluation(made, batches)).metrics)


def pieces(batch, sizes):
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        {key: value[start : start + size] for key, value in batch.items()} for start, size in zip(starts, sizes, strict=True)
    ]


# Fidelity


def cka(x, y):
    """From the Gram matrices, as the paper writes it: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    count = len(x)
    centre = torch.eye(count, dtype=torch.float64) - 1 / count
    k, l = (centre @ (each.double() @ each.double().T) @ centre for each in (x, y))  # noqa: E741  # the letters of the paper
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


def test_fidelity_is_agreement_divergence_and_cka_over_all_batches():
    made = Distiller(
        *mlps(8, 5),
        [Match("head", "head", loss="kl", temperature=3.0, name="logits"), Match("second", "second", name="hidden")],
    )
    batch = points(11)
    made.plan(batch)
    with torch.no_grad():
        ours, theirs = (each.eval().spelled_out(batch["x"]) for each in (made.student, made.teacher))
    expected = {
        "fidelity/logits/agreement": float((ours["head"].argmax(-1) == theirs["head"].argmax(-1)).double().mean()),
        "fidelity/logits/kl": float(
            F.kl_div(ours["head"].log_softmax(-1), theirs["head"].log_softmax(-1), log_target=True, reduction="batchmean")
        ),
        "fidelity/hidden/cka": cka(ours["second"], theirs["second"]),
    }
    assert measured(Fidelity(), made, pieces(batch, [4, 4, 3])) == pytest.approx(expected, rel=1e-5)


def test_masked_positions_do_not_count():
    matches = [
        Match(":logits", ":logits", loss="kl", name="logits", mask="attention_mask"),
        Match("embed", "embed", name="hidden", mask="attention_mask"),
        Match(None, ":logits", loss="cross_entropy", target="labels"),
    ]
    made = Distiller(*readers(), matches)
    batch = tokens(4, 6)
    made.plan(batch)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (each.eval().spelled_out(batch["input_ids"]) for each in (made.student, made.teacher))
    found = measured(Fidelity(), made, [batch])
    assert found.keys() == {"fidelity/logits/agreement", "fidelity/logits/kl", "fidelity/hidden/cka"}
    agree = ours["logits"][valid].argmax(-1) == theirs["logits"][valid].argmax(-1)
    assert found["fidelity/logits/agreement"] == pytest.approx(float(agree.double().mean()))
    assert found["fidelity/hidden/cka"] == pytest.approx(cka(ours["embed"][valid], theirs["embed"][valid]))


def test_a_copy_of_the_teacher_is_as_faithful_as_can_be():
    teacher = seeded(mlps, seed=0)[0]
    made = Distiller(teacher, seeded(type(teacher), 8, seed=1), [Match("head", "head", loss="kl"), Match("second", "second")])
    made.student.load_state_dict(teacher.state_dict())
    found = measured(Fidelity(), made, [points(9)])
    assert list(found.values()) == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)


def test_cka_is_of_the_first_positions():
    made = Distiller(*mlps(), [Match("second", "second")])
    batch = points(12)
    first = {key: value[:5] for key, value in batch.items()}
    name = "fidelity/second <- second: mse/cka"
    assert measured(Fidelity(positions=5), made, [batch])[name] == pytest.approx(measured(Fidelity(), made, [first])[name])


def test_fidelity_without_anything_to_compare_is_an_error():
    made = Distiller(None, mlps()[1], [Match(None, "head", loss="cross_entropy", target="labels")])
    with pytest.raises(TrainerError, match=r"Fidelity\(\) compares logits and features"):
        measured(Fidelity(), made, [points()])


# Metrics of the user's


def right(output, batch):
    return output.argmax(-1) == batch["labels"]


def test_an_example_metric_is_the_mean_over_examples():
    made = Distiller(*mlps(), [Match("head", "head", loss="kl")])
    batch = points(11)
    with torch.no_grad():
        expected = float(right(made.student.eval()(batch["x"]), batch).double().mean())
    found = measured(ExampleMetric("accuracy", right), made, pieces(batch, [4, 4, 3]))
    assert found == {"accuracy": pytest.approx(expected)}


def test_an_example_metric_must_give_a_tensor():
    made = Distiller(*mlps(), [Match("head", "head")])
    with pytest.raises(TrainerError, match=r"ExampleMetric\('x'\) returned float, not a tensor"):
        measured(ExampleMetric("x", lambda output, batch: 0.5), made, [points()])
    with pytest.raises(TrainerError, match=r"eval_loader gave no batch"):
        measured(ExampleMetric("x", right), made, [])


def test_the_teacher_is_measured_once():
    def accuracy(network, batches):
        return torch.cat([right(network(batch["x"]), batch) for batch in batches]).double().mean()

    made = Distiller(*mlps(), [Match("head", "head", loss="kl")])
    rows = [{key: value[row] for key, value in points(10).items()} for row in range(10)]
    evaluators = [StudentMetric("whole", accuracy), ExampleMetric("mean", right), StudentMetric("not", accuracy, teacher=False)]
    trainer = Trainer(
        made, DataLoader(rows, 5), epochs=2, eval_loader=DataLoader(rows, 4), evaluators=evaluators, progress=False
    )
    result = trainer.train()
    level = float(accuracy(made.teacher.eval(), [points(10)]))
    assert result.teacher == {"whole": pytest.approx(level), "mean": pytest.approx(level)}
    assert result.history[0].metrics["whole"] == pytest.approx(result.history[0].metrics["mean"])


def test_a_metric_that_the_teacher_does_not_suit_is_a_note_in_the_log(tmp_path):
    def width(student, batches):
        return {5: 1.0}[student[0].out_features]

    result = trainer(
        distiller(), evaluators=[StudentMetric("width", width)], eval_loader=loader(), output_dir=tmp_path, report=False
    ).train()
    assert result.teacher == {}
    assert "could not be measured on the teacher: KeyError: 8" in (tmp_path / "log.jsonl").read_text()


# Best, patience


@pytest.mark.parametrize(
    ("name", "higher", "value", "beats"),
    [("fidelity/logits/kl", None, 0.4, True), ("fidelity/logits/kl", None, 0.6, False), ("klaxon", None, 0.6, True)],
)
def test_less_divergence_is_better(name, higher, value, beats):
    before = Measurement(step=1, epoch=1, metrics={name: 0.5})
    assert Measurement(step=2, epoch=1, metrics={name: value}).beats(before, name, higher=higher) is beats


@pytest.mark.parametrize(
    ("scores", "settings", "steps"),
    [
        ([1, 2, 1, 1, 5], {"patience": 2}, 3),
        ([1, 2, 1, 3, 1, 1, 1], {"patience": 3}, 6),
        ([1, 2, 3, 4, 5, 6, 7], {"patience": 1}, 6),
        ([5, 4, 4, 4, 4, 4, 4], {"patience": 2, "higher_is_better": False}, 3),
        ([math.nan, math.nan, 1, 0, 0, 0, 0], {"patience": 2}, 1),
    ],
)
def test_patience_ends_the_training(scores, settings, steps):
    result = trainer(distiller(), evaluators=[Calls(*scores)], evaluate_every=1, best="score", **settings).train()
    assert (result.steps, result.stopped_early) == (steps, steps < 6)


@pytest.mark.parametrize("kept", ["on disk", "in memory"])
def test_the_best_can_be_loaded_at_the_end(kept, tmp_path):
    made, seen = distiller(LOGITS, Match("0", "0", name="hidden")), []

    def keeps(evaluation):
        seen.append(state(evaluation.distiller))
        return {}

    settings = {"output_dir": tmp_path, "report": False} if kept == "on disk" else {}
    result = trainer(
        made, evaluators=[Calls(1, 2, 5, 3, 4, 5, 0), keeps], evaluate_every=1, best="score", load_best_at_end=True, **settings
    ).train()
    assert result.best.step == 2
    assert same(state(made), seen[2])
    if kept == "on disk":
        last = load_file(tmp_path / "last" / "model.safetensors")
        assert same([last[key] for key in made.student.state_dict()], state(made.student))


def test_metrics_by_steps_and_by_passes_and_several_at_once():
    evaluators = [HeldOutLosses(), Fidelity(), Calls()]
    by_pass = trainer(distiller(), epochs=2, eval_loader=loader(), evaluators=evaluators).train()
    by_step = trainer(distiller(), epochs=2, eval_loader=loader(), evaluators=evaluators, evaluate_every=5).train()
    assert [each.step for each in by_pass.history] == [0, 6, 12]
    assert [each.step for each in by_step.history] == [0, 5, 10, 12]
    assert by_pass.history[0].metrics.keys() == {"eval/loss", "eval/loss/logits", "fidelity/logits/cka", "score"}


def test_an_evaluator_may_draw_from_every_random_state():
    import random

    import numpy as np

    def run(*evaluators):
        made = distiller()
        made.student[1] = nn.Dropout(0.5)
        trainer(made, loader(shuffle=True), seed=0, evaluators=list(evaluators), evaluate_every=1).train()
        return state(made.student), random.random(), np.random.random()  # noqa: NPY002  # the global one is meant

    def draws(evaluation):
        return {"drawn": random.random() + np.random.random() + float(torch.rand(()))}  # noqa: NPY002

    with_, without = run(draws), run()
    assert same(with_[0], without[0])
    assert with_[1:] == without[1:]


def test_held_out_losses_of_a_sum_and_of_schedules():
    made = distiller(Match("2", "2", name="mean", weight=lambda step: 1.0 + step), Match("2", "2", name="sum", reduction="sum"))
    batches = [model(6, 3)[0].weight.detach()[:2], torch.ones(3, 6)]
    with torch.no_grad():
        errors = [(made.student(x) - made.teacher(x)).square().mean(-1) for x in batches]
    found = measured(HeldOutLosses(), made, [[x] for x in batches])
    joined = torch.cat(errors)
    expected = {"mean": float(joined.mean()), "sum": float(joined.sum())}
    assert found["eval/loss/mean"] == pytest.approx(expected["mean"], rel=1e-5)
    assert found["eval/loss/sum"] == pytest.approx(expected["sum"], rel=1e-5)
    assert found["eval/loss"] == pytest.approx(expected["mean"] + expected["sum"], rel=1e-5)


class Gate(nn.Module):
    """Says where something is."""

    def forward(self, x):
        return (x > 0).float()


def test_held_out_losses_with_a_mask_that_only_a_forward_knows():
    def two(student, teacher, mask=None):
        return 0 * (student * mask.mean()).sum() + len(student)

    made = distiller(Match("2", "2", name="masked", mask="1:output", loss=two))
    made.student[1] = Gate()
    batches = [[torch.ones(2, 6)], [torch.ones(6, 6)]]
    assert measured(HeldOutLosses(), made, batches)["eval/loss/masked"] == pytest.approx((2 * 2 + 6 * 6) / 8)


def test_a_student_is_measured_outside_of_a_training():
    made = distiller(LOGITS, Match("0", "0", name="hidden"))
    result = trainer(made, eval_loader=loader(), evaluators=[HeldOutLosses(), Fidelity()]).train()
    modes = flags(made.student, made.teacher)
    found = evaluate(made, loader(), [HeldOutLosses(), Fidelity()])
    assert found.metrics == pytest.approx(result.history[-1].metrics)
    assert evaluate(made, loader()).metrics.keys() == {"eval/loss", "eval/loss/logits", "eval/loss/hidden"}
    assert flags(made.student, made.teacher) == modes
    assert hooks(made.student, made.teacher) == 0
