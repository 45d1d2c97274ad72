"""Feature losses by kernels."""

import math

import pytest
import torch

from hookdistill.fused.rows import RowTask
from hookdistill.kernels import features
from hookdistill.kernels.launching import recorded
from hookdistill.kernels.rows import run_rows_triton
from kernel_cases import FEATURES, check, computed, defined, drawn, same_bits, some, term, terms

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ANGLES = ["cosine", "normalized_mse"]
DISTANCES = [name for name in FEATURES if name not in ANGLES]


@pytest.fixture
def wide(monkeypatch):
    """Rows of 200 features and more are too wide for a program."""
    monkeypatch.setattr(features, "WIDEST", 128)
    monkeypatch.setattr(features, "CHUNK", 128)


def pair(*shape, dtype=torch.float32, device="cpu"):
    return drawn(*shape, dtype=dtype, device=device), drawn(*shape, dtype=dtype, seed=1, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_error_is_that_of_the_definition(name, dtype, device):
    student, teacher = pair(3, 5, 200, dtype=dtype, device=device)
    check(RowTask(student=student, terms=[term(name, teacher, valid=some(3, 5, device=device), coefficient=0.7)]))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (67, 1), (5, 7), (1, 200), (5, 768), (67, 40)])
def test_any_width_and_number_of_rows(width, rows, device):
    student, teacher = pair(rows, width, device=device)
    # Vectors of one feature have no angle between them, and slopes that are rounding and nothing else.
    check(RowTask(student=student, terms=terms(FEATURES if width > 1 else DISTANCES, teacher)))


@pytest.mark.parametrize("names", [["mse"], ["mse", "huber"], ["cosine"], ["l1", "cosine", "normalized_mse"]], ids=str)
@pytest.mark.parametrize("width", [200, 333])
def test_rows_that_no_program_holds(width, names, wide, device):
    student, teacher = pair(2, width, device=device)
    valid = torch.tensor([True, False], device=device)
    check(RowTask(student=student, terms=[*terms(names, teacher), *terms(names[:1], teacher, valid=valid)]))


def test_a_row_of_sixteen_thousand(device):
    student, teacher = pair(2, 16384, dtype=torch.bfloat16, device=device)
    check(RowTask(student=student, terms=terms(["mse", "cosine"], teacher)))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_teachers_of_other_dtypes(dtypes, device):
    student = drawn(4, 24, dtype=dtypes[0], device=device)
    teacher = drawn(4, 24, dtype=dtypes[1], seed=1, device=device)
    check(RowTask(student=student, terms=terms(FEATURES, teacher)))
    check(RowTask(student=student, terms=[*terms(["mse", "cosine"], teacher), *terms(["l1"], teacher.to(torch.bfloat16))]))
    check(RowTask(student=student, terms=terms(["mse"], teacher.to(torch.int64))))


ARRANGEMENTS = {
    "tokens but the first": lambda x: x[:, 1:],
    "some features": lambda x: x[..., 2:],
    "transposed": lambda x: x.transpose(0, 1),
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "expanded tokens": lambda x: x[:, :1].expand(-1, 3, -1),
    "misaligned": lambda x: x.flatten()[3 : 3 + 4 * 6 * 8].view(4, 6, 8),
    "every other feature": lambda x: x[..., ::2],
    "features first": lambda x: x.permute(2, 0, 1),
    "one row": lambda x: x[0, 0],
}


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
def test_any_strides(arrange, device):
    base, other = pair(5, 8, 16, dtype=torch.bfloat16, device=device)
    student, teacher = ARRANGEMENTS[arrange](base), ARRANGEMENTS[arrange](other)
    valid = some(*student.shape[:-1], device=device)
    check(RowTask(student=student, terms=terms(["mse", "cosine"], teacher, valid=valid)))
    check(RowTask(student=student, terms=terms(["mse", "cosine"], teacher.contiguous())))


