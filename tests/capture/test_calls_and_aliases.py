"""Rows: module called several times; one module under two names; path that names nothing; module never called or replaced."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from capture_zoo import Mlp, albert, bert, encoder, gradients, hooks_on, rows, same_gradients, tokens
from hookdistill import AddressError, Capture, CaptureError


class Loop(nn.Module):
    """Runs ``shared`` as often as ``times`` says."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.shared, self.times = nn.Linear(8, 8), times
        self.again = self.shared

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.shared(x).tanh()
        return x

    def values(self, x: Tensor) -> list[Tensor]:
        made = []
        for _ in range(self.times):
            made.append(self.shared(x))
            x = made[-1].tanh()
        return made


@pytest.mark.parametrize("call", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("path", ["shared", "again"])
def test_a_module_called_several_times_needs_a_call_index(path, call):
    model, x = Loop(3), rows()
    with Capture(model, [f"{path}@{call}", f"{path}@*", f"{path}:input@{call}"]) as captured:
        model(x)
    got, want = captured[path][f"output@{call}"], model.values(x)[call]
    assert torch.equal(got, want)
    assert same_gradients(gradients(got, model), gradients(want, model))
    assert [torch.equal(*both) for both in zip(captured[path]["output@*"], model.values(x), strict=True)] == [True] * 3
    before = [x, *[value.tanh() for value in model.values(x)]][:3][call]
    assert torch.equal(captured[path][f"input@{call}"], before)


def test_several_calls_without_an_index_are_an_error_that_counts_them():
    with (
        pytest.raises(CaptureError, match=r"ran 3 times.*again@0 to again@2.*again@-1 for the last.*again@\*"),
        Capture(Loop(3), "again") as captured,
    ):
        captured._session.model(rows())


@pytest.mark.parametrize(("times", "call"), [(1, 1), (3, 3), (2, -3)])
def test_a_call_that_did_not_happen_is_an_error(times, call):
    model = Loop(times)
    with (
        pytest.raises(CaptureError, match=f"ran (once|{times} times) in this forward, so there is no call {call}"),
        Capture(model, f"shared@{call}"),
    ):
        model(rows())


def test_one_module_under_two_names_has_both_names():
    model, x = Loop(1), rows()
    with Capture(model, ["shared", "again", "*"]) as captured:
        model(x)
    assert list(captured) == ["shared", "again"]
    assert torch.equal(captured["shared"]["output"], model.shared(x))
    assert torch.equal(captured["again"]["output"], model.shared(x))


def test_albert_runs_one_layer_four_times():
    model, batch = albert().eval(), tokens()
    path = "encoder.albert_layer_groups.0.albert_layers.0"
    with Capture(model, [f"{path}@{call}" for call in ("*", -1, 2)]) as captured:
        out = model(**batch, output_hidden_states=True)
    for call, got in enumerate(captured[path]["output@*"]):
        want = out.hidden_states[call + 1]
        assert torch.equal(got, want)
        assert same_gradients(gradients(got, model), gradients(want, model))
    assert torch.equal(captured[path]["output@2"], out.hidden_states[3])
    assert torch.equal(captured[path]["output@-1"], out.hidden_states[4])


def test_list_of_calls_is_empty_never_only_an_error_when_the_module_did_not_run():
    with pytest.raises(CaptureError, match="never called"), Capture(Loop(0), "shared@*") as captured:
        captured._session.model(rows())


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("layer.3", ["Did you mean 'layers.3'", "'layers'", "'act'", "'tail'"]),
        ("layers.3", ["'layers' (ModuleList) has 3 items, '0' to '2'"]),
        ("layers.-4", ["has 3 items"]),
        ("layers", ["ModuleList, which is never called", "layers.*"]),
        ("tail.weight", ["'tail' (Linear) has no submodules"]),
        ("**.attention", ["names none of the"]),
    ],
)
def test_a_path_that_names_nothing_is_an_error_before_any_hook(address, says):
    model = Mlp()
    with pytest.raises(AddressError) as error:
        Capture(model, ["layers.0", address])
    assert hooks_on(model) == 0
    for words in says:
        assert words in str(error.value)


