"""Losses with modules of their own that fit no other list: the knowledge review, and those that remember."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional

from hookdistill import losses
from hookdistill.errors import LossError
from hookdistill.losses.memories import ContrastMemory

STATEFUL = sorted(name for name, spec in losses.registered_losses().items() if spec.state is not None)


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)


def gradient(value, student):
    return torch.autograd.grad(value, student)[0]


def handed_over(loss, state):
    return {name: getattr(state, name) for name in losses.loss_spec(loss).parameters if hasattr(state, name)}


def double(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("loss", STATEFUL)
def test_a_state_has_all_that_its_loss_requires_and_trains(loss):
    spec, options = losses.loss_spec(loss), {"crd": {"samples": 10, "index": torch.tensor([0, 1])}}.get(loss, {})
    shapes = {"crd": ((2, 5), (2, 7)), "queue_kl": ((2, 5), (2, 5))}.get(loss, ((2, 5, 4, 4), (2, 7, 4, 4)))
    student, teacher = torch.randn(shapes[0], requires_grad=True), torch.randn(shapes[1])
    state = spec.state(student, teacher, **options)
    given = handed_over(loss, state)
    assert set(spec.required) <= given.keys() | options.keys()
    arguments = {name: value for name, value in options.items() if name in spec.parameters}
    spec.function(student, teacher, **given, **arguments).backward()
    assert (student.grad != 0).any()
    for name, parameter in state.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("loss", ["vid", "mgd", "factor_transfer"])
@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 6, 4, 4), (2, 6, 3, 4, 4)], ids=["tokens", "image", "volume"])
def test_maps_are_made_for_tokens_images_and_volumes(loss, shape):
    wide = (*shape[:-1], 8) if len(shape) == 3 else (shape[0], 8, *shape[2:])
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(wide)
    state = losses.loss_spec(loss).state(student, teacher)
    assert getattr(losses, loss)(student, teacher, **handed_over(loss, state)).isfinite()


@pytest.mark.parametrize("loss", ["mgd", "factor_transfer"])
def test_convolutions_need_places(loss):
    with pytest.raises(LossError, match=rf"{loss} convolves over places.*got \[2, 5\]"):
        losses.loss_spec(loss).state(torch.zeros(2, 5), torch.zeros(2, 5))


def test_a_paraphraser_of_ones_own_is_frozen():
    paraphraser = nn.Conv2d(7, 3, 1)
    state = losses.loss_spec("factor_transfer").state(
        torch.zeros(2, 6, 4, 4), torch.zeros(2, 7, 4, 4), rate=3 / 7, paraphraser=paraphraser
    )
    assert state.paraphraser is paraphraser
    assert not any(parameter.requires_grad for parameter in paraphraser.parameters())
    assert state.decoder is None
    given = handed_over("factor_transfer", state)
    assert losses.factor_transfer(torch.randn(2, 6, 4, 4), torch.randn(2, 7, 4, 4), **given).isfinite()


# The knowledge review


def stages():
    ours = [double(3, 6, 4, 4), double(3, 5, 8, 8, seed=1)]
    theirs = [double(3, 7, 4, 4, seed=2), double(3, 4, 8, 8, seed=3)]
    return ours, theirs


def channels(maps):
    """A fusion without parameters, for formulas: each stage cut or repeated to the teacher's width."""
    return [stage.repeat(1, 2, 1, 1)[:, :width] for stage, width in zip(maps, (7, 4), strict=True)]


def hierarchical(ours, theirs):
    pooled = [functional.adaptive_avg_pool2d(side, size) for size in (2, 1) for side in (ours, theirs)]
    if ours.shape[-1] == 8:
        four = [functional.adaptive_avg_pool2d(side, 4) for side in (ours, theirs)]
        parts = [(ours, theirs), four, pooled[:2], pooled[2:]]
    else:
        parts = [(ours, theirs), pooled[:2], pooled[2:]]
    weights = [0.5**power for power in range(len(parts))]
    return sum(weight * functional.mse_loss(*part) for weight, part in zip(weights, parts, strict=True)) / sum(weights)


def test_reviewkd_is_the_hierarchical_loss_of_every_stage():
    ours, theirs = stages()
    found = losses.reviewkd(ours[0], theirs[0], students=ours[1:], teachers=theirs[1:], fusion=channels)
    fused = channels(ours)
    same(found, hierarchical(fused[0], theirs[0]) + hierarchical(fused[1], theirs[1]))


