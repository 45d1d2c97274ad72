"""Row: keyword-only call; and the other ways to name what a module was called with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from capture_zoo import bert, gradients, llama, rows, same_gradients, tokens
from hookdistill import Capture, CaptureError


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, *rest: Tensor, bias: Tensor | None = None, **extra: Tensor
    ) -> Tensor:
        return self.lin(x)


class Calls(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.pre, self.inner = nn.Linear(8, 8), Takes()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        h = self.pre(x)
        return self.how(self.inner, h)


CALLS = [
    (lambda f, h: f(h), "input", 1),
    (lambda f, h: f(h), "input[0]", 1),
    (lambda f, h: f(h), "input.x", 1),
    (lambda f, h: f(x=h), "input", 1),
    (lambda f, h: f(x=h), "input.x", 1),
    (lambda f, h: f(x=h), "input[0]", 1),
    (lambda f, h: f(bias=h * 3, scale=h * 2, x=h), "input", 1),  # by the signature, not by the order of the call
    (lambda f, h: f(h, h * 2), "input[1]", 2),
    (lambda f, h: f(h, h * 2), "input.scale", 2),
    (lambda f, h: f(h, scale=h * 2), "input[1]", 2),
    (lambda f, h: f(h, h * 2, h * 3), "input[2]", 3),
    (lambda f, h: f(h, h * 2, h * 3), "input[-1]", 3),
    (lambda f, h: f(h, bias=h * 3), "input.bias", 3),
    (lambda f, h: f(h, other=h * 3), "input.other", 3),
    (lambda f, h: f(h, pair={"p": (h, h * 2)}), 'input.pair["p"][1]', 2),
]


@pytest.mark.parametrize(("how", "selector", "times"), CALLS)
def test_arguments_have_names_and_numbers_however_they_are_passed(how, selector, times):
    model, x = Calls(how), rows()
    with Capture(model, [f"inner:{selector}"]) as captured:
        model(x)
    got, want = captured["inner"][selector], model.pre(x) * times
    assert torch.equal(got, want)
    assert same_gradients(gradients(got, model), gradients(want, model))


@pytest.mark.parametrize(
    ("how", "selector", "says"),
    [
        (lambda f, h: f(h), "input.scale", ["input.scale was not passed", "x: Tensor[4, 8]"]),
        (lambda f, h: f(h), "input[1]", ["input[1] was not passed"]),
        (lambda f, h: f(h, None), "input.scale", ["input.scale is None"]),
        (lambda f, h: f(h), "input.mask", ["input.mask was not passed"]),
    ],
)
def test_an_argument_that_was_not_passed_is_an_error_that_lists_those_that_were(how, selector, says):
    model = Calls(how)
    with pytest.raises(CaptureError) as error, Capture(model, [f"inner:{selector}"]):
        model(rows())
    for words in says:
        assert words in str(error.value)


def test_keyword_only_call_of_llamas_self_attention():
    model, batch = llama().eval(), tokens()
    with Capture(model, ["model.layers.1.self_attn:input.hidden_states", "model.layers.1.input_layernorm"]) as captured:
        model(**batch)
    got = captured["model.layers.1.self_attn"]["input.hidden_states"]
    hidden = model(**batch, output_hidden_states=True).hidden_states[1]
    want = model.model.layers[1].input_layernorm(hidden)
    assert torch.equal(got, want)
    assert same_gradients(gradients(got, model), gradients(want, model))


def test_input_of_the_model_itself():
    model, batch = bert().eval(), tokens()
    with Capture(model, [":input", ":input.attention_mask"]) as captured:
        model(**batch)
    assert torch.equal(captured[""]["input"], batch["input_ids"])
    assert torch.equal(captured[""]["input.attention_mask"], batch["attention_mask"])


def test_an_input_that_the_module_overwrites_is_what_it_was_called_with():
    class Doubles(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pre, self.doubles = nn.Linear(8, 8), Doubles()

        def forward(self, x: Tensor) -> Tensor:
            return self.doubles(self.pre(x))

    model, x = Model(), rows()
    with Capture(model, ["doubles:input", "doubles", "pre"]) as captured:
        model(x)
    want = model.pre(x)
    for got, expected in [
        (captured["doubles"]["input"], want),
        (captured["doubles"]["output"], want * 2),
        (captured["pre"]["output"], want),
    ]:
        assert torch.equal(got, expected)
        assert same_gradients(gradients(got, model), gradients(expected, model))


def test_an_input_is_what_the_users_pre_hooks_made_of_it():
    model, x = Calls(lambda f, h: f(h)), rows()
    model.inner.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with Capture(model, ["inner:input"]) as captured:
        model.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model(x)
    assert torch.equal(captured["inner"]["input"], (model.pre(x) + 1) * 2)


def test_a_later_pre_hook_on_the_model_itself_is_an_error_and_then_right():
    model, x = Takes(), rows()
    with Capture(model, [":input"]) as captured:
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        model(x)
        with pytest.raises(CaptureError, match="registered on this module after the capture was opened"):
            captured[""]["input"]
        model(x)
        assert torch.equal(captured[""]["input"], x * 2)
        with Capture(model, [":input"]) as second:  # another capture's hook rewrites nothing
            model(x)
        assert torch.equal(captured[""]["input"], x * 2)
        assert torch.equal(second[""]["input"], x * 2)
