"""Each loss against independent implementations, where they are installed.

They are optional: ``pip install --no-deps torchdistill textbrewer mmrazor nvidia-modelopt lightly-train KD-Lib`` and ``pip
install sentence-transformers trl``. Without a peer its comparisons are skipped. The last result is in ``docs/losses.md``,
written by ``python tests/parity/table.py``.
"""

import math

import pytest
import torch

from parity.cases import CASES, KINDS, Draw
from parity.peers import version

TOLERANCE = 1e-5
"""Of the largest entry; peers add constants such as 1e-7 to what they divide by."""


def compared(case, kind):
    """Our value and gradient, and theirs."""
    if version(case.peer) is None:
        pytest.skip(f"{case.peer} is not installed")
    try:
        ours, theirs, student = case.compute(Draw(kind))
    except ImportError as error:
        pytest.skip(f"{case.peer} does not import: {error}")
    gradients = [torch.autograd.grad(value, student, retain_graph=True)[0] for value in (ours, theirs)]
    return (ours.detach(), gradients[0]), (theirs.detach().reshape(ours.shape).to(ours), gradients[1])


def distance(ours, theirs):
    """The largest difference of values or gradients, as a share of the largest entry; infinite where the peer is not finite."""
    shares = [(left - right).abs().max() / (right.abs().max() + 1e-10) for left, right in zip(ours, theirs, strict=True)]
    worst = float(torch.stack(shares).max())
    return worst if math.isfinite(worst) else math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parity(case, kind):
    ours, theirs = compared(case, kind)
    assert ours[0].isfinite()
    assert ours[1].isfinite().all()
    if case.differs or kind in case.trouble:
        assert distance(ours, theirs) > TOLERANCE, f"now they agree: {case.differs or case.trouble[kind]}"
    else:
        assert distance(ours, theirs) < TOLERANCE
