"""The config items of the older library: what they meant there they mean here."""

import pytest
import torch
from torch.nn import functional as F

from hookdistill import DistillationLoss, Distiller, Match, MatchError
from pairs import mlps, points, readers, tokens


def soft(teacher="bert_layer4", student="bert_layer1", output="hidden_states", loss="mse", **more):
    return {
        "type": "ts_distill",
        "teacher_layer_name": teacher,
        "teacher_layer_output_name": output,
        "student_layer_name": student,
        "student_layer_output_name": output,
        "loss": {"loss_function": loss, "args": {}},
        "weight": 1.0,
        **more,
    }


def hard(student="head", output="output", loss="cross_entropy", **more):
    return {
        "type": "hard_distill",
        "student_layer_name": student,
        "student_layer_output_name": output,
        "loss": {"loss_function": loss, "args": {}},
        "weight": 1.0,
        **more,
    }


def captures(tensor, *, layer="bert_layer1", output="hidden_states"):
    return {layer: {output: tensor}}


@pytest.fixture
def hidden():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, generator=draw), torch.randn(2, 3, 4, generator=draw).requires_grad_()


def test_the_readme_config_of_the_older_library_runs_on_its_dictionaries():
    """``{layer: {output: tensor}}`` made by an output adaptor, as its README does, attention maps included."""
    config = [soft("embedding_layer", "embedding_layer", "embedding")]
    for ours, theirs in ((1, 4), (2, 8), (3, 12)):
        config += [soft(f"bert_layer{theirs}", f"bert_layer{ours}", output) for output in ("hidden_states", "attention")]
    draw = torch.Generator().manual_seed(0)

    def adapted(layers):
        found = {"embedding_layer": {"embedding": torch.randn(2, 5, 4, generator=draw)}}
        for layer in range(1, layers + 1):
            maps = torch.randn(2, 2, 5, 5, generator=draw).softmax(-1)
            found[f"bert_layer{layer}"] = {"hidden_states": torch.randn(2, 5, 4, generator=draw), "attention": maps}
        return found

    teacher, student = adapted(12), adapted(3)
    for layer in student.values():
        for tensor in layer.values():
            tensor.requires_grad_()
    found = DistillationLoss(config)(teacher, student)
    expected = sum(
        F.mse_loss(
            student[item["student_layer_name"]][item["student_layer_output_name"]],
            teacher[item["teacher_layer_name"]][item["teacher_layer_output_name"]],
        )
        for item in config
    )
    torch.testing.assert_close(found.total, expected)
    assert len(found.parts) == 7


@pytest.mark.parametrize("name", ["cos", "cosine"])
def test_cos_is_the_cosine_loss(name, hidden):
    teacher, student = hidden
    found = DistillationLoss([soft(loss=name)])(captures(teacher, layer="bert_layer4"), captures(student))
    torch.testing.assert_close(found.total, (1 - F.cosine_similarity(student, teacher, dim=-1)).mean())


def test_weights_and_arguments_arrive(hidden):
    teacher, student = hidden
    item = soft(weight=0.25, loss="kl")
    item["loss"]["args"] = {"temperature": 2.0}
    found = DistillationLoss([item])(captures(teacher, layer="bert_layer4"), captures(student))
    expected = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1).mean()
    torch.testing.assert_close(found.total, 0.25 * expected)
    torch.testing.assert_close(next(iter(found.parts.values())), expected)


def test_weight_and_args_may_be_left_out(hidden):
    teacher, student = hidden
    item = soft()
    del item["weight"], item["loss"]["args"]
    found = DistillationLoss([item])(captures(teacher, layer="bert_layer4"), captures(student))
    torch.testing.assert_close(found.total, F.mse_loss(student, teacher))


def test_cross_entropy_between_teacher_and_student_is_soft(hidden):
    teacher, student = hidden
    found = DistillationLoss([soft(loss="cross_entropy")])(captures(teacher, layer="bert_layer4"), captures(student))
    expected = F.cross_entropy(student.flatten(0, 1), teacher.flatten(0, 1).softmax(-1))
    torch.testing.assert_close(found.total, expected)


def test_a_mask_may_stand_in_an_item(hidden):
    teacher, student = hidden
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = DistillationLoss([soft(mask="attention_mask")])
    found = loss(captures(teacher, layer="bert_layer4"), captures(student), {"attention_mask": mask})
    torch.testing.assert_close(found.total, F.mse_loss(student[mask.bool()], teacher[mask.bool()]))


def test_mse_with_mask_takes_the_attention_mask_of_the_batch(hidden):
    teacher, student = hidden
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = DistillationLoss([soft(loss="mse_with_mask")])
    found = loss(captures(teacher, layer="bert_layer4"), captures(student), {"attention_mask": mask})
    torch.testing.assert_close(found.total, F.mse_loss(student[mask.bool()], teacher[mask.bool()]))


def test_attention_mse_with_mask_counts_query_and_key():
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 2, 3, 3, generator=draw).softmax(-1) for _ in range(2))
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = DistillationLoss([soft(output="attention", loss="attention_mse_with_mask")])
    maps = captures(teacher, layer="bert_layer4", output="attention"), captures(student, output="attention")
    found = loss(*maps, {"attention_mask": mask})
    valid = (mask[:, None, :, None] * mask[:, None, None, :]).expand(student.shape).bool()
    torch.testing.assert_close(found.total, F.mse_loss(student[valid], teacher[valid]))


