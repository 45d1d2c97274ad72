"""A match says what is compared; what is wrong on its face is found when it is written down."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

from hookdistill import DistillationLoss, Distiller, Match, MatchError, losses, register_loss
from hookdistill.losses import registry
from hookdistill.matches import as_matches
from pairs import mlps, points, readers


@pytest.fixture
def registry_as_before(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))


def one(match, teacher, student, batch=None, **kwargs):
    """The value of one match on hand-written captures of the models' outputs."""
    return DistillationLoss([match])({"": {"output": teacher}}, {"": {"output": student}}, batch, **kwargs)


def pair(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw), torch.randn(*shape, generator=draw).requires_grad_()


@pytest.mark.parametrize(
    ("match", "label"),
    [
        (Match("encoder.layer.3", "encoder.layer.0"), "encoder.layer.0 <- encoder.layer.3: mse"),
        (Match(":logits", ":logits", loss="kl"), ":logits <- :logits: kl"),
        (Match(None, ":logits", loss="cross_entropy", target="labels"), ":logits <- labels: cross_entropy"),
        (Match("a", "b", name="hidden"), "hidden"),
        (Match("a@0", 'b:output["p2"]', loss="cosine"), 'b:output["p2"] <- a@0: cosine'),
    ],
)
def test_the_default_name_says_student_teacher_and_loss(match, label):
    assert match.label == label
    assert list(DistillationLoss([match]).terms) == [label]


def test_default_names_that_are_alike_are_made_unique():
    loss = DistillationLoss([Match("a", "b"), Match("a", "b", weight=2), Match("a", "b", weight=3)])
    assert len(loss.terms) == 3
    assert [term.weight for term in loss.terms.values()] == [1.0, 2, 3]


def test_a_generated_name_does_not_take_one_that_was_given():
    entries = [Match("a", "b"), Match("a", "b"), Match("a", "c", name="b <- a: mse #2")]
    assert len(DistillationLoss(entries).terms) == 3


def test_selector_stands_for_both_addresses():
    match = Match("encoder.layer.11.attention", "encoder.layer.2.attention", selector="attention")
    assert str(match.teacher_address) == "encoder.layer.11.attention:attention"
    assert str(match.student_address) == "encoder.layer.2.attention:attention"


def test_selector_goes_with_a_call():
    match = Match("albert.layer@-1", "albert.layer@0", selector="query")
    assert (str(match.teacher_address), str(match.student_address)) == ("albert.layer:query@-1", "albert.layer:query@0")


def test_a_match_cannot_be_changed():
    with pytest.raises(AttributeError):
        Match("a", "b").weight = 2.0


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda match: pickle.loads(pickle.dumps(match))])
def test_a_match_can_be_copied_and_pickled(clone):
    match = clone(Match("a", "b", loss="huber", delta=0.3, mask="valid", weight=0.25))
    assert match.label == "b <- a: huber"
    assert (match.loss_args, match.mask, match.weight) == ({"delta": 0.3}, "valid", 0.25)


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [
        ("mse", {}, lambda s, t: nn.functional.mse_loss(s, t)),
        ("l1", {}, lambda s, t: nn.functional.l1_loss(s, t)),
        ("cosine", {}, lambda s, t: (1 - nn.functional.cosine_similarity(s, t, dim=-1)).mean()),
        ("huber", {"delta": 0.3}, lambda s, t: nn.functional.huber_loss(s, t, delta=0.3)),
        (
            "kl",
            {"temperature": 3.0},
            lambda s, t: 9 * nn.functional.kl_div((s / 3).log_softmax(-1), (t / 3).softmax(-1), reduction="batchmean"),
        ),
        ("soft_cross_entropy", {}, lambda s, t: nn.functional.cross_entropy(s, t.softmax(-1))),
    ],
)
def test_each_loss_by_name_is_the_one_of_torch(loss, options, expected):
    teacher, student = pair(6, 4)
    found = one(Match("", "", loss=loss, **options), teacher, student)
    torch.testing.assert_close(found.total, expected(student, teacher))
    (got,) = torch.autograd.grad(found.total, student)
    (wanted,) = torch.autograd.grad(expected(student, teacher), student)
    torch.testing.assert_close(got, wanted)


