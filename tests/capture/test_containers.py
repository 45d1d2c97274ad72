"""Row: tuple, list, dict, dataclass, ModelOutput, nested, ``None`` leaf; and outputs that are no ordinary tensor."""

from __future__ import annotations

import dataclasses
import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from capture_zoo import bert, gradients, same_gradients, tokens
from hookdistill import Capture, CaptureError


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


Point = namedtuple("Point", "x y")


class Shaped(nn.Module):
    """Returns what ``shape`` makes of two tensors, and uses both."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.a(x), self.b(x))


class Uses(nn.Module):
    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.inner = Shaped(shape)

    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        return x


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))

LEAVES = [
    (lambda a, b: a, "", "a"),
    (lambda a, b: (a, b), "", "a"),
    (lambda a, b: (a, b), ":output[1]", "b"),
    (lambda a, b: (a, b), ":output[-1]", "b"),
    (lambda a, b: [None, b, a], "", "b"),
    (lambda a, b: [None, b, a], ":output[2]", "a"),
    (lambda a, b: {"p": a}, "", "a"),
    (lambda a, b: {"p": a, "q": b}, ':output["q"]', "b"),
    (lambda a, b: {"p": a, "q": b}, ":output.q", "b"),
    (lambda a, b: {"p": a, "q": b}, ":q", "b"),
    (lambda a, b: {0: a, 1: b}, ":output[1]", "b"),
    (lambda a, b: {"p2": Pair(None, [a, b])}, ':output["p2"].right[1]', "b"),
    (lambda a, b: {"p2": Pair(None, [a, b])}, ":p2.right[0]", "a"),
    (lambda a, b: Pair(a, b), "", "a"),
    (lambda a, b: Pair(None, b), "", "b"),
    (lambda a, b: Pair(a, b), ":output.right", "b"),
    (lambda a, b: Point(a, b), ":output.y", "b"),
    (lambda a, b: Point(a, b), ":output[1]", "b"),
    (lambda a, b: ((None, (b,)), a), "", "b"),
    (lambda a, b: ((None, (b,)), a), ":output[0][1][0]", "b"),
]


@pytest.mark.parametrize(("shape", "selector", "layer"), LEAVES)
def test_a_leaf_of_any_container_is_the_tensor_and_trains_its_layer(shape, selector, layer):
    model = Uses(shape)
    with Capture(model, [f"inner{selector}"]) as captured:
        model(X)
    (got,) = captured["inner"].values()
    want = getattr(model.inner, layer)(X)
    assert torch.equal(got, want)
    assert same_gradients(gradients(got, model), gradients(want, model))


@pytest.mark.parametrize(
    ("shape", "selector", "says"),
    [
        (lambda a, b: {"p": a, "q": b}, "", ["2 tensors", "output.p", "output.q"]),
        (lambda a, b: (a, None), ":output[1]", ["output[1] is None"]),
        (lambda a, b: Pair(a, None), ":output.right", ["output.right is None"]),
        (lambda a, b: (a, b), ":output[2]", ["no leaf [2]", "output[0]", "output[1]"]),
        (lambda a, b: Pair(a, b), ":logits", ["no leaf .logits", "output.left", "output.right"]),
        (lambda a, b: a, ":output[0]", ["bare tensor", "row 0 of the batch", "'output'"]),
        (lambda a, b: a, ":output.last_hidden_state", ["bare tensor"]),
        (lambda a, b: (a, [b, a]), ":output[1]", ["not one tensor", "output[1][0]"]),
        (lambda a, b: ("text", 3), "", ["holds no tensor"]),
        (lambda a, b: ("text", a), ":output[0]", ["no tensor but str"]),
        (lambda a, b: None, "", ["holds no tensor", "None"]),
        (lambda a, b: (), "", ["holds no tensor"]),
    ],
)
def test_a_leaf_that_cannot_be_taken_is_an_error_that_names_it(shape, selector, says):
    model = Uses(shape)
    with pytest.raises(CaptureError) as error, Capture(model, [f"inner{selector}"]):
        model(X)
    assert "'inner" in str(error.value)
    for words in says:
        assert words in str(error.value)


def test_model_outputs_give_their_fields():
    model, batch = bert().eval(), tokens()
    with Capture(model, [":logits", "bert", "bert:last_hidden_state", "bert:output[0]", "bert.encoder.layer.1"]) as captured:
        out = model(**batch, output_hidden_states=True)
    assert torch.equal(captured[""]["logits"], out.logits)
    for key in ("output", "last_hidden_state", "output[0]"):
        assert torch.equal(captured["bert"][key], out.hidden_states[-1])
    assert torch.equal(captured["bert.encoder.layer.1"]["output"], out.hidden_states[2])
    assert same_gradients(gradients(captured["bert.encoder.layer.1"]["output"], model), gradients(out.hidden_states[2], model))


def test_a_view_of_something_larger_is_the_values_asked_for():
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.cls = nn.Linear(4, 4), First()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            c = self.cls(h)
            h *= 0  # through the base of the view
            return c + h[:, 0]

    model, x = Model(), torch.randn(2, 5, 4)
    with Capture(model, "cls") as captured:
        model(x)
    want = model.a(x)[:, 0]
    assert captured["cls"]["output"].shape == (2, 4)
    assert torch.equal(captured["cls"]["output"], want)
    assert same_gradients(gradients(captured["cls"]["output"], model), gradients(want, model))


class Constant(nn.Module):
    """Returns what it holds."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


def _nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors announce that they are a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        _nested,
        lambda: torch.from_numpy(__import__("numpy").ones(3)),
        lambda: torch.ones(3).share_memory_(),
        lambda: nn.Parameter(torch.ones(3)),
        lambda: torch.tensor(2.0),
        lambda: torch.empty(0),
        lambda: torch.ones(3, dtype=torch.complex64),
    ],
    ids=["sparse", "nested", "numpy", "shared", "parameter", "scalar", "empty", "complex"],
)
def test_unusual_tensors_are_the_value_or_an_error(make):
    value = make()
    model = nn.Sequential(Constant(value))
    with Capture(model, "0") as captured:
        model(X)
    assert captured["0"]["output"] is value
    with Capture(model, "0") as captured:
        model(X)
        before = value.clone()
        with torch.no_grad():
            value.mul_(2)
        try:
            got = captured["0"]["output"]
        except CaptureError as error:
            assert "changed in place" in str(error)
        else:
            assert torch.equal(got, before)


def test_a_parameter_as_output_trains():
    model = nn.Sequential(Constant(nn.Parameter(torch.ones(3))))
    with Capture(model, "0") as captured:
        model(X)
    captured["0"]["output"].sum().backward()
    assert model[0].value.grad.tolist() == [1, 1, 1]


def test_a_tensor_subclass_keeps_its_class_and_is_never_wrong():
    class Tagged(Tensor):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tag = Constant(torch.ones(3).as_subclass(Tagged))

        def forward(self, x: Tensor, *, write: bool) -> Tensor:
            y = self.tag(x)
            return y.mul_(2) if write else y * 2

    model = Model()
    with Capture(model, "tag") as captured:
        model(X, write=False)
        assert type(captured["tag"]["output"]) is Tagged
        model(X, write=True)
        with pytest.raises(CaptureError, match="Tagged was changed in place"):
            captured["tag"]["output"]
