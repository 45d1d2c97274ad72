import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
