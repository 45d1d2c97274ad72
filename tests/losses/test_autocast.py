"""Autocast is for models: what a loss computes of their tensors is the same under it."""

import pytest
import torch

from hookdistill import hsic, losses
from loss_cases import COUPLED, MAPS

AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}
POINTWISE = sorted(
    name
    for name, spec in losses.registered_losses().items()
    if spec.state is None and not spec.required and spec.compares in ("features", "logits") and name not in {"uld"}
)


def assert_autocast_changes_nothing(loss, student, teacher):
    plain = loss(student, teacher)
    with torch.autocast(**AUTOCAST):
        under = loss(student, teacher)
    assert torch.equal(plain, under)
    # As in a training, where backward runs outside.
    assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (plain, under)))


@pytest.mark.parametrize("case", [*MAPS, *COUPLED], ids=str)
def test_relations_within_samples_and_between_them(case):
    assert_autocast_changes_nothing(case, *case.tensors(5, 3, dtype=torch.float32))


@pytest.mark.parametrize("name", [name for name in POINTWISE if name not in {case.loss for case in (*MAPS, *COUPLED)}])
def test_positions(name):
    student, teacher = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 6, 8)
    if name == "cross_entropy":
        teacher = teacher.softmax(-1)
    if name in ("sampled_kl", "top_k_tail_kl"):
        teacher = torch.cat([teacher[..., :2].log_softmax(-1), torch.tensor([1.0, 2.0, -3.0]).expand(4, 6, 3)], -1)
    assert_autocast_changes_nothing(getattr(losses, name), student, teacher)


def test_relations_between_tokens():
    assert_autocast_changes_nothing(losses.relation_kl, torch.randn(2, 4, 7, 8, requires_grad=True), torch.randn(2, 4, 7, 8))


def test_cka_of_layers():
    layers = [torch.randn(8, 5, dtype=torch.float32) for _ in range(2)]
    plain, under = hsic.MinibatchCKA(), hsic.MinibatchCKA()
    plain.add(layers[:1], layers[1:])
    with torch.autocast(**AUTOCAST):
        under.add(layers[:1], layers[1:])
    assert torch.equal(plain.result(), under.result())
