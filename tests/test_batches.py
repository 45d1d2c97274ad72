"""From a batch to the inputs of two models: by the names of their forwards, or by a function of the user's."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookdistill import BatchError, Distiller, HookDistillError, Match
from hookdistill.batches import contents, given_inputs, has_item, model_inputs, named_items, pick, positional_items, to_device
from pairs import mlps, points, readers, tokens

HARD = Match(None, ":logits", loss="cross_entropy", target="labels")


@dataclasses.dataclass
class Batch:
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Named(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def encoded(items):
    from transformers import BatchEncoding

    return BatchEncoding(items)


KINDS = {
    "dict": dict,
    "ordered dict": collections.OrderedDict,
    "user dict": collections.UserDict,
    "BatchEncoding": encoded,
    "dataclass": lambda items: Batch(**items),
    "named tuple": lambda items: Named(**items),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_with_names_of_any_kind_give_the_same_losses(kind):
    teacher, student = readers()
    matches = [Match("layers.3", "layers.1", mask="attention_mask"), HARD]
    plain = Distiller(teacher, student, matches)(tokens())
    found = Distiller(teacher, student, matches)(KINDS[kind](tokens()))
    assert torch.equal(found.total, plain.total)


@pytest.mark.parametrize("kind", [tuple, list])
def test_batches_without_names_fill_the_parameters_in_order(kind):
    teacher, student = readers()
    batch = tokens()
    named = Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask"), HARD])(batch)
    numbered = [Match("layers.3", "layers.1", mask=1), Match(None, ":logits", loss="cross_entropy", target=2)]
    found = Distiller(teacher, student, numbered)(kind(batch.values()))
    assert torch.equal(found.total, named.total)
    assert not student.got_labels


def test_a_tensor_is_a_batch_of_one_item():
    teacher, student = mlps()
    x = points()["x"]
    student.eval()
    assert torch.equal(
        Distiller(teacher, student, [Match("first", "first")])(x).total,
        Distiller(teacher, student, [Match("first", "first")])({"x": x}).total,
    )


def test_a_pair_of_inputs_and_labels_as_torchvision_gives_it():
    teacher, student = mlps()
    batch = points()
    matches = [Match("", "", loss="kl"), Match(None, "", loss="cross_entropy", target=1)]
    assert torch.isfinite(Distiller(teacher, student, matches)((batch["x"], batch["labels"])).total)
    assert torch.isfinite(Distiller(teacher, student, [Match("", "")])([batch["x"], batch["labels"]]).total)


def test_a_negative_index_of_a_target_is_withheld_from_the_models():
    teacher, student = readers()
    match = Match(None, ":logits", loss="cross_entropy", target=-1)
    Distiller(teacher, student, [match])(tuple(tokens().values()))
    assert not student.got_labels


class Wants(nn.Module):
    """Takes other inputs than its partner, and tells what it got."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.got = None


class Audio(Wants):
    def forward(self, audio, *, speed=1.0):
        self.got = {"audio": audio, "speed": speed}
        return self.layer(audio)


class Text(Wants):
    def forward(self, text, audio=None):
        self.got = {"text": text, "audio": audio}
        return self.layer(text)


class Anything(Wants):
    def forward(self, **inputs):
        self.got = inputs
        return self.layer(inputs["text"])


class Positional(Wants):
    def forward(self, text, /, audio=None):
        self.got = {"text": text, "audio": audio}
        return self.layer(text)


class Starred(Wants):
    def forward(self, *inputs):
        self.got = inputs
        return self.layer(inputs[0])


ITEMS = {"audio": torch.zeros(2, 3), "text": torch.ones(2, 3), "extra": "an id", "speed": 2.0}


def given(teacher, student, batch, matches=None, **kwargs):
    """What both models got."""
    distiller = Distiller(teacher, student, matches or [Match("layer", "layer")], **kwargs)
    distiller(batch)
    return teacher.got, student.got


def test_teacher_and_student_get_what_their_forwards_name():
    theirs, ours = given(Audio(), Text(), ITEMS)
    assert theirs["audio"] is not None
    assert theirs["speed"] == 2.0
    assert torch.equal(ours["text"], ITEMS["text"])
    assert torch.equal(ours["audio"], ITEMS["audio"])