@pytest.mark.parametrize("mask", [None, (3,), (3, 4), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("names", [["mse", "l1"], ["mse", "cosine"]], ids=str)
def test_channels_may_come_first(names, mask, device):
    student, teacher = pair(3, 6, 4, 5, device=device)
    valid = None
    if mask is not None:
        drawn_mask = some(*mask, device=device)
        valid = drawn_mask.reshape(mask + (1,) * (3 - len(mask))).expand(3, 4, 5)
    check(RowTask(student=student, dim=1, terms=terms(names, teacher, valid=valid)))
    last = student.contiguous(memory_format=torch.channels_last)
    check(RowTask(student=last, dim=1, terms=terms(names, teacher, valid=valid)))


@pytest.mark.parametrize(
    "mask",
    [lambda: some(4, 1).expand(4, 6), lambda: some(1, 6).expand(4, 6), lambda: some(6, 4).t(), lambda: some(4, 12)[:, ::2]],
)
def test_any_strides_of_a_mask(mask, device):
    student, teacher = pair(4, 6, 8, device=device)
    check(RowTask(student=student, terms=terms(["mse", "cosine"], teacher, valid=mask().to(device))))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("width", [24, 200])
def test_nothing_of_a_masked_row_gets_through(width, poison, wide, device):
    student, teacher = pair(4, width, device=device)
    valid = torch.tensor([True, False, True, False], device=device)
    task = RowTask(student=student, terms=terms(["mse", "huber", "normalized_mse"], teacher, valid=valid))
    (clean,) = computed(task)
    student[1], teacher[1] = poison, poison
    student[3] = poison
    (found,) = computed(task)
    assert same_bits(found.values, clean.values)
    assert same_bits(found.total, clean.total)
    assert same_bits(found.gradient, clean.gradient)
    assert (found.gradient[[1, 3]] == 0).all()


def test_nothing_valid_is_zero(device):
    student, teacher = pair(4, 24, device=device)
    valid = torch.zeros(4, dtype=torch.bool, device=device)
    (found,) = computed(RowTask(student=student, terms=terms(FEATURES, teacher, valid=valid)))
    assert (found.values == 0).all() and found.total == 0
    assert (found.gradient == 0).all()


def test_a_row_masked_in_one_term_counts_in_another(device):
    student, teacher = pair(5, 24, device=device)
    both = [term(name, teacher, valid=some(5, seed=seed, device=device)) for seed, name in enumerate(FEATURES)]
    check(RowTask(student=student, terms=both))


@pytest.mark.parametrize("width", [24, 200])
def test_ties_cost_nothing(width, wide, device):
    student = drawn(2, width, device=device)
    (found,) = computed(RowTask(student=student, terms=terms(DISTANCES, student.clone())))
    assert (found.values == 0).all()
    assert (found.gradient == 0).all()
    (found,) = computed(RowTask(student=student, terms=terms(ANGLES, student.clone())))
    assert found.values.abs().max() < 1e-6
    assert found.gradient.abs().max() < 1e-7


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("length", [0.0, 1e-10])
@pytest.mark.parametrize("width", [24, 200])
def test_vectors_of_no_length(width, length, which, wide, device):
    student, teacher = pair(2, width, device=device)
    for tensor in {"student": [student], "teacher": [teacher], "both": [student, teacher]}[which]:
        tensor[1] *= length
    check(RowTask(student=student, terms=terms(ANGLES, teacher)))


def test_a_beta_of_zero_is_l1(device):
    student, teacher = pair(3, 24, device=device)
    found = [
        computed(RowTask(student=student, terms=[term(name, teacher, constants=constants)]))[0]
        for name, constants in (("smooth_l1", {"beta": 0.0}), ("l1", {}))
    ]
    assert same_bits(found[0].gradient, found[1].gradient)
    assert same_bits(found[0].values, found[1].values)


def test_sums_and_numbers_on_the_device(device):
    student, teacher = pair(3, 5, 24, device=device)
    weight = torch.tensor(0.3, dtype=torch.float64, device=device)
    valid = some(3, 5, device=device)
    two = [term("mse", teacher, mean=False, coefficient=weight), term("cosine", teacher, mean=False, valid=valid)]
    check(RowTask(student=student, terms=two))


def test_without_gradients_the_values_are_the_same(device):
    student, teacher = pair(3, 24, device=device)
    task = RowTask(student=student, terms=terms(FEATURES, teacher))
    (found,) = computed(task, gradient=False)
    assert found.gradient is None
    assert same_bits(found.values, computed(task)[0].values)


def test_twice_gives_the_same_bits(device):
    student, teacher = pair(5, 300, dtype=torch.bfloat16, device=device)
    task = RowTask(student=student, terms=terms(FEATURES, teacher, valid=some(5, device=device)))
    one, two = computed(task)[0], computed(task)[0]
    assert same_bits(one.gradient, two.gradient) and same_bits(one.values, two.values) and same_bits(one.total, two.total)


def test_tasks_of_one_width_share_a_launch_and_nothing_else(device):
    mask = some(2, 5, device=device)
    tasks = [
        RowTask(student=student, terms=terms(names, teacher, valid=mask))
        for names, (student, teacher) in (
            (["mse"], pair(2, 5, 24, device=device)),
            (["cosine", "mse"], pair(2, 5, 24, device=device)),
            (["l1"], pair(2, 5, 40, device=device)),
            (["mse"], pair(2, 5, 24, dtype=torch.bfloat16, device=device)),
        )
    ]
    short = RowTask(student=drawn(3, 24, device=device), terms=terms(["huber"], drawn(3, 24, seed=1, device=device)))
    for task, found in zip([*tasks, short], computed(*tasks, short), strict=True):
        check(task, found)
    with recorded() as launched:
        run_rows_triton([*tasks, short], gradient=True)
    names = [each.kernel.__name__ for each in launched]
    assert names == ["shares", *["narrow_rows"] * 3, "totals"]
    assert launched[1].grid[1] == 3


def test_more_than_four_dimensions_and_none(device):
    student, teacher = pair(2, 3, 2, 2, 8, device=device)
    check(RowTask(student=student.permute(1, 3, 0, 2, 4), terms=terms(FEATURES, teacher.permute(1, 3, 0, 2, 4))))
    check(RowTask(student=student[0, 0, 0, 0], terms=terms(FEATURES, teacher[0, 0, 0, 0])))


def test_float64_is_left_to_the_closed_forms(device):
    student, teacher = pair(3, 24, dtype=torch.float64, device=device)
    task = RowTask(student=student, terms=terms(FEATURES, teacher))
    single = RowTask(student=student.float(), terms=terms(["mse"], teacher.float()))
    found, by_kernel = computed(task, single)
    values, gradient = defined(task)
    torch.testing.assert_close(found.values, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-14)
    check(single, by_kernel)
