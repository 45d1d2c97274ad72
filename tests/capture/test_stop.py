"""``stop=True``: the forward ends as soon as the last address has been seen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from capture_zoo import Mlp, bert, edited, hooks_on, rows, tokens
from hookdistill import Capture, CaptureError


class Counted(Mlp):
    """Counts the layers that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[int] = []
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(lambda module, args, i=i: self.ran.append(i))


def test_stop_ends_the_forward_and_gives_none():
    model, x = Counted(), rows()
    with Capture(model, ["layers.1:input", "layers.0"], stop=True) as captured:
        assert model(x) is None
        assert model.ran == [0, 1]
        assert torch.equal(captured["layers.0"]["output"], nn.functional.linear(x, *model.layers[0].parameters()))
        assert torch.equal(captured["layers.1"]["input"], captured["layers.0"]["output"].tanh())
        assert model(x) is None  # and again
    assert hooks_on(model) == 3
    assert model(x) is not None


def test_stop_gives_the_values_and_gradients_of_the_whole_forward():
    model, batch = bert().eval(), tokens()
    with edited(model, ["bert.encoder.layer.1"]) as want:
        model(**batch)
    with Capture(model, "bert.encoder.layer.1", stop=True) as captured:
        assert model(**batch) is None
    got = captured["bert.encoder.layer.1"]["output"]
    assert torch.equal(got, want["bert.encoder.layer.1"])
    got.sum().backward()
    assert model.bert.encoder.layer[1].output.dense.weight.grad is not None


def test_stop_with_the_models_own_output_runs_to_the_end():
    model, x = Counted(), rows()
    with Capture(model, ["layers.0", ":output"], stop=True) as captured:
        out = model(x)
    assert out is None or torch.equal(out, captured[""]["output"])
    assert model.ran == [0, 1, 2]
    assert torch.equal(captured[""]["output"], model(x))


def test_stop_is_content_with_the_first_call():
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.ran = nn.Linear(8, 8), 0

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = self.lin(x)
                self.ran += 1
            return x

    model = Loop()
    with Capture(model, "lin", stop=True) as captured:
        assert model(rows()) is None
    assert model.ran == 0
    assert captured["lin"]["output"].shape == (4, 8)
    with Capture(model, "lin@2", stop=True):
        model(rows())
    assert model.ran == 2


class Guarded(nn.Module):
    """Catches every ``Exception`` of its body, and works under ``no_grad`` and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return self.b(self.a(x))
        except Exception:
            return x


def test_stop_is_not_swallowed_and_restores_contexts():
    model = Guarded()
    with Capture(model, "a", stop=True) as captured:
        assert model(rows()) is None
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
    assert captured["a"]["output"].dtype is torch.bfloat16


def test_stop_an_exception_is_the_users():
    model = Mlp()
    with pytest.raises(RuntimeError, match="shapes"), Capture(model, "layers.2", stop=True):
        model(torch.randn(2, 3))
    assert hooks_on(model) == 0
    assert model(rows()) is not None


def test_stop_does_not_take_anything_from_another_capture():
    model, x = Counted(), rows()
    whole = model(x)
    with Capture(model, ["layers.2", ":output"]) as outer, Capture(model, "layers.0", stop=True) as inner:
        assert torch.equal(model(x), whole)  # the other one wants it to the end
        assert inner["layers.0"]["output"].shape == (4, 8)
        assert torch.equal(outer[""]["output"], whole)
    model.ran.clear()
    with Capture(model, "layers.1", stop=True) as later, Capture(model, "layers.0", stop=True) as sooner:
        assert model(x) is None
        assert model.ran == [0, 1]
        assert sooner["layers.0"]["output"].shape == later["layers.1"]["output"].shape
    assert hooks_on(model) == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_stop_captures_may_be_closed_in_any_order(order):
    model, x = Counted(), rows()
    captures = [Capture(model, "layers.0", stop=True), Capture(model, "layers.1", stop=True)]
    for capture in captures:
        capture.open()
    captures[order[0]].close()
    model.ran.clear()
    assert model(x) is None
    assert model.ran == ([0] if order[0] == 1 else [0, 1])
    captures[order[1]].close()
    assert hooks_on(model) == 3
    assert model(x) is not None


def test_stop_inside_a_larger_model_lets_the_larger_one_run():
    inner = Counted()
    larger = nn.Sequential(inner, nn.Linear(8, 2))
    with Capture(larger, "1"), Capture(inner, "layers.0", stop=True) as captured:
        assert larger(rows()).shape == (4, 2)
    assert captured["layers.0"]["output"].shape == (4, 8)


def test_stop_does_not_escape_from_a_call_that_is_not_the_models():
    model = bert().eval()
    with Capture(model, "bert.encoder.layer.0", stop=True) as captured:
        for _ in range(3):
            assert model.bert(**tokens()) is not None
            assert captured["bert.encoder.layer.0"]["output"].shape == (2, 6, 16)


def test_stop_always_call_hooks_of_others_do_not_break_the_next_forward():
    model, calls = Mlp(), []
    model.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    with Capture(model, "layers.0", stop=True):
        for _ in range(3):
            model(rows())
    model(rows())
    assert calls == [1]  # torch calls them for an Exception only


@pytest.mark.parametrize("address", ["layers.0@-1", "layers.0@*"])
def test_stop_needs_to_know_the_last_call(address):
    with pytest.raises(CaptureError, match="cannot tell which call is the last"):
        Capture(Mlp(), address, stop=True)


def test_stop_on_a_compiled_model_is_refused():
    with pytest.raises(CaptureError, match="compiled"):
        Capture(torch.compile(Mlp(), backend="eager"), "layers.0", stop=True)
    model = Mlp()
    model.compile(backend="eager")
    with pytest.raises(CaptureError, match="compiled"):
        Capture(model, "layers.0", stop=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at every tensor it meets
def test_stop_is_not_undone_or_left_behind_when_the_model_is_compiled_meanwhile():
    model, x = Mlp(), rows()
    with Capture(model, "layers.0", stop=True) as captured:
        model.compile(backend="eager")
        compiled = model._compiled_call_impl
        with contextlib.suppress(CaptureError):
            assert model(x) is not None
            captured["layers.0"]["output"]
        captured.clear()
    assert model._compiled_call_impl is compiled


def test_stop_under_attention_leaves_no_mode_behind():
    model = bert().eval()
    addresses = ["bert.encoder.layer.1:attention", "bert.encoder.layer.1.attention.self.query"]
    with Capture(model, addresses, stop=True) as captured:
        for _ in range(2):
            assert model(**tokens()) is None
            assert captured["bert.encoder.layer.1"]["attention"].shape == (2, 2, 6, 6)
    assert torch.overrides._get_current_function_mode_stack() == []
