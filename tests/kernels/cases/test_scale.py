"""Gradients times what comes from above, by a kernel."""

import pytest
import torch

from hookdistill.kernels.launching import recorded
from hookdistill.kernels.scale import scale_triton
from kernel_cases import drawn, same_bits

FACTORS = [1.0, 0.5, -3.0, 65536.0]


def gradients(device):
    """One shorter than a block, one of several, one of another dtype, one that is dense but in another order, and a scalar."""
    return [
        drawn(5, 7, device=device),
        drawn(4, 5000, seed=1, device=device),
        drawn(3, 100, dtype=torch.bfloat16, seed=2, device=device),
        drawn(2, 8, 3, seed=3, device=device).permute(2, 0, 1),
        drawn(1, seed=4, device=device).reshape(()),
    ]


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("in_place", [False, True])
def test_it_is_a_multiplication(in_place, factor, device):
    given = gradients(device)
    copies = [gradient.clone() for gradient in given]
    expected = [gradient * factor for gradient in given]
    torch.use_deterministic_algorithms(True)  # new memory is full of NaN
    try:
        found = scale_triton(given, torch.tensor(factor, device=device), in_place=in_place)
    finally:
        torch.use_deterministic_algorithms(False)
    for scaled, true, gradient, copy in zip(found, expected, given, copies, strict=True):
        # The interpreter cuts bfloat16 off.
        torch.testing.assert_close(scaled, true, rtol=1e-2 if scaled.dtype is torch.bfloat16 else 0, atol=0)
        assert (scaled is gradient) is in_place
        assert in_place or same_bits(gradient, copy)


@pytest.mark.parametrize("in_place", [False, True])
def test_tensors_that_are_no_piece_of_memory(in_place, device):
    base = drawn(4, 10, device=device)
    given = [base[:, ::2], drawn(9, seed=1, device=device)[1:], drawn(3, dtype=torch.float64, device=device)]
    expected = [gradient * 0.5 for gradient in given]
    with recorded() as launched:
        found = scale_triton(given, torch.tensor(0.5, device=device), in_place=in_place)
    torch.testing.assert_close(found, expected)
    assert not launched


def test_one_launch_for_each_dtype(device):
    with recorded() as launched:
        scale_triton(gradients(device), torch.tensor(0.5, device=device), in_place=True)
    assert len(launched) == 2


def test_a_factor_of_float64(device):
    (found,) = scale_triton(
        [torch.ones(3, device=device)], torch.tensor(0.5, dtype=torch.float64, device=device), in_place=False
    )
    assert found.dtype is torch.float32 and (found == 0.5).all()
