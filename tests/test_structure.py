"""Parts of a model found by structure: blocks, attention, stages, head, logits."""

import pytest
import torch
import transformers
from torch import nn

from hookdistill import Capture, StructureError, structure
from nets import MobileNet, ResNet, TimmVit, TorchEncoder, Vgg, images
from pairs import ConvNet, Mlp, Reader

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40, "num_hidden_layers": 3}
BART = {"d_model": 16, "vocab_size": 40, "encoder_layers": 3, "decoder_layers": 2} | {
    f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("attention_heads", 2), ("ffn_dim", 32))
}
IDS = {"input_ids": torch.arange(1, 9)[None]}
PIXELS = {"pixel_values": torch.zeros(1, 3, 32, 32)}

# family → config, head class, a batch; then what is to be found: path of the list, attention inside a block
FAMILIES = {
    "bert": ("Bert", SIZES, "ForSequenceClassification", IDS, "bert.encoder.layer", "attention.self"),
    "roberta": ("Roberta", SIZES, "ForMaskedLM", IDS, "roberta.encoder.layer", "attention.self"),
    "distilbert": (
        "DistilBert",
        {"dim": 16, "n_heads": 2, "hidden_dim": 32, "n_layers": 3, "vocab_size": 40},
        "ForMaskedLM",
        IDS,
        "distilbert.transformer.layer",
        "attention",
    ),
    "mpnet": ("MPNet", SIZES, "ForMaskedLM", IDS, "mpnet.encoder.layer", "attention.attn"),
    "electra": ("Electra", SIZES | {"embedding_size": 8}, "ForSequenceClassification", IDS, "electra.encoder.layer", None),
    "gpt2": ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 40}, "LMHeadModel", IDS, "transformer.h", "attn"),
    "neox": ("GPTNeoX", SIZES, "ForCausalLM", IDS, "gpt_neox.layers", "attention"),
    "llama": ("Llama", SIZES | {"num_key_value_heads": 1}, "ForCausalLM", IDS, "model.layers", "self_attn"),
    "qwen2": ("Qwen2", SIZES | {"num_key_value_heads": 1}, "ForCausalLM", IDS, "model.layers", "self_attn"),
    "opt": (
        "OPT",
        {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 40, "num_hidden_layers": 3}
        | {"word_embed_proj_dim": 16},
        "ForCausalLM",
        IDS,
        "model.decoder.layers",
        "self_attn",
    ),
    "vit": (
        "ViT",
        {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 3}
        | {"image_size": 32, "patch_size": 8},
        "ForImageClassification",
        PIXELS,
        None,
        None,
    ),
}


def built(family):
    name, sizes, head, batch, path, attention = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}{head}")(config).eval(), batch, path, attention


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_transformer_and_the_attention_inside_them(family):
    model, batch, path, attention = built(family)
    (stack,) = structure.stacks(model)
    assert len(stack) == 3
    assert path in (None, stack.path)  # ViT's list moved between transformers 4 and 5
    assert attention in (None, stack.attention)
    assert not stack.cross
    assert structure.logits(model) == [":logits"]
    wanted = [stack.address(), f"{stack.address(stack.attention)}:attention", f"{stack.blocks[0]}:input", ":logits"]
    with torch.no_grad(), Capture(model, [*wanted, f"{structure.heads(model)[-1]}:input"]) as captured:
        out = model(**batch, output_hidden_states=True)
    states = [captured[block]["output"] for block in stack.blocks]
    torch.testing.assert_close(captured[stack.blocks[0]]["input"], out.hidden_states[0])
    torch.testing.assert_close(states[0], out.hidden_states[1])
    torch.testing.assert_close(states[1], out.hidden_states[2])
    for block in stack.blocks:
        attention_map = captured[f"{block}.{stack.attention}"]["attention"]
        torch.testing.assert_close(attention_map.sum(-1), torch.ones(attention_map.shape[:-1]))


def test_an_encoder_and_a_decoder_are_two_stacks_and_cross_attention_is_not_taken_for_self_attention():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, num_heads=2, d_kv=8, d_ff=32, vocab_size=40, num_layers=3, num_decoder_layers=2)
    )
    encoder, decoder = structure.stacks(t5)
    assert (encoder.path, len(encoder), encoder.cross) == ("encoder.block", 3, False)
    assert (decoder.path, len(decoder), decoder.cross) == ("decoder.block", 2, True)
    assert encoder.attention == decoder.attention == "layer.0.SelfAttention"
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**BART))
    assert [(each.path, each.attention) for each in structure.stacks(bart)] == [
        ("model.encoder.layers", "self_attn"),
        ("model.decoder.layers", "self_attn"),
    ]
    torchs = nn.Transformer(16, 2, 2, 3, batch_first=True)
    assert [(each.path, each.attention, each.cross) for each in structure.stacks(torchs)] == [
        ("encoder.layers", "self_attn", False),
        ("decoder.layers", "self_attn", True),
    ]


