"""What holds for every loss that compares how the samples of a batch relate to each other."""

import inspect

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hookdistill import losses
from hookdistill.errors import LossError
from loss_cases import COUPLED, SampleCase

CASES = COUPLED
EITHER = pytest.mark.parametrize("samples", ["batch", "positions"])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])


def each(cases: list[SampleCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def gradient(value, student):
    return torch.autograd.grad(value, student)[0]


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("name", sorted({case.loss for case in CASES}))
def test_signature_and_docstring(name):
    function = getattr(losses, name)
    parameters = list(inspect.signature(function).parameters.values())
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {p.name: p.default for p in parameters}
    assert (defaults["mask"], defaults["reduction"], defaults["dim"], defaults["samples"]) == (None, "mean", None, "batch")
    assert "arXiv" in function.__doc__
    assert "ouples the batch" in function.__doc__


@each(CASES)
@EITHER
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradient_is_that_of_finite_differences(case, samples, masked):
    student, teacher = case.tensors(4, 3, seed=1)
    options = {"samples": samples, "mask": MASK if masked else None}
    assert gradcheck(lambda s, t: case(s, t, **options), (student, teacher.requires_grad_()))
    assert gradgradcheck(lambda s: case(s, teacher.detach(), **options), (student,))


@each(CASES)
@EITHER
def test_identical_inputs_cost_nothing(case, samples):
    student = case.equal(4, 3)
    value = case(student, student.detach(), samples=samples)
    same(value, torch.zeros_like(value), atol=1e-14, rtol=0)
    same(gradient(value, student), torch.zeros_like(student), atol=1e-13, rtol=0)


@each(CASES)
@EITHER
def test_different_inputs_cost_something(case, samples):
    assert (case(*case.tensors(4, 3), samples=samples, reduction="none") > 1e-5).all()


@each(CASES)
def test_reductions_are_over_samples(case):
    student, teacher = case.tensors(4, 3)
    for samples, counted in (("batch", MASK.any(-1)), ("positions", MASK.bool())):
        values = case(student, teacher, mask=MASK, reduction="none", samples=samples)
        assert values.shape == counted.shape
        assert (values[~counted] == 0).all()
        same(case(student, teacher, mask=MASK, reduction="sum", samples=samples), values.sum())
        same(case(student, teacher, mask=MASK, samples=samples), values.sum() / counted.sum())


@each(CASES)
def test_positions_are_samples_of_a_flat_batch(case):
    student, teacher = case.tensors(4, 3)
    flat = [side.flatten(0, 1) for side in (student, teacher)]
    same(case(student, teacher, samples="positions"), case(*flat))
    same(case(student, teacher, samples="positions", mask=MASK), case(*flat, mask=MASK.flatten()))


@each(CASES)
def test_a_sample_is_everything_but_the_first_dimension(case):
    student, teacher = case.tensors(4, 3)
    same(case(student, teacher), case(student.flatten(1), teacher.flatten(1)))
    images = case.tensors(4, 2, 3, images=True)
    same(case(*images), case(*(side.flatten(1) for side in images)))
    same(case(*images, samples="positions"), case(*(side.movedim(1, -1).flatten(0, 2) for side in images)))


@each(CASES)
def test_a_mask_of_samples_is_indexing_by_it(case):
    student, teacher = case.tensors(5, 3)
    mask = torch.tensor([True, False, True, True, False])
    masked, indexed = case(student, teacher, mask=mask), case(student[mask], teacher[mask])
    same(masked, indexed)
    same(gradient(masked, student), gradient(indexed, student))
    kept = torch.tensor([[True, False, True], [True, True, True], [False, False, False], [True, False, False], [True] * 3])
    masked = case(student, teacher, mask=kept, samples="positions")
    indexed = case(student[kept], teacher[kept])
    same(masked, indexed)
    same(gradient(masked, student), gradient(indexed, student))


@each(CASES)
@EITHER
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_positions_get_no_gradient_whatever_they_hold(case, samples, poison):
    student, teacher = case.tensors(4, 3)
    hidden = (MASK == 0).unsqueeze(-1)
    poisoned = student.detach().masked_fill(hidden, poison).requires_grad_()
    value = case(poisoned, teacher.masked_fill(hidden, poison), mask=MASK, samples=samples)
    found = gradient(value, poisoned)
    same(value, case(student, teacher, mask=MASK, samples=samples))
    assert found.isfinite().all()
    assert (found[hidden.expand_as(found)] == 0).all()
    assert (found[~hidden.expand_as(found)] != 0).any()


@each(CASES)
@EITHER
def test_nothing_valid_is_zero_and_attached(case, samples):
    student, teacher = case.tensors(4, 3)
    value = case(student, teacher, mask=torch.zeros(4, 3), samples=samples)
    assert value == 0
    assert (gradient(value, student) == 0).all()


@each(CASES)
def test_one_sample_alone_and_samples_that_are_equal_have_finite_gradients(case):
    student, teacher = case.tensors(1, 3)
    assert gradient(case(student, teacher), student).isfinite().all()
    twice, theirs = case.equal(2, 3).detach()[:1].repeat(3, 1, 1).requires_grad_(), case.tensors(3, 3)[1]
    value = case(twice, theirs)
    assert value.isfinite()
    assert gradient(value, twice).isfinite().all()
    zeros = torch.zeros_like(twice).requires_grad_()
    assert gradient(case(zeros, theirs), zeros).isfinite().all()


@each(CASES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(case, half):
    student, teacher = case.tensors(4, 3, dtype=half)
    value = case(student, teacher)
    assert value.dtype is torch.float32
    same(value, case(student.float(), teacher.float()), rtol=0, atol=0)
    assert gradient(value, student).dtype is half


@each(CASES)
@EITHER
def test_nothing_is_read_on_the_host(case, samples):
    student, teacher = (side.detach().to("meta") for side in case.tensors(4, 3))
    assert case(student, teacher, mask=MASK.to("meta"), samples=samples).shape == ()


@each(CASES)
@EITHER
def test_samples_may_be_permuted_on_both_sides(case, samples):
    student, teacher = case.tensors(4, 3)
    same(case(student.flip(0), teacher.flip(0), samples=samples), case(student, teacher, samples=samples))


@each(CASES)
def test_features_may_be_rotated(case):
    student, teacher = (side.flatten(1) for side in case.tensors(4, 3))
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    same(case(student @ rotation, teacher), case(student, teacher))


@each([case for case in CASES if case.args != {"kernel": "bilinear"}])
def test_the_scale_does_not_matter(case):
    student, teacher = case.tensors(4, 3)
    same(case(100 * student, teacher), case(student, teacher))


@each([case for case in CASES if case.loss in ("rkd_distance", "rkd_angle", "cka")])
def test_a_shift_does_not_matter(case):
    student, teacher = case.tensors(4, 3)
    same(case(student + 5, teacher), case(student, teacher))


# Each against its formula, written out


def batch(seed=0, samples=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, generator=generator).double(), torch.randn(samples, 7, generator=generator).double()


def test_similarity_preserving():
    s, t = batch()
    g, h = (torch.nn.functional.normalize(side @ side.T, dim=1) for side in (s, t))
    same(losses.similarity_preserving(s, t), (g - h).square().sum() / 36)


def test_rkd_distance():
    s, t = batch()
    relative = [torch.cdist(side, side) / torch.pdist(side).mean() for side in (s, t)]
    same(losses.rkd_distance(s, t), torch.nn.functional.smooth_l1_loss(*relative))


def test_rkd_angle():
    s, t = batch(samples=4)

    def cosine(side, b, a, c):
        if a in (b, c):
            return 0.0 * side.sum()
        return torch.nn.functional.cosine_similarity(side[b] - side[a], side[c] - side[a], dim=0)

    triples = [(b, a, c) for b in range(4) for a in range(4) for c in range(4)]
    ours, theirs = (torch.stack([cosine(side, *triple) for triple in triples]) for side in (s, t))
    same(losses.rkd_angle(s, t), torch.nn.functional.smooth_l1_loss(ours, theirs))


def test_rkd_keeps_its_digits_far_from_the_origin():
    s, t = batch()
    for loss in (losses.rkd_distance, losses.rkd_angle):
        same(loss((s + 100).float(), t.float()).double(), loss(s, t), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", [losses.rkd_distance, losses.rkd_angle])
def test_samples_that_only_rounding_keeps_apart_are_equal(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(20, 300, generator=generator) for _ in range(2))
    student[10:] = student[:1] + 1e-7 * torch.randn(10, 300, generator=generator)  # squares of distances come out negative
    found = gradient(loss(student.requires_grad_(), teacher), student)
    assert found.isfinite().all()
    equal = torch.cat([student[:10], student[:1].expand(10, 300)]).detach().requires_grad_()
    same(found, gradient(loss(equal, teacher), equal), rtol=0, atol=0.05 * float(found.abs().max()))


def test_the_gaussian_kernel_of_correlation_congruence_is_that_of_its_series():
    s, t = batch()
    unit = [torch.nn.functional.normalize(side, dim=1) for side in (s, t)]
    exact = [torch.exp(-0.4 * torch.cdist(side, side).square()) for side in unit]
    same(losses.correlation_congruence(s, t, order=20), (exact[0] - exact[1]).square().mean())


def test_cka_is_one_minus_the_normalised_cross_covariance():
    s, t = batch(samples=30)
    x, y = s - s.mean(0), t - t.mean(0)
    expected = 1 - (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    same(losses.cka(s, t), expected)
    same(losses.cka(s[:5], t[:5]), losses.cka(s[:5], torch.cat([t[:5], torch.zeros(5, 40)], 1)))  # by samples, not features


def test_pkt_is_the_divergence_of_neighbourhoods():
    s, t = batch()

    def chances(side):
        cosine = torch.nn.functional.cosine_similarity(side[:, None], side[None], dim=-1)
        return (1 + cosine) / (1 + cosine).sum(-1, keepdim=True)

    expected = torch.nn.functional.kl_div(chances(s).log(), chances(t), reduction="batchmean")
    same(losses.pkt(s, t), expected, atol=1e-6, rtol=1e-5)


# Errors


@each(CASES)
def test_other_samples_are_refused(case):
    student, teacher = case.tensors(4, 3)
    with pytest.raises(LossError, match=rf"{case.loss} compares the same samples.*\[4, 3, 4\].*\[3, 3, 6\]"):
        case(student, teacher[:3])
    with pytest.raises(LossError, match="compares the same samples"):
        case(student, teacher[:, :2], samples="positions")
    with pytest.raises(LossError, match=r"samples='rows'; a sample is one entry of the 'batch'"):
        case(student, teacher, samples="rows")


@each(CASES)
def test_what_is_no_floating_point_student_is_refused(case):
    student, teacher = case.tensors(4, 3)
    with pytest.raises(LossError, match=r"floating-point student.*torch\.int64"):
        case(student.long(), teacher)
    with pytest.raises(LossError, match="the teacher is a list"):
        case(student, [1.0])
    with pytest.raises(LossError, match=r"real numbers.*complex"):
        case(student, teacher.to(torch.complex64))


@each(CASES)
def test_a_mask_and_a_reduction_that_do_not_exist_are_refused(case):
    student, teacher = case.tensors(4, 3)
    with pytest.raises(LossError, match=r"mask \[5\] does not fit the positions \[4, 3\]"):
        case(student, teacher, mask=torch.ones(5))
    with pytest.raises(LossError, match="No reduction is called 'batchmean'"):
        case(student, teacher, reduction="batchmean")


@pytest.mark.parametrize("argument", [{"kernel": "linear"}, {"gamma": -1.0}, {"order": 0}])
def test_correlation_congruence_out_of_range_is_refused(argument):
    with pytest.raises(LossError, match="correlation_congruence got"):
        losses.correlation_congruence(*batch(), **argument)
