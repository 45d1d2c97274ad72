"""Heads and losses in one: the logits of neither model are made, and nothing else changes."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hookdistill import Capture, Distiller, Match, MatchError, losses
from hookdistill.fused import head as fused_head
from hookdistill.fused.compiler import compiled_block, compiler_available
from hookdistill.fused.forms import FORMS
from hookdistill.fused.head import Head, HeadTask, head_losses
from hookdistill.fused.rows import RowTerm, block_losses

FUNCTIONS = [
    pytest.param(block_losses, id="plain"),
    pytest.param(
        compiled_block,
        id="compiled",
        marks=pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler"),
    ),
]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused_head, "FEWEST_ROWS", 2)
    monkeypatch.setattr(fused_head, "HEAD_BLOCK", 100)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no cap", "capped"])
def test_values_and_gradients_are_those_of_whole_logits(softcap, bias, function, small_blocks):
    dtype = torch.float64 if function is block_losses else torch.float32
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    hidden, weight = tensor(3, 5, 6).requires_grad_(), tensor(17, 6).requires_grad_()
    offset = tensor(17).requires_grad_() if bias else None
    their_hidden, their_weight = tensor(3, 5, 4), tensor(17, 4)
    mask, labels = torch.rand(3, 5, generator=draw) < 0.7, torch.randint(17, (3, 5), generator=draw)

    logits = F.linear(hidden, weight, offset) * 0.8
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = their_hidden @ their_weight.t()
    soft = losses.kl(logits, theirs, temperature=2.0, mask=mask)
    hard = losses.cross_entropy(logits, labels, mask=mask)
    total = 0.5 * soft + 2 * hard + losses.js(logits, theirs)
    wanted = [each for each in (hidden, weight, offset) if each is not None]
    expected = torch.autograd.grad(total, wanted)

    student = Head(hidden=hidden, weight=weight, bias=offset, scale=0.8, softcap=softcap)
    teacher = Head(hidden=their_hidden, weight=their_weight)
    terms = [
        RowTerm(form=FORMS["kl"], other=teacher, temperature=2.0, valid=mask, coefficient=0.5),
        RowTerm(form=FORMS["cross_entropy"], other=labels, valid=mask, coefficient=2.0, constants=(("label_smoothing", 0.0),)),
        RowTerm(form=FORMS["js"], other=teacher, constants=(("beta", 0.5),)),
    ]
    with torch.no_grad():
        found = head_losses(HeadTask(student=student, terms=terms), function, most=40, gradient=True)
    torch.testing.assert_close(found.total, total.detach())
    torch.testing.assert_close(found.values[:2], torch.stack([soft, hard]).detach())
    assert [tensor for tensor, _ in found.slopes] == wanted
    for (_, slope), gradient in zip(found.slopes, expected, strict=True):
        torch.testing.assert_close(slope, gradient)


class CountingRows(TorchDispatchMode):
    """Adds up the rows that matrix products with a head of ``classes`` are made for."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.rows = classes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm and out.shape[-1] == self.classes:
            self.rows += out.shape[0]
        return out


@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_rows_that_no_term_counts_are_left_out(masked, small_blocks):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 6, generator=draw, dtype=torch.float64).requires_grad_()
    weight, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in ((17, 6), (17,)))
    theirs, labels = torch.randn(4, 5, 17, generator=draw, dtype=torch.float64), torch.randint(17, (4, 5), generator=draw)
    masks = {"none": torch.ones(4, 5), "some": torch.rand(4, 5, generator=draw), "all": torch.zeros(4, 5)}
    soft, hard = masks[masked] > 0.6, masks[masked] > 0.5
    with torch.no_grad():  # what is left out may be anything
        hidden[~hard] = torch.nan
    identity = Head(hidden=theirs, weight=torch.eye(17, dtype=torch.float64))
    terms = [
        RowTerm(form=FORMS["kl"], other=identity, valid=soft, coefficient=2.0),
        RowTerm(form=FORMS["cross_entropy"], other=labels, valid=hard, constants=(("label_smoothing", 0.0),)),
    ]
    with torch.no_grad(), CountingRows(17) as counting:
        student = Head(hidden=hidden, weight=weight, bias=bias)
        found = head_losses(HeadTask(student=student, terms=terms), block_losses, most=40, gradient=True)
    assert counting.rows == 2 * hard.sum()  # logits of both models

    logits = F.linear(torch.where(hard[..., None], hidden, 0.0), weight, bias)
    total = 2 * losses.kl(logits, theirs, mask=soft) + losses.cross_entropy(logits, labels, mask=hard)
    torch.testing.assert_close(found.total, total.detach())
    expected = torch.autograd.grad(total, [hidden, weight, bias])
    for (_, slope), gradient in zip(found.slopes, expected, strict=True):
        torch.testing.assert_close(slope, gradient)


