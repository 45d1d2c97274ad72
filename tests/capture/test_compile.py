"""Row: ``torch.compile`` before or after the capture is made, also after the first compiled run."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from capture_zoo import Mlp, bert, edited, gradients, rows, same_gradients, tokens
from hookdistill import Capture, CaptureError

pytestmark = [
    # dynamo looks at every tensor it meets, also at those with a graph behind them
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    # torch's own imports on the way to inductor
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a C++ compiler")),
]


class Net(nn.Module):
    """In place after every layer, with one layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.relu, self.norm = nn.ReLU(inplace=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.relu(layer(x))
        return self.norm(self.norm(x))


ADDRESSES = ["layers.0", "layers.1", "layers.1:input", "norm@0", "norm@-1", "norm@*", ":output"]


def by_hand(net: Net, x: Tensor) -> list[Tensor]:
    # Not by calling the modules: under an open capture that would be a forward of its own.
    first = nn.functional.linear(x, *net.layers[0].parameters())
    second = nn.functional.linear(first.relu(), *net.layers[1].parameters())
    normed = [nn.functional.layer_norm(second.relu(), (8,), *net.norm.parameters())]
    normed.append(nn.functional.layer_norm(normed[0], (8,), *net.norm.parameters()))
    return [first, second, first.relu(), *normed, *normed, normed[1]]


def flat(captured) -> list[Tensor]:
    values: list[Tensor] = []
    for layer in captured.values():
        for value in layer.values():
            values += value if isinstance(value, list) else [value]
    return values


def compiled(net: nn.Module, how: str, backend: str = "aot_eager") -> nn.Module:
    if how == "wrapped":
        return torch.compile(net, backend=backend)
    net.compile(backend=backend)
    return net


def check_steps(net: Net, call: Callable[[Tensor], Tensor], captured, *, steps: int = 6, exactly: bool = True) -> None:
    close = torch.equal if exactly else lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for step in range(steps):
        x = torch.randn(4, 8)
        call(x)
        got, want = flat(captured), by_hand(net, x)
        assert len(got) == len(want) == 8
        for a, b in zip(got, want, strict=True):
            assert close(a, b)
            if step in (0, steps - 1):
                assert same_gradients(gradients(a, net), gradients(b, net), exactly=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("first", ["compile", "capture"])
def test_compile_one_graph_no_break_and_values_that_later_writes_do_not_change(how, first, backend):
    if backend == "inductor" and first == "capture":
        pytest.skip("the order is the affair of dynamo, which the other backend shows")
    net = Net()
    counters.clear()
    if first == "compile":
        model = compiled(net, how, backend)
        with Capture(model, ADDRESSES) as captured:
            check_steps(net, model, captured, exactly=False)
    else:
        with Capture(net, ADDRESSES) as captured:
            model = compiled(net, how, backend)
            check_steps(net, model, captured, exactly=False)
    assert sum(counters["graph_break"].values()) == 0
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_compile_fullgraph():
    net = Net()
    model = torch.compile(net, backend="aot_eager", fullgraph=True)
    with Capture(model, ADDRESSES) as captured:
        check_steps(net, model, captured)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_capture_after_the_first_compiled_run_is_right_or_a_clear_error(how):
    net = Net()
    model = compiled(net, how)
    for _ in range(2):
        model(rows())
    with Capture(model, ["layers.0", "layers.1:input", "norm@0"]) as captured:
        for _ in range(2):
            x = torch.randn(4, 8)
            model(x)
            for path, key, want in (("layers.0", "output", 0), ("layers.1", "input", 2), ("norm", "output@0", 3)):
                try:
                    got = captured[path][key]
                except CaptureError as error:
                    assert "after its first compiled call" in str(error)
                    assert "torch.compiler.reset()" in str(error)
                else:
                    assert torch.equal(got, by_hand(net, x)[want])
        torch.compiler.reset()  # what the message says
        x = torch.randn(4, 8)
        model(x)
        assert torch.equal(captured["layers.0"]["output"], by_hand(net, x)[0])


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_capture_after_the_first_compiled_run_nobody_looked(how):
    net = Net()
    model = compiled(net, how)
    model(rows())
    with pytest.raises(CaptureError, match="first compiled call"), Capture(model, ["layers.0"]):
        model(rows())


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_captures_one_after_the_other(how):
    net = Net()
    model = compiled(net, how)
    for addresses in (["layers.0"], ["layers.0", "layers.1"], ["layers.1"]):
        for _ in range(2):
            with Capture(model, addresses) as captured:
                x = torch.randn(4, 8)
                model(x)
                for address in addresses:
                    try:
                        got = captured[address]["output"]
                    except CaptureError as error:
                        assert "first compiled call" in str(error)
                    else:
                        assert torch.equal(got, by_hand(net, x)[int(address[-1])])


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_leaves_a_model_that_writes_nowhere(how):
    net = Net()
    model = compiled(net, how)
    with Capture(model, ["layers.0", ":output"]) as captured:
        out = model(rows())
        assert torch.equal(captured[""]["output"], out)
    value = captured["layers.0"]["output"]
    kept = weakref.ref(value)
    model(torch.zeros(4, 8))
    model(torch.zeros(4, 8))
    assert captured["layers.0"]["output"] is value
    del captured, value, out
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    "paths",
    [
        ["bert.encoder.layer.0", "bert.encoder.layer.2"],
        ["bert.encoder.layer.1.intermediate"],
        ["bert.encoder.layer.0.intermediate", "bert.encoder.layer.1"],
    ],
)
def test_compile_blocks_one_by_one(paths):
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).eval()
    with edited(model, paths) as want:
        model(**tokens())
    for layer in model.bert.encoder.layer:
        layer.compile(backend="aot_eager")
    with Capture(model, [*paths, ":logits"]) as captured:
        for _ in range(2):
            out = model(**tokens())
            assert torch.equal(captured[""]["logits"], out.logits)
            for path in paths:
                try:
                    got = captured[path]["output"]
                except CaptureError as error:  # torch lets like blocks share their code, whatever hooks they have inside
                    assert "intermediate" in path
                    assert "compiled one by one" in str(error)
                else:
                    assert torch.equal(got, want[path])
                    assert same_gradients(gradients(got, model), gradients(want[path], model), exactly=False)


