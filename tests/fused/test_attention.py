"""Attention losses from queries and keys against the same losses on whole maps."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

from encoders import BATCH, PADDING, TOKENS, encoders, token_batch
from hookdistill import Capture, Distiller, Match, losses
from hookdistill.attention import AttentionCall, attention_probabilities, attention_scores
from hookdistill.engine.fast import Choice
from hookdistill.fused.attention import AttentionTask, Heads, attention_losses, map_blocks, queries_that_count

KINDS = ["kl", "mse", "scores mse"]
HEADS = 4


def heads(groups, width, *, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(BATCH, HEADS, TOKENS, width, generator=draw, dtype=dtype)
    key = torch.randn(BATCH, HEADS // groups, TOKENS, width, generator=draw, dtype=dtype)
    return query, key


def masks():
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    keys = PADDING[:, None, None, :]
    lost = keys & torch.ones(TOKENS, 1, dtype=torch.bool)
    lost[0, 0, 3] = False  # a query with no key
    return {
        "none": (None, False),
        "causal flag": (None, True),
        "bool keys": (keys, False),
        "bool keys causal": (keys & causal, False),
        "a lost row": (lost, False),
        "additive": (torch.zeros(keys.shape, dtype=torch.float64).masked_fill(~keys, torch.finfo(torch.float32).min), False),
        "bias of heads": (torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64), False),
    }


def side(query, key, mask, is_causal, scale):
    call = AttentionCall(query=query, key=key, value=key, mask=mask, is_causal=is_causal, scale=scale)
    return call, Heads(query=query.detach(), key=key.detach(), mask=mask, is_causal=is_causal, scale=scale)


def on_maps(kind, ours, theirs, valid):
    make = attention_scores if kind == "scores mse" else attention_probabilities
    loss = losses.attention_kl if kind == "kl" else losses.attention_mse
    return loss(make(ours), make(theirs), mask=valid)


@pytest.mark.parametrize("counted", [None, "tokens", "pairs"])
@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize(("kind", "groups"), list(itertools.product(KINDS, [1, 2])))
def test_values_and_gradients_are_those_of_whole_maps(kind, groups, mask, counted):
    query, key = (tensor.requires_grad_() for tensor in heads(groups, 8, seed=0))
    ours, our_heads = side(query, key, *masks()[mask], 0.35)
    theirs, their_heads = side(*heads(1, 6, seed=1), *masks()[mask], 0.4)
    if mask == "bias of heads":
        theirs, their_heads = side(*heads(1, 6, seed=1), masks()["bias of heads"][0], False, 0.4)
        ours, our_heads = side(query, key, theirs.mask, False, 0.35)
    valid = {None: None, "tokens": PADDING, "pairs": PADDING[:, None] & PADDING[:, :, None]}[counted]
    value = on_maps(kind, ours, theirs, valid)
    expected = torch.autograd.grad(value * 2, (query, key))
    valid = valid.unsqueeze(1) if counted == "pairs" else valid
    for most in (1, 100, 10**6):
        task = AttentionTask(kind=kind, student=our_heads, teacher=their_heads, valid=valid, coefficient=2.0)
        found = attention_losses(task, gradient=True, most=most)
        torch.testing.assert_close(found.value, value.detach())
        torch.testing.assert_close(found.total, 2 * value.detach())
        torch.testing.assert_close((found.query, found.key), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_only_the_student_hides_gets_no_gradient(kind):
    query, key = (tensor.requires_grad_() for tensor in heads(1, 8, seed=0))
    ours, our_heads = side(query, key, None, True, 0.35)
    theirs, their_heads = side(*heads(1, 8, seed=1), None, kind == "scores mse", 0.35)
    value = on_maps(kind, ours, theirs, None)
    expected = torch.autograd.grad(value, (query, key))
    found = attention_losses(AttentionTask(kind=kind, student=our_heads, teacher=their_heads), gradient=True)
    torch.testing.assert_close(found.value, value.detach())
    torch.testing.assert_close((found.query, found.key), expected)


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_a_query_that_is_lost_on_one_side_only(kind, which):
    seen = torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool)
    seen[0, 0, 3] = False
    query, key = (tensor.requires_grad_() for tensor in heads(1, 8, seed=0))
    ours, our_heads = side(query, key, seen if which == "student" else None, False, 0.35)
    theirs, their_heads = side(*heads(1, 8, seed=1), seen if which == "teacher" else None, False, 0.35)
    value = on_maps(kind, ours, theirs, None)
    expected = torch.autograd.grad(value, (query, key))
    found = attention_losses(AttentionTask(kind=kind, student=our_heads, teacher=their_heads), gradient=True)
    torch.testing.assert_close(found.value, value.detach())
    torch.testing.assert_close((found.query, found.key), expected)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_identical_attentions_cost_nothing(kind):
    query, key = heads(1, 8, seed=0, dtype=torch.float32)
    both = Heads(query=query, key=key, scale=0.3)
    found = attention_losses(AttentionTask(kind=kind, student=both, teacher=both), gradient=True)
    assert abs(found.value.item()) < 1e-6
    assert max(found.query.abs().max(), found.key.abs().max()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_agree(kind):
    from hookdistill.engine.total import attach

    teacher = Heads(query=torch.randn(1, 2, 4, 3, dtype=torch.float64), key=torch.randn(1, 2, 4, 3, dtype=torch.float64))

    def value(query, key):
        task = AttentionTask(kind=kind, student=Heads(query=query.detach(), key=key.detach(), is_causal=True), teacher=teacher)
        if kind == "scores mse":
            task = AttentionTask(kind=kind, student=Heads(query=query.detach(), key=key.detach()), teacher=teacher)
        found = attention_losses(task, gradient=True)
        return attach(found.total, (query, key), (found.query, found.key), lambda: None)

    drawn = [torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(value, drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_in_half_precision_it_is_no_worse_than_maps(kind, dtype):
    query, key = (tensor.to(dtype).requires_grad_() for tensor in heads(1, 8, seed=0))
    their_query, their_key = (tensor.to(dtype) for tensor in heads(1, 8, seed=1))
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key)]
    ours, our_heads = side(query, key, None, False, 0.3)
    theirs, their_heads = side(their_query, their_key, None, False, 0.3)
    exactly, _ = side(*exact, None, False, 0.3)
    exact_teacher, _ = side(their_query.double(), their_key.double(), None, False, 0.3)
    truth = torch.autograd.grad(on_maps(kind, exactly, exact_teacher, None), exact)
    eager = torch.autograd.grad(on_maps(kind, ours, theirs, None), (query, key))
    found = attention_losses(AttentionTask(kind=kind, student=our_heads, teacher=their_heads), gradient=True)
    for mine, theirs_, true in zip((found.query, found.key), eager, truth, strict=True):
        errors = [((each.double() - true).norm() / true.norm()).item() for each in (mine.to(dtype), theirs_)]
        assert errors[0] <= 1.5 * errors[1] + 1e-6


def test_masked_tokens_may_hold_anything():
    query, key = heads(1, 8, seed=0)
    their_query, their_key = heads(1, 8, seed=1)
    keys = PADDING[:, None, None, :]
    results = []
    for poison in (0.0, 1e30):
        for tensor in (query, key, their_query, their_key):
            tensor.transpose(1, 2)[~PADDING] = poison
        task = AttentionTask(
            kind="kl",
            student=Heads(query=query, key=key, mask=keys, scale=0.3),
            teacher=Heads(query=their_query, key=their_key, mask=keys, scale=0.3),
            valid=PADDING,
        )
        results.append(attention_losses(task, gradient=True))
    assert torch.equal(results[0].value, results[1].value)
    assert torch.equal(results[0].query, results[1].query)
    assert (results[1].query.transpose(1, 2)[~PADDING] == 0).all()


def test_blocks_cover_what_counts_once():
    assert queries_that_count(PADDING, BATCH, TOKENS) == [(0, 9), (0, 6), (4, 9)]
    assert queries_that_count(torch.zeros(1, 3, dtype=torch.bool), 1, 3) == [(3, 3)]
    for most in (1, 20, 45, 100, 10**6):
        seen = torch.zeros(BATCH, HEADS, TOKENS)
        for b, h, q in map_blocks([(0, 9), (0, 6), (9, 9)], HEADS, TOKENS, most):
            seen[b, h, q] += 1
        assert (seen[0] == 1).all() and (seen[1, :, :6] == 1).all() and (seen[1, :, 6:] == 0).all() and (seen[2] == 0).all()


# In a model: what the capture hands over

MATCHES = {
    "attention": Match("layers.2", "layers.1", selector="attention", loss="kl", mask="attention_mask", name="map"),
    "scores": Match("layers.2", "layers.1", selector="attention_scores", loss="mse", mask="attention_mask", name="map"),
    "unmasked": Match("layers.2", "layers.1", selector="attention", loss="mse", name="map"),
}


@pytest.mark.parametrize("order", ["student first", "teacher first"])
@pytest.mark.parametrize("which", MATCHES)
def test_a_distiller_makes_no_map_and_trains_the_same(which, order, monkeypatch):
    teacher, student = encoders()
    batch = token_batch()
    gradients = {}
    for impl in ("eager", "auto"):
        distiller = Distiller(teacher, student, [MATCHES[which]], impl=impl, order=order, example_batch=batch)
        if impl == "auto":
            monkeypatch.setattr("hookdistill.attention.calls.attention_scores", lambda call: pytest.fail("a map was made"))
        student.zero_grad()
        losses = distiller(batch)
        losses.total.backward()
        monkeypatch.undo()
        distiller.close()
        gradients[impl] = losses.total.detach(), student.layers[1].qkv.weight.grad.clone()
    torch.testing.assert_close(gradients["auto"], gradients["eager"])
    assert gradients["auto"][1].abs().sum() > 0


def test_the_plan_says_that_there_is_no_map():
    teacher, student = encoders()
    plan = Distiller(teacher, student, [MATCHES["attention"]]).plan(token_batch())
    (row,) = plan
    assert row.implementation == str(Choice("chunked", "no map"))
    assert row.student_shape == (BATCH, 4, TOKENS, TOKENS)
    assert math.isfinite(row.value)


def test_a_loss_of_the_users_gets_the_map():
    teacher, student = encoders()

    def sharpness(ours, theirs, mask=None):
        assert ours.shape == theirs.shape == (BATCH, 4, TOKENS, TOKENS)
        return (ours.square() - theirs.square()).square().mean()

    distiller = Distiller(teacher, student, [Match("layers.2", "layers.1", selector="attention", loss=sharpness)])
    batch = token_batch()
    distiller.plan(batch)
    distiller(batch).total.backward()
    with Capture(student, ["layers.1:attention"]) as ours, Capture(teacher, ["layers.2:attention"]) as theirs:
        student(**batch), teacher(**batch)
    expected = sharpness(ours["layers.1"]["attention"], theirs["layers.2"]["attention"].detach())
    torch.testing.assert_close(distiller(batch).total, expected)


def test_a_student_that_attends_without_gradient_is_an_error():
    teacher, student = encoders()
    student.requires_grad_(False)
    student.head.requires_grad_(True)
    distiller = Distiller(teacher, student, [MATCHES["attention"]])
    with pytest.raises(Exception, match="carries no gradient"):
        distiller(token_batch())
