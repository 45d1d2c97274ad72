"""Blocks of logits by a kernel, and heads that make them."""

import pytest
import torch

from hookdistill.fused.head import Head, HeadTask, head_losses
from hookdistill.fused.rows import block_losses, layout_of
from hookdistill.kernels.blocks import block_losses_triton
from hookdistill.kernels.launching import recorded
from kernel_cases import DISTRIBUTIONS, LOGITS, drawn, labels, some, term, terms


def both(student, rows, *, gradient=True):
    """Values and gradient of a block by the kernel, and by the closed forms in float64."""
    found = []
    for function, dtype in ((block_losses_triton, torch.float32), (block_losses, torch.float64)):
        layout = layout_of(rows, student.shape, -1, dtype, student.device)
        others = [other.to(dtype) if other.is_floating_point() else other for other in layout.others]
        weights = [weight.reshape(-1) for weight in layout.weights]
        out = torch.full_like(student, torch.nan, dtype=dtype) if gradient else None
        values = function(layout.program, student.to(dtype), others, weights, layout.scalars, out)
        found.append((values.double(), None if out is None else out.double()))
    return found


@pytest.mark.parametrize("classes", [100, 101])
def test_a_block_is_that_of_the_closed_forms(classes, device):
    student, teacher = (drawn(4, classes, spread=3.0, seed=seed, device=device) for seed in (0, 1))
    target = labels(4, classes=classes, device=device)
    rows = [
        *terms(LOGITS, teacher, target, temperature=2.0, valid=some(4, device=device)),
        term("kl", teacher, temperature=4.0, mean=False),
        term("js", teacher, temperature=2.0, coefficient=0.3),
    ]
    found, true = both(student, rows)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both(student, rows, gradient=False)[0][0], found[0])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(40, 32), (32, 40)])
def test_a_block_with_vocabularies_of_different_sizes(ours, theirs, padded, device):
    student, teacher = drawn(2, ours, device=device), drawn(2, theirs, seed=1, device=device)
    names = [name for name in DISTRIBUTIONS if not padded or name in ("js", "tvd", "skew_kl")]
    found, true = both(student, terms(names, teacher, padded=padded))
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def test_features_of_logits_are_left_to_the_closed_forms(device):
    student, teacher = drawn(2, 32, device=device), drawn(2, 32, seed=1, device=device)
    with recorded() as launched:
        found, true = both(student, terms(["mse", "kl"], teacher))
    assert not launched
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)


def test_a_head_makes_blocks_for_the_kernel(device, monkeypatch):
    classes, blocks_seen = 40, []

    def counted(*arguments):
        blocks_seen.append(arguments[1].shape[0])
        return block_losses_triton(*arguments)

    monkeypatch.setattr("hookdistill.fused.head.HEAD_BLOCK", 3 * classes)
    monkeypatch.setattr("hookdistill.fused.head.FEWEST_ROWS", 1)
    ours = Head(
        hidden=drawn(2, 4, 8, device=device).requires_grad_(),
        weight=drawn(classes, 8, seed=1, device=device).requires_grad_(),
        bias=drawn(classes, seed=2, device=device).requires_grad_(),
        softcap=5.0,
    )
    theirs = Head(hidden=drawn(2, 4, 6, seed=3, device=device), weight=drawn(classes, 6, seed=4, device=device))
    target = labels(2, 4, classes=classes, device=device)

    def task():
        rows = [term("kl", theirs, temperature=2.0, valid=some(2, 4, device=device)), term("cross_entropy", target)]
        return HeadTask(student=ours, terms=rows)

    found = head_losses(task(), counted, most=1 << 62, gradient=True)
    true = head_losses(task(), block_losses, most=1 << 20, gradient=True)
    assert blocks_seen == [3, 3, 2]
    torch.testing.assert_close(found.values, true.values, rtol=1e-5, atol=1e-6)
    for (mine, slope), (other, expected) in zip(found.slopes, true.slopes, strict=True):
        assert mine is other
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)
