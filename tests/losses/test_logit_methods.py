"""Methods between logits, and what all losses between logits share: vocabularies, labels, the causal shift."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from hookdistill import losses
from hookdistill.errors import LossError

INF = float("inf")


@dataclass(frozen=True)
class Between:
    """A loss between logits of one vocabulary, with its extra arguments."""

    loss: str
    args: dict[str, Any] = field(default_factory=dict)
    finite_when: frozenset[str] = frozenset({"student", "teacher"})  # which side may be the smaller one that is padded

    def __str__(self):
        return self.loss

    def __call__(self, student, teacher, **options):
        if self.loss == "dkd" and "target" not in options:
            options["target"] = torch.zeros(student.movedim(options.get("dim", -1), -1).shape[:-1], dtype=torch.long)
        return getattr(losses, self.loss)(student, teacher, **{**self.args, **options})


SHARED = [
    Between("kl", finite_when=frozenset({"teacher"})),
    Between("reverse_kl", finite_when=frozenset({"student"})),
    Between("js"),
    Between("skew_kl"),
    Between("tvd"),
    Between("soft_cross_entropy", finite_when=frozenset({"teacher"})),
    Between("dkd", finite_when=frozenset({"teacher"})),
    Between("dist"),
    Between("logit_standardization", finite_when=frozenset({"teacher"})),
    Between("top_k_kl", {"k": 3}, finite_when=frozenset({"teacher"})),
]
each = pytest.mark.parametrize("loss", SHARED, ids=str)


def logits(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    return sides[0].requires_grad_(), sides[1]


def gradient(value, student):
    return torch.autograd.grad(value, student)[0]


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)


def test_every_loss_between_logits_is_here():
    of_logits = {name for name, spec in losses.registered_losses().items() if spec.compares == "logits"}
    of_kept_classes = {"sampled_kl", "top_k_tail_kl"}  # test_sparse.py
    shared = {name for name in of_logits if "vocabulary" in losses.loss_spec(name).parameters}
    assert {loss.loss for loss in SHARED} == shared - of_kept_classes
    assert of_logits - {loss.loss for loss in SHARED} == {"uld"} | of_kept_classes


# Vocabularies of one family


@each
def test_a_shared_vocabulary_drops_the_classes_that_one_side_lacks(loss):
    student, teacher = logits(4, 3, 7)
    expected = loss(student[..., :5], teacher[..., :5])
    same(loss(student, teacher[..., :5], vocabulary="shared"), expected)
    same(loss(student[..., :5], teacher, vocabulary="shared"), expected)
    found = gradient(loss(student, teacher[..., :5], vocabulary="shared"), student)
    assert (found[..., 5:] == 0).all()


@each
@pytest.mark.parametrize("smaller", ["student", "teacher"])
def test_a_padded_vocabulary_rules_out_the_classes_that_one_side_lacks(loss, smaller):
    student, teacher = logits(4, 3, 7)
    pad = torch.full((4, 3, 2), -INF, dtype=torch.float64)
    cut = {"student": student[..., :5], "teacher": teacher} if smaller == "student" else {}
    cut = cut or {"student": student, "teacher": teacher[..., :5]}
    if smaller not in loss.finite_when:
        with pytest.raises(LossError, match=rf"{loss} would be infinite.*the {smaller}, which has 5 of 7.*'shared'"):
            loss(cut["student"], cut["teacher"], vocabulary="padded")
        return
    padded = {key: torch.cat([side, pad], -1) if side.shape[-1] == 5 else side for key, side in cut.items()}
    value = loss(cut["student"], cut["teacher"], vocabulary="padded")
    same(value, loss(padded["student"], padded["teacher"]))
    assert value.isfinite()
    found = gradient(value, student)
    assert found.isfinite().all()
    if smaller == "teacher" and loss.loss != "dist":
        assert (found[..., 5:] > 0).any()  # the student learns that they do not occur


@each
def test_along_another_dimension(loss):
    student, teacher = logits(4, 3, 7)
    moved = student.movedim(-1, 1), teacher[..., :5].movedim(-1, 1)
    same(loss(*moved, vocabulary="shared", dim=1), loss(student, teacher[..., :5], vocabulary="shared"))


@each
def test_equal_vocabularies_need_no_word(loss):
    student, teacher = logits(4, 3, 7)
    for vocabulary in ("shared", "padded"):
        same(loss(student, teacher, vocabulary=vocabulary), loss(student, teacher))


@each
def test_other_vocabularies_are_refused_with_the_ways_out(loss):
    student, teacher = logits(4, 3, 7)
    with pytest.raises(LossError, match=r"vocabularies differ, 7 and 5 classes.*'shared'.*'padded'.*'uld'"):
        loss(student, teacher[..., :5])
    with pytest.raises(LossError, match="differ in their positions"):
        loss(student, teacher[:, :2, :5], vocabulary="shared", target=torch.zeros(4, 3).long())
    with pytest.raises(LossError, match=r"vocabulary='cut'; it is 'same', 'shared' or 'padded'"):
        loss(student, teacher, vocabulary="cut")


# Labels and the causal shift


@each
def test_positions_without_a_label_do_not_count(loss):
    student, teacher = logits(4, 3, 7)
    target = torch.tensor([[1, 2, -100], [-100, 0, 6], [3, -100, -100], [-100, -100, -100]])
    keep = target != -100
    found = loss(student, teacher, target=target)
    same(found, loss(student[keep], teacher[keep], target=target[keep]))
    found = gradient(found, student)
    assert (found[~keep] == 0).all()
    assert (found[keep] != 0).any()
    also = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    both = keep & also.bool()
    same(loss(student, teacher, target=target, mask=also), loss(student[both], teacher[both], target=target[both]))
    six = loss(student, teacher, target=target.clamp_min(0), ignore_index=6)
    kept = target.clamp_min(0) != 6
    same(six, loss(student[kept], teacher[kept], target=target.clamp_min(0)[kept]))


@each
@pytest.mark.parametrize("mask", [None, [[1, 1, 0, 0], [1, 1, 1, 0]], [1, 0]], ids=["whole", "tokens", "batch"])
def test_a_causal_shift_moves_mask_and_labels_against_the_logits(loss, mask):
    student, teacher = logits(2, 4, 7)
    target = torch.tensor([[-100, 1, 2, 3], [0, -100, 5, 6]])
    mask = None if mask is None else torch.tensor(mask)
    shifted = mask if mask is None or mask.ndim == 1 else mask[:, 1:]
    found = loss(student, teacher, target=target, mask=mask, causal_shift=True)
    same(found, loss(student[:, :-1], teacher[:, :-1], target=target[:, 1:], mask=shifted))
    assert (gradient(found, student)[:, -1] == 0).all()
    assert loss(student, teacher, target=target, causal_shift=True, reduction="none").shape == (2, 3)


@each
def test_a_causal_shift_without_labels(loss):
    student, teacher = logits(2, 4, 7)
    target = {"target": torch.zeros(2, 4).long()} if loss.loss == "dkd" else {}
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    found = loss(student, teacher, mask=mask, causal_shift=True, **target)
    same(found, loss(student[:, :-1], teacher[:, :-1], mask=mask[:, 1:]))


@each
def test_labels_that_are_none_are_refused(loss):
    student, teacher = logits(2, 4, 7)
    for target in (torch.zeros(2, 4), torch.zeros(2).long(), torch.zeros(2, 4, 7).long(), torch.zeros(2, 4).bool()):
        with pytest.raises(LossError, match=rf"{loss} takes as target= indices, integers of shape \[2, 4\]; got"):
            loss(student, teacher, target=target)
    with pytest.raises(LossError, match="dimension of tokens"):
        loss(student[0, 0], teacher[0, 0], target=torch.tensor(1), causal_shift=True)


# Decoupled KD


def test_dkd_with_the_weights_of_kd_is_kl():
    student, teacher = logits(6, 7)
    target = torch.tensor([0, 1, 2, 3, 4, 6])
    for heat in (1.0, 3.0):
        p_target = (teacher / heat).softmax(-1).gather(-1, target[:, None]).squeeze(-1)
        halves = [
            losses.dkd(student, teacher, target=target, alpha=a, beta=1 - a, temperature=heat, reduction="none") for a in (1, 0)
        ]
        kl = losses.kl(student, teacher, temperature=heat, reduction="none")
        same(halves[0] + (1 - p_target) * halves[1], kl)


def test_dkd_stays_finite_for_a_certain_teacher():
    teacher = torch.tensor([[200.0, 0.0, -5.0]])
    student = torch.tensor([[-200.0, 0.0, 5.0]], requires_grad=True)
    value = losses.dkd(student, teacher, target=torch.tensor([0]))
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()


def test_dkd_needs_a_target():
    with pytest.raises(TypeError, match="target"):
        losses.dkd(*logits(6, 7))


# DIST


def pearson(x, y):
    return functional.cosine_similarity(x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True), dim=-1)


def test_dist_is_one_minus_both_correlations():
    student, teacher = logits(4, 3, 7)
    p, q = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    inter = 1 - pearson(p, q)
    intra = (1 - pearson(p.flatten(0, 1).T, q.flatten(0, 1).T)).mean()
    found = losses.dist(student, teacher, beta=2.0, gamma=0.5, temperature=2.0, reduction="none")
    same(found, 4 * (2 * inter + 0.5 * intra))
    same(losses.dist(student, teacher, beta=2.0, gamma=0.5, temperature=2.0), found.mean())


def test_dist_does_not_care_for_a_linear_map_of_the_probabilities():
    student, teacher = logits(6, 7)
    mixed = (0.5 * student.softmax(-1) + 0.5 / 7).log()
    same(losses.dist(mixed, teacher), losses.dist(student, teacher))


@pytest.mark.parametrize("masked", [False, True])
def test_dist_has_the_gradient_of_finite_differences(masked):
    student, teacher = logits(3, 3, 4, seed=1)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0]]) if masked else None
    assert gradcheck(lambda s, t: losses.dist(s, t, mask=mask), (student, teacher.requires_grad_()))
    assert gradgradcheck(lambda s: losses.dist(s, teacher.detach(), mask=mask), (student,))


def test_dist_of_equal_inputs_costs_nothing():
    student, _ = logits(4, 3, 7)
    same(losses.dist(student, student.detach()), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_dist_of_masked_positions(poison):
    student, teacher = logits(4, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 0]]).bool()
    poisoned = student.detach().masked_fill(~mask[..., None], poison).requires_grad_()
    found = losses.dist(poisoned, teacher.masked_fill(~mask[..., None], poison), mask=mask)
    same(found, losses.dist(student[mask], teacher[mask]))
    assert (gradient(found, poisoned)[~mask] == 0).all()
    nothing = losses.dist(student, teacher, mask=torch.zeros(4, 3))
    assert nothing == 0
    assert (gradient(nothing, student) == 0).all()


def test_dist_of_one_position_and_of_uniform_logits_is_finite():
    for student in (torch.randn(1, 5), torch.zeros(3, 5)):
        student.requires_grad_()
        assert gradient(losses.dist(student, torch.randn(student.shape)), student).isfinite().all()


# Logit standardisation


def test_logit_standardization_forgets_shift_and_scale():
    student, teacher = logits(6, 7)
    expected = losses.logit_standardization(student, teacher, temperature=2.0)
    same(losses.logit_standardization(3 * student + 5, 0.1 * teacher - 2, temperature=2.0), expected)
    z_s, z_t = ((side - side.mean(-1, keepdim=True)) / side.std(-1, keepdim=True) for side in (student, teacher))
    same(expected, losses.kl(z_s, z_t, temperature=2.0))


def test_logits_that_are_all_equal_stay_uniform():
    student = torch.zeros(3, 5, requires_grad=True)
    value = losses.logit_standardization(student, torch.randn(3, 5))
    assert value.isfinite()
    assert gradient(value, student).isfinite().all()


# Top k with a tail


def test_top_k_is_a_lower_bound_that_grows_to_kl():
    student, teacher = logits(6, 7)
    kl = losses.kl(student, teacher, reduction="none")
    bounds = [losses.top_k_kl(student, teacher, k=k, reduction="none") for k in (1, 2, 4, 6, 7, 100)]
    for lower, higher in pairwise(bounds):
        assert (lower <= higher + 1e-12).all()
    same(bounds[3], kl)  # the tail of six out of seven is the seventh
    same(bounds[-1], kl)
    same(gradient(bounds[-1].sum(), student), gradient(kl.sum(), student))


def test_without_a_tail_the_other_classes_are_free():
    student, teacher = logits(6, 7)
    top = teacher.topk(3, -1).indices
    expected = losses.kl(student.gather(-1, top), teacher.gather(-1, top))
    same(losses.top_k_kl(student, teacher, k=3, tail=False), expected)
    found = gradient(losses.top_k_kl(student, teacher, k=3, tail=False, reduction="sum"), student)
    assert (found.scatter(-1, top, 0) == 0).all()
    assert (gradient(losses.top_k_kl(student, teacher, k=3), student) != 0).all()


@pytest.mark.parametrize("k", [0, -1, 2.5, True, None])
def test_a_k_below_one_is_refused(k):
    with pytest.raises(LossError, match="top_k_kl got k="):
        losses.top_k_kl(*logits(6, 7), k=k)


# Two tokenizers


def test_uld_is_the_distance_of_sorted_probabilities():
    student, teacher = logits(2, 3, 5)
    p, q = (side.softmax(-1).sort(-1).values for side in (student, teacher))
    same(losses.uld(student, teacher, reduction="none"), (p - q).abs().sum(-1))
    same(losses.uld(student, teacher, temperature=2.0), 4 * losses.uld(student / 2, teacher / 2))


def test_uld_forgets_which_class_is_which():
    student, teacher = logits(2, 3, 5)
    same(losses.uld(student.flip(-1), teacher), losses.uld(student, teacher))
    same(losses.uld(student, student.detach().roll(2, -1)), torch.zeros((), dtype=torch.float64), atol=1e-15, rtol=0)


def test_uld_fills_the_smaller_vocabulary_with_zeros():
    student, teacher = logits(2, 3, 5)
    wide = torch.cat([teacher, torch.full((2, 3, 4), -INF)], -1)
    same(losses.uld(student, wide), losses.uld(student, teacher))
    narrow = losses.uld(teacher[..., :4].requires_grad_(), student.detach())
    assert narrow.isfinite()


def test_uld_compares_the_ith_valid_token_with_the_ith():
    student, _ = logits(2, 4, 5)
    _, teacher = logits(2, 6, 9, seed=1)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    teacher_mask = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0]])
    pairs = [((0, 1), (0, 2)), ((0, 2), (0, 4)), ((1, 0), (1, 1)), ((1, 1), (1, 2))]
    ours = torch.stack([student[place] for place, _ in pairs]).unsqueeze(0)
    theirs = torch.stack([teacher[place] for _, place in pairs]).unsqueeze(0)
    found = losses.uld(student, teacher, mask=mask, teacher_mask=teacher_mask)
    same(found, losses.uld(ours, theirs))
    values = losses.uld(student, teacher, mask=mask, teacher_mask=teacher_mask, reduction="none")
    assert (values != 0).tolist() == [[False, True, True, False], [True, True, False, False]]
    spoilt = student.detach().masked_fill(mask[..., None] == 0, float("nan")).requires_grad_()
    spoilt_teacher = teacher.masked_fill(teacher_mask[..., None] == 0, float("nan"))
    again = losses.uld(spoilt, spoilt_teacher, mask=mask, teacher_mask=teacher_mask)
    same(again, found)
    assert (gradient(again, spoilt)[mask == 0] == 0).all()


def test_uld_laws():
    student, teacher = logits(4, 3, 5, seed=2)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
    assert gradcheck(lambda s, t: losses.uld(s, t, mask=mask), (student, teacher.requires_grad_()))
    halves = [losses.uld(student[h], teacher[h], mask=mask[h]) * mask[h].sum() / mask.sum() for h in (slice(2), slice(2, 4))]
    same(losses.uld(student, teacher, mask=mask), halves[0] + halves[1])
    nothing = losses.uld(student, teacher, mask=torch.zeros(4, 3))
    assert nothing == 0
    assert (gradient(nothing, student) == 0).all()
    meta = [side.detach().to("meta") for side in (student, teacher)]
    assert losses.uld(*meta, mask=mask.to("meta"), teacher_mask=mask.to("meta")).shape == ()
    assert losses.uld(student.bfloat16(), teacher.bfloat16()).dtype is torch.float32


def test_uld_refuses_what_it_cannot_align():
    student, teacher = logits(2, 4, 5)
    with pytest.raises(LossError, match=r"4 tokens of the student and 3 of the teacher; say which are valid"):
        losses.uld(student, teacher[:, :3])
    with pytest.raises(LossError, match=r"\[batch, tokens, classes\] of the same batch"):
        losses.uld(student, teacher[0])
    with pytest.raises(LossError, match=r"mask \[2, 3\] does not fit the positions \[2, 4\]"):
        losses.uld(student, teacher, mask=torch.ones(2, 3))
