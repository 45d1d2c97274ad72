"""What holds for every loss that looks at all places of a sample: one value per sample, whatever the others are."""

import inspect

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hookdistill import losses
from hookdistill.errors import LossError
from loss_cases import LEARNED, MAPS, SampleCase

CASES = [*MAPS, *LEARNED]
WIDTH_FREE = ("attention_transfer", "nst", "vid", "mgd", "factor_transfer")
PER_PLACE = ("vid", "mgd")  # learned maps, whose value is that of a place
SMEARING = ("mgd", "factor_transfer")  # convolutions: a place reaches its neighbours


def each(cases: list[SampleCase]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def gradient(value, student):
    return torch.autograd.grad(value, student)[0]


def same(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **tolerance)


PLACES = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("name", sorted({case.loss for case in CASES}))
def test_signature_is_explicit(name):
    parameters = list(inspect.signature(getattr(losses, name)).parameters.values())
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {p.name: p.default for p in parameters}
    assert (defaults["mask"], defaults["reduction"], defaults["dim"]) == (None, "mean", None)
    assert "arXiv" in getattr(losses, name).__doc__ or name == "fsp"  # which is not on arXiv


@each(CASES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradient_is_that_of_finite_differences(case, masked):
    student, teacher = case.tensors(3, 5, seed=1)
    if not masked and case.loss != "factor_transfer":  # whose teacher is detached
        teacher.requires_grad_()
    assert gradcheck(lambda s, t: case(s, t, mask=PLACES if masked else None), (student, teacher))
    assert gradgradcheck(lambda s: case(s, teacher.detach(), mask=PLACES if masked else None), (student,))


@each([case for case in CASES if case.zero_for_equal])
def test_identical_inputs_cost_nothing(case):
    student = case.equal(3, 5)
    value = case(student, student.detach())
    same(value, torch.zeros_like(value), atol=1e-14, rtol=0)
    same(gradient(value, student), torch.zeros_like(student), atol=1e-13, rtol=0)


@each(CASES)
def test_different_inputs_cost_something_for_each_sample(case):
    values = case(*case.tensors(3, 5), reduction="none")
    assert (values > 1e-4).all()


@each(CASES)
def test_reductions_are_over_samples_or_places(case):
    student, teacher = case.tensors(3, 5)
    values = case(student, teacher, mask=PLACES, reduction="none")
    counted = PLACES.bool() if case.loss in PER_PLACE else PLACES.any(-1)
    assert values.shape == counted.shape
    assert (values[~counted] == 0).all()
    same(case(student, teacher, mask=PLACES, reduction="sum"), values.sum())
    same(case(student, teacher, mask=PLACES), values.sum() / counted.sum())


@each(CASES)
def test_two_half_batches_give_the_gradient_of_one_whole(case):
    student, teacher = case.tensors(4, 5)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]])
    whole = case(student, teacher, mask=mask)
    weights = mask.sum(-1) if case.loss in PER_PLACE else torch.ones(4)
    if case.loss == "mgd":  # its pattern of erased places is laid over the batch
        keep = case.extras(student, teacher)["keep"]
        parts = [case(student[h], teacher[h], mask=mask[h], keep=keep[h]) for h in (slice(0, 2), slice(2, 4))]
    else:
        parts = [case(student[h], teacher[h], mask=mask[h]) for h in (slice(0, 2), slice(2, 4))]
    total = (parts[0] * weights[:2].sum() + parts[1] * weights[2:].sum()) / weights.sum()
    same(whole, total)
    same(gradient(whole, student), gradient(total, student))


@each([case for case in CASES if case.loss != "mgd"])
def test_a_mask_of_samples_is_indexing_by_it(case):
    student, teacher = case.tensors(4, 5)
    mask = torch.tensor([True, False, True, True])
    masked, indexed = case(student, teacher, mask=mask), case(student[mask], teacher[mask])
    same(masked, indexed)
    same(gradient(masked, student), gradient(indexed, student))


@each([case for case in CASES if case.loss not in SMEARING])
def test_a_mask_of_places_is_indexing_by_it(case):
    student, teacher = case.tensors(2, 5)
    keep = torch.tensor([True, True, False, True, False])
    masked, indexed = case(student, teacher, mask=keep.expand(2, 5)), case(student[:, keep], teacher[:, keep])
    same(masked, indexed)
    same(gradient(masked, student), gradient(indexed, student))