def test_reviewkd_of_equal_stages_costs_nothing():
    ours, _ = stages()
    found = losses.reviewkd(ours[0], ours[0], students=ours[1:], teachers=ours[1:], fusion=lambda maps: maps)
    assert found == 0


def test_reviewkd_reductions_and_masks():
    ours, theirs = stages()
    ours = [stage.requires_grad_() for stage in ours]
    options = {"students": ours[1:], "teachers": theirs[1:], "fusion": channels}
    values = losses.reviewkd(ours[0], theirs[0], reduction="none", **options)
    assert values.shape == (3,)
    mask = torch.tensor([1, 0, 1])
    same(losses.reviewkd(ours[0], theirs[0], mask=mask, **options), values[mask == 1].mean())
    spoilt = ours[0].detach().clone()
    spoilt[1] = float("nan")
    spoilt.requires_grad_()
    found = losses.reviewkd(spoilt, theirs[0], mask=mask, **options)
    same(found, values[mask == 1].mean())
    assert (gradient(found, spoilt)[1] == 0).all()
    with pytest.raises(LossError, match=r"mask \[batch\] of samples, as stages differ in size; got \[3, 4, 4\]"):
        losses.reviewkd(ours[0], theirs[0], mask=torch.ones(3, 4, 4), **options)


def test_reviewkd_has_the_gradient_of_finite_differences():
    ours, theirs = stages()
    small = [stage[:2, :3, :2, :2].clone().requires_grad_() for stage in ours]
    fusion = losses.loss_spec("reviewkd").state(small[0], theirs[0][:2, :3, :2, :2], mid=2).double().eval().fusion

    def loss(student):
        return losses.reviewkd(student, theirs[0][:2, :3, :2, :2], fusion=fusion)

    assert gradcheck(loss, small[0])


def test_the_fusion_hands_down_from_deep_to_shallow():
    ours, theirs = ([stage.float() for stage in side] for side in stages())
    state = losses.loss_spec("reviewkd").state(ours[0], theirs[0], students=ours[1:], teachers=theirs[1:], mid=3)
    ours[0].requires_grad_()
    deep, shallow = state.fusion(ours)
    assert [deep.shape[1], shallow.shape[1]] == [7, 4]
    assert (gradient(shallow.square().sum(), ours[0]) != 0).any()
    one = losses.loss_spec("reviewkd").state(ours[0], theirs[0])
    assert len(one.fusion.share) == 0


def test_reviewkd_refuses_stages_that_do_not_pair():
    ours, theirs = stages()
    with pytest.raises(LossError, match="students= holds 1 and teachers= 0"):
        losses.reviewkd(ours[0], theirs[0], students=ours[1:], fusion=channels)
    with pytest.raises(LossError, match=r"\[batch, channels, height, width\]; one of the student is \[3, 6\]"):
        losses.reviewkd(ours[0][:, :, 0, 0], theirs[0], fusion=channels)
    with pytest.raises(LossError, match=r"the fusion gave \[3, 6, 4, 4\] for a teacher stage \[3, 7, 4, 4\]"):
        losses.reviewkd(ours[0], theirs[0], fusion=lambda maps: maps)


# Contrast with a memory of all samples


def memory(samples=9, width=3):
    torch.manual_seed(0)
    return ContrastMemory(samples, width).double()


CONTRAST = {"embed_student": lambda x: x[:, :3], "embed_teacher": lambda x: x[:, :3], "tau": 0.5}


def contrast(anchor, bank, index, negatives, scale=None):
    """The noise-contrastive estimate, term by term."""
    n, k = len(bank), negatives.shape[1]
    scores = torch.stack(
        [(bank[[i, *row]] @ a / 0.5).exp() for a, i, row in zip(anchor, index.tolist(), negatives.tolist(), strict=True)]
    )
    p = scores / (scores.mean() * n if scale is None else scale)
    h = p / (p + k / n + 1e-7)
    rest = (k / n) / (p[:, 1:] + k / n + 1e-7)
    return -(h[:, 0].log() + rest.log().sum(-1))


def test_crd_is_the_contrast_of_both_directions():
    bank = memory()
    student, teacher, index = double(4, 5), double(4, 6, seed=1), torch.tensor([2, 0, 8, 5])
    negatives = torch.tensor([[1, 3], [4, 5], [6, 7], [1, 1]])
    s, t = functional.normalize(student[:, :3]), functional.normalize(teacher[:, :3])
    expected = contrast(s, bank.teacher.clone(), index, negatives) + contrast(t, bank.student.clone(), index, negatives)
    found = losses.crd(student, teacher, index=index, negatives=negatives, memory=bank, reduction="none", **CONTRAST)
    same(found, expected)