# Module named but never called.


def never(model, address, call, match):
    with Capture(model, address) as captured:
        call(model)
        with pytest.raises(CaptureError, match=match) as error:
            list(captured[next(iter(captured))].values())
    assert repr(address) in str(error.value)
    with pytest.raises(CaptureError, match=match), Capture(model, address):  # nobody looked
        call(model)


def test_never_called_unused_module():
    never(Mlp(), "tail", lambda m: m(rows()), "branch that uses it was not taken")


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_never_called_bypassed_out_proj():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = rows().view(1, 4, 8)
    never(model, "out_proj", lambda m: m(x, x, x), "MultiheadAttention hands its weights to a fused kernel")
    never(encoder(), "layers.1.self_attn.out_proj", lambda m: m(torch.randn(1, 3, 16)), r"Capture 'layers.1.self_attn'")


def test_never_called_tied_head_used_functionally():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.embed(ids), self.head.weight)

    never(Tied(), "head", lambda m: m(torch.arange(3)), "shares a weight with 'embed'")


def test_never_called_forward_called_directly():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.inner.forward(x))

    never(Direct(), "inner", lambda m: m(rows()), r"\.forward\(\)")
    model = Mlp()
    with Capture(model, ":output") as captured:
        model.forward(rows())
        with pytest.raises(CaptureError, match=r"no forward of Mlp was seen.*Call the model as model"):
            captured[""]["output"]


def test_never_called_branch_not_taken_is_never_the_last_forwards_tensor():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, *, left: bool) -> Tensor:
            return self.a(x) if left else self.b(x)

    model, x = Branches(), rows()
    with Capture(model, ["a", "b:input"]) as captured:
        for left in (True, False, True):
            model(x, left=left)
            if left:
                assert torch.equal(captured["a"]["output"], model.a(x))
                with pytest.raises(CaptureError, match=r"'b:input'.*never called"):
                    captured["b"]["input"]
            else:
                assert torch.equal(captured["b"]["input"], x)
                with pytest.raises(CaptureError, match=r"'a'.*never called"):
                    captured["a"]["output"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_never_called_traced_before_the_capture():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8))
    model[0] = torch.jit.trace(model[0], rows())
    never(model, "0.0", lambda m: m(rows()), "inside a ScriptModule")


def test_no_forward_at_all_is_an_error_on_look_up():
    with Capture(Mlp(), "layers.0") as captured, pytest.raises(CaptureError, match="no forward of Mlp was seen"):
        captured["layers.0"]["output"]


def test_looking_at_one_address_does_not_excuse_another():
    model = Mlp()
    with pytest.raises(CaptureError, match="'tail'"), Capture(model, ["layers.0", "tail"]) as captured:
        model(rows())
        assert captured["layers.0"]["output"].shape == (4, 8)


# Module replaced after the capture was made; a later hook of the user's rewrites the output.


def test_a_module_replaced_between_making_and_opening_is_the_new_one():
    model, x = Mlp(), rows()
    capture = Capture(model, "layers.1")
    model.layers[1] = nn.Linear(8, 8)
    with capture as captured:
        model(x)
    assert torch.equal(captured["layers.1"]["output"], model.layers[1](model.act(model.layers[0](x))))


