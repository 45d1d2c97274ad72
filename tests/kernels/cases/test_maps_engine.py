"""Attention and relations in a step by kernels: the same training, nothing of a map, and what is left to other forms."""

import pytest
import torch

from encoders import PADDING, TOKENS, encoders, token_batch
from hookdistill import DistillationLoss, Distiller, Match
from hookdistill.engine import fast
from hookdistill.fused.attention import AttentionTask, Heads
from hookdistill.fused.relations import RelationTask
from kernel_cases import drawn

MATCHES = [
    Match("layers.2", "layers.1", selector="attention", loss="kl", mask="attention_mask", name="map"),
    Match("layers.2", "layers.1", selector="attention_scores", loss="mse", mask="attention_mask", weight=0.5, name="scores"),
    Match("layers.2", "layers.1", selector="attention", loss="mse", weight=lambda step: 2.0 + step, name="unmasked"),
    Match("layers.2", "layers.1", selector="value", loss="relation_kl", heads=2, mask="attention_mask", name="relation"),
]


def parts(impl, matches, device, order="student first"):
    """A distiller of small encoders, and a batch of two examples for it."""
    teacher, student = (model.to(device) for model in encoders(heads=2))
    batch = {key: value[1:].to(device) for key, value in token_batch().items()}
    return Distiller(teacher, student, matches, impl=impl, order=order), student, batch


@pytest.mark.parametrize(("order", "matches"), [("student first", MATCHES[::3]), ("teacher first", MATCHES[1:3])])
def test_a_step_is_that_of_the_definitions(order, matches, device, monkeypatch):
    found = {}
    for impl in ("eager", "triton"):
        distiller, student, batch = parts(impl, matches, device, order)
        if impl == "triton":
            for module in ("hookdistill.attention.calls.attention_scores", "hookdistill.engine.fast.attention_losses"):
                monkeypatch.setattr(module, lambda *args, **kwargs: pytest.fail("not by the kernels"))
        plan = distiller.plan(batch)
        losses = distiller(batch)
        (losses.total * 0.5).backward()
        distiller.close()
        gradients = [each.grad for each in student.parameters() if each.grad is not None]
        found[impl] = losses.total.detach(), losses.parts, gradients
    assert {row.implementation for row in plan} == {"triton (no map)"}
    torch.testing.assert_close(found["triton"], found["eager"], rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().sum() > 0 for gradient in found["triton"][2])


def test_an_evaluation_makes_no_gradient(device):
    values = []
    for impl in ("eager", "triton"):
        distiller, _, batch = parts(impl, MATCHES[:1], device)
        with torch.no_grad():
            values.append(distiller(batch).total)
        distiller.close()
    assert not values[1].requires_grad
    torch.testing.assert_close(*values)


def choice(*, query=torch.float32, key=torch.float32, width=8, valid=None, device):
    """What computes a loss between attentions of this kind."""
    tensors = {"query": torch.ones(1, 1, 2, width), "key": torch.ones(1, 1, 2, width)}
    heads = Heads(query=tensors["query"].to(device, query), key=tensors["key"].to(device, key))
    return str(fast.choose(AttentionTask(kind="kl", student=heads, teacher=heads, valid=valid), "triton"))


def test_what_is_left_to_the_closed_forms_and_why(device):
    assert choice(device=device) == "triton (no map)"
    assert choice(width=128, device=device) == "triton (no map)"
    assert choice(width=129, device=device) == "chunked (no map; heads wider than 128)"
    assert choice(query=torch.float64, key=torch.float64, device=device) == "chunked (no map; float64)"
    assert choice(key=torch.float16, device=device) == "chunked (no map; queries in float32, keys in float16)"
    pairs = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device)
    said = "chunked (no map; a mask of pairs and heads wider than 64 in float32)"
    assert choice(width=65, valid=pairs, device=device) == said
    assert choice(width=65, valid=pairs[0, 0, :1], device=device) == "triton (no map)"
    half = {"query": torch.bfloat16, "key": torch.bfloat16}
    assert choice(width=65, valid=pairs, device=device, **half) == "triton (no map)"
    wide = torch.ones(1, 4, 2, 64, device=device)
    for heads, dtype, expected in (
        (2, torch.float32, "triton (no map)"),
        (1, torch.float32, "chunked (no map; heads wider than 128)"),
        (1, torch.bfloat16, "triton (no map)"),
    ):
        both = wide.to(dtype)
        assert str(fast.choose(RelationTask(student=both, teacher=both, heads=heads), "triton")) == expected


def test_relations_in_float64_train_by_the_closed_forms(device):
    student, teacher = (drawn(3, 2, TOKENS, 4, seed=seed, dtype=torch.float64, device=device) for seed in (0, 1))
    found = []
    for impl in ("eager", "triton"):
        student.requires_grad_()
        loss = DistillationLoss([Match(":query", ":query", loss="relation_kl", mask="valid", name="relation")], impl=impl)
        step = loss.begin({"": {"query": student}}, {"valid": PADDING.to(device)})
        total = step.finish({"": {"query": teacher}}).total
        found.append((total.detach(), *torch.autograd.grad(total, student)))
    assert str(step.choices["relation"]) == "chunked (no map; float64)"
    torch.testing.assert_close(found[1], found[0])