def test_near_the_teacher_the_gradient_is_as_exact_as_float32_logits():
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=draw).bfloat16()
    weight = (torch.randn(3000, 64, generator=draw) / 8).bfloat16()
    ours = (hidden.float() + 0.03 * torch.randn(64, 64, generator=draw)).bfloat16().requires_grad_()
    student, teacher = Head(hidden=ours, weight=weight), Head(hidden=hidden, weight=weight)
    terms = [RowTerm(form=FORMS["kl"], other=teacher)]
    with torch.no_grad():
        found = head_losses(HeadTask(student=student, terms=terms), block_losses, most=10**6, gradient=True)
    exact = ours.detach().double().requires_grad_()
    value = losses.kl(exact @ weight.double().t(), hidden.double() @ weight.double().t())
    (truth,) = torch.autograd.grad(value, exact)
    rounded = ours.detach().clone().requires_grad_()
    (eager,) = torch.autograd.grad(losses.kl(rounded @ weight.t(), hidden @ weight.t()), rounded)
    errors = [((each.double() - truth).norm() / truth.norm()).item() for each in (found.slopes[0][1], eager)]
    assert errors[0] < 0.005
    assert errors[0] < errors[1] / 4  # bfloat16 logits


# In models


def language_model(kind="llama", *, width=32, vocabulary=90, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": vocabulary}
    sizes |= {"intermediate_size": 2 * width, "max_position_embeddings": 64}
    few = {"num_key_value_heads": 2}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**sizes, **few, **changes),
        "gemma2": lambda: transformers.Gemma2Config(**sizes, **few, head_dim=8, final_logit_softcapping=3.0, **changes),
        "cohere": lambda: transformers.CohereConfig(**sizes, **few, logit_scale=0.25, **changes),
        "bert": lambda: transformers.BertConfig(**sizes, **changes),
    }
    config = configs[kind]()
    if kind == "bert":
        return transformers.BertForMaskedLM(config).eval()  # no dropout
    return transformers.AutoModelForCausalLM.from_config(config)


def text(vocabulary=90):
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, vocabulary, (2, 7), generator=draw)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def matches():
    return [
        Match("model.layers.-1", "model.layers.0", mask="attention_mask", name="hidden"),
        Match(":logits", ":logits", loss="kl", temperature=2.0, mask="attention_mask", name="soft"),
        Match(None, ":logits", loss="cross_entropy", target="labels", causal_shift=True, weight=0.5, name="hard"),
    ]


class Counting:
    """How many rows of logits a model makes."""

    def __init__(self, model):
        self.calls = 0
        model.get_output_embeddings().register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1


def trained(head, teacher, student, entries, *, order="student first", autocast=False, **kwargs):
    """Losses and gradients of one step."""
    distiller = Distiller(teacher, student, entries, head=head, order=order, **kwargs)
    plan = distiller.plan(text())
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = distiller(text())
    found.total.backward()
    distiller.close()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return plan, found, gradients


