"""Nested states survive JSON and safetensors to the bit, and what cannot be saved says where it is."""

import json
import math
import random
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR
from transformers import get_scheduler

from hookdistill.randomness import Stream, forked, random_state, set_random_state, set_seed
from hookdistill.training.states import CheckpointError, read_state, unpack, write_state


def through_disk(tree, folder):
    write_state(tree, folder, "state")
    return read_state(folder, "state")


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(equal, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


TREES = [
    {"a": [1, -2, 0.1, 1e-300, True, None, "x"], "b": (1, (2.5,)), "__kind__": "mine"},
    {0: "int", "0": "str", (1, 2): [3]},
    {"inf": math.inf, "minus": -math.inf, "nan": math.nan},
    {"t": torch.randn(3, 2), "scalar": torch.tensor(1.5), "half": torch.randn(2).bfloat16(), "none": torch.zeros(0, 3)},
    {"bytes": torch.arange(5, dtype=torch.uint8), "bool": torch.tensor([True, False]), "turned": torch.randn(3, 4).t()},
    {"array": np.arange(4, dtype=np.uint32), "dtype": torch.float16, "set": {1, 2}, "big": 2**80},
    {"counter": Counter({3: 2, 5: 1})},
    [],
    {},
]


@pytest.mark.parametrize("tree", TREES, ids=range(len(TREES)))
def test_a_tree_comes_back_as_it_was(tree, tmp_path):
    assert equal(through_disk(tree, tmp_path), tree)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors"}


def test_a_tensor_that_is_there_twice_is_written_once_and_a_view_is_another(tmp_path):
    weight = torch.randn(4, 3)
    back = through_disk({"a": weight, "b": weight, "part": weight[1:3], "flat": weight.view(-1)}, tmp_path)
    assert equal(back, {"a": weight, "b": weight, "part": weight[1:3], "flat": weight.view(-1)})
    assert back["a"] is back["b"]
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a", "flat", "part"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), r"state\.optimizer\.0\.what is a object"),
        (lambda step: step, r"state\.optimizer\.0\.what is a function"),
        (torch.zeros(2, 2).to_sparse(), r"state\.optimizer\.0\.what is a tensor of layout torch\.sparse_coo"),
    ],
)
def test_what_cannot_be_saved_is_an_error_that_has_its_place(value, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        write_state({"optimizer": [{"what": value}]}, tmp_path, "state")


def test_a_kind_of_the_future_is_an_error():
    with pytest.raises(CheckpointError, match=r"'qubit'.*newer"):
        unpack(json.loads('{"__kind__": "qubit", "value": 1}'), {})


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.SGD])
def test_an_optimizer_goes_on_as_if_nothing_had_been(make, tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()

    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    options = {"momentum": 0.9} if make is torch.optim.SGD else {}
    ours, theirs = (make(model.parameters(), lr=0.1, **options) for model in (first, second))
    for _ in range(3):
        step(first, ours)
    theirs.load_state_dict(through_disk(ours.state_dict(), tmp_path))
    second.load_state_dict(through_disk(first.state_dict(), tmp_path))
    for model, optimizer in ((first, ours), (second, theirs)):
        step(model, optimizer)
    assert torch.equal(first.weight, second.weight)


SCHEDULERS = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "steps": lambda optimizer: MultiStepLR(optimizer, [2, 4, 4]),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=10),
    "sequence": lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, 5)], [3]),
    "transformers": lambda optimizer: get_scheduler("linear", optimizer, 2, 10),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_as_if_nothing_had_been(name, tmp_path):
    def rates(scheduler, optimizer, steps):
        found = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    def make():
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
        return SCHEDULERS[name](optimizer), optimizer

    (ours, first), (theirs, second) = make(), make()
    rates(ours, first, 4)
    second.load_state_dict(through_disk(first.state_dict(), tmp_path))
    theirs.load_state_dict(through_disk(OrderedDict(ours.state_dict()), tmp_path))
    assert rates(ours, first, 4) == rates(theirs, second, 4)


def draws():
    legacy = np.random.rand()  # noqa: NPY002  # what most data sets draw from
    return random.random(), legacy, torch.rand(()).item()


def test_random_states_go_through_the_disk(tmp_path):
    state = through_disk(random_state(), tmp_path)
    first = draws()
    set_random_state(state)
    assert draws() == first


def test_what_is_drawn_in_a_fork_is_not_missed_outside():
    set_seed(5)
    expected = draws()
    set_seed(5)
    with forked():
        assert draws() == expected
    assert draws() == expected


def test_a_stream_goes_on_where_it_stood_and_leaves_the_outside_alone():
    set_seed(1)
    expected = [draws(), draws()]
    set_seed(2)
    outside = draws()
    set_seed(2)
    stream = Stream(1)
    with stream:
        first = draws()
    assert draws() == outside
    with stream:
        assert [first, draws()] == expected