@each(CASES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_masked_places_get_no_gradient_whatever_they_hold(case, poison):
    student, teacher = case.tensors(3, 5)
    hidden = (PLACES == 0).unsqueeze(-1)
    poisoned = student.detach().masked_fill(hidden, poison).requires_grad_()
    value = case(poisoned, teacher.masked_fill(hidden, poison), mask=PLACES)
    found = gradient(value, poisoned)
    same(value, case(student, teacher, mask=PLACES))
    assert found.isfinite().all()
    assert (found[hidden.expand_as(found)] == 0).all()
    assert (found[~hidden.expand_as(found)] != 0).any()


@each(CASES)
def test_nothing_valid_is_zero_and_attached(case):
    student, teacher = case.tensors(3, 5)
    value = case(student, teacher, mask=torch.zeros(3, 5))
    assert value == 0
    assert (gradient(value, student) == 0).all()


@each(CASES)
def test_images_have_their_channels_first(case):
    student, teacher = case.tensors(3, 2, 3, images=True)
    if case.loss in SMEARING:  # their weights are those of another convolution
        value = case(student, teacher)
        assert value.isfinite()
        assert (gradient(value, student) != 0).any()
        return
    flat = [side.flatten(2).transpose(1, 2) for side in (student, teacher)]
    same(case(student, teacher), case(*flat))
    same(case(student, teacher, mask=torch.ones(3, 2, 3)), case(*flat))
    same(case(*flat, dim=-1), case(*flat))


@each([case for case in CASES if case.loss not in ("mgd", "fsp")])
def test_the_larger_grid_is_pooled_to_the_smaller(case):
    student, teacher = case.tensors(3, 4, 4, images=True)
    pooled = torch.nn.functional.adaptive_avg_pool2d(student, 2)
    small = torch.nn.functional.adaptive_avg_pool2d(teacher, 2)
    same(case(student, small), case(pooled, small))
    same(case(pooled, teacher), case(pooled, small))
    with pytest.raises(LossError, match=r"different grids; give a mask \[3\] of samples"):
        case(student, small, mask=torch.ones(3, 4, 4))
    same(case(student, small, mask=torch.tensor([1, 0, 1])), case(pooled, small, mask=torch.tensor([1, 0, 1])))


@each(CASES)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(case, half):
    student, teacher = case.tensors(3, 5, dtype=half)
    value = case(student, teacher)
    assert value.dtype is torch.float32
    same(value, case(student.float(), teacher.float()), rtol=0, atol=0)
    assert gradient(value, student).dtype is half


@each(CASES)
def test_nothing_is_read_on_the_host(case):
    student, teacher = (side.detach().float().to("meta") for side in case.tensors(3, 5))
    assert case(student, teacher, mask=PLACES.to("meta")).shape == ()


@each(CASES)
def test_inputs_are_left_alone(case):
    student, teacher = case.tensors(3, 5)
    before = student.detach().clone(), teacher.clone()
    case(student, teacher, mask=PLACES).backward()
    same(student.detach(), before[0], rtol=0, atol=0)
    same(teacher, before[1], rtol=0, atol=0)


@each(CASES)
def test_zeros_have_finite_gradients(case):
    student, teacher = (torch.zeros_like(side) for side in case.tensors(3, 5))
    student.requires_grad_()
    assert gradient(case(student, teacher), student).isfinite().all()


# What does not matter


@each([case for case in MAPS if case.loss in ("attention_transfer", "nst")])
def test_channels_may_be_permuted_and_scaled(case):
    student, teacher = case.tensors(3, 5)
    same(case(student.flip(-1), teacher), case(student, teacher))
    same(case(3 * student, teacher), case(student, teacher))


@each([case for case in MAPS if case.loss in ("ickd", "nst", "fsp")])
def test_places_may_be_permuted_on_both_sides(case):
    student, teacher = case.tensors(3, 5)
    same(case(student.flip(1), teacher.flip(1)), case(student, teacher))


def test_ickd_forgets_the_scale_and_the_order_of_the_places():
    student, teacher = SampleCase("ickd").tensors(3, 5)
    same(losses.ickd(student.flip(1) * 7, teacher), losses.ickd(student, teacher))


def test_cwd_forgets_the_mean_of_each_channel():
    student, teacher = SampleCase("cwd").tensors(3, 5)
    same(losses.cwd(student + torch.arange(4.0), teacher), losses.cwd(student, teacher))


def test_cwd_is_torchs_kl_over_the_places():
    student, teacher = SampleCase("cwd").tensors(3, 2, 3, images=True)
    log_s, log_t = ((side / 2).flatten(2).log_softmax(-1) for side in (student, teacher))
    expected = torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="sum") * 4 / (3 * 4)
    same(losses.cwd(student, teacher, temperature=2.0), expected)
    same(losses.cwd(student, teacher, temperature=torch.tensor(2.0)), expected)


def test_nst_is_the_discrepancy_of_both_sets_of_channels():
    student, teacher = SampleCase("nst", widths=(2, 3)).tensors(1, 5)
    s, t = (torch.nn.functional.normalize(side[0].T, dim=-1) for side in (student, teacher))

    def mean(x, y):
        return torch.stack([(a @ b) ** 2 for a in x for b in y]).mean()

    same(losses.nst(student, teacher), mean(s, s) + mean(t, t) - 2 * mean(s, t))


def test_fsp_is_the_mean_square_of_the_difference_of_the_flows():
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    their_first, their_second = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    ours = torch.einsum("bchw,bdhw->bcd", first, second) / 16
    theirs = torch.einsum("bchw,bdhw->bcd", their_first, their_second) / 16
    found = losses.fsp(first, their_first, student_second=second, teacher_second=their_second)
    same(found, (ours - theirs).square().mean())


