"""Exceptions: what can be caught, and the words that help."""

import pickle

import pytest
import torch

import hookdistill
from hookdistill import (
    AddressError,
    BatchError,
    CaptureError,
    HookDistillError,
    LossError,
    MatchError,
    StoreError,
    TrainerError,
)
from hookdistill.errors import did_you_mean, listing, nearest


@pytest.mark.parametrize(
    ("error", "also"),
    [
        (AddressError, ValueError),
        (MatchError, ValueError),
        (LossError, ValueError),
        (BatchError, ValueError),
        (CaptureError, RuntimeError),
        (StoreError, RuntimeError),
        (TrainerError, RuntimeError),
    ],
)
def test_every_error_is_a_hookdistill_error_and_one_of_pythons(error, also):
    assert issubclass(error, HookDistillError)
    assert issubclass(error, also)
    assert str(pickle.loads(pickle.dumps(error("what happened")))) == "what happened"


def test_a_failed_look_up_in_a_capture_is_a_key_error_with_a_readable_message():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with hookdistill.Capture(model, ["0"]) as captured:
        model(torch.zeros(1, 2))
    with pytest.raises(KeyError) as caught:
        captured["7"]
    assert isinstance(caught.value, CaptureError)
    assert not str(caught.value).startswith(('"', "'\""))


def test_the_nearest_names_come_first():
    assert nearest("cosin", ["mse", "cosine", "kl"]) == ["cosine"]
    assert did_you_mean("cosin", ["mse", "cosine"]) == " Did you mean 'cosine'?"
    assert did_you_mean("zzz", ["mse"]) == ""


def test_a_long_listing_is_cut_and_says_so():
    assert listing(["a", "b"]) == "'a', 'b'"
    assert listing([]) == "none"
    assert listing(map(str, range(14)), most=3) == "'0', '1', '2' and 11 more"


def test_an_error_in_a_match_keeps_its_cause():
    match = hookdistill.Match(":logits", ":logits", loss="kl", name="soft")
    loss = hookdistill.DistillationLoss([match])
    student = {"": {"logits": torch.randn(2, 3, requires_grad=True)}}
    with pytest.raises(MatchError, match="soft") as caught:
        loss({"": {"logits": torch.randn(2, 4)}}, student)
    assert isinstance(caught.value.__cause__, LossError)
