"""Row: a later in-place op would overwrite the captured tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from capture_zoo import Residual, gradients, image, resnet, same_gradients
from hookdistill import Capture, CaptureError

PATHS = ["conv", "bn", "relu", "mix", "pool", "head"]


def out_of_place(model: Residual, x: Tensor) -> dict[str, Tensor]:
    """The forward of `Residual` written without in-place ops."""
    conv = model.conv(x)
    bn = model.bn(conv)
    relu = torch.relu(bn)
    mix = model.mix(relu)
    pool = model.pool(mix + relu)
    mixed = torch.cat([0.5 * pool[:, 1:2], pool[:, 1:]], 1)
    return {"conv": conv, "bn": bn, "relu": relu, "mix": mix, "pool": pool, "head": model.head(mixed.flatten(1))}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_in_place_the_value_is_the_modules_true_output_and_gradients_stay_right(mode):
    model, x = Residual().train(mode == "train"), image()
    reference = copy.deepcopy(model)
    with Capture(model, PATHS) as captured:
        model(x)
    want = out_of_place(reference, x)
    for path in PATHS:
        got = captured[path]["output"]
        assert torch.equal(got, want[path]), path
        assert same_gradients(gradients(got, model), gradients(want[path], reference), exactly=path != "head"), path


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_in_place_without_gradients(context):
    model, x = Residual().eval(), image()
    with context():
        with Capture(model, PATHS) as captured:
            model(x)
        want = out_of_place(model, x)
    for path in PATHS:
        assert torch.equal(captured[path]["output"], want[path]), path


def test_in_place_in_a_real_residual_network():
    model, x = resnet().eval(), image(size=16)
    paths = [path for path, module in model.named_modules() if isinstance(module, (nn.BatchNorm2d, nn.ReLU, nn.Conv2d))]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    with Capture(model, [f"{path}@0" for path in paths]) as captured:
        model(x)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    seen: dict[str, Tensor] = {}
    for path in paths:
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out, path=path: seen.update({path: out.clone()}) if path not in seen else None
        )
    model(x)
    assert len(paths) > 12
    for path in paths:
        assert torch.equal(captured[path]["output@0"], seen[path]), path


class Then(nn.Module):
    """A linear layer, then ``do`` with its output."""

    def __init__(self, do) -> None:
        super().__init__()
        self.lin, self.do = nn.Linear(4, 4), do

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        self.do(h)
        return h.sum()


def _data(h: Tensor) -> None:
    h.data.mul_(2)  # bumps no version counter


def _numpy(h: Tensor) -> None:
    h.detach().numpy()[:] = 3


WRITES = {
    "add_": lambda h: h.add_(1),
    "relu_": torch.relu_,
    "view": lambda h: h.view(-1)[1:].mul_(2),
    "row": lambda h: h[0].fill_(1),
    "index": lambda h: h.__setitem__((slice(None), 0), 0.0),
    "detached": lambda h: h.detach().zero_(),
    "data": _data,
    "numpy": _numpy,
    "out": lambda h: torch.add(torch.ones(3, 4), 1, out=h.detach()),
    "transposed": lambda h: h.t_(),
    "detach_": lambda h: h.detach_(),
    "resize": lambda h: h.data.resize_(1, 4),
    "scatter": lambda h: h.scatter_(0, torch.zeros(1, 4, dtype=torch.int64), 0.0),
    "copy": lambda h: h.copy_(torch.ones(3, 4)),
    "masked": lambda h: h.masked_fill_(h > 0, 0.0),
    "foreach": lambda h: torch._foreach_mul_([h], 2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("late", [False, True], ids=["in the forward", "after it"])
def test_in_place_whatever_the_write(write, grad, late):
    if write == "detach_" and not grad:
        pytest.skip("nothing to detach")
    model, x = Then((lambda h: None) if late else WRITES[write]), torch.randn(3, 4)
    kept: list[Tensor] = []
    if late:
        model.do = kept.append
    with torch.set_grad_enabled(grad):
        with Capture(model, "lin") as captured:
            model(x)
        for h in kept:
            WRITES[write](h)
    got, want = captured["lin"]["output"], nn.functional.linear(x, *model.lin.parameters())
    assert torch.equal(got, want)
    assert got.requires_grad == grad
    if grad:
        assert same_gradients(gradients(got, model), gradients(want, model))


def test_in_place_nothing_is_copied_unless_somebody_writes():
    model, x = Then(lambda h: h * 2), torch.randn(3, 4)
    with Capture(model, "lin") as captured:
        model(x)
    kept = captured._session.slots[0].kept
    assert torch._C._data_address(kept[0]) == torch._C._data_address(kept[2])  # the twin shares its memory
    assert captured["lin"]["output"] is kept[0]
    assert captured["lin"]["output"] is captured["lin"]["output"]
    assert captured._session.slots[0].kept[2] is None  # and goes with the first look-up


def test_in_place_a_kernel_that_asks_for_the_address_of_a_looked_up_tensor_copies_nothing():
    model, x = Then(lambda h: h * 2), torch.randn(3, 4)
    with Capture(model, "lin") as captured:
        model(x)
    before = torch._C._data_address(captured._session.slots[0].kept[0])
    assert captured["lin"]["output"].data_ptr() == before  # as a compiled or Triton kernel asks; a twin would be copied now


def test_in_place_a_write_after_the_look_up_is_an_error_not_another_value():
    model, x = Then(lambda h: h), torch.randn(3, 4)
    with Capture(model, "lin") as captured:
        model(x)
    with torch.no_grad():
        captured["lin"]["output"].mul_(2)
    with pytest.raises(CaptureError, match=r"changed in place.*after it was looked up"):
        captured["lin"]["output"]


def test_in_place_looking_up_while_the_forward_still_runs():
    seen: list[Tensor] = []
    model, x = Residual().eval(), image()
    with Capture(model, ["bn"]) as captured:
        handle = model.relu.register_forward_pre_hook(lambda m, a: seen.append(captured["bn"]["output"]))
        model(x)
        handle.remove()
    want = model.bn(model.conv(x))
    assert torch.equal(seen[0], want)
    assert torch.equal(captured["bn"]["output"], want)
    assert same_gradients(gradients(seen[0], model), gradients(want, model))


class Thrifty(nn.Module):
    """Attention that uses its query's memory for something else before it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        query.mul_(0)
        return mixed

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()


def test_in_place_what_attention_saw_is_overwritten_before_its_module_returns():
    model, x = Thrifty(), torch.randn(2, 5, 8)
    with torch.no_grad():
        query, key, _ = model.heads(x)
        with Capture(model, [":attention", ":attention_scores", ":query", ":key"]) as captured:
            model(x)
    scores = query @ key.transpose(-2, -1) / 2
    torch.testing.assert_close(captured[""]["attention_scores"], scores)
    torch.testing.assert_close(captured[""]["attention"], scores.softmax(-1))
    assert torch.equal(captured[""]["query"], query)
    assert torch.equal(captured[""]["key"], key)


def test_in_place_attention_kept_as_query_and_key_forces_no_copy_once_it_is_looked_up():
    model, x = Then(lambda h: nn.functional.scaled_dot_product_attention(h, h, h)), torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        capture = Capture(model, ":attention")
        captured = capture.open(keeps_calls=True)
        model(x)
        call = captured.attention_call("", "attention")
        address = torch._C._data_address(call.query)
        assert call.query.data_ptr() == address == call.key.data_ptr()
        capture.close()