def test_fsp_pools_the_larger_layer_by_its_maximum():
    first, second = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 2, 2)
    pooled = torch.nn.functional.max_pool2d(first, 2)
    teacher = {"teacher": torch.zeros(2, 3, 2, 2), "teacher_second": second}
    same(losses.fsp(first, student_second=second, **teacher), losses.fsp(pooled, student_second=second, **teacher))


def test_vid_is_a_normal_log_likelihood_without_its_constant():
    student, teacher = SampleCase("vid").tensors(3, 5)
    variance = torch.nn.functional.softplus(torch.arange(4.0)).double() + 1e-5
    normal = torch.distributions.Normal(2 * student, variance.sqrt())
    expected = -normal.log_prob(teacher).mean() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    same(losses.vid(student, teacher, regressor=lambda x: 2 * x, scale=torch.arange(4.0)), expected)


def test_mgd_erases_as_many_places_as_it_is_told_and_others_each_time():
    ones = torch.ones(4, 50, 2)
    erased = [losses.mgd(ones, torch.zeros(4, 50, 2), generation=lambda x: x, ratio=0.3, reduction="none") for _ in range(2)]
    assert 0.6 < erased[0].mean() < 0.8
    assert (erased[0] != erased[1]).any()
    assert losses.mgd(ones, ones, generation=lambda x: x, ratio=0.0) == 0
    assert losses.mgd(ones, ones, generation=lambda x: x, ratio=1.0) == 1


def test_the_paraphraser_learns_by_reconstruction_alone():
    case = SampleCase("factor_transfer", widths=(4, 6))
    student, teacher = case.tensors(3, 5)
    state = losses.loss_spec("factor_transfer").state(student, teacher).double()
    maps = {"paraphraser": state.paraphraser, "translator": state.translator}
    losses.factor_transfer(student, teacher, **maps).backward()
    assert all(parameter.grad is None for parameter in state.paraphraser.parameters())
    assert all(parameter.grad is not None for parameter in state.translator.parameters())
    losses.factor_transfer(student, teacher, **maps, decoder=state.decoder).backward()
    assert all(parameter.grad is not None for parameter in [*state.paraphraser.parameters(), *state.decoder.parameters()])


# Errors


@each([case for case in MAPS if case.loss not in WIDTH_FREE])
def test_widths_that_differ_are_refused(case):
    student, teacher = case.tensors(3, 5)
    with pytest.raises(LossError, match="as many channels on both sides"):
        case(student, torch.cat([teacher, teacher], -1))


def test_vid_of_embeddings_is_that_of_one_place():
    case = SampleCase("vid", widths=(4, 6))
    student, teacher = case.tensors(3, 1)
    same(case(student[:, 0], teacher[:, 0]), case(student, teacher))


@each([case for case in CASES if case.loss != "vid"])
def test_tensors_without_places_are_refused(case):
    student, teacher = case.tensors(3, 5)
    with pytest.raises(LossError, match=rf"{case.loss} compares maps .* of the same batch; got student \[3, 4\]"):
        case(student[:, 0], teacher[:, 0], **(case.extras(student, teacher) if case in LEARNED else {}))


@each(CASES)
def test_another_batch_is_refused(case):
    student, teacher = case.tensors(3, 5)
    with pytest.raises(LossError, match="same batch"):
        case(student, teacher[:2])


@each(CASES)
def test_what_is_no_floating_point_student_is_refused(case):
    student, teacher = case.tensors(3, 5)
    with pytest.raises(LossError, match=r"floating-point student.*torch\.int64"):
        case(student.long(), teacher)
    with pytest.raises(LossError, match="the student is a list"):
        case([1.0], teacher)
    with pytest.raises(LossError, match=r"real numbers.*complex"):
        case(student, teacher.to(torch.complex64))


@each(CASES)
def test_a_mask_and_a_reduction_that_do_not_exist_are_refused(case):
    student, teacher = case.tensors(3, 5)
    with pytest.raises(LossError, match=r"mask \[5\] does not fit the positions \[3, 5\]"):
        case(student, teacher, mask=torch.ones(5))
    with pytest.raises(LossError, match="No reduction is called 'batchmean'"):
        case(student, teacher, reduction="batchmean")


@pytest.mark.parametrize(
    ("loss", "argument"),
    [
        ("attention_transfer", {"power": 0}),
        ("nst", {"degree": 0}),
        ("cwd", {"temperature": -1.0}),
        ("mgd", {"ratio": 1.5}),
        ("mgd", {"keep": torch.ones(2)}),
    ],
)
def test_arguments_out_of_range_are_refused(loss, argument):
    case = SampleCase(loss)
    with pytest.raises(LossError, match=f"{loss} got {next(iter(argument))}="):
        case(*case.tensors(3, 5), **argument)


def test_a_map_of_the_wrong_shape_is_named():
    student, teacher = SampleCase("vid").tensors(3, 5)
    with pytest.raises(LossError, match=r"regressor maps \[3, 5, 4\] to \[3, 5, 1\], not to \[3, 5, 4\]"):
        losses.vid(student, teacher, regressor=lambda x: x[..., :1], scale=torch.ones(4))