@pytest.mark.parametrize("order", ["student first", "teacher first"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_a_language_model_is_trained_the_same_without_logits(kind, order):
    teacher, student = language_model(kind, seed=1), language_model(kind, width=16, seed=2)
    _, whole, expected = trained("whole", teacher, student, matches())
    counters = Counting(teacher), Counting(student)
    for model in (teacher, student):
        model.get_output_embeddings()._forward_hooks.clear()
    plan, fused, gradients = trained("fused", teacher, student, matches(), order=order)
    assert [counter.calls for counter in counters] == [0, 0]
    torch.testing.assert_close(fused.total, whole.total)
    torch.testing.assert_close(fused.parts, whole.parts)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-7)
    soft = next(row for row in plan if row.name == "soft")
    assert "head and loss in one" in soft.implementation
    assert soft.student_shape == (2, 7, 90)
    assert math.isfinite(soft.value)


def test_no_logits_are_made_in_a_step():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    distiller = Distiller(teacher, student, matches(), head="fused", example_batch=text())
    made = []
    for model in (teacher, student):
        head = model.get_output_embeddings()
        forward = head.forward
        head.forward = lambda hidden, forward=forward: made.append(hidden.shape) or forward(hidden)
    distiller(text()).total.backward()
    assert made == []


def test_tied_weights_get_the_gradients_of_both_uses():
    teacher = language_model(seed=1)
    students = [language_model(width=16, seed=2, tie_word_embeddings=True) for _ in range(2)]
    assert students[0].lm_head.weight is students[0].model.embed_tokens.weight
    expected = trained("whole", teacher, students[0], matches())[2]
    found = trained("fused", teacher, students[1], matches())[2]
    torch.testing.assert_close(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


def test_a_head_with_a_bias_behind_other_layers():
    teacher, student = language_model("bert", seed=1), language_model("bert", width=16, seed=2)
    entries = [Match(":logits", ":logits", loss="reverse_kl", mask="attention_mask")]
    expected = trained("whole", teacher, student, entries)
    found = trained("fused", teacher, student, entries)
    torch.testing.assert_close(found[1].total, expected[1].total)
    assert found[2]["cls.predictions.bias"].abs().sum() > 0
    for name in expected[2]:
        torch.testing.assert_close(found[2][name], expected[2][name], rtol=1e-4, atol=1e-7)


def test_a_frozen_body_with_a_head_that_learns():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    student.requires_grad_(False)
    student.lm_head.requires_grad_(True)
    _, _, gradients = trained("fused", teacher, student, matches()[1:])
    assert list(gradients) == ["lm_head.weight"]


def test_under_autocast_it_trains_what_whole_logits_train():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    _, whole, expected = trained("whole", teacher, student, matches(), autocast=True)
    _, fused, gradients = trained("fused", teacher, student, matches(), autocast=True)
    torch.testing.assert_close(fused.total, whole.total, rtol=2e-2, atol=1e-3)
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 0.05 * expected[name].norm() + 1e-4


def test_evaluation_without_gradients_gives_the_same_parts():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    parts = []
    for head in ("whole", "fused"):
        distiller = Distiller(teacher, student, matches(), head=head, example_batch=text())
        with torch.no_grad():
            parts.append(distiller(text()).parts)
        distiller.close()
    torch.testing.assert_close(parts[1], parts[0])


def test_the_plan_chooses_by_the_memory_it_saves(monkeypatch):
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    plan, _, _ = trained("auto", teacher, student, matches())
    assert all("head" not in row.implementation for row in plan)
    monkeypatch.setattr("hookdistill.head_choice.FUSED_FROM", 1)
    plan, _, _ = trained("auto", teacher, student, matches())
    assert sum("head and loss in one" in row.implementation for row in plan) == 2


def test_what_needs_whole_logits_gets_them(monkeypatch):
    monkeypatch.setattr("hookdistill.head_choice.FUSED_FROM", 1)
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    for extra, words in [
        (Match(":logits", ":logits", loss="mse"), "classes last"),
        (Match(":logits", ":logits", loss=lambda s, t: (s - t).square().mean(), name="own"), "own has"),
        (Match("lm_head:input", "lm_head:input", name="input"), "is compared too"),
    ]:
        entries = [*matches(), extra]
        plan, _, _ = trained("auto", teacher, student, entries)
        assert all("head and loss" not in row.implementation for row in plan)
        with pytest.raises(MatchError, match=r"head='fused', but") as raised:
            trained("fused", teacher, student, entries)
        assert words in str(raised.value)


def test_a_model_whose_logits_come_from_no_linear_layer_says_so():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(90, 8), nn.Linear(8, 90)

        def forward(self, input_ids):
            return {"logits": self.head(self.embed(input_ids)) * 2}

    with pytest.raises(MatchError, match="no linear layer gives these logits"):
        Distiller(Doubled(), Doubled(), [Match(":logits", ":logits", loss="kl")], head="fused", example_batch=text())


def test_a_head_that_somebody_else_hooks_is_left_alone():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    student.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(MatchError, match="of the student, no linear layer"):
        Distiller(teacher, student, matches(), head="fused", example_batch=text())


def test_wrong_words_are_errors():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    with pytest.raises(MatchError, match="'auto', 'fused', 'whole'"):
        Distiller(teacher, student, matches(), head="fuse")
    with pytest.raises(MatchError, match="no eager definition"):
        Distiller(teacher, student, matches(), head="fused", impl="eager")


def test_the_student_is_whole_again_outside_of_a_step():
    teacher, student = language_model(seed=1), language_model(width=16, seed=2)
    distiller = Distiller(teacher, student, matches(), head="fused", example_batch=text())
    distiller(text()).total.backward()
    with Capture(student, [":logits"]) as captured:
        output = student(**text())
    assert output.loss is not None
    assert captured[""]["logits"].shape == (2, 7, 90)
