"""Every recipe on the model families it is for: it finds its layers, is planned, and trains."""

import pytest
import torch
import transformers
from torch import nn

from hookdistill import Distiller, StructureError, recipes
from nets import MobileNet, ResNet, TimmVit, TorchEncoder, Vgg, images
from pairs import seeded

HEADS = {"num_attention_heads": 2}
SIZES = HEADS | {"hidden_size": 16, "intermediate_size": 32, "vocab_size": 40}
PICTURES = HEADS | {"hidden_size": 16, "intermediate_size": 32, "image_size": 32, "patch_size": 8, "num_labels": 3}

# family → the class of its config, sizes, the name of the number of layers, the class of the model
LANGUAGE = {
    "bert": ("BertConfig", SIZES, "num_hidden_layers", "BertForMaskedLM"),
    "roberta": ("RobertaConfig", SIZES, "num_hidden_layers", "RobertaForMaskedLM"),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 16, "n_heads": 2, "hidden_dim": 32, "vocab_size": 40},
        "n_layers",
        "DistilBertForMaskedLM",
    ),
    "mpnet": ("MPNetConfig", SIZES, "num_hidden_layers", "MPNetForMaskedLM"),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_head": 2, "vocab_size": 40}, "n_layer", "GPT2LMHeadModel"),
    "neox": ("GPTNeoXConfig", SIZES, "num_hidden_layers", "GPTNeoXForCausalLM"),
    "llama": ("LlamaConfig", SIZES | {"num_key_value_heads": 1}, "num_hidden_layers", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", SIZES | {"num_key_value_heads": 1}, "num_hidden_layers", "Qwen2ForCausalLM"),
}
CAUSAL = ("gpt2", "neox", "llama", "qwen2")


def language(family, layers, **changed):
    config, sizes, number, model = LANGUAGE[family]
    made = getattr(transformers, config)(**sizes | {number: layers} | changed)
    return seeded(getattr(transformers, model), made, seed=layers)


def classifier(layers, **changed):
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": layers, "num_labels": 3} | changed)
    return seeded(transformers.BertForSequenceClassification, config, seed=layers)


def vit(layers):
    return seeded(
        transformers.ViTForImageClassification, transformers.ViTConfig(**PICTURES, num_hidden_layers=layers), seed=layers
    )


def t5(layers):
    config = transformers.T5Config(d_model=16, num_heads=2, d_kv=8, d_ff=32, vocab_size=40, num_layers=layers)
    return seeded(transformers.T5ForConditionalGeneration, config, seed=layers)


def text(batch=3, length=6, *, labels="tokens"):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (batch, length), generator=draw)
    mask = (torch.arange(length) < torch.tensor([length, length - 2, length - 1])[:batch, None]).long()
    found = {"input_ids": ids, "attention_mask": mask}
    if labels == "tokens":
        found["labels"] = ids.masked_fill(mask == 0, -100)
    if labels == "classes":
        found["labels"] = torch.randint(3, (batch,), generator=draw)
    return found


def trained(matches, teacher, student, batch):
    """The plan, after a backward in which every entry that has a gradient for a parameter gave a finite one."""
    distiller = Distiller(teacher, student, matches)
    plan = distiller.plan(batch)
    losses = distiller(batch)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(value.isfinite() for value in losses.parts.values())
    found = [p.grad for p in distiller.parameters() if p.requires_grad and p.grad is not None]
    assert found
    assert all(gradient.isfinite().all() for gradient in found)
    assert any(bool(gradient.any()) for gradient in found)
    return plan


