"""Rows: activation checkpointing, ``use_reentrant=False`` and ``True``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from capture_zoo import bert, gradients, rows, same_gradients, tokens
from hookdistill import Capture, CaptureError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(8, 12), nn.Linear(12, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.up(x).tanh()))


class Deep(nn.Module):
    """Checkpoints each block; ``None`` runs it plainly."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


ADDRESSES = ["blocks.0", "blocks.1.up", "blocks.1.down:input", "blocks.1", "stem"]


def run(model: Deep, addresses: list[str], **options: bool) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(3)
    with Capture(model, addresses, **options) as captured:
        out = model(rows())
    return [value for layer in captured.values() for value in layer.values()], out


def plain(model: Deep, addresses: list[str]) -> list[Tensor]:
    """The same blocks written out by hand."""
    torch.manual_seed(3)
    x = model.stem(rows())
    values = {"stem": x}
    for i, block in enumerate(model.blocks):
        values[f"blocks.{i}.up"] = block.up(x)
        values[f"blocks.{i}.down:input"] = values[f"blocks.{i}.up"].tanh()
        x = values[f"blocks.{i}"] = x + block.drop(block.down(values[f"blocks.{i}.down:input"]))
    return [values[address] for address in addresses]


def test_non_reentrant_checkpointing_is_differentiable_and_equal_to_the_plain_run():
    model = Deep(False)
    for value, want in zip(run(model, ADDRESSES)[0], plain(model, ADDRESSES), strict=True):
        assert torch.equal(value, want)
        assert same_gradients(gradients(value, model), gradients(want, model))


def test_non_reentrant_recomputation_neither_overwrites_nor_appends():
    model, counted = Deep(False), []
    for block in model.blocks:
        block.up.register_forward_hook(lambda m, a, o: counted.append(m))
    with Capture(model, ["blocks.0.up@*", "blocks.1.up", "blocks.1.up:input"]) as captured:
        out = model(rows())
        before = {layer: dict(outputs) for layer, outputs in captured.items()}
        (out.sum() + before["blocks.1.up"]["output"].sum()).backward()
        assert len(counted) == 4  # the recomputation did run
        assert len(captured["blocks.0.up"]["output@*"]) == 1
        for key in ("output", "input"):
            assert captured["blocks.1.up"][key] is before["blocks.1.up"][key]


def test_non_reentrant_recomputation_while_the_forward_still_runs():
    class Forces(Deep):
        def forward(self, x: Tensor) -> Tensor:
            energy = super().forward(x)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
            return force

    model = Forces(False)
    with Capture(model, ["blocks.0.up", "blocks.1.up@*"]) as captured:
        model(rows().requires_grad_())
    assert captured["blocks.0.up"]["output"].shape == (4, 12)
    assert len(captured["blocks.1.up"]["output@*"]) == 1


def test_non_reentrant_whole_model_in_one_checkpoint():
    model = Deep(None)
    torch.manual_seed(3)
    with Capture(model, ADDRESSES) as captured:
        checkpoint(model, rows(), use_reentrant=False)
    values = [value for layer in captured.values() for value in layer.values()]
    for value, want in zip(values, plain(model, list(ADDRESSES)), strict=True):
        assert torch.equal(value, want)
        assert same_gradients(gradients(value, model), gradients(want, model))


@pytest.mark.parametrize("address", ["blocks.0", "blocks.1", "stem"])
def test_reentrant_checkpointing_block_outputs_are_differentiable(address):
    model = Deep(True)
    ((value,), _), (want,) = run(model, [address]), plain(model, [address])
    assert torch.equal(value, want)
    value.sum().backward()
    got = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    want.sum().backward()
    assert same_gradients(got, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("address", ["blocks.1.up", "blocks.0.down:input", "blocks.1.up@0", "blocks.1.up@-1", "blocks.1.up@*"])
@pytest.mark.parametrize("look", [True, False])
def test_reentrant_checkpointing_tensors_inside_are_an_error(address, look):
    model = Deep(True)
    said = rf"'{address.replace('*', '.')}'.*carries no gradient.*use_reentrant=False"
    with pytest.raises(CaptureError, match=said), Capture(model, [address]) as captured:
        model(rows())
        if look:
            (layer,) = captured.values()
            list(layer.values())


def test_reentrant_checkpoint_around_the_whole_model_is_seen_too():
    model = Deep(None)
    x = rows().requires_grad_()
    with Capture(model, ["blocks.0", ":output"]) as captured:
        out = checkpoint(model, x, use_reentrant=True)
        with pytest.raises(CaptureError, match="carries no gradient"):
            captured["blocks.0"]["output"]
        assert captured[""]["output"] is out


def test_reentrant_checkpointing_detached_or_without_gradients():
    model = Deep(True)
    (value,), _ = run(model, ["blocks.1.up"], detach=True)
    (want,) = plain(model, ["blocks.1.up"])
    assert torch.equal(value, want)
    assert not value.requires_grad
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that nothing will get a gradient
        (value,), _ = run(model, ["blocks.1.up"])
    assert torch.equal(value, want)


def test_reentrant_block_output_that_is_overwritten_is_an_error():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = Deep(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(x).mul_(2)

    with pytest.raises(CaptureError, match="changed in place"), Capture(Writes(), "deep.blocks.1") as captured:
        captured._session.model(rows())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # the name in transformers 4
@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_checkpointing(reentrant):
    model, batch = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(), tokens()
    reference = model(**batch, output_hidden_states=True).hidden_states[2]
    want = gradients(reference, model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with Capture(model, ["bert.encoder.layer.1", "bert.encoder.layer.1.intermediate"]) as captured:
        out = model(**batch)
        got = captured["bert.encoder.layer.1"]["output"]
        assert torch.equal(got, reference)
        if reentrant:
            with pytest.raises(CaptureError, match="carries no gradient"):
                captured["bert.encoder.layer.1.intermediate"]["output"]
        else:
            assert captured["bert.encoder.layer.1.intermediate"]["output"].requires_grad
        (out.logits.sum() * 0 + (got * torch.linspace(-1, 1, got.numel()).view_as(got)).sum()).backward()
    assert same_gradients([p.grad for p in model.parameters()], want, exactly=False)
