"""Losses on logits by kernels."""

import math

import pytest
import torch

from hookdistill.fused.rows import RowTask
from hookdistill.kernels.launching import recorded
from hookdistill.kernels.records import ANYWHERE, ON_COLUMNS, ON_ROWS
from hookdistill.kernels.rows import run_rows_triton
from kernel_cases import DISTRIBUTIONS, LOGITS, check, computed, defined, drawn, labels, same_bits, some, term, terms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pair(*shape, dtype=torch.float32, spread=3.0, device="cpu"):
    one, other = (drawn(*shape, dtype=dtype, spread=spread, seed=seed, device=device) for seed in (0, 1))
    return one, other, labels(*shape[:-1], classes=shape[-1], device=device)


def launched(task):
    """The constants of the launches on logits that a task takes."""
    with recorded() as launches:
        run_rows_triton([task], gradient=True)
    return [each.constants for each in launches if each.kernel.__name__ == "distribution_rows"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOGITS)
def test_error_is_that_of_the_definition(name, dtype, device):
    student, teacher, target = pair(1, 3, 333, dtype=dtype, device=device)
    valid = torch.tensor([[True, False, True]], device=device)
    check(RowTask(student=student, terms=terms([name], teacher, target, valid=valid, temperature=2.0)))


@pytest.mark.parametrize("classes", [1, 7, 255, 1000, 1023, 4099])
def test_any_number_of_classes(classes, device):
    student, teacher, target = pair(2, classes, device=device)
    check(RowTask(student=student, terms=terms(LOGITS, teacher, target, temperature=1.5)))


@pytest.mark.parametrize("classes", [2600, 4104])
@pytest.mark.parametrize("names", [["kl", "cross_entropy"], ["reverse_kl"], ["js"]], ids=str)
def test_rows_of_several_blocks(names, classes, device):
    student, teacher, target = pair(2, classes, dtype=torch.bfloat16, device=device)
    check(RowTask(student=student, terms=terms(names, teacher, target, temperature=0.7)))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_any_temperature(temperature, device):
    student, teacher, target = pair(2, 100, spread=1.0, device=device)
    check(RowTask(student=student, terms=terms(LOGITS, teacher, target, temperature=temperature)))


def test_a_temperature_and_weights_on_the_device(device):
    student, teacher, target = pair(2, 100, device=device)
    heat, weight = torch.tensor(2.0, device=device), torch.tensor(0.3, device=device)
    task = RowTask(
        student=student,
        terms=[
            term("kl", teacher, temperature=heat, coefficient=weight),
            term("js", teacher, temperature=heat),
            term("cross_entropy", target, coefficient=weight),
        ],
    )
    check(task)
    assert len(launched(task)) == 1


def test_labels_share_the_softmax_at_temperature_one(device):
    student, teacher, target = pair(2, 100, device=device)
    for temperature, shared in ((1.0, True), (2.0, False)):
        task = RowTask(student=student, terms=terms(["kl", "cross_entropy"], teacher, target, temperature=temperature))
        check(task)
        assert [each["ONE"] for each in launched(task)] == [shared]


def test_labels_alone_smoothed_and_not(device):
    student, _, target = pair(2, 100, device=device)
    for smoothing in (0.0, 0.2, 1.0):
        check(RowTask(student=student, terms=[term("cross_entropy", target, constants={"label_smoothing": smoothing})]))


def test_identical_logits_cost_nothing(device):
    student, _, _ = pair(3, 100, device=device)
    (found,) = computed(RowTask(student=student, terms=terms(["kl", "js", "tvd"], student.clone(), temperature=2.0)))
    assert (found.gradient == 0).all()
    assert found.values.abs().max() == 0
    (found,) = computed(RowTask(student=student, terms=terms(["reverse_kl", "skew_kl"], student.clone(), temperature=2.0)))
    assert found.gradient.abs().max() < 1e-7
    assert found.values.abs().max() < 1e-5


def test_some_ties(device):
    student, teacher, _ = pair(3, 100, device=device)
    teacher[1] = student[1]
    (found,) = computed(RowTask(student=student, terms=terms(["tvd"], teacher)))
    assert (found.gradient[1] == 0).all()
    assert (found.gradient[0] != 0).any()


def test_classes_that_both_exclude_cost_nothing_and_get_nothing(device):
    student, teacher, target = pair(3, 100, device=device)
    student[:, 10:40] = teacher[:, 10:40] = -math.inf
    student[1, :96] = teacher[1, :96] = -math.inf
    target[:] = 97
    names = [name for name in LOGITS if name != "cross_entropy"]
    task = RowTask(
        student=student,
        terms=[
            *terms(names, teacher, temperature=2.0),
            term("cross_entropy", target, constants={"label_smoothing": 0.0}),
        ],
    )
    found = check(task)
    assert (found.gradient[:, 10:40] == 0).all()


