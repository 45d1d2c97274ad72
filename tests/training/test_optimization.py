"""Optimizers and schedulers: what is made where none is given, and that given ones are followed."""

import math

import pytest
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from hookdistill import Trainer, parameter_groups
from pairs import same, state
from runs import DATA, HIDDEN, LOGITS, constant, distiller, loader, trained


def spied(into):
    def make(optimizer, total_steps):
        into.append((optimizer, total_steps))
        return constant(optimizer, total_steps)

    return make


def test_the_default_optimizer_trains_adapters_and_decays_no_biases():
    made, spy = distiller(LOGITS, HIDDEN), []
    Trainer(made, loader(), epochs=1, lr=0.5, scheduler=spied(spy), progress=False).train()
    ((optimizer, total),) = spy
    assert type(optimizer) is AdamW
    assert total == 6
    held = {group["name"]: {id(each) for each in group["params"]} for group in optimizer.param_groups}
    assert held == {
        "student": {id(made.student[0].weight), id(made.student[2].weight)},
        "student, no decay": {id(made.student[0].bias), id(made.student[2].bias)},
        "adapters": {id(each) for each in made.adapters.parameters()},
    }
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.01), (0.5, 0.0), (0.5, 0.01)]


def test_adapters_may_have_a_rate_of_their_own():
    made, spy = distiller(LOGITS, HIDDEN), []
    Trainer(made, loader(), epochs=1, lr=0.5, adapter_lr=0.1, weight_decay=0.0, scheduler=spied(spy), progress=False).train()
    groups = spy[0][0].param_groups
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("student", 0.5, 0.0),
        ("student, no decay", 0.5, 0.0),
        ("adapters", 0.1, 0.0),
    ]


def test_groups_for_an_optimizer_of_ones_own():
    made = distiller(LOGITS, HIDDEN)
    made.plan([DATA])
    made.student[0].bias.requires_grad_(False)
    groups = parameter_groups(made, lr=0.2, adapter_lr=0.3, weight_decay=0.1)
    assert [(group["name"], group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        ("student", 0.2, 0.1, 2),
        ("student, no decay", 0.2, 0.0, 1),
        ("adapters", 0.3, 0.1, 1),
    ]
    trained(made, optimizer=SGD(groups))


def rates(**settings):
    """The rate at each optimizer step."""
    found, spy = [], []
    made = distiller()

    def make(parameters):
        optimizer = SGD(parameters, lr=1.0)
        optimizer.register_step_pre_hook(lambda *_: found.append(optimizer.param_groups[0]["lr"]))
        spy.append(optimizer)
        return optimizer

    Trainer(made, loader(), epochs=2, optimizer=make, progress=False, **settings).train()
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scheduler": "constant"}, [1.0] * 12),
        ({"scheduler": "linear"}, [1 - step / 12 for step in range(12)]),
        ({"scheduler": "linear", "warmup": 4}, [0, 0.25, 0.5, 0.75, *[1 - step / 8 for step in range(8)]]),
        ({"scheduler": "constant_with_warmup", "warmup": 0.25}, [0, 1 / 3, 2 / 3, *[1.0] * 9]),
        ({"warmup": 4}, [0, 0.25, 0.5, 0.75, *[(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]]),
    ],
    ids=str,
)
def test_a_scheduler_by_name(settings, expected):
    assert rates(**settings) == pytest.approx(expected)


def test_the_default_schedule_is_a_cosine_to_zero():
    made = distiller()
    optimizer = SGD(made.parameters(), lr=1.0)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    Trainer(made, loader(), epochs=2, accumulate=2, optimizer=optimizer, progress=False).train()
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_a_given_scheduler_steps_with_the_optimizer():
    made = distiller()
    optimizer = SGD(made.parameters(), lr=1.0)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    trained(made, epochs=2, accumulate=2, optimizer=optimizer, scheduler=scheduler)
    assert scheduler.last_epoch == 6


def test_adapters_are_trained():
    made = distiller(HIDDEN)
    made.plan([DATA])
    before = state(made.adapters)
    trained(made)
    assert not same(before, state(made.adapters))


def test_parts_of_the_student_may_be_left_out():
    made = distiller()
    before = state(made.student[0])
    kept = []  # gradients that would pile up, as no optimizer clears them

    def look(evaluation):
        kept.extend(parameter.grad for parameter in made.parameters() if parameter.grad is not None)
        return {}

    trained(made, optimizer=SGD(made.student[2].parameters(), lr=0.1), evaluators=[look], evaluate_every=1)
    assert same(before, state(made.student[0]))
    assert kept == []