def test_kl_between_images_of_logits_sums_over_the_channels():
    teacher, student = pair(2, 5, 3, 3)
    found = one(Match("", "", loss="kl"), teacher, student)
    expected = nn.functional.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1).mean()
    torch.testing.assert_close(found.total, expected)


def test_a_dimension_that_was_given_is_kept():
    teacher, student = pair(2, 5, 3, 3)
    found = one(Match("", "", loss="cosine", dim=-1, adapter="none"), teacher, student)
    torch.testing.assert_close(found.total, (1 - nn.functional.cosine_similarity(student, teacher, dim=-1)).mean())


def test_cross_entropy_against_labels_is_hard_and_against_a_teacher_soft():
    teacher, student = pair(6, 4)
    labels = torch.tensor([0, 1, 2, 3, -100, 1])
    hard = one(Match(None, "", loss="cross_entropy", target="labels"), teacher, student, {"labels": labels})
    torch.testing.assert_close(hard.total, nn.functional.cross_entropy(student, labels))
    soft = one(Match("", "", loss="cross_entropy"), teacher, student)
    torch.testing.assert_close(soft.total, nn.functional.cross_entropy(student, teacher.softmax(-1)))
    probabilities = {"labels": teacher.softmax(-1)}
    soft_labels = one(Match(None, "", loss="cross_entropy", target="labels"), teacher, student, probabilities)
    torch.testing.assert_close(soft_labels.total, nn.functional.cross_entropy(student, teacher.softmax(-1)))


def test_soft_cross_entropy_against_a_teacher_takes_a_temperature():
    teacher, student = pair(6, 4)
    found = one(Match("", "", loss="cross_entropy", temperature=2.0), teacher, student)
    expected = 4 * nn.functional.cross_entropy(student / 2, (teacher / 2).softmax(-1))
    torch.testing.assert_close(found.total, expected)


def test_cross_entropy_takes_its_options():
    teacher, student = pair(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 9, 1])
    match = Match(None, "", loss="cross_entropy", target="labels", label_smoothing=0.1, ignore_index=9)
    found = one(match, teacher, student, {"labels": labels})
    expected = nn.functional.cross_entropy(student, labels, label_smoothing=0.1, ignore_index=9)
    torch.testing.assert_close(found.total, expected)


# Losses of the user's own


def absolute(student, teacher, mask=None, *, power=1.0):
    return losses.masked_mean((student - teacher).abs().pow(power).mean(-1), mask)


