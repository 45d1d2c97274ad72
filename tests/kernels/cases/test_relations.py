"""MiniLMv2's relations by kernels, against the same loss on whole maps in float64."""

import math

import pytest
import torch

from hookdistill import losses
from hookdistill.fused.relations import RelationTask, relation_losses
from hookdistill.kernels import maps
from hookdistill.kernels.availability import interpreted
from hookdistill.kernels.relations import regrouped, relation_losses_triton
from kernel_cases import EPSILON, cut_off, distance, drawn, same_bits

BATCH, TOKENS = 2, 37  # two tiles of 32 each way


def counted(device):
    """Tokens that count: all, and some that begin and end within tiles."""
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=device)
    valid[1, :3] = False
    valid[1, 20:] = False
    return valid


def sides(ours=(2, 6), theirs=(2, 8), *, dtype=torch.float32, device="cpu"):
    return [
        drawn(BATCH, heads, TOKENS, width, seed=seed, dtype=dtype, device=device)
        for seed, (heads, width) in enumerate((ours, theirs))
    ]


def computed(task, *, gradient=True):
    """By kernels, with all new memory full of NaN, and nothing that is given changed."""
    before = [(tensor, tensor.clone()) for tensor in (task.student, task.teacher)]
    torch.use_deterministic_algorithms(True)
    try:
        found = relation_losses_triton(task, gradient=gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor, copy in before:
        assert same_bits(tensor, copy)
    return found


def defined(student, teacher, heads, valid, dtype):
    student = student.detach().to(dtype).requires_grad_()
    value = losses.relation_kl(student, teacher.to(dtype), heads=heads, mask=valid)
    return value.detach(), torch.autograd.grad(value * 2, student)[0]


def check(student, teacher, heads, valid=None):
    """The error against float64 is no larger than 1.5 times that of whole maps in the same dtype, plus rounding."""
    dtype = student.dtype
    found = computed(RelationTask(student=student, teacher=teacher, heads=heads, valid=valid, coefficient=2.0))
    value, slope = defined(student, teacher, heads, valid, torch.float64)
    eager, eager_slope = defined(student, teacher, heads, valid, dtype)
    torch.testing.assert_close(found.total, found.value * 2)
    assert distance(found.value, value) <= 1.5 * distance(eager, value) + 8 * EPSILON * (1 + abs(value.item()))
    assert found.gradient.shape == student.shape
    assert found.gradient.dtype is (torch.float32 if dtype is torch.float16 else dtype)
    inherent = distance(eager_slope, slope)
    if interpreted() and dtype is torch.bfloat16:
        inherent = max(inherent, distance(cut_off(slope), slope))
    assert distance(found.gradient.to(dtype), slope) <= 1.5 * inherent + 8 * EPSILON * slope.norm().item()
    return found


@pytest.mark.parametrize(
    ("ours", "theirs", "heads", "masked"),
    [((2, 6), (2, 8), 2, False), ((2, 6), (2, 8), 2, True), ((2, 6), (3, 4), 4, True), ((2, 6), (3, 4), 1, False)],
)
def test_values_and_gradients_are_those_of_whole_relations(ours, theirs, heads, masked, device):
    check(*sides(ours, theirs, device=device), heads, counted(device) if masked else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_wide_heads(dtype, device):
    check(*sides((1, 80), (2, 20), dtype=dtype, device=device), 1, counted(device))


def test_a_relation_head_is_read_where_it_stands(device):
    joined = torch.empty(BATCH, TOKENS, 4, 6, device=device).transpose(1, 2)
    apart = torch.empty(BATCH, 4, TOKENS, 6, device=device)
    for tensor, heads, copied in (
        (joined, 2, False),
        (joined, 8, False),
        (apart, 4, False),
        (apart, 12, False),
        (apart, 2, True),
    ):
        found, split, strides = regrouped(tensor, heads)
        assert (found.data_ptr() != tensor.data_ptr()) is copied
        filled = drawn(*tensor.shape, device=device)
        found.copy_(filled)
        expected = filled.transpose(1, 2).reshape(BATCH, TOKENS, heads, -1).transpose(1, 2)
        for head in (0, heads - 1):
            by_example, by_head, by_token = strides
            width = 24 // heads
            start = found.storage_offset() + by_head * (head // split) + width * (head % split)
            seen = torch.as_strided(found, (BATCH, TOKENS, width), (by_example, by_token, 1), start)
            assert torch.equal(seen, expected[:, head])
    fused = drawn(BATCH, TOKENS, 3, 2, 6, device=device)
    check(fused[:, :, 1].transpose(1, 2), fused[:, :, 0].transpose(1, 2)[..., ::2], 6, counted(device))


def test_slopes_rounded_for_tensor_cores(device, monkeypatch):
    """Near the teacher they are too small for float16, unless they are lifted."""
    student, _ = sides(dtype=torch.float16, device=device)
    teacher = student.float() + 1e-5 * drawn(*student.shape, seed=3, device=device)
    results = []
    for exact in (True, False):
        monkeypatch.setattr(maps, "exact", lambda tensor, exact=exact: exact or tensor.dtype is torch.float32)
        results.append(computed(RelationTask(student=student, teacher=teacher, heads=2)).gradient)
    assert 0 < distance(*results) <= 3e-3 * results[0].norm().item()


def test_masked_tokens_may_hold_anything_and_get_no_gradient(device):
    valid, results = counted(device), []
    for poison in (0.0, math.nan):
        student, teacher = sides(device=device)
        for tensor in (student, teacher):
            tensor.transpose(1, 2)[~valid] = poison
        results.append(computed(RelationTask(student=student, teacher=teacher, heads=2, valid=valid)))
    assert same_bits(results[0].value, results[1].value) and same_bits(results[0].gradient, results[1].gradient)
    assert torch.isfinite(results[1].gradient).all() and (results[1].gradient.transpose(1, 2)[~valid] == 0).all()


def test_nothing_valid_is_zero_and_the_same_costs_nothing(device):
    student, teacher = sides(device=device)
    nothing = torch.zeros(BATCH, TOKENS, dtype=torch.bool, device=device)
    for mean in (True, False):
        found = computed(RelationTask(student=student, teacher=teacher, heads=2, valid=nothing, mean=mean))
        assert found.value == 0 and (found.gradient == 0).all()
    found = computed(RelationTask(student=student, teacher=student, heads=2))
    assert abs(found.value.item()) < 1e-6 and found.gradient.abs().max() < 1e-6


def test_tokens_far_apart_cost_what_closed_forms_say(device):
    student, teacher = (10 * side for side in sides(device=device))
    check(student, teacher, 2, counted(device))


def test_sums_evaluations_and_factors_on_the_device(device):
    student, teacher = sides(device=device)
    factor = torch.tensor(0.5, device=device)
    task = RelationTask(student=student, teacher=teacher, heads=2, valid=counted(device), mean=False, coefficient=factor)
    found, again, alone = computed(task), computed(task), computed(task, gradient=False)
    assert same_bits(found.gradient, again.gradient) and same_bits(found.value, alone.value) and alone.gradient is None
    expected = relation_losses(task, gradient=True)
    torch.testing.assert_close((found.value, found.total), (expected.value, expected.total))
    torch.testing.assert_close(found.gradient, expected.gradient, rtol=1e-5, atol=1e-5)