@pytest.mark.parametrize("family", LANGUAGE)
@pytest.mark.parametrize("name", ["distilbert", "tinybert", "minilm", "minilm_v2", "kd", "cka", "mobilebert"])
def test_language_models(family, name):
    teacher, student = language(family, 4), language(family, 4 if name == "mobilebert" else 2)
    plan = trained(getattr(recipes, name)(teacher, student), teacher, student, text())
    assert all(row.mask == "attention_mask" for row in plan if not row.teacher.startswith("batch:"))


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_language_models(family):
    teacher, student = language(family, 4), language(family, 2)
    plan = trained(recipes.gkd_losses(teacher, student), teacher, student, text())
    assert "causal_shift=True" in plan.rows[0].loss
    for name in ("kd", "distilbert"):
        losses = [row.loss for row in trained(getattr(recipes, name)(teacher, student), teacher, student, text())][:2]
        assert all("causal_shift=True" in loss for loss in losses)


@pytest.mark.parametrize("name", ["patient_kd", "rkd", "kd", "dkd", "dist", "fitnet", "cka", "tinybert", "minilm_v2"])
def test_text_classifiers(name):
    teacher, student = classifier(4), classifier(3)
    trained(getattr(recipes, name)(teacher, student), teacher, student, text(labels="classes"))


@pytest.mark.parametrize("name", ["tinybert", "minilm", "minilm_v2", "kd", "dkd", "dist", "fitnet", "rkd", "cka"])
@pytest.mark.parametrize("build", [vit, lambda layers: seeded(TimmVit, depth=layers, seed=layers)], ids=["hf", "timm"])
def test_vision_transformers(name, build):
    teacher, student = build(4), build(2)
    batch = images() if isinstance(student, TimmVit) else {"pixel_values": images()["x"], "labels": images()["labels"] % 3}
    plan = trained(getattr(recipes, name)(teacher, student), teacher, student, batch)
    assert all(row.mask == "" for row in plan)


@pytest.mark.parametrize("name", ["distilbert", "tinybert", "minilm", "minilm_v2", "kd"])
def test_encoders_with_decoders(name):
    teacher, student = t5(4), t5(2)
    batch = text() | {"decoder_input_ids": text(length=5)["input_ids"], "labels": text(length=5)["labels"]}
    matches = getattr(recipes, name)(teacher, student)
    assert any("decoder_input_ids" in each for each in matches.besides)
    plan = trained(matches, teacher, student, batch)
    masks = {row.mask for row in plan if row.student.startswith("decoder") or row.student == ":logits"} - {""}
    assert masks == {"decoded_tokens"}
    if name != "kd":
        assert {row.mask for row in plan if row.student.startswith("encoder")} == {"attention_mask"}


def test_the_mask_of_a_decoder_is_its_own_where_the_batch_has_it():
    from hookdistill.recipes.finding import decoded_tokens

    labels = torch.tensor([[3, -100]])
    assert decoded_tokens({"labels": labels}).tolist() == [[True, False]]
    own = torch.tensor([[1, 1]])
    assert decoded_tokens({"labels": labels, "decoder_attention_mask": own}) is own


@pytest.mark.parametrize("name", ["fitnet", "attention_transfer", "rkd", "kd", "dkd", "dist", "cka", "reviewkd"])
@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (lambda: ResNet(8, 16, 32, depth=2), lambda: ResNet(4, 8, 16)),
        (lambda: ResNet(8, 16, 32, depth=1), lambda: Vgg(4, 8)),
        (lambda: MobileNet(8, 8, 16, strides=(1, 2, 2)), lambda: MobileNet(4, 4, 8, strides=(1, 2, 2))),
    ],
    ids=["resnet", "resnet-vgg", "mobilenet"],
)
def test_conv_nets(name, teacher, student):
    teacher, student = seeded(teacher, seed=1), seeded(student, seed=2)
    trained(getattr(recipes, name)(teacher, student), teacher, student, images(size=64))


def test_contrastive_distillation_keeps_a_memory_of_the_training_set():
    teacher, student = seeded(ResNet, 8, 16, seed=1), seeded(ResNet, 4, 8, seed=2)
    batch = images() | {"index": torch.tensor([3, 1, 8, 0])}
    matches = recipes.crd(teacher, student, samples=10, k=4)
    plan = trained(matches, teacher, student, batch)
    assert [row.student for row in plan] == [":output", "fc:input"]
    assert plan.rows[1].weight == "0.8"