def test_a_forward_of_keywords_only_gets_everything_but_targets_and_masks():
    batch = {**ITEMS, "wanted": torch.zeros(2, 3), "valid": torch.ones(2)}
    matches = [Match("layer", "layer", mask="valid"), Match(None, "layer", target="wanted")]
    _, ours = given(Audio(), Anything(), batch, matches)
    assert set(ours) == {"audio", "text", "extra", "speed"}


def test_positional_only_parameters_are_filled():
    _, ours = given(Audio(), Positional(), ITEMS)
    assert torch.equal(ours["text"], ITEMS["text"])


def test_a_starred_forward_gets_all_items_by_position():
    _, ours = given(Text(), Starred(), (ITEMS["text"], ITEMS["audio"]))
    assert len(ours) == 2


def test_a_mask_that_the_model_takes_is_passed_to_it():
    teacher, student = readers()
    seen = []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask"), HARD])(tokens())
    assert seen[-1] == {"input_ids", "attention_mask"}


def test_an_input_that_is_a_target_too_is_passed_all_the_same():
    teacher, student = readers()
    match = Match(None, ":logits", loss=lambda s, t: (s.mean(-1) - t).square().mean(), target="input_ids")
    assert torch.isfinite(Distiller(teacher, student, [match])(tokens()).total)


def test_a_mask_that_is_a_target_too_is_passed_all_the_same():
    teacher, student = readers()
    seen = []
    student.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    match = Match(None, ":logits", loss=lambda s, t: (s.mean(-1) - t).square().mean(), target="attention_mask")
    Distiller(teacher, student, [match, Match("layers.3", "layers.1", mask="attention_mask")])(tokens())
    assert "attention_mask" in seen[-1]


def test_labels_that_no_match_uses_follow_the_signature():
    teacher, student = readers()
    Distiller(teacher, student, [Match("layers.3", "layers.1")])(tokens())
    assert student.got_labels


def test_two_targets_and_a_callable_one():
    teacher, student = mlps()
    batch = {**points(), "wanted": torch.randn(5, 4)}
    matches = [
        Match(None, "", target="wanted"),
        Match(None, "", loss="cross_entropy", target="labels"),
        Match(None, "", loss="cross_entropy", target=lambda batch: batch["labels"], name="by function"),
    ]
    losses = Distiller(teacher, student, matches)(batch)
    parts = losses.parts
    assert torch.equal(parts["by function"], parts[":output <- labels: cross_entropy"])


# The user's own function


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x: {"x": x},
        lambda x: (x,),
        lambda x: [x],
        lambda x: x,
    ],
    ids=["dict", "tuple", "list", "tensor"],
)
def test_a_batch_adaptor_gives_the_inputs_of_both(inputs):
    teacher, student = mlps()
    teacher.eval(), student.eval()
    x = points()["x"]
    asked = []

    def adaptor(device, batch):
        asked.append(device)
        return inputs(batch["teacher"]), inputs(batch["student"])

    distiller = Distiller(teacher, student, [Match("first", "first")], batch_adaptor=adaptor)
    student.eval()
    losses = distiller({"teacher": x, "student": 2 * x})
    torch.testing.assert_close(losses.total, F.mse_loss(student.first(2 * x), teacher.first(x).detach()))
    assert set(asked) == {torch.device("cpu")}


def test_with_a_batch_adaptor_the_batch_may_be_anything():
    teacher, student = mlps()
    x = points()["x"]

    class Opaque:
        rows = x

    distiller = Distiller(
        teacher, student, [Match("first", "first")], batch_adaptor=lambda device, batch: (batch.rows, batch.rows)
    )
    distiller.plan(Opaque())
    assert torch.isfinite(distiller(Opaque()).total)


def test_masks_and_targets_come_from_the_batch_not_from_what_the_adaptor_made_of_it():
    teacher, student = mlps()
    batch = points()
    matches = [Match("first", "first", mask="valid"), Match(None, "", loss="cross_entropy", target="labels")]
    plain = Distiller(teacher, student, matches)(batch)
    adapted = Distiller(teacher, student, matches, batch_adaptor=lambda device, batch: ((batch["x"],), {"x": batch["x"]}))(
        batch
    )
    assert torch.equal(plain.total, adapted.total)


