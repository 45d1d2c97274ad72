"""Schedules of weights and temperatures: their values, their edges, and that a distiller follows them."""

import math
import pickle

import pytest
import torch

from hookdistill import Distiller, Match, MatchError
from hookdistill.schedules import Constant, Cosine, Linear, Steps, Warmup, Window
from pairs import mlps, points


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.5), {0: 0.5, 7: 0.5}),
        (Linear(2.0, 0.0, steps=4), {0: 2.0, 1: 1.5, 4: 0.0, 9: 0.0}),
        (Cosine(1.0, 0.0, steps=4), {0: 1.0, 1: (1 + math.cos(math.pi / 4)) / 2, 2: 0.5, 4: 0.0, 9: 0.0}),
        (Steps({10: 0.1, 0: 1.0, 5: 0.5}), {0: 1.0, 4: 1.0, 5: 0.5, 9: 0.5, 10: 0.1, 99: 0.1}),
        (Warmup(4), {0: 0.0, 1: 0.25, 4: 1.0, 9: 1.0}),
        (Warmup(2, Linear(1.0, 0.0, steps=4)), {0: 0.0, 1: 0.375, 2: 0.5, 4: 0.0}),
        (Window(0.3, start=2, stop=4), {0: 0.0, 1: 0.0, 2: 0.3, 3: 0.3, 4: 0.0}),
        (Window(Linear(1.0, 0.0, steps=2), start=3, outside=0.1), {2: 0.1, 3: 1.0, 4: 0.5, 5: 0.0}),
    ],
    ids=repr,
)
def test_values(schedule, values):
    assert {step: schedule(step) for step in values} == pytest.approx(values)
    again = pickle.loads(pickle.dumps(schedule))
    assert (repr(again), again(1)) == (repr(schedule), schedule(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(1.0, 0.0, steps=0),
        lambda: Cosine(1.0, 0.0, steps=-1),
        lambda: Warmup(True),
        lambda: Window(start=-1),
        lambda: Window(start=3, stop=3),
        lambda: Steps({1: 0.5}),
        lambda: Steps({0: 0.5, 1.5: 0.1}),
    ],
)
def test_a_schedule_that_says_nothing_is_refused(make):
    with pytest.raises(MatchError):
        make()


def test_a_distiller_follows_weight_and_temperature():
    matches = [
        Match("second", "second", name="hidden", weight=Window(2.0, start=3)),
        Match("head", "head", loss="kl", name="logits", temperature=Linear(4.0, 1.0, steps=3)),
    ]
    distiller = Distiller(*mlps(), matches).eval()
    with torch.no_grad():
        early, late = (distiller(points(), step=step) for step in (0, 3))
    assert early.total == early.parts["logits"]
    torch.testing.assert_close(late.total, 2 * late.parts["hidden"] + late.parts["logits"])
    assert early.parts["logits"] != late.parts["logits"]
