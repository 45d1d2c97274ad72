"""MiniLMv2's relations in blocks against the same loss on whole maps."""

import pytest
import torch
from torch.autograd import gradcheck

from hookdistill import DistillationLoss, Match, losses
from hookdistill.fused.relations import RelationTask, relation_losses

BATCH, TOKENS = 3, 9
VALID = torch.ones(BATCH, TOKENS, dtype=torch.bool)
VALID[1, 6:] = False
VALID[2, :4] = False


def sides(ours=(4, 6), theirs=(4, 8), *, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(BATCH, ours[0], TOKENS, ours[1], generator=draw, dtype=torch.float64).to(dtype)
    teacher = torch.randn(BATCH, theirs[0], TOKENS, theirs[1], generator=draw, dtype=torch.float64).to(dtype)
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("most", [1, 50, 10**6])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("ours", "theirs", "heads"), [((4, 6), (4, 8), 4), ((4, 6), (2, 12), 8), ((2, 6), (3, 4), 1)])
def test_values_and_gradients_are_those_of_whole_relations(ours, theirs, heads, masked, most):
    student, teacher = sides(ours, theirs)
    valid = VALID if masked else None
    value = losses.relation_kl(student, teacher, heads=heads, mask=valid)
    (expected,) = torch.autograd.grad(value * 3, student)
    task = RelationTask(student=student, teacher=teacher, heads=heads, valid=valid, coefficient=3.0)
    found = relation_losses(task, gradient=True, most=most)
    torch.testing.assert_close(found.value, value.detach())
    torch.testing.assert_close(found.total, 3 * value.detach())
    torch.testing.assert_close(found.gradient, expected)


def test_identical_tensors_cost_nothing():
    student, _ = sides()
    found = relation_losses(RelationTask(student=student, teacher=student.detach(), heads=8), gradient=True)
    assert abs(found.value.item()) < 1e-12
    assert found.gradient.abs().max() < 1e-12


def test_masked_tokens_may_hold_anything_and_get_no_gradient():
    student, teacher = (tensor.detach().clone() for tensor in sides())
    results = []
    for poison in (0.0, float("nan")):
        for tensor in (student, teacher):
            tensor.transpose(1, 2)[~VALID] = poison
        task = RelationTask(student=student, teacher=teacher, heads=4, valid=VALID)
        results.append(relation_losses(task, gradient=True))
    assert torch.equal(results[0].value, results[1].value)
    assert torch.equal(results[0].gradient, results[1].gradient)
    assert (results[1].gradient.transpose(1, 2)[~VALID] == 0).all()


def test_nothing_valid_is_zero():
    student, teacher = sides()
    task = RelationTask(student=student, teacher=teacher, heads=4, valid=torch.zeros_like(VALID))
    found = relation_losses(task, gradient=True)
    assert found.value == 0
    assert (found.gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_it_is_no_worse_than_whole_relations(dtype):
    student, teacher = sides(dtype=dtype)
    exact = student.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(losses.relation_kl(exact, teacher.double()), exact)
    (eager,) = torch.autograd.grad(losses.relation_kl(student, teacher), student)
    found = relation_losses(RelationTask(student=student, teacher=teacher, heads=4), gradient=True)
    errors = [((each.to(dtype).double() - truth).norm() / truth.norm()).item() for each in (found.gradient, eager)]
    assert errors[0] <= 1.5 * errors[1] + 1e-6


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_the_engine_takes_it_and_finite_differences_agree(impl):
    student, teacher = sides((2, 3), (2, 3))
    loss = DistillationLoss([Match(":query", ":query", loss="relation_kl", heads=3, mask="valid")], impl=impl)

    def total(student):
        step = loss.begin({"": {"query": student}}, {"valid": VALID})
        found = step.finish({"": {"query": teacher}}).total
        (choice,) = step.choices.values()
        assert choice.implementation == {"auto": "chunked", "eager": "eager"}[impl]
        return found

    assert gradcheck(total, student)
