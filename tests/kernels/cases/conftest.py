import warnings

import pytest
import torch

from hookdistill.kernels.availability import interpreted


def pytest_collection_modifyitems(items):
    if not interpreted():
        for item in items:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture
def device():
    return torch.device("cpu" if interpreted() else "cuda")


@pytest.fixture(autouse=True)
def numbers_that_are_none():
    """What a GPU does without a word, as a logarithm of zero, NumPy warns of in the interpreter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\..*")
        yield