def test_hugging_face_conv_nets():
    def build(width):
        sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [1, 1], "num_labels": 5}
        return seeded(transformers.ResNetForImageClassification, transformers.ResNetConfig(**sizes))

    batch = {"pixel_values": images()["x"], "labels": images()["labels"]}
    plan = trained(recipes.attention_transfer(build(8), build(4)), build(8), build(4), batch)
    assert [row.student for row in plan] == [":logits", "resnet.encoder.stages.0", "resnet.encoder.stages.1"]


def test_torchs_own_encoder():
    teacher, student = seeded(TorchEncoder, depth=4, seed=1), seeded(TorchEncoder, depth=2, seed=2)
    batch = {"input_ids": torch.randint(30, (4, 6)), "labels": torch.randint(5, (4,))}
    for name in ("tinybert", "minilm_v2", "rkd", "kd"):
        trained(getattr(recipes, name)(teacher, student), teacher, student, batch)


def test_a_transformer_teaches_a_conv_net():
    teacher, student = seeded(TimmVit, depth=4, seed=1), seeded(ResNet, 4, 8, seed=2)
    for name in ("kd", "rkd", "cka"):
        trained(getattr(recipes, name)(teacher, student), teacher, student, images())


@pytest.mark.parametrize("name", ["tinybert", "minilm", "minilm_v2", "mobilebert", "distilbert", "patient_kd"])
def test_a_conv_net_has_no_blocks(name):
    teacher, student = seeded(ResNet, 8, 16), seeded(ResNet, 4, 8)
    with pytest.raises(
        StructureError, match=rf"recipes\.{name}: looked for transformer blocks in the teacher, .*'layer2 \(Seq"
    ):
        getattr(recipes, name)(teacher, student)


@pytest.mark.parametrize("name", ["attention_transfer", "reviewkd"])
def test_a_transformer_has_no_stages(name):
    with pytest.raises(StructureError, match=rf"recipes\.{name}: looked for stages in the teacher, .*Name their last modules"):
        getattr(recipes, name)(TimmVit(), TimmVit())


def test_a_model_without_logits_says_what_it_returns():
    config = transformers.BertConfig(**SIZES, num_hidden_layers=2)
    base = transformers.BertModel(config)
    for name in ("kd", "distilbert", "patient_kd", "dkd"):
        with pytest.raises(
            StructureError, match=rf"recipes\.{name}: looked for logits .*BertModel, which has 'last_hidden_state'"
        ):
            getattr(recipes, name)(base, base)
    assert [str(match.student_address) for match in recipes.kd(base, base, logits=":last_hidden_state", labels=None)] == [
        ":last_hidden_state"
    ]
    with pytest.raises(StructureError, match=r"recipes\.rkd: looked for one vector per item .*teacher_features="):
        recipes.rkd(base, base, labels=None)


@pytest.mark.parametrize("name", ["tinybert", "minilm", "minilm_v2", "distilbert", "cka", "kd"])
def test_under_autocast(name):
    teacher, student = language("bert", 4), language("bert", 2)
    matches = getattr(recipes, name)(teacher, student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = Distiller(teacher.eval(), student.eval(), matches, example_batch=text())(text()).total
    exact = Distiller(teacher, student, matches)(text()).total
    torch.testing.assert_close(low, exact, atol=0.05, rtol=0.1)
    low.backward()


def test_wrapped_models():
    teacher, student = language("bert", 4), language("bert", 2)
    plain = recipes.minilm_v2(teacher, student)
    wrapped = recipes.minilm_v2(torch.compile(teacher, backend="eager"), nn.parallel.DataParallel(student).module)
    assert str(wrapped) == str(plain)