def test_crd_remembers_where_gradients_are_recorded_and_nowhere_else():
    bank = memory()
    before = {name: buffer.clone() for name, buffer in bank.named_buffers()}
    student, teacher, index = double(2, 5).requires_grad_(), double(2, 6, seed=1), torch.tensor([2, 7])
    call = {"index": index, "memory": bank, "k": 4, "momentum": 0.25, **CONTRAST}
    with torch.no_grad():
        losses.crd(student, teacher, **call)
    bank.eval()
    losses.crd(student, teacher, **call)
    assert all(torch.equal(buffer, before[name]) for name, buffer in bank.named_buffers())
    bank.train()
    losses.crd(student, teacher, **call).backward()
    assert student.grad.isfinite().all()
    new = functional.normalize(0.25 * before["student"][index] + 0.75 * functional.normalize(student.detach()[:, :3]))
    same(bank.student[index], new)
    untouched = torch.tensor([0, 1, 3, 4, 5, 6, 8])
    same(bank.teacher[untouched], before["teacher"][untouched])
    assert bank.student_scale > 0
    scale = bank.student_scale.clone()
    losses.crd(student, teacher, **call)
    same(bank.student_scale, scale)  # estimated once


def test_crd_never_draws_the_sample_itself():
    bank = ContrastMemory(2, 3)
    with torch.no_grad():
        bank.teacher.copy_(torch.eye(3)[:2])
        bank.student.copy_(torch.eye(3)[:2])
    eye = torch.eye(3)[:2]
    call = {"index": torch.tensor([0, 1]), "memory": bank, "reduction": "none", **CONTRAST}
    with torch.no_grad():
        drawn = losses.crd(eye, eye, k=5, **call)
        other = losses.crd(eye, eye, negatives=torch.tensor([[1] * 5, [0] * 5]), **call)
    same(drawn, other)


def test_crd_of_masked_samples():
    bank = memory()
    student, teacher = double(3, 5), double(3, 6, seed=1)
    student[1] = float("nan")
    student.requires_grad_()
    negatives = torch.tensor([[1, 3], [4, 5], [6, 7]])
    index = torch.tensor([1, 100, 2])  # no such sample, but masked
    before = bank.student.clone()
    found = losses.crd(
        student, teacher, index=index, negatives=negatives, memory=bank, mask=torch.tensor([1, 0, 1]), **CONTRAST
    )
    assert found.isfinite()
    found = gradient(found, student)
    assert (found[1] == 0).all()
    assert (found[0] != 0).any()
    same(bank.student[[0, 3, 4, 5, 6, 7, 8]], before[[0, 3, 4, 5, 6, 7, 8]])
    new = functional.normalize(0.5 * before[[1, 2]] + 0.5 * functional.normalize(student.detach()[[0, 2], :3]))
    same(bank.student[[1, 2]], new)
    before = bank.student.clone()
    nothing = losses.crd(student, teacher, index=index, negatives=negatives, memory=bank, mask=torch.zeros(3), **CONTRAST)
    assert nothing == 0
    same(bank.student, before)


def test_crd_has_the_gradient_of_finite_differences():
    bank = memory().eval()
    negatives = torch.tensor([[1, 3], [4, 5]])
    with torch.no_grad():
        bank.student_scale.fill_(3.0)
        bank.teacher_scale.fill_(2.0)

    def loss(student, teacher):
        return losses.crd(student, teacher, index=torch.tensor([2, 7]), negatives=negatives, memory=bank, **CONTRAST)

    assert gradcheck(loss, (double(2, 5).requires_grad_(), double(2, 6, seed=1).requires_grad_()))


def test_crd_reads_nothing_on_the_host():
    student, teacher = torch.zeros(2, 5, device="meta"), torch.zeros(2, 6, device="meta")
    bank = ContrastMemory(9, 3).to("meta")
    index = torch.zeros(2, dtype=torch.long, device="meta")
    student.requires_grad_()
    assert (
        losses.crd(student, teacher, index=index, memory=bank, k=4, mask=torch.ones(2, device="meta"), **CONTRAST).shape == ()
    )


