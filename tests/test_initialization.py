"""A student filled from chosen blocks of its teacher."""

import pytest
import torch
import transformers
from torch import nn

from hookdistill import MatchError, StructureError, initialize_student
from hookdistill.layer_maps import chosen
from nets import ResNet, TimmVit
from pairs import same, seeded, state

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
IDS = torch.arange(1, 9)[None]


def bert(layers, kind="BertModel", **changed):
    config = transformers.BertConfig(**{**SIZES, "num_hidden_layers": layers, **changed})
    return seeded(getattr(transformers, kind), config, seed=layers).eval()


def t5(layers):
    sizes = {"d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 32, "vocab_size": 40}
    return seeded(
        transformers.T5ForConditionalGeneration, transformers.T5Config(num_layers=layers, **sizes), seed=layers
    ).eval()


def test_a_student_of_all_blocks_is_the_teacher():
    teacher, student = bert(3), bert(3)
    student.load_state_dict(seeded(lambda: bert(3, initializer_range=1.0)).state_dict())
    initialize_student(teacher, student)
    assert torch.equal(student(IDS).last_hidden_state, teacher(IDS).last_hidden_state)


@pytest.mark.parametrize(
    ("layers", "positions"),
    [("spread", [0, 2, 5]), ("uniform", [1, 3, 5]), ("last", [3, 4, 5]), ([0, 0, -1], [0, 0, 5])],
)
def test_the_student_is_the_teacher_with_the_other_blocks_cut_out(layers, positions):
    teacher, student = bert(6), bert(3)
    made = initialize_student(teacher, student, layers=layers)
    assert [each.teacher for each in made.copied if each.part == "block"] == [f"encoder.layer.{i}" for i in positions]
    blocks = list(teacher.encoder.layer)
    teacher.encoder.layer = nn.ModuleList(blocks[position] for position in positions)
    teacher.config.num_hidden_layers = 3
    assert torch.equal(student(IDS).last_hidden_state, teacher(IDS).last_hidden_state)
    assert torch.equal(student(IDS).pooler_output, teacher(IDS).pooler_output)


def test_distilberts_own_choice():
    assert chosen("spread", 12, 6) == [0, 2, 4, 7, 9, 11]


def test_the_copy_is_a_copy():
    teacher, student = bert(4), bert(2)
    initialize_student(teacher, student)
    before = state(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert same(state(teacher), before)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_student_with_a_head_and_a_teacher_without():
    teacher, student = bert(4), bert(2, "BertForSequenceClassification")
    head = student.classifier.weight.clone()
    made = initialize_student(teacher, student)
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.embeddings.word_embeddings.weight)
    assert torch.equal(student.bert.pooler.dense.weight, teacher.pooler.dense.weight)
    assert torch.equal(student.classifier.weight, head)
    assert made.left == ("classifier.weight (the teacher has none)", "classifier.bias (the teacher has none)")
    shown = str(made)
    assert "bert.encoder.layer.1" in shown
    assert "encoder.layer.3" in shown
    assert "classifier.bias (the teacher has none)" in shown


def test_embeddings_and_head_may_be_left_out():
    teacher, student = bert(4), bert(2)
    words, pooler = student.embeddings.word_embeddings.weight.clone(), student.pooler.dense.weight.clone()
    made = initialize_student(teacher, student, embeddings=False, head=False)
    assert torch.equal(student.embeddings.word_embeddings.weight, words)
    assert torch.equal(student.pooler.dense.weight, pooler)
    assert {each.part for each in made.copied} == {"block"}
    assert "pooler.dense.weight (head=False)" in made.left
    assert "embeddings.LayerNorm.bias (embeddings=False)" in made.left


def test_an_encoder_and_a_decoder_and_tied_embeddings():
    teacher, student = t5(4), t5(2)
    made = initialize_student(teacher, student)
    blocks = [each.teacher for each in made.copied if each.part == "block"]
    assert blocks == ["encoder.block.0", "encoder.block.3", "decoder.block.0", "decoder.block.3"]
    assert [each.student for each in made.copied].count("shared") == 1
    assert made.left == ()
    assert student.lm_head.weight is student.shared.weight
    assert torch.equal(student.shared.weight, teacher.shared.weight)
    for stack in (teacher.encoder, teacher.decoder):
        del stack.block[1:3]
    assert torch.equal(student(IDS, decoder_input_ids=IDS).logits, teacher(IDS, decoder_input_ids=IDS).logits)


def test_a_timm_like_vision_transformer_and_a_compiled_teacher():
    teacher, student = seeded(TimmVit, depth=4, seed=1), seeded(TimmVit, depth=2, seed=2)
    initialize_student(torch.compile(teacher, backend="eager"), student)
    teacher.blocks = nn.Sequential(teacher.blocks[0], teacher.blocks[3])
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(x), teacher(x))


@pytest.mark.parametrize(
    ("teacher", "student", "options", "error", "message"),
    [
        (
            bert(4),
            bert(2, hidden_size=8),
            {},
            StructureError,
            r"nothing was copied, .*query.weight is \[8, 8\] in the student",
        ),
        (bert(4), bert(2, vocab_size=50), {}, StructureError, r"word_embeddings\.weight is \[50, 16\].*embeddings=False"),
        (bert(4), t5(2), {}, StructureError, "'encoder.layer', the student in 'encoder.block', 'decoder.block'"),
        (t5(4), t5(2), {"layers": "uniform"}, StructureError, "only the student has .*relative_attention_bias"),
        (bert(4), seeded(TimmVit), {}, StructureError, "are made differently: only the student has .*Choose other layers="),
        (
            ResNet(8, 16),
            ResNet(8, 16),
            {},
            StructureError,
            r"the teacher has no repeated transformer blocks .*'conv1 \(Conv2d\)'",
        ),
        (bert(4), bert(2), {"layers": [0, 7]}, MatchError, "no teacher layer 7: there are 4, 0 to 3"),
        (bert(4), bert(2), {"layers": [0]}, MatchError, "there are 2 student layers, but 1 teacher layers are given"),
        (bert(4), bert(2), {"layers": "unifrom"}, MatchError, "Did you mean 'uniform'"),
        (bert(2), bert(4), {}, MatchError, "there are 2 and 4"),
    ],
)
def test_a_refusal_says_why_and_changes_nothing(teacher, student, options, error, message):
    before = state(student)
    with pytest.raises(error, match=message):
        initialize_student(teacher, student, **options)
    assert same(state(student), before)


def test_widths_that_differ_outside_the_blocks_only():
    teacher, student = bert(4), bert(2, vocab_size=50)
    words = student.embeddings.word_embeddings.weight.clone()
    initialize_student(teacher, student, embeddings=False)
    assert torch.equal(student.embeddings.word_embeddings.weight, words)
    assert torch.equal(student.encoder.layer[0].output.dense.weight, teacher.encoder.layer[0].output.dense.weight)


def test_precision_and_place_are_the_students():
    teacher, student = bert(4), bert(2).to(torch.bfloat16)
    initialize_student(teacher, student)
    assert student.pooler.dense.weight.dtype == torch.bfloat16
    torch.testing.assert_close(student.pooler.dense.weight, teacher.pooler.dense.weight.to(torch.bfloat16))
