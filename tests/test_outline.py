"""`outline` lists what a user may write: every address it prints can be captured, with the shape it prints."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model

import hookdistill
from hookdistill import AddressError, Capture
from hookdistill.addresses import parse
from hookdistill.survey import survey

IDS = torch.arange(1, 9).reshape(2, 4)


def bert():
    return BertModel(
        BertConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )


def llama():
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaModel(LlamaConfig(**sizes, intermediate_size=32, vocab_size=50))


def t5():
    return T5Model(T5Config(num_layers=2, d_model=16, num_heads=2, d_kv=8, d_ff=32, vocab_size=50))


class Twice(nn.Module):
    """Calls one module twice, another never, and returns a dict."""

    def __init__(self):
        super().__init__()
        self.shared, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, scale=None):
        return {"a": self.shared(self.shared(x)), "b": [x.sum(-1)]}


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (bert, {"input_ids": IDS}),
        (llama, {"input_ids": IDS}),
        (t5, {"input_ids": IDS, "decoder_input_ids": IDS}),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), torch.randn(2, 3, 8, 8)),
    ],
    ids=["bert", "llama", "t5", "conv"],
)
def test_every_address_can_be_captured_and_has_the_printed_shape(build, inputs):
    model = build()
    rows = [row for row in survey(model, inputs, inputs=True).rows if row.calls == 1]
    assert len(rows) > 3
    with Capture(model, [row.address for row in rows]) as captured:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for row in rows:
        address = parse(row.address)
        tensor = captured[address.path][address.key]
        assert (tuple(tensor.shape), f"torch.{row.dtype}") == (row.shape, str(tensor.dtype))
        assert row.bytes == tensor.numel() * tensor.element_size()


def test_attention_is_listed_where_one_attention_runs():
    addresses = survey(t5(), {"input_ids": IDS, "decoder_input_ids": IDS}).addresses()
    assert "decoder.block.0.layer.0:attention" in addresses
    assert "decoder.block.0.layer.1.EncDecAttention:query" in addresses
    assert "decoder.block.0:attention" not in addresses  # two run there
    assert "decoder:attention" not in addresses


def test_calls_containers_and_modules_that_never_run(capsys):
    made = hookdistill.outline(Twice(), (torch.randn(2, 4),))
    rows = {row.address: row for row in made.rows}
    assert rows["shared"].calls == 2
    assert rows[":output.a"].shape == (2, 4)
    assert rows[":output.b[0]"].shape == (2,)
    assert made.silent == ("unused",)
    printed = capsys.readouterr().out
    assert "×2" in printed
    assert "never called: unused" in printed


def test_inputs_have_the_names_of_the_signature():
    addresses = survey(Twice(), {"x": torch.randn(2, 4), "scale": torch.ones(1)}, inputs=True).addresses()
    assert {":input.x", ":input.scale", "shared:input.input"} <= set(addresses)


def test_a_pattern_narrows_the_list():
    made = survey(bert(), {"input_ids": IDS}, pattern="encoder.layer.-1.output")
    assert made.addresses() == ["encoder.layer.1.output"]


def test_a_pattern_that_names_nothing_is_an_error():
    with pytest.raises(AddressError, match=r"encoder\.layer\.7"):
        survey(bert(), {"input_ids": IDS}, pattern="encoder.layer.7")


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).train()
    before, random_state = model[0].running_mean.clone(), torch.get_rng_state()
    survey(model, torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert model.training and model[1].training
    assert torch.equal(model[0].running_mean, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_exception_in_the_forward_leaves_no_hook():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        survey(model, torch.randn(2, 4))
    assert not any(module._forward_hooks for module in model.modules())
