"""The mask and the mean that all losses share."""

import pytest
import torch

from hookdistill.errors import LossError
from hookdistill.losses import masked_mean, reduce
from hookdistill.losses.reduction import fit_mask, working_dtype


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[True, False, True], [False, False, True]]),
        torch.tensor([[1, 0, 1], [0, 0, 1]]),
        torch.tensor([[1, 0, 2], [0, 0, 1]], dtype=torch.uint8),
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        torch.tensor([[1.0, 0.0, 1.0], [0.0, -0.0, 1.0]], dtype=torch.bfloat16),
    ],
    ids=lambda mask: str(mask.dtype),
)
def test_nonzero_is_valid(mask):
    valid = fit_mask(mask, [2, 3])
    assert valid.dtype is torch.bool
    assert valid.tolist() == [[True, False, True], [False, False, True]]


@pytest.mark.parametrize("shape", [[], [2], [2, 3], [2, 3, 4]], ids=str)
def test_a_mask_holds_for_the_leading_dimensions(shape):
    mask = torch.rand(shape) < 0.5
    valid = fit_mask(mask, (2, 3, 4))
    assert valid.shape == (2, 3, 4)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        assert valid[tuple(index)] == mask[tuple(index[: mask.ndim])]


def test_an_expanded_mask_is_a_view():
    mask = torch.ones(2, dtype=torch.bool)
    assert fit_mask(mask, (2, 1000)).untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [[3], [2, 4], [2, 1], [1, 3], [2, 3, 4], [3, 2]], ids=str)
def test_a_mask_that_does_not_fit_says_what_would(shape):
    with pytest.raises(LossError) as error:
        fit_mask(torch.ones(shape), (2, 3))
    assert f"The mask {shape} does not fit the positions [2, 3]" in str(error.value)
    assert "[2] or [2, 3] would fit" in str(error.value)


def test_a_mask_for_a_single_position_has_no_dimensions():
    with pytest.raises(LossError, match=r"mask \[1\] does not fit the positions \[\].*so \[\] would fit"):
        fit_mask(torch.ones(1), ())


def test_a_mask_is_a_tensor():
    with pytest.raises(LossError, match="got a list"):
        fit_mask([True, False], (2,))


def test_masked_mean_is_the_mean_of_what_is_valid():
    values = torch.arange(6.0).reshape(2, 3)
    assert masked_mean(values) == 2.5
    assert masked_mean(values, torch.tensor([[1, 0, 0], [1, 1, 0]])) == pytest.approx((0 + 3 + 4) / 3)
    assert masked_mean(values, torch.tensor([0, 1])) == 4


def test_masked_mean_looks_at_nothing_else():
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    mean = masked_mean(values, torch.tensor([1, 0, 0]))
    mean.backward()
    assert mean == 1
    assert values.grad.tolist() == [1, 0, 0]


@pytest.mark.parametrize("values", [torch.zeros(0), torch.full((3,), float("nan"))], ids=["empty", "masked"])
def test_masked_mean_of_nothing_is_zero_and_attached(values):
    values.requires_grad_()
    mean = masked_mean(values, torch.zeros(values.shape))
    mean.backward()
    assert mean == 0
    assert (values.grad == 0).all()


def test_masked_mean_of_no_values_without_a_mask_is_zero():
    assert masked_mean(torch.zeros(0)) == 0


def test_half_precision_does_not_overflow_in_the_sum():
    values = torch.full((100,), 6e4, dtype=torch.float16)
    for found, expected in (
        (masked_mean(values), 6e4),
        (masked_mean(values, torch.ones(100)), 6e4),
        (reduce(values, reduction="sum"), 6e6),
    ):
        assert found.dtype is torch.float32
        assert found.item() == pytest.approx(expected, rel=1e-3)


def test_reductions():
    values, mask = torch.arange(1.0, 7.0).reshape(2, 3), torch.tensor([[1, 0, 0], [1, 1, 0]])
    assert reduce(values, mask) == masked_mean(values, mask)
    assert reduce(values, mask, "sum") == 1 + 4 + 5
    assert reduce(values, mask, "none").tolist() == [[1, 0, 0], [4, 5, 0]]
    assert reduce(values, reduction="sum") == 21
    assert reduce(values, reduction="none").tolist() == values.tolist()


def test_an_unknown_reduction_lists_the_known_ones():
    with pytest.raises(LossError, match="'average'; there are 'mean', 'sum', 'none'"):
        reduce(torch.ones(2), reduction="average")


def test_only_double_precision_is_kept():
    half, single, double = torch.zeros(1).half(), torch.zeros(1), torch.zeros(1).double()
    assert working_dtype(half) is torch.float32
    assert working_dtype(half, single) is torch.float32
    assert working_dtype(double, half) is torch.float64
    assert working_dtype(single, torch.zeros(1).long()) is torch.float32