def test_compile_wrapped_blocks():
    net = Mlp()
    net.layers[1] = torch.compile(net.layers[1], backend="aot_eager")
    x = rows()
    net(x)
    with Capture(net, ["layers.1", "layers.2"]) as captured:  # the wrapper takes hooks, even late
        net(x)
    assert torch.equal(captured["layers.1"]["output"], net.layers[1](net.layers[0](x).tanh()))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # dynamo reports the break
def test_compile_graph_break_in_the_middle():
    class Breaks(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[2](self.layers[1](x))

    for how in ("wrapped", "in place"):
        net = Breaks()
        model = compiled(net, how)
        with Capture(model, ["layers.0", "layers.1", ":output"]) as captured:
            for _ in range(3):
                x = torch.randn(4, 8)
                out = model(x)
                x0 = nn.functional.linear(x, *net.layers[0].parameters())
                assert torch.equal(captured[""]["output"], out)
                assert torch.equal(captured["layers.0"]["output"], x0)
                assert torch.equal(captured["layers.1"]["output"], nn.functional.linear(x0, *net.layers[1].parameters()))


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_later_hook_of_the_users(how):
    net, x = Net(), rows()
    with Capture(net, ["layers.0"]) as captured:
        net.layers[0].register_forward_hook(lambda module, args, output: output * 2)
        model = compiled(net, how)
        model(x)
        try:
            got = captured["layers.0"]["output"]
        except CaptureError as error:
            assert "registered on this module after the capture was opened" in str(error)
        else:
            assert torch.equal(got, nn.functional.linear(x, *net.layers[0].parameters()) * 2)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_branch_not_taken_is_never_stale(how):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, left: bool) -> Tensor:
            return self.a(x) if left else self.b(x)

    net = Branches()
    model = compiled(net, how)
    with Capture(model, ["a", "b"]) as captured:
        for left in (True, False, True, True, False):
            out = model(rows(), left)
            assert torch.equal(captured["a" if left else "b"]["output"], out)
            with pytest.raises(CaptureError, match="never called"):
                captured["b" if left else "a"]["output"]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_two_threads(how):
    net = Net()
    model = compiled(net, how)
    with Capture(model, ["layers.0"]) as captured:
        x = rows()
        for _ in range(2):
            model(x)
        value = captured["layers.0"]["output"]
        thread = threading.Thread(target=model, args=(torch.zeros(4, 8),))
        thread.start()
        thread.join()
        assert captured["layers.0"]["output"] is value
        assert torch.equal(value, nn.functional.linear(x, *net.layers[0].parameters()))


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_modes_of_grad_and_shapes(how):
    net = Net()
    model = compiled(net, how)
    with Capture(model, ["layers.1", "layers.0:input"]) as captured:
        for batch in (2, 3):
            for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                x = torch.randn(batch, 8)
                with context():
                    model(x)
                got = captured["layers.1"]["output"]
                with torch.no_grad():
                    assert torch.allclose(got, by_hand(net, x)[1], atol=1e-6)
                    assert torch.equal(captured["layers.0"]["input"], x)
                assert got.requires_grad == (context is torch.enable_grad)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compile_with_checkpointing_inside(how):
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Mlp(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False)
            return torch.utils.checkpoint.checkpoint(self.b, x, use_reentrant=False)

    net, x = Deep(), rows()
    model = compiled(net, how)
    wants = {"a.layers.1": net.a.layers[1](net.a.layers[0](x).tanh()), "b": net(x)}
    try:
        with Capture(model, list(wants)) as captured:
            model(x)
            got = {path: captured[path]["output"] for path in wants}
    except CaptureError:
        return
    for path, want in wants.items():
        assert torch.allclose(got[path], want, atol=1e-6)
        assert same_gradients(gradients(got[path], net), gradients(want, net), exactly=False)


def test_compile_exception_and_then_on():
    class Fails(Mlp):
        def forward(self, x: Tensor, broken: bool) -> Tensor:
            x = self.layers[0](x)
            if broken:
                raise ValueError("broken")
            return self.layers[1](x)

    for how in ("wrapped", "in place"):
        net = Fails()
        model = compiled(net, how)
        with Capture(model, ["layers.0", "layers.1"]) as captured:
            model(rows(), False)
            with pytest.raises(ValueError, match="broken"):
                model(rows(), True)
            with pytest.raises(CaptureError):
                captured["layers.1"]["output"]
            out = model(rows() * 2, False)
            assert torch.equal(captured["layers.1"]["output"], out)