def test_a_batch_adaptor_as_in_the_older_librarys_readme():
    teacher, student = readers()

    def train_data_adaptor(device, batch_data):
        batch_data = tuple(t.to(device) for t in batch_data)
        batch_data_dict = {"input_ids": batch_data[0], "attention_mask": batch_data[1]}
        return batch_data_dict, batch_data_dict

    batch = tokens()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1", mask=1)], batch_adaptor=train_data_adaptor)
    named = Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask")])(batch)
    assert torch.equal(distiller((batch["input_ids"], batch["attention_mask"])).total, named.total)


def broken(device, batch):
    return batch["inptu_ids"], batch["input_ids"]


@pytest.mark.parametrize(
    ("adaptor", "words"),
    [
        (lambda device, batch: batch["input_ids"], ["pair", "Tensor"]),
        (lambda device, batch: None, ["pair", "NoneType"]),
        (lambda device, batch: (batch,), ["pair"]),
        (lambda device, batch: (batch, batch, batch), ["pair"]),
        (lambda device, batch: (batch, None), ["student", "NoneType"]),
        (lambda device, batch: (3, batch), ["teacher", "int"]),
        (lambda device, batch: ("input_ids", batch), ["teacher", "str"]),
        (lambda device, batch: ({"ids": batch["input_ids"]}, batch), ["ids", "input_ids"]),
        (lambda device, batch: ({**batch, "colour": 3}, batch), ["colour", "input_ids"]),
        (lambda device, batch: ((batch["input_ids"],) * 9, batch), ["9"]),
        (broken, ["batch_adaptor", "KeyError", "inptu_ids"]),
        (lambda batch: (batch, batch), ["batch_adaptor", "TypeError"]),
    ],
    ids=[
        *(
            "not a pair",
            "nothing",
            "one",
            "three",
            "none for the student",
            "a number",
            "a string",
            "wrong name",
            "unknown keyword",
        ),
        *("too many", "raises", "wrong signature"),
    ],
)
def test_a_batch_adaptor_that_goes_wrong_is_an_error_that_says_what_it_gave(adaptor, words):
    teacher, student = readers()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1")], batch_adaptor=adaptor)
    with pytest.raises(HookDistillError) as caught:
        distiller.plan(tokens())
    for word in words:
        assert word in str(caught.value)


def test_something_that_cannot_be_called_is_no_batch_adaptor():
    with pytest.raises(HookDistillError, match="batch_adaptor"):
        Distiller(*mlps(), [Match("first", "first")], batch_adaptor={"x": "x"}).plan(points())


# The functions behind it


def test_items_by_name_and_by_position():
    batch = Batch(*tokens().values())
    assert list(named_items(batch)) == ["input_ids", "attention_mask", "labels"]
    assert named_items((1, 2)) is None
    assert len(positional_items(batch)) == 3
    assert pick(batch, "labels") is batch.labels
    assert pick(batch, -1) is batch.labels
    assert pick(tokens(), 1) is not None
    assert has_item(batch, 2)
    assert not has_item(batch, 3)
    assert not has_item(batch, "label")
    assert not has_item(object(), "label")
    assert "'labels'" in contents(batch)
    assert "2 items" in contents((1, 2))


@pytest.mark.parametrize("key", ["nothing", 7, -8])
def test_a_missing_item_is_an_error_that_lists_what_there_is(key):
    with pytest.raises(BatchError) as caught:
        pick(tokens(), key)
    assert repr(key) in str(caught.value)
    assert "'attention_mask'" in str(caught.value)


def test_the_plan_line_says_what_comes_from_where():
    inputs = model_inputs(mlps()[0], points(), targets=(), masks=())
    assert str(inputs) == "x = batch['x']"
    assert str(given_inputs((1, 2))) == "argument 0 = batch[0], argument 1 = batch[1]"


def test_tensors_inside_containers_are_moved_and_the_rest_is_left():
    meta = torch.device("meta")
    moved = to_device({"a": [torch.ones(2), "text"], "b": (torch.ones(1), None), "c": 3}, meta)
    assert moved["a"][0].device == meta
    assert moved["b"][0].device == meta
    assert isinstance(moved["b"], tuple)
    assert (moved["a"][1], moved["b"][1], moved["c"]) == ("text", None, 3)
