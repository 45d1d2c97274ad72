"""Averages of the student, which are saved or teach, and weights that balance themselves."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import hookdistill
from hookdistill import EMA, Distiller, GradNormBalance, MagnitudeBalance, Match, TrainerError
from hookdistill.training.gradients import norms_by_match
from pairs import gradients, mlps, points, same, state
from runs import DATA, close, constant, distiller, loader, model, noisy, sgd, trainer


class Follows:
    """An evaluator that keeps copies of the student, as it was evaluated."""

    def __init__(self):
        self.seen = []

    def __call__(self, evaluation):
        self.seen.append(state(evaluation.student))
        return {"score": -float(evaluation.step == 4)}


def averaged(histories, decay):
    """The average after each optimizer step, spelled out."""
    mean, means = histories[0], [histories[0]]
    for step, now in enumerate(histories[1:]):
        share = min(decay, (1 + step) / (10 + step))
        mean = [share * old + (1 - share) * new for old, new in zip(mean, now, strict=True)]
        means.append(mean)
    return means


def test_the_average_is_evaluated_and_saved_and_is_the_student_at_the_end(tmp_path):
    plain, seen = Follows(), Follows()
    trainer(distiller(), evaluators=[plain], evaluate_every=1).train()
    made = distiller()
    trainer(made, evaluators=[seen], evaluate_every=1, ema=0.3, output_dir=tmp_path, best="score", report=False).train()
    expected = averaged(plain.seen, 0.3)
    assert all(close(found, wanted) for found, wanted in zip(seen.seen, expected, strict=True))
    assert close(state(made.student), expected[-1])
    for name, wanted in (("best", expected[0]), ("last", expected[-1])):
        found = load_file(tmp_path / name / "model.safetensors")
        assert close([found[key] for key in made.student.state_dict()], wanted)


def test_without_warm_up_the_decay_is_what_it_says():
    student = model(5, seed=2)
    ema = EMA(student, decay=0.9, warmup=False)
    before = state(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    ema.update(student, step=0)
    assert close(state(ema.model), [value + 0.1 for value in before])
    assert close(state(student), [value + 1.0 for value in before])
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


def test_statistics_are_the_last_ones_and_weights_the_average():
    student = mlps()[1]
    ema = EMA(student, decay=0.5, warmup=False)
    with torch.no_grad():
        student.norm.running_mean.fill_(3.0)
        student.norm.num_batches_tracked.fill_(7)
        student.norm.weight.fill_(3.0)
    ema.update(student, step=0)
    assert torch.equal(ema.model.norm.running_mean, torch.full((8,), 3.0))
    assert ema.model.norm.num_batches_tracked == 7
    assert torch.equal(ema.model.norm.weight, torch.full((8,), 2.0))


def test_the_average_teaches_the_student():
    made = noisy()
    ema = EMA(made.student, decay=0.5)
    both = Distiller(
        {"other": made.teacher, "itself": ema.model},
        made.student,
        [
            Match("2", "2", teacher_model="other", name="other"),
            Match("2", "2", teacher_model="itself", name="itself", weight=0.5),
        ],
    )
    seen = Follows()
    before = state(made.student)
    result = trainer(both, evaluators=[seen], evaluate_every=1, ema=ema, seed=0).train()
    assert result.losses["itself"] > 0
    assert same(seen.seen[-1], state(made.student))  # the student itself is evaluated
    assert not same(state(ema.model), before)
    expected = averaged(seen.seen, 0.5)[-1]
    assert close(state(ema.model), expected)


@pytest.mark.parametrize("decay", [0.0, 1.0, True])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(TrainerError, match="between 0 and 1"):
        EMA(model(3, seed=0), decay=decay)


def test_an_average_of_another_model_is_refused():
    with pytest.raises(TrainerError, match=r"other parameters than the student; use EMA\(student\)"):
        EMA(nn.Linear(2, 2)).update(model(3, seed=0), 0)


# Balances


def pair():
    return distiller(Match("2", "2", name="large", weight=100.0), Match("2", "2", loss="l1", name="small", weight=1.0))


def test_magnitudes_are_divided_by_their_running_mean():
    balance = MagnitudeBalance(decay=0.5)
    assert balance.factors() == {}
    means = {"a": 0.0, "b": 0.0}
    for count, (a, b) in enumerate([(4.0, 0.5), (2.0, 0.1), (6.0, 0.3)], 1):
        balance.see_parts({"a": torch.tensor(a), "b": torch.tensor(b)})
        means = {"a": 0.5 * means["a"] + 0.5 * a, "b": 0.5 * means["b"] + 0.5 * b}
        expected = {name: (1 - 0.5**count) / mean for name, mean in means.items()}
        assert {name: float(factor) for name, factor in balance.factors().items()} == pytest.approx(expected)
    balance.see_parts({"a": torch.tensor(float("nan")), "b": torch.tensor(0.0)})
    assert all(bool(factor.isfinite()) for factor in balance.factors().values())


def test_a_match_that_is_zero_has_no_infinite_factor():
    balance = MagnitudeBalance()
    balance.see_parts({"a": torch.tensor(0.0)})
    assert balance.factors() == {"a": 1.0}


def test_gradients_are_made_equal():
    balance = GradNormBalance()
    balance.see_gradients({"a": 4.0, "b": 1.0, "c": 0.0}, {"a": 1.0, "b": 1.0, "c": 0.0})
    factors = balance.factors()
    assert factors.keys() == {"a", "b"}
    assert factors["a"] * 4.0 == pytest.approx(factors["b"] * 1.0)
    assert sum(factors.values()) == pytest.approx(2)


def test_a_match_that_learns_slower_gets_more():
    balance = GradNormBalance(alpha=1.0)
    balance.see_gradients({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    balance.see_gradients({"a": 1.0, "b": 1.0}, {"a": 0.9, "b": 0.3})
    assert balance.factors()["a"] / balance.factors()["b"] == pytest.approx(3.0)


def test_norms_are_those_of_the_unweighted_matches_and_leave_nothing():
    made = Distiller(
        *mlps(dropout=0.5),
        [Match("head", "head", name="a", weight=3.0), Match("second", "second", name="b", weight=lambda step: 0.0)],
    )
    made.plan(points())
    made.train()
    before, random = state(made), torch.random.get_rng_state()
    norms, values = norms_by_match(made, points(), 0, Accelerator())
    assert norms.keys() == values.keys() == {"a"}
    assert same(state(made), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    losses = made(points(), shares={"a": 1 / 3.0})
    found = [each for each in gradients(made.student, losses.total) if each is not None]
    assert norms["a"] == pytest.approx(float(torch.cat([each.flatten() for each in found]).norm()), rel=1e-5)
    assert values["a"] == pytest.approx(float(losses.parts["a"]))


@pytest.mark.parametrize("balance", ["magnitude", "gradnorm", GradNormBalance(every=2)])
def test_a_balance_weighs_the_training(balance):
    def run(**settings):
        made = pair()
        trainer(made, epochs=2, **settings, optimizer=sgd(0.01)).train()
        return state(made.student)

    balanced = run(balance=balance)
    assert not close(balanced, run())
    assert same(balanced, run(balance=copy.deepcopy(balance)))
    assert same(balanced, run(balance=balance))  # what a run finds is not left on the balance that was given


def test_the_first_step_is_unbalanced_and_the_second_is():
    made = pair()
    by_hand = pair()
    x = DATA[:4]
    trainer(made, [x, x], balance=MagnitudeBalance(decay=0.0), optimizer=sgd(0.001)).train()
    factors = {"large": 1.0, "small": 1.0}
    optimizer = torch.optim.SGD(by_hand.student.parameters(), lr=0.001)
    for _ in range(2):
        losses = by_hand([x], shares=factors)
        factors = {name: 1 / float(part) for name, part in losses.parts.items()}
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert close(state(made.student), state(by_hand.student))


def test_factors_are_logged(tmp_path):
    trainer(pair(), balance="magnitude", output_dir=tmp_path, log_every=2, report=False).train()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert all(line["balance_by_name"].keys() == {"large", "small"} for line in steps)


@pytest.mark.parametrize(
    "make", [lambda: MagnitudeBalance(decay=1.0), lambda: GradNormBalance(every=0), lambda: GradNormBalance(decay=-1)]
)
def test_a_balance_that_cannot_be_is_refused(make):
    with pytest.raises(TrainerError):
        make()


def test_several_teachers_and_a_schedule_train_together():
    made = Distiller(
        {"a": model(8, seed=1), "b": model(4, seed=9)},
        model(5, seed=2),
        [
            Match("2", "2", teacher_model="a", name="a", weight=hookdistill.schedules.Linear(1.0, 0.0, steps=6)),
            Match("0", "0", teacher_model="b", name="b", weight=hookdistill.schedules.Window(1.0, start=3)),
        ],
    )
    before = state(made.student)
    result = trainer(made, loader(), scheduler=constant).train()
    assert result.losses.keys() == {"a", "b"}
    assert not same(before, state(made.student))
