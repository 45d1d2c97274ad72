"""Captured modules are called past torch's way to hooks, where nothing but the capture's own hook would run on it."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from hookdistill import Capture, CaptureError

# dynamo looks at every tensor it meets, also at those with a graph behind them
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

X = torch.linspace(-1, 1, 12).view(3, 4)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def usual_calls(monkeypatch):
    """The modules that were called through ``Module._call_impl``."""
    called, usual = [], nn.Module._call_impl

    def noting(self, *args, **kwargs):
        called.append(self)
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_call_impl", noting)
    return called


def placed(module):
    return module.__dict__.get("_compiled_call_impl")


def test_the_model_and_captured_modules_are_called_directly(usual_calls):
    model = Halves()
    with Capture(model, ["first"]) as captured:
        out = model(X)
    assert usual_calls == [model.second]
    assert torch.equal(captured["first"]["output"], model.first(X)) and torch.equal(out, model(X))


def register(model, kind, note):
    """A hook of each kind on ``model.first``, or on every module."""
    first = model.first
    return {
        "pre": lambda: first.register_forward_pre_hook(lambda module, args: note()),
        "forward": lambda: first.register_forward_hook(lambda module, args, output: note()),
        "backward pre": lambda: first.register_full_backward_pre_hook(lambda module, grads: note()),
        "backward": lambda: first.register_full_backward_hook(lambda module, ours, theirs: note()),
        "any pre": lambda: torch_module.register_module_forward_pre_hook(lambda module, args: note()),
        "any forward": lambda: torch_module.register_module_forward_hook(lambda module, args, output: note()),
        "any backward pre": lambda: torch_module.register_module_full_backward_pre_hook(lambda module, grads: note()),
        "any backward": lambda: torch_module.register_module_full_backward_hook(lambda module, ours, theirs: note()),
    }[kind]()


KINDS = ["pre", "forward", "backward pre", "backward", "any pre", "any forward", "any backward pre", "any backward"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_others_run(kind):
    model, noted = Halves(), []
    with Capture(model, ["first"]) as captured:
        handle = register(model, kind, lambda: noted.append(kind))
        try:
            for _ in range(2):  # in the first one a late forward hook may stand behind that of the capture
                noted.clear()
                model(X.clone().requires_grad_()).sum().backward()
        finally:
            handle.remove()
        modules = 3 if kind.startswith("any") else 1
        assert len(noted) == modules
        assert torch.equal(captured["first"]["output"], model.first(X))


def test_a_later_hook_that_changes_the_output_is_seen():
    model = Halves()
    with Capture(model, ["first"]) as captured:
        model.first.register_forward_hook(lambda module, args, output: output + 1)
        model(X)
    assert torch.equal(captured["first"]["output"], nn.functional.linear(X, model.first.weight, model.first.bias) + 1)


def test_two_captures_of_one_module():
    model = Halves()
    with Capture(model, ["first"]) as one, Capture(model, ["first", "second"]) as other:
        out = model(X)
        assert torch.equal(one["first"]["output"], other["first"]["output"])
        assert torch.equal(other["second"]["output"], out)


def test_nothing_is_left_when_the_capture_is_closed():
    model = Halves()
    with Capture(model, ["first"]):
        assert placed(model) and placed(model.first)
    assert not placed(model) and not placed(model.first)


def test_a_forward_that_fails_is_one_that_failed():
    class Fails(Halves):
        def forward(self, x):
            if x is None:
                raise ValueError("no input")
            return super().forward(x)

    model = Fails()
    with Capture(model, ["first"]) as captured:
        model(X)
        with pytest.raises(ValueError, match="no input"):
            model(None)
        with pytest.raises(CaptureError, match="raised an exception"):
            captured["first"]["output"]
        model(2 * X)
        assert torch.equal(captured["first"]["output"], model.first(2 * X))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_none(copied):
    model = Halves()
    with Capture(model, ["first"]):
        model(X)
        other = copied(model.first)
        assert not placed(other) and torch.equal(other(X), model.first(X))


def test_a_deep_copy_runs_its_own_weights():
    model = Halves()
    with Capture(model, ["first"]):
        model(X)
        other = copy.deepcopy(model)
        nn.init.zeros_(other.first.weight)
        assert torch.equal(other.first(X), model.first.bias.expand(3, 4))


def test_a_replica_in_another_thread_runs_itself():
    """As ``DataParallel`` makes them: with the attributes of the original, but weights of their own."""
    model = Halves()
    with Capture(model, ["first"], stop=True) as captured:
        model(X)
        before = captured["first"]["output"]
        replica = model._replicate_for_data_parallel()
        replica.first = model.first._replicate_for_data_parallel()
        replica.first.weight, replica.first.bias = torch.zeros(4, 4), torch.ones(4)
        replica.second = model.second
        found = []
        thread = threading.Thread(target=lambda: found.append((replica(X), replica.first(X))))
        thread.start(), thread.join()
        whole, first = found[0]
        assert torch.equal(first, torch.ones(3, 4))
        assert torch.equal(whole, model.second(first.tanh()))
        assert captured["first"]["output"] is before


def test_a_module_that_is_compiled_later_is_still_seen():
    model = Halves()
    with Capture(model, ["first"]) as captured:
        model.first.compile(backend="eager")
        model(X)
        assert torch.equal(captured["first"]["output"], model.first(X))
    assert placed(model.first) is not None  # the user's


def test_a_module_that_is_compiled_already_stays_so():
    model = Halves()
    model.first.compile(backend="eager")
    compiled = placed(model.first)
    with Capture(model, ["first"]) as captured:
        model(X)
        assert torch.equal(captured["first"]["output"], model.first(X))
    assert placed(model.first) is compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_model_compiled_later_runs_in_one_graph(backend):
    model = Halves()
    with Capture(model, ["first"]) as captured:
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for scale in (1, 2):
            compiled(scale * X)
            torch.testing.assert_close(captured["first"]["output"], model.first(scale * X))


def test_a_call_of_the_users_own_is_not_passed_by():
    class Doubling(nn.Linear):
        def _call_impl(self, *args, **kwargs):
            return 2 * super()._call_impl(*args, **kwargs)

    model = Halves()
    model.first = Doubling(4, 4)
    with Capture(model, ["first"]) as captured:
        model(X)
        assert not placed(model.first)
        assert torch.equal(2 * captured["first"]["output"], model.first(X))


def test_a_traced_model_is_traced_whole():
    model = Halves()
    with Capture(model, ["first"]):
        traced = torch.jit.trace(model, X)
    assert [name for name, _ in traced.named_children()] == ["first", "second"]
    torch.testing.assert_close(traced(2 * X), model(2 * X))


def test_an_inner_module_called_alone_is_a_forward_of_its_own():
    """Who is running is read from the stack, on which a direct call stands in for torch's."""
    model = nn.Sequential(Halves(), Halves())
    with Capture(model, ["0", "0.first", "0.second"]) as captured:
        model[0](X)
        first = captured["0.first"]["output"]
        model[0](2 * X)
        assert not torch.equal(captured["0.first"]["output"], first)
        assert torch.equal(captured["0"]["output"], captured["0.second"]["output"])
