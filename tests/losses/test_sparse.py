"""Divergences from a teacher of which only some classes were kept."""

import inspect
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hookdistill import LossError, losses
from hookdistill.losses import sampled_kl, top_k_tail_kl

CLASSES, KEPT = 9, 4


def student(*positions, dtype=torch.float64, seed=0):
    drawn = torch.randn(*positions, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).requires_grad_()


def top_k(*positions, kept=KEPT, seed=1):
    """The likeliest classes of a random teacher, in float64 so that finite differences can be taken."""
    logits = torch.randn(*positions, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(kept, -1)
    log_tail = log_p.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([values, ids.double(), log_tail.clamp_min(-1e30)], -1)


def sampled(*positions, seed=1):
    """Three drawn classes and an unused place."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(CLASSES, generator=draw)[:KEPT] for _ in range(math.prod(positions))])
    weights = torch.rand(math.prod(positions), KEPT, generator=draw, dtype=torch.float64)
    weights[:, -1] = 0
    ids[:, -1] = 0
    packed = torch.cat([weights / weights.sum(-1, keepdim=True), ids.double(), -torch.ones(len(ids), 1)], -1)
    return packed.reshape(*positions, -1)


BOTH = pytest.mark.parametrize(("loss", "teacher"), [(top_k_tail_kl, top_k), (sampled_kl, sampled)], ids=["top-k", "sampled"])


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradient_is_that_of_finite_differences(loss, teacher, temperature, reduction):
    ours, theirs = student(2, 3), teacher(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    def value(logits):
        return loss(logits, theirs, temperature=temperature, mask=mask, reduction=reduction)

    assert gradcheck(value, (ours,))
    assert gradgradcheck(value, (ours,))


@BOTH
def test_signature_is_that_of_the_other_losses(loss, teacher):
    parameters = list(inspect.signature(loss).parameters.values())
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.name: p.default for p in parameters}["reduction"] == "mean"
    assert losses.loss_spec(loss.__name__).compares == "logits"


@BOTH
def test_masked_positions_do_not_count_whatever_is_there(loss, teacher):
    ours, theirs = student(2, 3), teacher(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = loss(ours[mask == 1], theirs[mask == 1])
    theirs[mask == 0] = math.nan
    with torch.no_grad():
        ours[mask == 0] = math.nan
    found = loss(ours, theirs, mask=mask)
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found, ours)
    assert bool((slope[mask == 0] == 0).all())
    assert bool(slope.isfinite().all())
    nothing = loss(ours, theirs, mask=torch.zeros(2, 3))
    assert nothing.requires_grad and float(nothing.detach()) == 0


@BOTH
def test_what_was_not_stored_is_nan_where_nobody_masks_it(loss, teacher):
    theirs = teacher(2, 3)
    theirs[0, 0] = math.nan
    assert bool(loss(student(2, 3), theirs).isnan())


@pytest.mark.parametrize("kept", [1, KEPT, CLASSES])
def test_a_student_that_agrees_costs_nothing(kept):
    theirs = top_k(4, kept=kept)
    logits = torch.full((4, CLASSES), 0.0, dtype=torch.float64)
    if kept < CLASSES:
        logits += theirs[:, -1:] - math.log(CLASSES - kept)
    logits.scatter_(-1, theirs[:, kept : 2 * kept].long(), theirs[:, :kept])
    logits.requires_grad_()
    loss = top_k_tail_kl(logits, theirs)
    torch.testing.assert_close(loss, torch.zeros((), dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(slope, torch.zeros_like(slope))


def test_counts_that_are_the_distribution_give_the_whole_divergence():
    logits = torch.randn(5, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = logits.softmax(-1)
    ids = torch.arange(CLASSES).expand(5, -1).double()
    packed = torch.cat([p, ids, (p * p.log()).sum(-1, keepdim=True)], -1)
    ours = student(5)
    torch.testing.assert_close(sampled_kl(ours, packed), losses.kl(ours, logits))


@BOTH
def test_a_class_that_the_student_excludes(loss, teacher):
    ours = student(1)
    theirs = teacher(1)
    kept = theirs[0, KEPT : 2 * KEPT].long()
    outside = next(i for i in range(CLASSES) if i not in kept.tolist())
    with torch.no_grad():
        ours[0, outside] = -math.inf
    assert bool(loss(ours, theirs).isfinite())
    with torch.no_grad():
        ours[0, kept[0]] = -math.inf
    assert float(loss(ours, theirs).detach()) == math.inf


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, teacher, dtype):
    ours = student(3, dtype=dtype)
    value = loss(ours, teacher(3).float())
    assert value.dtype is torch.float32
    torch.testing.assert_close(value, loss(ours.float(), teacher(3).float()))


@BOTH
def test_inputs_that_do_not_fit(loss, teacher):
    for theirs in (teacher(3), teacher(2, 4), teacher(2, 3)[..., 1:]):
        with pytest.raises(LossError, match=r"2n \+ 1"):
            loss(student(2, 3), theirs)
    with pytest.raises(LossError, match="greater than zero"):
        loss(student(2), teacher(2), temperature=0)
    with pytest.raises(LossError, match="the teacher is a list"):
        loss(student(2), [1.0])


@BOTH
def test_labels_and_a_causal_shift(loss, teacher):
    ours, theirs = student(2, 4), teacher(2, 4)
    labels = torch.tensor([[5, -100, 3, 1], [-100, -100, 2, -100]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    values = loss(ours, theirs, reduction="none")
    torch.testing.assert_close(loss(ours, theirs, target=labels, reduction="sum"), values[labels != -100].sum())
    counts = (labels != -100)[:, 1:] & (mask == 1)[:, 1:]
    shifted = loss(ours, theirs, target=labels, mask=mask, causal_shift=True)
    torch.testing.assert_close(shifted, values[:, :-1][counts].mean())


@BOTH
def test_numbers_of_classes(loss, teacher):
    ours, theirs = student(3), teacher(3)
    same = loss(ours, theirs, classes=CLASSES)
    torch.testing.assert_close(same, loss(ours, theirs))
    with pytest.raises(LossError, match="the student has 9 classes and the teacher 8; vocabulary='padded' lets"):
        loss(ours, theirs, classes=8)
    loss(ours, theirs, classes=8, vocabulary="padded")
    with pytest.raises(LossError, match="the student has 9 classes and the teacher 10; the student needs all"):
        loss(ours, theirs, classes=10, vocabulary="padded")
    with pytest.raises(LossError, match="it is 'same' or 'padded'"):
        loss(ours, theirs, vocabulary="shared")
    more = torch.cat([ours, torch.full((3, 2), -1.0, dtype=torch.float64)], -1)
    assert bool(loss(more, theirs, vocabulary="padded") > same)
