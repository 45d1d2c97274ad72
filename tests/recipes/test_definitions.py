"""What recipes compare, against the tensors that the models themselves return, and their options."""

import inspect
import math

import pytest
import torch
import transformers
from torch.nn import functional

from hookdistill import Capture, Distiller, Match, MatchError, StructureError, losses, recipes
from hookdistill.recipes.finding import first_token
from nets import ResNet, TimmVit, images
from pairs import seeded

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 40, "num_labels": 3}
NAMES = """
distilbert tinybert minilm minilm_v2 patient_kd mobilebert fitnet attention_transfer rkd crd dkd dist reviewkd cka gkd_losses kd
"""


def bert(layers, kind="BertForSequenceClassification", **changed):
    config = transformers.BertConfig(**SIZES | {"num_hidden_layers": layers} | changed, attn_implementation="eager")
    model = seeded(getattr(transformers, kind), config, seed=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # attention that is not uniform
    return model.eval()


def batch(labels=(0, 2, 1)):
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([6, 4, 5])[:, None]).long()
    ids = torch.randint(1, 40, (3, 6), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def states(model, inputs):
    """Hidden states before each block and after the last, attention maps, and logits, as the model returns them."""
    given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    out = model(**given, output_hidden_states=True, output_attentions=True)
    return out.hidden_states, out.attentions, getattr(out, "logits", None)


def total(matches, teacher, student, inputs):
    distiller = Distiller(teacher, student, matches, example_batch=inputs)
    distiller.eval()
    return distiller(inputs).total


def test_all_recipes_of_the_contract_are_there():
    assert set(recipes.__all__) == set(NAMES.split()) == set(recipes.catalogue())


@pytest.mark.parametrize("name", NAMES.split())
def test_a_recipe_names_its_paper_and_has_its_options_by_keyword(name):
    entry = recipes.catalogue()[name]
    assert "arXiv" in entry.paper
    assert entry.summary.endswith(".")
    assert len(entry.summary) < 140
    numbers = [word.strip(";,") for word in entry.paper.split() if word.strip(";,").replace(".", "").isdigit() and "." in word]
    assert numbers
    assert all(number in entry.function.__doc__ for number in numbers)
    parameters = inspect.signature(entry.function).parameters.values()
    assert [p.name for p in parameters][:2] == ["teacher", "student"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in list(parameters)[2:])
    assert set(entry.options) == {p.name for p in list(parameters)[2:]}


def test_tinybert():
    teacher, student, inputs = bert(4), bert(2), batch()
    found = total(recipes.tinybert(teacher, student), teacher, student, inputs)
    (theirs, _, _), (ours, _, _) = states(teacher, inputs), states(student, inputs)
    valid = inputs["attention_mask"].bool()
    pairs = valid[:, None, :, None] & valid[:, None, None, :]
    expected = functional.mse_loss(ours[0][valid], theirs[0][valid])  # what enters the first block
    for student_layer, teacher_layer in ((0, 1), (1, 3)):
        expected = expected + functional.mse_loss(ours[student_layer + 1][valid], theirs[teacher_layer + 1][valid])
    rest = total([m for m in recipes.tinybert(teacher, student) if m.selector is None], teacher, student, inputs)
    torch.testing.assert_close(rest, expected)
    scores = total([m for m in recipes.tinybert(teacher, student) if m.selector], teacher, student, inputs)
    torch.testing.assert_close(found, rest + scores)
    with Capture(teacher, ["bert.encoder.layer.{1,3}.attention.self:attention_scores"]) as captured:
        states(teacher, inputs)
        raw = [captured[f"bert.encoder.layer.{i}.attention.self"]["attention_scores"] for i in (1, 3)]
    with Capture(student, ["bert.encoder.layer.*.attention.self:attention_scores"]) as captured:
        states(student, inputs)
        mine = [captured[f"bert.encoder.layer.{i}.attention.self"]["attention_scores"] for i in (0, 1)]
    where = pairs.expand_as(raw[0])
    torch.testing.assert_close(scores, sum(functional.mse_loss(m[where], t[where]) for m, t in zip(mine, raw, strict=True)))


def test_the_second_stage_of_tinybert_is_the_soft_cross_entropy():
    teacher, student, inputs = bert(4), bert(2), batch()
    found = total(recipes.tinybert(teacher, student, stage="prediction"), teacher, student, inputs)
    theirs, ours = states(teacher, inputs)[2].detach(), states(student, inputs)[2]
    soft = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum(-1).mean()
    entropy = -(theirs.softmax(-1) * theirs.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(found, soft - entropy)
    with pytest.raises(MatchError, match=r"recipes\.tinybert: stage='last' is not known"):
        recipes.tinybert(teacher, student, stage="last")


def test_minilm():
    teacher, student, inputs = bert(4), bert(2, hidden_size=16), batch()
    found = total(recipes.minilm(teacher, student), teacher, student, inputs)
    (_, their_maps, _), (_, our_maps, _) = states(teacher, inputs), states(student, inputs)
    attention = losses.attention_kl(our_maps[-1], their_maps[-1], mask=inputs["attention_mask"])
    relations = [value_relation(model, inputs) for model in (student, teacher)]
    valid = inputs["attention_mask"].bool()
    rows = (relations[1].exp() * (relations[1] - relations[0])).nan_to_num(0).sum(-1)  # [batch, heads, tokens]
    torch.testing.assert_close(found, attention + rows.transpose(1, 2)[valid].mean())


def value_relation(model, inputs):
    """log softmax(V Vᵀ / √d) over the valid tokens, from the last block's input and its value projection."""
    hidden = states(model, inputs)[0][-2]
    project = model.bert.encoder.layer[-1].attention.self.value
    value = project(hidden).unflatten(-1, (4, -1)).transpose(1, 2)
    scores = value @ value.transpose(-1, -2) / math.sqrt(value.shape[-1])
    return scores.masked_fill(inputs["attention_mask"][:, None, None] == 0, -math.inf).log_softmax(-1)


def test_minilm_v2_takes_relation_heads_of_sixteen():
    teacher, student = bert(4, hidden_size=96), bert(2, hidden_size=48)
    matches = recipes.minilm_v2(teacher, student)
    assert [match.selector for match in matches] == ["query", "key", "value"]
    assert {match.loss_args["heads"] for match in matches} == {6}
    assert {match.student for match in matches} == {"bert.encoder.layer.1.attention.self"}
    assert {match.teacher for match in matches} == {"bert.encoder.layer.3.attention.self"}
    assert recipes.minilm_v2(teacher, student, relation_heads=12)[0].loss_args == {"heads": 12}
    assert recipes.minilm_v2(teacher, student, relation_heads=None)[0].loss_args == {}
    other = recipes.minilm_v2(teacher, student, teacher_layer=1)
    assert other[0].teacher == "bert.encoder.layer.1.attention.self"
    with pytest.raises(MatchError, match=r"recipes\.minilm_v2: teacher_layer=4, but the teacher has 4 blocks"):
        recipes.minilm_v2(teacher, student, teacher_layer=4)


@pytest.mark.parametrize(
    ("teacher", "student", "heads"),
    [
        ({"hidden_size": 768, "num_attention_heads": 12}, {"hidden_size": 384, "num_attention_heads": 12}, 48),
        ({"hidden_size": 1024, "num_attention_heads": 16}, {"hidden_size": 384, "num_attention_heads": 12}, 64),
        ({"hidden_size": 384, "num_attention_heads": 12}, {"hidden_size": 312, "num_attention_heads": 12}, 24),
        ({"hidden_size": 32, "num_attention_heads": 2}, {"hidden_size": 48, "num_attention_heads": 2}, 2),
    ],
)
def test_the_papers_numbers_of_relation_heads(teacher, student, heads):
    models = []
    for sizes in (teacher, student):
        config = transformers.BertConfig(**SIZES | sizes | {"num_hidden_layers": 1})
        with torch.device("meta"):
            models.append(transformers.BertModel(config))
    assert {match.loss_args["heads"] for match in recipes.minilm_v2(*models)} == {heads}


def test_relation_heads_of_grouped_heads_divide_keys_and_values_too():
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.LlamaConfig(**SIZES | sizes | {"hidden_size": 64})
    model = transformers.LlamaForCausalLM(config)
    heads = {match.loss_args["heads"] for match in recipes.minilm_v2(model, model)}
    assert heads == {4}  # queries are 64 wide, keys and values 32


def test_patient_kd_compares_the_first_token_of_all_layers_but_the_last():
    teacher, student, inputs = bert(6), bert(3), batch()
    matches = recipes.patient_kd(teacher, student)
    (theirs, _, their_logits), (ours, _, our_logits) = states(teacher, inputs), states(student, inputs)
    expected = 0.5 * functional.cross_entropy(our_logits, inputs["labels"])
    expected = expected + 0.5 * losses.kl(our_logits, their_logits.detach(), temperature=10.0)
    for student_layer, teacher_layer in ((0, 1), (1, 3)):  # every second of the first five
        unit = [functional.normalize(side[:, 0], dim=-1) for side in (ours[student_layer + 1], theirs[teacher_layer + 1])]
        expected = expected + 100 * (unit[0] - unit[1]).square().sum(-1).mean()
    torch.testing.assert_close(total(matches, teacher, student, inputs), expected)
    last = Distiller(teacher, student, recipes.patient_kd(teacher, student, layer_map="last")).loss.terms.values()
    pairs = [(str(t.student_address)[-1], str(t.teacher_address)[-1]) for t in last if t.spec.name == "normalized_mse"]
    assert pairs == [("0", "3"), ("1", "4")]
    with pytest.raises(StructureError, match="both need two blocks at least"):
        recipes.patient_kd(teacher, bert(1))


def test_the_first_token():
    assert first_token(batch()).tolist() == [[True] + [False] * 5] * 3


def test_distilbert():
    teacher, student = bert(4, "BertForMaskedLM"), bert(2, "BertForMaskedLM")
    inputs = batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.4, -100)
    (theirs, _, their_logits), (ours, _, our_logits) = states(teacher, inputs), states(student, inputs)
    valid = inputs["attention_mask"].bool()
    expected = 5 * losses.kl(our_logits[valid], their_logits[valid].detach(), temperature=2.0)
    expected = expected + 2 * functional.cross_entropy(our_logits.flatten(0, 1), inputs["labels"].flatten())
    expected = expected + (1 - functional.cosine_similarity(ours[-1][valid], theirs[-1][valid].detach(), -1)).mean()
    torch.testing.assert_close(total(recipes.distilbert(teacher, student), teacher, student, inputs), expected)
    assert len(recipes.distilbert(teacher, student, labels=None)) == 2


def test_mobilebert_goes_block_by_block():
    teacher, student, inputs = bert(3), bert(3, hidden_size=16), batch()
    terms = Distiller(teacher, student, recipes.mobilebert(teacher, student)).loss.terms
    assert [str(term.teacher_address) for term in terms.values()][:3] == [f"bert.encoder.layer.{i}" for i in range(3)]
    (block, attention) = Distiller(
        teacher, student, recipes.mobilebert(teacher, student, layer=1), example_batch=inputs
    ).loss.terms
    assert block == "bert.encoder.layer.1 <- bert.encoder.layer.1: mse"
    assert attention.endswith("attention_kl")
    second = recipes.mobilebert(teacher, student, stage="pretraining", alpha=0.25)
    assert [(match.spec.name, match.weight) for match in second] == [("cross_entropy", 0.25), ("kl", 0.75)]
    with pytest.raises(StructureError, match=r"the teacher has 3 blocks and the student 2. Take recipes\.tinybert"):
        recipes.mobilebert(teacher, bert(2))
    with pytest.raises(MatchError, match="layer=3, but there are 3 blocks"):
        recipes.mobilebert(teacher, student, layer=3)
    assert len(recipes.mobilebert(bert(4), bert(2), teacher_layers="bert.encoder.layer.{1,3}")) == 2


def test_fitnet_hints_at_the_middle():
    teacher, student = ResNet(8, 16, 32, 64), ResNet(4, 8, 16, 32)
    hint = recipes.fitnet(teacher, student, stage="hint")
    assert [(match.teacher, match.student, match.weight) for match in hint] == [("layer2", "layer2", 1.0)]
    assert "stage='kd'" in hint.besides[0]
    assert [match.spec.name for match in recipes.fitnet(teacher, student)] == ["cross_entropy", "mse"]
    assert [match.spec.name for match in recipes.fitnet(teacher, student, stage="kd")] == ["cross_entropy", "kl"]
    blocks = recipes.fitnet(TimmVit(depth=12), TimmVit(depth=4), stage="hint")
    assert [(match.teacher, match.student) for match in blocks] == [("blocks.5", "blocks.1")]


def test_stages_are_paired_from_the_end():
    matches = recipes.attention_transfer(ResNet(8, 16, 32, 64), ResNet(4, 8))
    assert [(match.teacher, match.student) for match in matches if match.teacher] == [
        ("layer3", "layer1"),
        ("layer4", "layer2"),
    ]
    chosen = recipes.attention_transfer(
        ResNet(8, 16), ResNet(4, 8), teacher_layers=["conv1"], student_layers="conv1", labels=None
    )
    assert [(match.teacher, match.student) for match in chosen] == [("conv1", "conv1")]


def test_reviewkd_takes_all_stages_deepest_first():
    teacher, student = ResNet(8, 16, 32), ResNet(4, 8, 16)
    (match,) = recipes.reviewkd(teacher, student, labels=None)
    assert (match.teacher, match.student) == ("layer3", "layer3")
    assert match.inputs == {"teachers": ["layer2", "layer1"], "students": ["layer2", "layer1"]}


def test_the_warm_up_of_dkd():
    teacher = ResNet(8, 16)
    weight = recipes.dkd(teacher, teacher, warmup_steps=4)[1].weight
    assert [weight(step) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert recipes.dkd(teacher, teacher)[1].target == "labels"
    with pytest.raises(MatchError, match=r"without any take recipes\.kd"):
        recipes.dkd(teacher, teacher, labels=None)


def test_the_ends_of_gkd_are_the_two_kl_divergences():
    model = bert(1, "BertForMaskedLM")
    names = [recipes.gkd_losses(model, model, beta=beta)[0].spec.name for beta in (0, 0.3, 1)]
    assert names == ["kl", "js", "reverse_kl"]
    with pytest.raises(MatchError, match=r"beta=1\.5 must lie between 0"):
        recipes.gkd_losses(model, model, beta=1.5)
    (unlabelled,) = recipes.gkd_losses(model, model, labels=None)
    assert (unlabelled.target, unlabelled.mask) == (None, "attention_mask")
    (labelled,) = recipes.gkd_losses(model, model)
    assert (labelled.target, labelled.mask) == ("labels", None)


def test_crd_needs_the_size_of_the_training_set():
    with pytest.raises(MatchError, match=r"recipes\.crd: samples= is missing, the size of the training set"):
        recipes.crd(ResNet(8), ResNet(4))


def test_the_list_is_printed_and_edited_like_any_list():
    teacher, student = bert(4), bert(2)
    matches = recipes.tinybert(teacher, student)
    shown = str(matches)
    assert "bert.encoder.layer.*.attention.self:attention_scores" in shown
    assert "uniform" in shown
    assert "besides: this is the first stage" in shown
    assert isinstance(matches, list)
    matches.append(Match(":logits", ":logits", loss="kl", temperature=3.0))
    del matches[0]
    assert "kl(T=3)" in str(matches)
    assert [type(each) for each in matches] == [Match] * 3
    assert total(matches, teacher, student, batch()).isfinite()


def test_layer_maps_and_layers_of_ones_own():
    teacher, student = bert(4), bert(2)
    matches = recipes.tinybert(teacher, student, layer_map="last", student_layers="bert.encoder.layer.{0,1}")
    terms = Distiller(teacher, student, matches).loss.terms
    assert "bert.encoder.layer.0 <- bert.encoder.layer.2: mse" in terms
    chosen = recipes.tinybert(teacher, student, layer_map="emd")
    assert total(chosen, teacher, student, batch()).isfinite()
    with pytest.raises(MatchError, match=r"recipes\.cka: layer_map='emd' does not depend on the numbers"):
        recipes.cka(teacher, student, layer_map="emd")
    with pytest.raises(StructureError, match="names modules of several parents"):
        recipes.tinybert(teacher, student, teacher_layers="bert.encoder.layer.*.attention")


def test_a_student_deeper_than_its_teacher():
    teacher, student = bert(2), bert(4)
    matches = recipes.cka(teacher, student, labels=None)
    assert [(m.teacher[-1], m.student[-1]) for m in matches] == [("0", "1"), ("1", "3")]


def test_encoder_and_decoder_against_an_encoder_alone():
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, num_heads=2, d_kv=8, d_ff=32, vocab_size=40, num_layers=2)
    )
    with pytest.raises(
        StructureError, match=r"blocks in 'encoder.block', 'decoder.block', the student in 'bert.encoder.layer'"
    ):
        recipes.minilm_v2(t5, bert(2))
    matches = recipes.minilm_v2(t5, bert(2), teacher_layers="encoder.block.*")
    assert matches[0].teacher == "encoder.block.1.layer.0.SelfAttention"


def test_nothing_left_is_an_error():
    with pytest.raises(StructureError, match=r"recipes\.rkd: every term was left out"):
        recipes.rkd(ResNet(8), ResNet(4), distance=0, angle=0, labels=None)


def test_labels_and_masks_of_ones_own():
    teacher, student = ResNet(8, 16), ResNet(4, 8)
    matches = recipes.kd(teacher, student, labels="y", mask="kept")
    assert [(match.target, match.mask) for match in matches] == [("y", None), (None, "kept")]
    inputs = images()
    inputs = {"x": inputs["x"], "y": inputs["labels"], "kept": torch.tensor([1, 1, 0, 1])}
    assert total(matches, teacher, student, inputs).isfinite()