def test_layers_are_addresses_when_models_are_given():
    teacher, student = readers()
    batch = tokens()
    item = soft("layers.3", "layers.1", "output")
    found = Distiller(teacher, student, [item])(batch)
    ids = batch["input_ids"]
    expected = F.mse_loss(student.spelled_out(ids)["layers.1"], teacher.spelled_out(ids)["layers.3"].detach())
    torch.testing.assert_close(found.total, expected)


def test_the_ground_truth_is_the_item_labels_of_the_batch():
    teacher, student = mlps()
    batch = points()
    distiller = Distiller(teacher, student.eval(), [hard(weight=0.5)])
    expected = 0.5 * F.cross_entropy(student(batch["x"]), batch["labels"])
    torch.testing.assert_close(distiller(batch).total, expected)


def test_the_ground_truth_may_have_another_name():
    teacher, student = mlps()
    batch = points()
    batch = {"x": batch["x"], "classes": batch["labels"]}
    distiller = Distiller(teacher, student.eval(), [hard(target="classes")])
    torch.testing.assert_close(distiller(batch).total, F.cross_entropy(student(batch["x"]), batch["classes"]))


def test_a_hard_item_with_soft_targets():
    teacher, student = mlps()
    batch = points()
    batch["labels"] = torch.randn(5, 4).softmax(-1)
    distiller = Distiller(teacher, student.eval(), [hard()])
    torch.testing.assert_close(distiller(batch).total, F.cross_entropy(student(batch["x"]), batch["labels"]))


def test_a_hard_item_with_mse_is_regression():
    teacher, student = mlps()
    batch = points()
    batch["labels"] = torch.randn(5, 4)
    distiller = Distiller(teacher, student.eval(), [hard(loss="mse")])
    torch.testing.assert_close(distiller(batch).total, F.mse_loss(student(batch["x"]), batch["labels"]))


def test_teacher_keys_in_a_hard_item_are_ignored_as_they_were():
    item = hard(teacher_layer_name="head", teacher_layer_output_name="output")
    teacher, student = mlps()
    assert torch.isfinite(Distiller(teacher, student, [item])(points()).total)


def test_a_callable_stands_where_a_name_does(hidden):
    teacher, student = hidden
    item = soft(loss=lambda s, t: (s - t).abs().sum())
    found = DistillationLoss([item])(captures(teacher, layer="bert_layer4"), captures(student))
    torch.testing.assert_close(found.total, (student - teacher).abs().sum())


def test_an_item_equals_the_match_it_stands_for():
    teacher, student = readers()
    items = [soft("layers.3", "layers.1", "output", "cos", weight=2.0, mask="attention_mask"), hard(target="labels")]
    matches = [
        Match("layers.3", "layers.1", loss="cosine", weight=2.0, mask="attention_mask"),
        Match(None, "head", loss="cross_entropy", target="labels"),
    ]
    old, new = (Distiller(teacher, student, entries)(tokens()) for entries in (items, matches))
    assert torch.equal(old.total, new.total)
    assert old.parts.keys() == new.parts.keys()


def without(item, key):
    return {name: value for name, value in item.items() if name != key}


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (soft(type="ts_destill"), ["ts_destill", "ts_distill"]),
        (without(soft(), "type"), ["type", "ts_distill", "hard_distill"]),
        (soft(type=None), ["type"]),
        (soft(type=["ts_distill"]), ["type"]),
        (without(soft(), "teacher_layer_name"), ["teacher_layer_name"]),
        (without(soft(), "student_layer_output_name"), ["student_layer_output_name"]),
        (without(soft(), "loss"), ["loss"]),
        (without(hard(), "student_layer_name"), ["student_layer_name"]),
        ({**soft(), "student_layer_nam": "x"}, ["student_layer_nam", "student_layer_name"]),
        ({**soft(), "wieght": 2.0}, ["wieght", "weight"]),
        ({**soft(), 3: 2.0}, ["3"]),
        (soft(loss="mze"), ["mze", "mse"]),
        ({**soft(), "loss": "mse"}, ["loss_function"]),
        ({**soft(), "loss": {"function": "mse"}}, ["loss_function"]),
        ({**soft(), "loss": {"loss_function": "mse", "arg": {}}}, ["args"]),
        ({**soft(), "loss": {"loss_function": "mse", "args": [1]}}, ["args"]),
        ({**soft(), "loss": {"loss_function": "mse", "args": {"gamma": 1}}}, ["gamma", "mse"]),
        ({**soft(), "loss": {"loss_function": None, "args": {}}}, ["loss"]),
        ({**soft(), "loss": {"loss_function": "kl", "args": {"weight": 2.0}}}, ["weight"]),
        ({**soft(), "loss": {"loss_function": "kl", "args": {"student": 2.0}}}, ["student"]),
        ({**soft(), "loss": {"loss_function": "kl", "args": {1: 2.0}}}, ["1"]),
        (soft(weight="1.0"), ["weight", "1.0"]),
        (soft(weight=None), ["weight"]),
        (soft(student="layers[0]"), ["layers[0]"]),
        (soft(output=""), ["bert_layer"]),
    ],
    ids=lambda value: None if isinstance(value, dict) else "-".join(value)[:40],
)
def test_a_wrong_item_is_an_error_that_names_it(item, words):
    with pytest.raises(MatchError) as caught:
        DistillationLoss([soft(), item])
    message = str(caught.value)
    assert "entry 1" in message
    for word in words:
        assert word in message