def test_hierarchical_vision_transformers_have_a_stack_for_each_stage():
    config = transformers.SwinConfig(embed_dim=8, depths=[2, 3], num_heads=[1, 2], image_size=32, patch_size=4, window_size=2)
    found = structure.stacks(transformers.SwinModel(config))
    assert [len(stack) for stack in found] == [2, 3]


def test_models_without_transformers():
    assert [stack.address("attn") for stack in structure.stacks(TimmVit())] == ["blocks.*.attn"]
    assert [stack.address() for stack in structure.stacks(TorchEncoder())] == ["encoder.layers.*"]
    assert structure.logits(TimmVit()) == [":output"]
    assert structure.logits(Reader()) == [":logits"]  # an annotated dataclass
    assert structure.heads(TimmVit()) == ["head"]


def test_blocks_among_other_modules_of_a_sequential():
    model = nn.Sequential(nn.Linear(4, 16), *TimmVit(depth=3).blocks, nn.LayerNorm(16), nn.Linear(16, 5))
    (stack,) = structure.stacks(model)
    assert (stack.names, stack.whole) == (("1", "2", "3"), False)
    assert stack.address() == "{1,2,3}"
    assert stack.address("attn", names=("1", "2")) == "{1,2}.attn"
    assert stack.address("attn", names=("3",)) == "{3}.attn"
    assert structure.heads(model) == ["5"]


def test_hybrid_blocks_without_attention_count_in_a_module_list():
    blocks = nn.ModuleList([TimmVit(depth=1).blocks[0], nn.Linear(16, 16), TimmVit(depth=1).blocks[0]])
    (stack,) = structure.stacks(nn.ModuleDict({"layers": blocks}))
    assert (stack.names, stack.attention) == (("0", "1", "2"), None)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: ResNet(8, 16, 32, 64, depth=2), ["layer1", "layer2", "layer3", "layer4"]),
        (lambda: Vgg(8, 16), ["features.3", "features.8"]),
        (lambda: MobileNet(8, 8, 16, 16, 24, strides=(1, 2, 2, 1, 2)), ["blocks.0", "blocks.1", "blocks.3", "blocks.4"]),
        (ConvNet, ["relu"]),
    ],
)
def test_stages_of_conv_nets(model, expected):
    net = model()
    assert structure.stacks(net) == []
    assert structure.stages(net) == expected
    assert structure.layers(net) == expected


def test_the_stages_of_a_resnet_are_those_where_the_resolution_changes():
    model = ResNet(8, 16, 32, depth=2)
    with Capture(model, structure.stages(model)) as captured:
        model(images(size=64)["x"])
    assert [captured[path]["output"].shape[-1] for path in structure.stages(model)] == [16, 8, 4]
    assert structure.heads(model) == ["fc"]


@pytest.mark.parametrize("name", ["ResNet", "ConvNext", "RegNet"])
def test_stages_of_hugging_face_conv_nets(name):
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 2, 1, 1]}
    sizes |= {"embedding_size": 8} if name != "ConvNext" else {}
    sizes |= {"groups_width": 8} if name == "RegNet" else {}
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes))
    assert structure.stages(model) == [f"encoder.stages.{i}" for i in range(4)]
    assert structure.stacks(model) == []  # squeeze and excitation is no self-attention
    assert structure.logits(model) == []


def test_wrappers_are_seen_through():
    model = torch.compile(nn.Sequential(TimmVit()), backend="eager")
    assert [stack.path for stack in structure.stacks(model)] == ["0.blocks"]


def test_without_attention_and_strides_the_longest_list_of_one_class():
    assert structure.layers(Reader(depth=3)) == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(StructureError, match=r"no layers were found: Mlp has 'first \(Linear\)', 'norm"):
        structure.layers(Mlp())


def test_blocks_with_a_convolution_but_without_steps_in_resolution():
    blocks = nn.ModuleList(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(8, 8)) for _ in range(3))  # as in Mamba
    assert structure.layers(nn.ModuleDict({"layers": blocks})) == ["layers.0", "layers.1", "layers.2"]


def test_a_model_that_returns_something_else_than_logits_has_none():
    config = transformers.BertConfig(**SIZES)
    assert structure.logits(transformers.BertModel(config)) == []
    assert "last_hidden_state" in structure.output_fields(transformers.BertModel(config))
    assert structure.logits(transformers.BertForQuestionAnswering(config)) == [":start_logits", ":end_logits"]
    assert structure.logits(nn.Linear(2, 2)) == [":output"]