class Weighted(nn.Module):
    """A loss with a parameter, which has to train with the student."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, student, teacher):
        return self.scale * (student - teacher).square().mean()


def test_a_callable_is_a_loss_and_gets_mask_and_arguments():
    teacher, student = pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    found = one(Match("", "", loss=absolute, mask="valid", power=2.0), teacher, student, {"valid": mask})
    torch.testing.assert_close(found.total, nn.functional.mse_loss(student[mask.bool()], teacher[mask.bool()]))
    assert list(found.parts) == [":output <- :output: absolute"]


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(absolute, power=3.0),
        lambda student, teacher: (student - teacher).abs().pow(3.0).mean(),
        lambda s, t, **options: (s - t).abs().pow(3.0).mean(),
        lambda *both: (both[0] - both[1]).abs().pow(3.0).mean(),
    ],
    ids=["partial", "lambda", "kwargs", "varargs"],
)
def test_a_callable_of_any_form_is_a_loss(loss):
    teacher, student = pair(3, 5)
    torch.testing.assert_close(one(Match("", "", loss=loss), teacher, student).total, (student - teacher).abs().pow(3).mean())


def test_a_module_as_loss_trains_with_the_student_and_is_saved_with_the_distiller():
    teacher, student = mlps()
    weighted = Weighted()
    distiller = Distiller(teacher, student, [Match("", "", loss=weighted)])
    assert any(parameter is weighted.scale for parameter in distiller.parameters())
    assert any(key.endswith("scale") for key in distiller.state_dict())
    assert not any(key.endswith("scale") for key in student.state_dict())
    distiller(points()).total.backward()
    assert weighted.scale.grad is not None


@pytest.mark.usefixtures("registry_as_before")
def test_a_registered_loss_is_known_by_its_name():
    register_loss("absolute")(absolute)
    teacher, student = pair(3, 5)
    assert torch.equal(one(Match("", "", loss="absolute"), teacher, student).total, absolute(student, teacher))
    item = {
        "type": "ts_distill",
        "teacher_layer_name": "t",
        "teacher_layer_output_name": "a",
        "student_layer_name": "s",
        "student_layer_output_name": "b",
        "loss": {"loss_function": "absolute", "args": {"power": 2.0}},
    }
    found = DistillationLoss([item])({"t": {"a": teacher}}, {"s": {"b": student}})
    assert torch.equal(found.total, absolute(student, teacher, power=2.0))


@pytest.mark.usefixtures("registry_as_before")
def test_a_registered_loss_between_features_gets_an_adapter():
    register_loss("absolute_features", compares="features")(absolute)
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second", loss="absolute_features")], example_batch=points())
    assert len(distiller.adapters) == 1


def test_a_loss_with_a_target_of_its_own_gets_teacher_and_target():
    def both(student, teacher, *, target):
        return (student - teacher).square().mean() + nn.functional.cross_entropy(student, target)

    teacher, student = pair(6, 4)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    found = one(Match("", "", loss=both, target="labels"), teacher, student, {"labels": labels})
    torch.testing.assert_close(found.total, both(student, teacher, target=labels))


def test_numbers_from_numpy_are_numbers():
    import numpy as np

    match = Match("a", "b", loss="kl", weight=np.float32(0.5), temperature=np.float64(2.0))
    assert float(match.weight) == 0.5


@pytest.mark.parametrize("weight", [0, 0.0, -1.0, 3])
def test_weights_may_be_zero_negative_or_whole(weight):
    teacher, student = pair(3, 4)
    found = one(Match("", "", weight=weight), teacher, student)
    torch.testing.assert_close(found.total, weight * nn.functional.mse_loss(student, teacher))


def test_reduction_is_an_option_like_any_other_of_the_loss():
    teacher, student = pair(3, 4)
    found = one(Match("", "", loss="kl", reduction="sum"), teacher, student)
    expected = nn.functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")
    torch.testing.assert_close(found.total, expected)


# Lists of matches


def test_matches_and_dicts_of_the_older_library_may_be_mixed():
    item = {
        "type": "hard_distill",
        "student_layer_name": "head",
        "student_layer_output_name": "output",
        "loss": {"loss_function": "cross_entropy", "args": {}},
    }
    entries = as_matches([Match("a", "b"), item])
    assert [type(entry) for entry in entries] == [Match, Match]


def test_any_iterable_of_matches_will_do():
    assert len(as_matches(Match(f"a.{i}", "b") for i in range(3))) == 3
    assert len(as_matches((Match("a", "b"),))) == 1


def test_the_entries_given_are_left_as_they_were():
    item = {
        "type": "ts_distill",
        "teacher_layer_name": "t",
        "teacher_layer_output_name": "a",
        "student_layer_name": "s",
        "student_layer_output_name": "b",
        "loss": {"loss_function": "cos", "args": {}},
    }
    before = copy.deepcopy(item)
    as_matches([item])
    assert item == before


def test_one_match_serves_in_two_distillers():
    match = Match("layers.*", "layers.*", name="hidden")
    values = []
    for _ in range(2):
        teacher, student = readers()
        distiller = Distiller(teacher, student, [match])
        values.append(distiller({"input_ids": torch.arange(6).reshape(2, 3)}).parts)
    assert list(values[0]) == list(values[1]) == ["hidden.0", "hidden.1"]
    assert values[0] == values[1]


def test_the_message_of_a_wrong_entry_has_its_position():
    with pytest.raises(MatchError, match="entry 1"):
        as_matches([Match("a", "b"), {"type": "nonsense"}])


def test_a_lambda_in_a_match_does_not_hinder_a_deep_copy():
    match = Match("first", "first", loss=lambda s, t: (s - t).square().mean(), mask=None)
    teacher, student = mlps()
    distiller = copy.deepcopy(Distiller(teacher, student, [match]))
    assert torch.isfinite(distiller(points()).total)
