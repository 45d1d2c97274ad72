"""Rows: exceptions; deepcopy, pickle, state_dict, save_pretrained; two captures; threads; generation; what is kept alive."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from capture_zoo import Mlp, bert, encoder, gradients, hooks_on, llama, rows, same_gradients, t5, tokens
from hookdistill import Capture, CaptureError
from hookdistill.errors import CaptureKeyError


class Fails(Mlp):
    broken = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.broken:
            raise ValueError("broken")
        return self.layers[1](x)


def test_exception_in_the_forward():
    model, x = Fails(), rows()
    model.broken = True
    with pytest.raises(ValueError, match="broken"), Capture(model, ["layers.0", "layers.1"]):
        model(x)
    assert hooks_on(model) == 0
    model.broken = False
    with Capture(model, ["layers.0", "layers.1"]) as captured:
        out = model(x)
    assert captured["layers.1"]["output"] is out


def test_exception_inside_the_context_gives_nothing_of_that_or_an_earlier_forward():
    model, x = Fails(), rows()
    with Capture(model, ["layers.0", "layers.1"]) as captured:
        model(x)
        model.broken = True
        with pytest.raises(ValueError):
            model(x)
        for path in ("layers.0", "layers.1"):
            with pytest.raises(CaptureError, match="last forward raised an exception"):
                captured[path]["output"]
        model.broken = False
        out = model(x)
        assert captured["layers.1"]["output"] is out


def test_exception_that_is_no_exception_does_not_confuse_the_next_forward():
    class Interrupted(Fails):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            if self.broken:
                raise KeyboardInterrupt
            return self.layers[1](x)

    model, x = Interrupted(), rows()
    with Capture(model, ["layers.0", "layers.1", "layers.0:input@*"]) as captured:
        for _ in range(3):
            model.broken = True
            with pytest.raises(KeyboardInterrupt):
                model(x)
            model.broken = False
            out = model(x)
            assert captured["layers.1"]["output"] is out
            assert len(captured["layers.0"]["input@*"]) == 1


def test_exception_that_the_model_catches_itself():
    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Fails(), nn.Linear(8, 8)
            self.a.broken = True

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.a(x)
            except ValueError:
                return self.b(x)

    model, x = Tries(), rows()
    with Capture(model, ["a", "a.layers.0", "b"]) as captured:
        out = model(x)
        assert captured["b"]["output"] is out
        assert captured["a.layers.0"]["output"].shape == (4, 8)
        with pytest.raises(CaptureError, match="'a'"):
            captured["a"]["output"]


def test_a_wrong_address_in_the_middle_leaves_no_hook():
    model = Mlp()
    with pytest.raises(ValueError):
        Capture(model, ["layers.0", "nothing"])
    assert hooks_on(model) == 0


def test_hooks_come_off_and_other_hooks_stay():
    model = Mlp()
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    with Capture(model, ["**", "layers.*:input"], stop=False) as captured:
        model(rows())
        captured.clear()
    assert hooks_on(model) == 1
    handle.remove()
    assert hooks_on(model) == 0
    assert all(not module.__dict__.get("_compiled_call_impl") for module in model.modules())


def test_nothing_keeps_a_tensor_alive_but_the_mapping():
    model, x = Mlp(), rows()
    capture = Capture(model, ["layers.0", "layers.1:input"])
    with capture as captured:
        model(x)
        first = weakref.ref(captured["layers.0"]["output"])
        model(x)
        assert first() is None  # replaced by the next forward
        captured["layers.0"]["output"].sum().backward()
    kept = weakref.ref(captured["layers.0"]["output"])
    entered = weakref.ref(captured["layers.1"]["input"])
    assert kept() is not None
    del captured  # no cycle that only the collector could free; `capture` and `model` hold nothing
    assert kept() is None
    assert entered() is None
    assert capture.model is model


def test_clear_lets_everything_go():
    model = Mlp()
    with Capture(model, "layers.0") as captured:
        model(rows())
        kept = weakref.ref(captured["layers.0"]["output"])
        captured.clear()
        assert kept() is None
        with pytest.raises(CaptureError, match="were cleared"):
            captured["layers.0"]["output"]
        model(rows())
        assert captured["layers.0"]["output"].shape == (4, 8)


def test_the_mapping_after_the_context():
    model, x = Mlp(), rows()
    with Capture(model, ["layers.-1", "layers.0:input"]) as captured:
        out = model(x)
    model(x * 2)
    assert torch.equal(captured["layers.2"]["output"].tanh(), out)
    assert captured["layers.-1"]["output"] is captured["layers.2"]["output"]
    assert {layer: list(outputs) for layer, outputs in captured.items()} == {"layers.2": ["output"], "layers.0": ["input"]}
    assert {layer: set(outputs) for layer, outputs in dict(captured).items()} == {"layers.2": {"output"}, "layers.0": {"input"}}
    for look in (lambda: captured["layers.1"], lambda: captured["layers.0"]["output"], lambda: captured[0]):
        with pytest.raises(CaptureKeyError, match="was not asked for"):
            look()
    assert captured.get("layers.1") is None
    assert "output" not in captured["layers.0"]


def test_a_capture_can_be_opened_again():
    model, x = Mlp(), rows()
    capture = Capture(model, "layers.0")
    with capture as first:
        model(x)
    with capture as second:
        model(x * 2)
    assert not torch.equal(first["layers.0"]["output"], second["layers.0"]["output"])
    with capture, pytest.raises(CaptureError, match="already open"):
        capture.open()


@pytest.mark.parametrize("stop", [False, True])
def test_deepcopy_works_and_records_nothing(stop):
    model, x = Mlp(), rows()
    with Capture(model, ["layers.1", "layers.0:input", ":output"], stop=stop) as captured:
        model(x)
        value = captured["layers.1"]["output"]
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(x).any()  # its own weights, and it does not stop
        assert captured["layers.1"]["output"] is value
        assert not any(isinstance(held, Tensor) for module in twin.modules() for held in vars(module).values())
    with Capture(twin, "layers.1") as of_twin:
        twin(x)
    assert not of_twin["layers.1"]["output"].any()


@pytest.mark.parametrize("make", [bert, encoder])
def test_pickle_state_dict_and_parameter_names(make):
    model = make()
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    with Capture(model, ["**"], stop=False) as captured:
        captured.clear()
        small = len(pickle.dumps(model))
        model(**tokens()) if make is bert else model(torch.randn(2, 3, 16))
        assert [n for n, _ in model.named_parameters()] == names
        assert list(model.state_dict()) == keys
        twin = pickle.loads(pickle.dumps(model))
        assert abs(len(pickle.dumps(model)) - small) < 200  # no tensor travels
        buffer = io.BytesIO()
        torch.save(model, buffer)
        captured.clear()
    assert list(twin.state_dict()) == keys
    with Capture(twin, "**.linear1" if make is encoder else "bert.encoder.layer.0") as of_twin:
        twin(**tokens()) if make is bert else twin(torch.randn(2, 3, 16))
    assert len(of_twin)


def test_save_pretrained_under_capture(tmp_path):
    model = bert().eval()
    with Capture(model, "bert.encoder.layer.0") as captured:
        out = model(**tokens())
        model.save_pretrained(tmp_path)
        assert captured["bert.encoder.layer.0"]["output"].shape == (2, 6, 16)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**tokens()).logits, out.logits)
    assert hooks_on(loaded) == 0


def test_two_captures_nested_each_see_their_own():
    model, x = Mlp(), rows()
    with Capture(model, "layers.0") as outer:
        model(x)
        first = outer["layers.0"]["output"]
        with Capture(model, ["layers.0", "layers.1:input"]) as inner:
            model(x * 2)
            assert torch.equal(inner["layers.0"]["output"], outer["layers.0"]["output"])
        assert not torch.equal(first, outer["layers.0"]["output"])
        model(x)
        assert torch.equal(outer["layers.0"]["output"], first)
    assert torch.equal(inner["layers.1"]["input"], nn.functional.linear(x * 2, *model.layers[0].parameters()).tanh())


def test_two_captures_on_a_model_and_on_a_part_of_it():
    model, batch = bert().eval(), tokens()
    with Capture(model, "bert.encoder.layer.1") as whole, Capture(model.bert.encoder, "layer.1") as part:
        model(**batch)
    assert torch.equal(whole["bert.encoder.layer.1"]["output"], part["layer.1"]["output"])


def test_two_threads_each_see_their_own_forward():
    model = Mlp()
    wrong: list[str] = []
    gate = threading.Barrier(3)

    def work(seed: int) -> None:
        x = torch.full((2, 8), float(seed))
        want = [value.detach() for value in by_hand(model, x)]
        gate.wait()
        for _ in range(150):
            with Capture(model, ["layers.1", "layers.2:input", "layers.0@*"]) as captured:
                model(x)
            got = [captured["layers.1"]["output"], captured["layers.2"]["input"], *captured["layers.0"]["output@*"]]
            if len(got) != 3 or not all(map(torch.equal, got, want)):
                wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert hooks_on(model) == 0


def by_hand(model: Mlp, x: Tensor) -> list[Tensor]:
    first = nn.functional.linear(x, *model.layers[0].parameters())
    second = nn.functional.linear(first.tanh(), *model.layers[1].parameters())
    return [second, second.tanh(), first]


def test_two_threads_a_forward_on_another_thread_is_not_seen_and_the_error_says_so():
    model = Mlp()
    with Capture(model, "layers.0") as captured:
        thread = threading.Thread(target=model, args=(rows(),))
        thread.start()
        thread.join()
        with pytest.raises(CaptureError, match="no forward of Mlp was seen"):
            captured["layers.0"]["output"]
    seen: list[str] = []
    with Capture(model, "layers.0") as captured:

        def look() -> None:
            with pytest.raises(CaptureError) as error:
                captured["layers.0"]["output"]
            seen.append(str(error.value))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert "thread" in seen[0]


def test_generation_loops_keep_the_last_forward_only():
    model = llama().eval()
    alive: list[weakref.ref[Tensor]] = []
    with Capture(model, ["model.layers.0", "model.layers.1:input"]) as captured:
        handle = model.model.layers[0].register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
        model.generate(tokens()["input_ids"], max_new_tokens=12, do_sample=False)
        handle.remove()
    assert len(alive) == 12
    assert sum(ref() is not None for ref in alive) == 1
    assert captured["model.layers.0"]["output"].shape == (2, 1, 16)


def test_generation_of_an_encoder_and_a_decoder():
    model, ids = t5().eval(), tokens()["input_ids"]
    with Capture(model, ["decoder.block.0", "encoder.block.1", "encoder.final_layer_norm"]) as captured:
        model.generate(ids, max_new_tokens=4, do_sample=False)
        assert captured["decoder.block.0"]["output"].shape[0] == 2
        with pytest.raises(CaptureError, match=r"encoder.block.1.*never called in this forward"):
            captured["encoder.block.1"]["output"]
        for _ in range(2):  # the encoder alone is a forward as well
            out = model.encoder(input_ids=ids).last_hidden_state
            assert torch.equal(captured["encoder.final_layer_norm"]["output"], out)
        captured.clear()
    with Capture(model, ["decoder.block.-1", "encoder.block.-1"]) as captured:
        out = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
        assert captured["encoder.block.1"]["output"].shape == out.encoder_last_hidden_state.shape
        assert captured["decoder.block.1"]["output"].shape == (2, 6, 16)


# Autocast; inference mode, no_grad, double backward; the fast path of nn.TransformerEncoder; script modules.


def test_autocast_gives_the_dtype_that_the_model_produced():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), rows()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16), Capture(model, ["0", "1", "1:input"]) as captured:
        out = model(x)
    assert captured["0"]["output"].dtype is torch.bfloat16
    assert torch.equal(captured["0"]["output"], seen[0])
    assert captured["1"]["output"].dtype is out.dtype
    assert same_gradients(gradients(captured["0"]["output"], model), gradients(seen[0], model))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(context):
    model, batch = bert().eval(), tokens()
    with context():
        with Capture(model, ["bert.encoder.layer.1", ":logits"]) as captured:
            out = model(**batch, output_hidden_states=True)
        assert torch.equal(captured["bert.encoder.layer.1"]["output"], out.hidden_states[2])
        assert not captured[""]["logits"].requires_grad


def test_double_backward_through_a_captured_tensor():
    model, x = Mlp(), rows().requires_grad_()
    with Capture(model, ["layers.1"]) as captured:
        model(x)

    def penalty(value: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [*model.layers[0].parameters(), model.layers[1].weight]))

    want = penalty(nn.functional.linear(model.layers[0](x).tanh(), *model.layers[1].parameters()))
    assert all(map(torch.equal, penalty(captured["layers.1"]["output"]), want))


def test_detach_gives_the_value_without_its_graph():
    model, x = Mlp(), rows()
    with Capture(model, ["layers.1", "layers.2:input"], detach=True) as captured:
        model(x)
    assert torch.equal(captured["layers.1"]["output"].tanh(), captured["layers.2"]["input"])
    assert not captured["layers.1"]["output"].requires_grad


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_fast_path_in_eval(padded):
    model = encoder().eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    layer = model.layers[0]
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=mask)
        with Capture(model, ["layers.0.linear1", "layers.0", "layers.1.self_attn", ":output"]) as captured:
            out = model(x, src_key_padding_mask=mask)
            got = {path: captured[path]["output"] for path in captured}
        assert got[""] is out
        keep = ~mask if padded else torch.ones(2, 5, dtype=torch.bool)
        assert torch.allclose(out[keep], fast[keep], atol=1e-6)
        attended = layer.norm1(x + layer.self_attn(x, x, x, key_padding_mask=mask)[0])
        hidden = nn.functional.linear(attended, *layer.linear1.parameters())
        final = layer.norm2(attended + nn.functional.linear(hidden.relu(), *layer.linear2.parameters()))
    for path, want in (("layers.0.linear1", hidden), ("layers.0", final)):
        value = got[path]
        if value.is_nested:
            value, want = torch.cat(value.unbind()), want[keep]
        else:
            value, want = value[keep], want[keep]
        assert torch.allclose(value, want, atol=1e-6), path


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, rows())], ids=["script", "trace"])
def test_script_modules_work_where_hooks_can_be_placed_else_an_error(make):
    model, x = nn.Sequential(nn.Linear(8, 8), make(nn.Sequential(nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 8)), rows()
    with Capture(model, ["0", "2:input"]) as captured:
        model(x)
    assert torch.equal(captured["2"]["input"], model[1](model[0](x)))
    for address in ("1", "1:input", "1.0"):
        try:
            with Capture(model, address) as captured:
                model(x)
            (value,) = captured[address.split(":")[0]].values()
        except CaptureError as error:
            assert repr(address) in str(error)
        else:
            assert torch.equal(value, model[0](x) if "input" in address else model[1](model[0](x)))
    assert hooks_on(nn.ModuleList([model[0], model[2]])) == 0
    whole = make(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    try:
        with Capture(whole, ":output") as captured:
            out = whole(x)
            assert torch.equal(captured[""]["output"], out)
    except CaptureError:
        pass