def test_crd_refuses_samples_that_are_not_in_its_memory():
    state = losses.loss_spec("crd").state
    with pytest.raises(LossError, match=r"index= up to 9, but samples=9 counts from 0 to 8"):
        state(torch.zeros(2, 5), torch.zeros(2, 6), samples=9, index=torch.tensor([0, 9]))
    with pytest.raises(LossError, match=r"index= indices, integers of shape \[2\]"):
        losses.crd(torch.zeros(2, 5), torch.zeros(2, 6), index=torch.zeros(3).long(), memory=memory(), **CONTRAST)
    with pytest.raises(LossError, match="the same samples"):
        losses.crd(torch.zeros(2, 5), torch.zeros(3, 6), index=torch.zeros(2).long(), memory=memory(), **CONTRAST)


# A queue of teacher embeddings


def test_queue_kl_is_the_divergence_of_similarities_to_batch_and_queue():
    student, teacher, queue = double(4, 5), double(4, 5, seed=1), double(6, 5, seed=2)
    queue = functional.normalize(queue)
    candidates = torch.cat([functional.normalize(teacher), queue])
    log_s = (functional.normalize(student) @ candidates.T / 0.2).log_softmax(-1)
    log_t = (functional.normalize(teacher) @ candidates.T / 0.1).log_softmax(-1)
    expected = functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
    same(losses.queue_kl(student, teacher, queue=queue, tau=0.2, teacher_tau=0.1), expected)


def test_empty_places_of_the_queue_are_no_candidates():
    student, teacher, queue = double(4, 5), double(4, 5, seed=1), functional.normalize(double(6, 5, seed=2))
    half_full = torch.cat([queue[:2], torch.zeros(5, 5)])
    same(losses.queue_kl(student, teacher, queue=half_full), losses.queue_kl(student, teacher, queue=queue[:2]))


def test_the_queue_moves_on_where_gradients_are_recorded():
    queue, position = torch.zeros(5, 3, dtype=torch.float64), torch.tensor(0)
    batches = [double(2, 3, seed=seed) for seed in range(3)]
    with torch.no_grad():
        losses.queue_kl(batches[0], batches[0], queue=queue, position=position)
    assert (queue == 0).all()
    for teacher in batches:
        student = double(2, 3, seed=9).requires_grad_()
        losses.queue_kl(student, teacher, queue=queue, position=position).backward()
        assert student.grad.isfinite().all()
    units = functional.normalize(torch.cat(batches), dim=-1)
    same(queue, units[[5, 1, 2, 3, 4]])
    assert position == 1
    large = double(7, 3, seed=4)
    losses.queue_kl(large.clone().requires_grad_(), large, queue=queue, position=position)
    same(queue.sum(0), functional.normalize(large[-5:], dim=-1).sum(0))


def test_queue_kl_laws():
    student, teacher, queue = double(4, 5).requires_grad_(), double(4, 5, seed=1), functional.normalize(double(6, 5, seed=2))
    assert losses.queue_kl(student, student.detach(), queue=queue).abs() < 1e-14
    same(losses.queue_kl(3 * student, teacher, queue=queue), losses.queue_kl(student, teacher, queue=queue))
    assert gradcheck(lambda s: losses.queue_kl(s, teacher, queue=queue, tau=0.5), student)
    mask = torch.tensor([1, 0, 1, 1])
    spoilt = teacher.clone()
    spoilt[1] = float("nan")
    found = losses.queue_kl(student, spoilt, queue=queue, mask=mask)
    kept = mask == 1
    same(found, losses.queue_kl(student[kept], teacher[kept], queue=queue))
    assert (gradient(found, student)[1] == 0).all()
    nothing = losses.queue_kl(student, teacher, queue=queue, mask=torch.zeros(4))
    assert nothing == 0
    assert (gradient(nothing, student) == 0).all()
    meta = [side.detach().to("meta") for side in (student, teacher, queue)]
    assert losses.queue_kl(meta[0], meta[1], queue=meta[2]).shape == ()


def test_queue_kl_refuses_other_shapes_and_temperatures():
    student, queue = torch.zeros(4, 5), torch.zeros(6, 5)
    with pytest.raises(LossError, match=r"\[batch, width\] with a queue \[size, width\]; got .* queue \[6, 4\]"):
        losses.queue_kl(student, student, queue=queue[:, :4])
    with pytest.raises(LossError, match="temperatures are more than zero"):
        losses.queue_kl(student, student, queue=queue, tau=0.0)
