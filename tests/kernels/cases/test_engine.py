"""The whole engine through kernels: what a step computes, what waits for what, and what the choice says."""

import pytest
import torch

from hookdistill import DistillationLoss, Distiller, Match
from hookdistill.engine import fast
from hookdistill.kernels import rows
from kernel_cases import labels
from pairs import readers, tokens

HIDDEN = [
    Match("layers.1", "layers.0", mask="attention_mask", weight=0.5, name="hidden"),
    Match("layers.3", "layers.1", loss="cosine", weight=lambda step: 2.0 + step, mask="attention_mask", name="direction"),
]
SOFT = [
    Match(":logits", ":logits", loss="kl", temperature=lambda step: 2.0 + step, mask="attention_mask", weight=3, name="soft"),
    Match(None, ":logits", loss="cross_entropy", target="labels", causal_shift=True, name="hard"),
]


@pytest.fixture
def calls(monkeypatch):
    """How many tasks each call of the kernels had."""
    seen = []
    real = rows.run_rows_triton

    def counted(tasks, *, gradient):
        seen.append(len(tasks))
        return real(tasks, gradient=gradient)

    monkeypatch.setattr(rows, "run_rows_triton", counted)
    return seen


def trained(matches, impl, device, order="student first", steps=2):
    """The totals of some steps, the parts of the last, the gradients of all, and the plan."""
    teacher, student = readers()
    batch = {key: value.to(device) for key, value in tokens(2, 3).items()}
    distiller = Distiller(teacher, student, matches, impl=impl, order=order).to(device)
    totals = []
    for _ in range(steps):
        losses = distiller(batch)
        losses.total.backward()
        totals.append(losses.total.detach())
    plan = distiller.plan(batch)
    distiller.close()
    return totals, losses.parts, [each.grad for each in student.parameters() if each.grad is not None], plan


@pytest.mark.parametrize("order", ["student first", "teacher first"])
def test_a_step_is_that_of_the_definitions(order, device):
    expected = trained(HIDDEN + SOFT, "eager", device, order)
    found = trained(HIDDEN + SOFT, "triton", device, order)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-5, atol=1e-7)
    assert all(row.implementation.startswith("triton") for row in found[3])


def test_a_head_and_its_loss_in_one(device):
    teacher, student = readers()
    batch = {key: value.to(device) for key, value in tokens(2, 3).items()}
    matches = [Match("head", "head", loss="kl", temperature=2.0, mask="attention_mask", name="soft")]
    found = {}
    for head, impl in (("whole", "eager"), ("fused", "triton")):
        distiller = Distiller(teacher, student, matches, impl=impl, head=head).to(device)
        (row,) = distiller.plan(batch)
        losses = distiller(batch)
        parameters = [student.head.weight, student.head.bias, student.embed.weight]
        found[head] = losses.total.detach(), torch.autograd.grad(losses.total, parameters)
        distiller.close()
    assert row.implementation == "triton (head and loss in one)"
    torch.testing.assert_close(found["fused"], found["whole"])


def test_small_terms_wait_for_each_other_and_large_ones_for_nobody(calls, device, monkeypatch):
    trained(HIDDEN + SOFT[1:], "triton", device, steps=1)
    assert calls == [3, 3, 3]  # a step between two dry runs: both hidden states and the logits at once
    calls.clear()
    monkeypatch.setattr(fast, "TOGETHER_BELOW", 0)
    trained(HIDDEN, "triton", device, steps=1)
    assert calls == [2, 1, 1, 2]  # dry runs come after both models in any case


def test_terms_with_the_same_mask_count_it_once(device, monkeypatch):
    counted = []
    real = rows._count
    monkeypatch.setattr(rows, "_count", lambda masks, *rest: (counted.append(len(masks)), real(masks, *rest)))
    trained([*HIDDEN, Match("layers.2", "layers.0", mask="attention_mask")], "triton", device, steps=1)
    assert set(counted) == {1}


def test_gradients_from_above_retained_and_accumulated(device):
    teacher, student = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device, requires_grad=True)
    found = {}
    for impl in ("eager", "triton"):
        loss = DistillationLoss([Match("", "", loss="cosine"), Match("", "", loss="mse", weight=0.5)], impl=impl)
        total = loss({"": {"output": teacher}}, {"": {"output": student}}).total
        (first,) = torch.autograd.grad(total * 3, student, retain_graph=True)
        (second,) = torch.autograd.grad(total, student, retain_graph=True)
        (third,) = torch.autograd.grad(total * -0.5, student)
        found[impl] = first, second, third
    torch.testing.assert_close(found["triton"], found["eager"])


def test_gradients_of_gradients_come_from_the_definition(device):
    teacher, student = torch.randn(4, 3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
    total = DistillationLoss([Match("", "", loss="kl")], impl="triton")(
        {"": {"output": teacher}}, {"": {"output": student}}
    ).total
    (first,) = torch.autograd.grad(total, student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student)
    assert torch.isfinite(second).all() and second.abs().sum() > 0


def test_what_no_kernel_does_goes_another_way(device):
    batch = {"y": labels(4, classes=3, device=device)}
    teacher = {"a": {"output": torch.randn(4, 3, device=device)}, "b": {"output": torch.randn(4, 3, 2, device=device).double()}}
    student = {
        "a": {"output": torch.randn(4, 3, device=device, requires_grad=True)},
        "b": {"output": torch.randn(4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)},
    }
    matches = [
        Match("a", "a", name="single"),
        Match("b", "b", name="double"),
        Match("a", "a", loss=lambda s, t: (s - t).abs().max(), name="own"),
        Match(None, "a", loss="cross_entropy", target="y", name="labels"),
    ]
    step = DistillationLoss(matches, impl="triton").begin(student, batch)
    losses = step.finish(teacher)
    losses.total.backward()
    assert {name: choice.implementation for name, choice in step.choices.items()} == {
        "single": "triton",
        "double": "chunked",
        "own": "eager",
        "labels": "triton",
    }
    assert step.choices["double"].reason == "float64"
    expected = DistillationLoss(matches, impl="eager")(teacher, student, batch)
    torch.testing.assert_close(losses.total, expected.total)


def test_half_precision_students_get_gradients_of_their_dtype(device):
    teacher = torch.randn(4, 8, device=device)
    for dtype in (torch.float16, torch.bfloat16):
        student = torch.randn(4, 8, device=device).to(dtype).requires_grad_()
        loss = DistillationLoss([Match("", "")], impl="triton")
        total = loss({"": {"output": teacher}}, {"": {"output": student}}).total
        assert total.dtype is torch.float32
        (total * 1024).backward()
        assert student.grad.dtype is dtype and torch.isfinite(student.grad).all()