@pytest.mark.parametrize("name", ["js", "skew_kl", "tvd"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_classes_that_one_side_excludes(side, name, device):
    student, teacher, _ = pair(2, 100, device=device)
    {"student": student, "teacher": teacher}[side][:, 10:40] = -math.inf
    check(RowTask(student=student, terms=terms([name], teacher)))


def test_excluding_what_must_not_be_is_infinite(device):
    student, teacher, target = pair(2, 100, device=device)
    one, other = student.clone(), teacher.clone()
    one[0, 5], other[0, 5] = -math.inf, -math.inf
    target[0] = 5
    for task in (
        RowTask(student=one, terms=terms(["kl"], teacher)),
        RowTask(student=one, terms=terms(["soft_cross_entropy"], teacher)),
        RowTask(student=student, terms=terms(["reverse_kl"], other)),
        RowTask(student=one, terms=terms(["cross_entropy"], teacher, target)),
    ):
        assert (defined(task)[0] == math.inf).all()
        (found,) = computed(task)
        assert (found.values == math.inf).all(), task.terms[0].form.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(dtype, device):
    student, teacher, target = pair(3, 100, dtype=dtype, device=device)
    student[0, :50] += 1e4
    teacher[0, 20:80] += 1e4
    student[1] -= 1e4
    teacher[2, 7], student[2, 7] = 1e4, -1e4
    # At temperature 2 the definition itself rounds nothing that this does not.
    check(RowTask(student=student, terms=terms(LOGITS, teacher, target, temperature=2.0)))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nothing_of_a_masked_row_gets_through(poison, device):
    student, teacher, target = pair(2, 100, device=device)
    valid = torch.tensor([True, False], device=device)
    task = RowTask(student=student, terms=terms(LOGITS, teacher, target, valid=valid, temperature=2.0))
    (clean,) = computed(task)
    student[1], teacher[1], target[1] = poison, poison, 0
    (found,) = computed(task)
    assert same_bits(found.values, clean.values) and same_bits(found.total, clean.total)
    assert same_bits(found.gradient, clean.gradient)
    assert (found.gradient[1] == 0).all()


def test_a_row_that_one_term_masks_counts_in_another(device):
    student, teacher, target = pair(4, 100, device=device)
    mixed = [
        each
        for seed, name in enumerate(LOGITS)
        for each in terms([name], teacher, target, temperature=2.0, valid=some(4, seed=seed, device=device))
    ]
    check(RowTask(student=student, terms=mixed))
    teacher[2] = math.nan
    valid = torch.tensor([True, True, False, True], device=device)
    (found,) = computed(
        RowTask(student=student, terms=[*terms(["kl"], teacher, valid=valid), *terms(["cross_entropy"], teacher, target)])
    )
    assert torch.isfinite(found.gradient).all() and torch.isfinite(found.values).all()


def test_nothing_valid_is_zero(device):
    student, teacher, target = pair(2, 100, device=device)
    valid = torch.zeros(2, dtype=torch.bool, device=device)
    (found,) = computed(RowTask(student=student, terms=terms(LOGITS, teacher, target, valid=valid)))
    assert (found.values == 0).all() and found.total == 0
    assert (found.gradient == 0).all()


def test_a_label_that_is_no_class_shows(device):
    student, _, target = pair(2, 100, device=device)
    target[1] = 100
    (found,) = computed(RowTask(student=student, terms=[term("cross_entropy", target)]))
    assert found.values.isnan().all()
    assert found.gradient[1].isnan().all() and torch.isfinite(found.gradient[0]).all()


ARRANGEMENTS = {
    "fewer classes than the teacher has": (lambda x: x[..., :96], ON_COLUMNS),
    "an odd number of them": (lambda x: x[..., :95], ANYWHERE),
    "dense and odd": (lambda x: x[..., :95].contiguous(), ON_ROWS),
    "tokens but the first": (lambda x: x[:, 1:], ON_COLUMNS),
    "tokens but the first, odd": (lambda x: x[..., :97].contiguous()[:, 1:], ANYWHERE),
    "misaligned": (lambda x: x.flatten()[1 : 1 + 2 * 2 * 96].view(2, 2, 96), ANYWHERE),
    "expanded": (lambda x: x[:1].expand(3, -1, -1), ON_COLUMNS),
    "transposed": (lambda x: x.transpose(0, 1), ON_COLUMNS),
    "classes first": (lambda x: x[..., :4].permute(2, 0, 1), ON_ROWS),
    "one row": (lambda x: x[0, 0, :97], ON_ROWS),
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
def test_any_strides(arrange, device):
    arranged, align = ARRANGEMENTS[arrange]
    base, other, _ = pair(2, 3, 104, dtype=torch.bfloat16, device=device)
    student, teacher = arranged(base), arranged(other)
    task = RowTask(student=student, terms=terms(["kl"], teacher, temperature=2.0))
    check(task)
    assert [each["ALIGN"] for each in launched(task)] == [align]


def test_classes_in_another_dimension(device):
    student, teacher, target = pair(1, 3, 2, 30, device=device)
    moved, compared = student.movedim(-1, 1).contiguous(), teacher.movedim(-1, 1).contiguous()
    check(RowTask(student=moved, dim=1, terms=terms(["kl", "cross_entropy"], compared, target, temperature=2.0)))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_teachers_of_other_dtypes(dtypes, device):
    student = drawn(2, 101, dtype=dtypes[0], spread=3.0, device=device)
    teacher = drawn(2, 101, dtype=dtypes[1], spread=3.0, seed=1, device=device)
    check(RowTask(student=student, terms=terms(["kl", "js"], teacher)))


@pytest.mark.parametrize(("ours", "theirs"), [(104, 96), (96, 104), (101, 99), (99, 1200)])
@pytest.mark.parametrize("padded", [False, True], ids=["shared", "padded"])
def test_vocabularies_of_different_sizes(padded, ours, theirs, device):
    student, teacher = drawn(2, ours, spread=3.0, device=device), drawn(2, theirs, spread=3.0, seed=1, device=device)
    infinite = {"kl", "soft_cross_entropy"} if ours < theirs else {"reverse_kl"}
    names = [name for name in DISTRIBUTIONS if not (padded and name in infinite)]
    task = RowTask(student=student, terms=terms([*names, "cross_entropy"], teacher, labels(2, classes=ours), padded=padded))
    found = check(task)
    alone = check(RowTask(student=student, terms=terms(names[:1], teacher, padded=padded)))
    if theirs < ours and not padded:
        assert (alone.gradient[:, theirs:] == 0).all() and (found.gradient[:, theirs:] != 0).any()


def test_other_teachers_temperatures_and_losses_said_twice_add_up(device):
    student, teacher, target = pair(2, 100, device=device)
    second = drawn(2, 100, seed=5, device=device)
    task = RowTask(
        student=student,
        terms=[
            term("kl", teacher, temperature=2.0),
            term("mse", teacher, coefficient=20.0),
            term("kl", second, temperature=2.0, coefficient=0.5),
            term("reverse_kl", teacher, temperature=4.0),
            term("kl", teacher, temperature=2.0, valid=torch.tensor([True, False], device=device)),
            term("cross_entropy", target),
            term("cross_entropy", target.flip(0), coefficient=0.1),
        ],
    )
    check(task)
    assert [each["ADD"] for each in launched(task)] == [True] * 4  # to the gradient of mse
    only_logits = RowTask(student=student, terms=task.terms[2:])
    assert [each["ADD"] for each in launched(only_logits)] == [False, True, True]
    check(only_logits)


def test_a_gradient_sums_to_nothing_over_the_classes(device):
    student, teacher, target = pair(1, 100, device=device)
    for name in LOGITS:
        (found,) = computed(RowTask(student=student, terms=terms([name], teacher, target, temperature=2.0)))
        assert found.gradient.double().sum(-1).abs().max() < 1e-6 * found.gradient.abs().sum(-1).max(), name


def test_a_constant_added_to_logits_changes_nothing(device):
    student, teacher, _ = pair(2, 100, device=device)
    task = RowTask(student=student.round(), terms=terms(DISTRIBUTIONS, teacher.round(), temperature=2.0))
    shifted = RowTask(student=student.round() + 64, terms=terms(DISTRIBUTIONS, teacher.round() - 32, temperature=2.0))
    one, other = computed(task)[0], computed(shifted)[0]
    assert same_bits(one.gradient, other.gradient) and same_bits(one.values, other.values)


def test_twice_gives_the_same_bits_and_without_gradients_the_same_values(device):
    student, teacher, target = pair(2, 300, dtype=torch.bfloat16, device=device)
    task = RowTask(student=student, terms=terms(LOGITS, teacher, target, temperature=2.0))
    one, two, values_only = computed(task)[0], computed(task)[0], computed(task, gradient=False)[0]
    assert same_bits(one.gradient, two.gradient) and same_bits(one.values, two.values) and same_bits(one.total, two.total)
    assert same_bits(one.values, values_only.values) and values_only.gradient is None


def test_sums_over_positions(device):
    student, teacher, target = pair(3, 100, device=device)
    check(RowTask(student=student, terms=terms(["kl", "cross_entropy"], teacher, target, mean=False)))