class Lora(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


@pytest.mark.parametrize("wrap", [Lora, lambda base: nn.Linear(8, 8)], ids=["around", "instead"])
@pytest.mark.parametrize("look", [True, False])
def test_a_module_replaced_under_an_open_capture_is_an_error(wrap, look):
    model, x = Mlp(), rows()
    with (
        pytest.raises(CaptureError, match=r"'layers.1' was replaced after the capture was opened: it is a"),
        Capture(model, "layers.1") as captured,
    ):
        model.layers[1] = wrap(model.layers[1])
        model(x)
        if look:
            captured["layers.1"]["output"]


def test_a_module_replaced_after_the_context_changes_nothing():
    model, x = Mlp(), rows()
    with Capture(model, "layers.1") as captured:
        model(x)
    want = model.layers[1](model.act(model.layers[0](x)))
    model.layers[1] = nn.Identity()
    assert torch.equal(captured["layers.1"]["output"], want)


def test_a_later_hook_of_the_users_rewrites_the_output():
    model, x = Mlp(), rows()
    with Capture(model, ["layers.1", ":output"]) as captured:
        model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        model.register_forward_hook(lambda module, args, output: output + 1)
        out = model(x)
    want = nn.functional.linear(model.layers[0](x).tanh(), model.layers[1].weight, model.layers[1].bias) * 2
    assert torch.equal(captured["layers.1"]["output"], want)
    assert same_gradients(gradients(captured["layers.1"]["output"], model), gradients(want, model))
    assert torch.equal(captured[""]["output"], out)


def test_a_later_hook_on_a_module_that_is_called_directly_is_an_error_and_then_right():
    model, x = Mlp(), rows()
    with Capture(model, "layers.1") as captured:
        model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        model.layers[1](x)
        with pytest.raises(CaptureError, match="registered on this module after the capture was opened"):
            captured["layers.1"]["output"]
        assert torch.equal(model.layers[1](x), captured["layers.1"]["output"])


def test_a_hook_that_is_taken_off_again_leaves_the_order_right():
    model, x = Mlp(), rows()
    with Capture(model, "layers.1") as captured:
        handle = model.layers[1].register_forward_hook(lambda module, args, output: output * 2)
        model(x)
        handle.remove()
        model(x)
        assert torch.equal(captured["layers.1"]["output"], model.layers[1](model.layers[0](x).tanh()))


# Inner modules called directly: the outermost call of any module under the model is a forward.


def test_an_inner_module_called_directly_is_a_forward_of_its_own():
    model, batch = bert().eval(), tokens()
    del batch["attention_mask"]
    with Capture(model, ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.2"]) as captured:
        for _ in range(3):
            for _ in range(2):
                out = model.bert(**batch)
                assert torch.equal(captured["bert.encoder.layer.2"]["output"], out.last_hidden_state)
                again = model.bert.encoder.layer[0].forward(captured["bert.embeddings"]["output"])
                assert torch.equal(captured["bert.encoder.layer.0"]["output"], again)
            out = model.bert.encoder.layer[0](torch.randn(2, 6, 16))  # replaces what the last forward left
            assert captured["bert.encoder.layer.0"]["output"] is out
            with pytest.raises(CaptureError, match="never called"):
                captured["bert.encoder.layer.2"]["output"]
        captured.clear()


def test_modules_called_one_after_the_other_are_forwards_of_their_own():
    model, x = Mlp(), rows()
    with Capture(model, ["layers.0", "layers.1"]) as captured:
        for _ in range(5):
            model.layers[0](x)
            model.layers[1](x)
            with pytest.raises(CaptureError, match=r"'layers.0'.*never called"):
                captured["layers.0"]["output"]
            assert torch.equal(captured["layers.1"]["output"], nn.functional.linear(x, *model.layers[1].parameters()))


def test_a_model_that_calls_itself_is_one_forward():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                return self.lin(x)
            return torch.cat([self(part) for part in x.split(1)])

    model, x = Halves(), rows()
    with Capture(model, ["lin@*", ":output@-1"]) as captured:
        out = model(x)
    assert len(captured["lin"]["output@*"]) == 4
    assert torch.equal(torch.cat(captured["lin"]["output@*"]), out)
    assert torch.equal(captured[""]["output@-1"], out)
