"""Losses of one step: their values and gradients against torch alone, and what masks, targets and schedules do to them."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hookdistill import Capture, DistillationLoss, Distiller, Losses, Match, MatchError
from pairs import ConvNet, assert_same_gradients, gradients, mlps, pictures, points, readers, seeded, tokens


def pair(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw), torch.randn(*shape, generator=draw).requires_grad_()


def one(match, teacher, student, batch=None, **kwargs):
    """The losses of one match between two tensors, each the output of its model."""
    return DistillationLoss([match])({"": {"output": teacher}}, {"": {"output": student}}, batch, **kwargs)


# The total is the sum of weight times part, computed by hand


def test_total_and_gradients_equal_a_forward_written_by_hand():
    teacher, student = readers()
    batch = tokens()
    ids, labels, valid = batch["input_ids"], batch["labels"], batch["attention_mask"].bool()
    distiller = Distiller(
        teacher,
        student,
        [
            Match("layers.1", "layers.0", mask="attention_mask", weight=0.5, name="hidden"),
            Match("layers.3", "layers.1", loss="cosine", weight=2.0, name="direction"),
            Match(":logits", ":logits", loss="kl", temperature=2.0, mask="attention_mask", weight=3, name="soft"),
            Match(None, ":logits", loss="cross_entropy", target="labels", mask="attention_mask", name="hard"),
            Match("head", "head", loss="cross_entropy", name="soft hard"),
        ],
    )
    with torch.no_grad():
        t = teacher.spelled_out(ids)
    s = student.spelled_out(ids)
    soft = F.kl_div((s["logits"] / 2).log_softmax(-1), (t["logits"] / 2).softmax(-1), reduction="none").sum(-1)
    by_hand = {
        "hidden": F.mse_loss(s["layers.0"][valid], t["layers.1"][valid]),
        "direction": (1 - F.cosine_similarity(s["layers.1"], t["layers.3"], dim=-1)).mean(),
        "soft": 4 * soft[valid].mean(),
        "hard": F.cross_entropy(s["logits"][valid], labels[valid]),
        "soft hard": F.cross_entropy(s["logits"].flatten(0, 1), t["logits"].flatten(0, 1).softmax(-1)),
    }
    weights = {"hidden": 0.5, "direction": 2.0, "soft": 3, "hard": 1.0, "soft hard": 1.0}
    total = sum(weights[name] * value for name, value in by_hand.items())
    losses = distiller(batch)
    assert isinstance(losses, Losses)
    torch.testing.assert_close(losses.total, total)
    torch.testing.assert_close(losses.parts, {name: value.detach() for name, value in by_hand.items()})
    assert_same_gradients(gradients(student, losses.total), gradients(student, total))


def test_total_and_gradients_in_train_mode_with_batch_norm_and_dropout():
    teacher, student = mlps(dropout=0.5)
    batch = points()
    distiller = Distiller(teacher, student, [Match("first", "first"), Match("second", "second"), Match("", "", loss="kl")])
    torch.manual_seed(0)
    losses = distiller(batch)
    teacher.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        t = teacher.spelled_out(batch["x"])
    s = student.spelled_out(batch["x"])
    kl = F.kl_div(s["head"].log_softmax(-1), t["head"].softmax(-1), reduction="batchmean")
    total = F.mse_loss(s["first"], t["first"]) + F.mse_loss(s["second"], t["second"]) + kl
    torch.testing.assert_close(losses.total, total)
    assert_same_gradients(gradients(student, losses.total), gradients(student, total))


def test_parts_are_scalars_detached_unweighted_and_in_the_order_of_the_entries():
    teacher, student = mlps()
    entries = [Match("second", "second", weight=5.0, name="b"), Match("first", "first", weight=0.0, name="a")]
    losses = Distiller(teacher, student, entries)(points())
    assert list(losses.parts) == ["b", "a"]
    assert all(part.dim() == 0 and not part.requires_grad for part in losses.parts.values())
    torch.testing.assert_close(losses.total.detach(), 5 * losses.parts["b"])
    assert losses.parts["a"] > 0


def test_losses_are_a_pair():
    teacher, student = pair(2, 3)
    total, parts = one(Match("", "", name="x"), teacher, student)
    assert total.shape == ()
    assert torch.equal(parts["x"], total.detach())


def test_one_tensor_in_many_matches_is_captured_once():
    teacher, student = mlps()
    batch = points()
    one_match, many = (
        [Match("first", "first")],
        [Match("first", "first", loss=name) for name in ("mse", "l1", "cosine", "huber")],
    )
    counts = []
    for matches in (one_match, many):
        distiller = Distiller(teacher, student, matches)
        losses = distiller(batch)
        counts.append((len(teacher.first._forward_hooks), len(student.first._forward_hooks)))
        distiller.close()
    assert counts == [(1, 1), (1, 1)]
    assert len(losses.parts) == 4


def test_each_model_runs_once_a_step_and_the_teacher_only_as_far_as_needed():
    teacher, student = mlps()
    ran = []
    for name, module in (
        ("teacher", teacher),
        ("teacher.head", teacher.head),
        ("student", student),
        ("student.head", student.head),
    ):
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    distiller = Distiller(teacher, student, [Match("first", "first"), Match("second", "second")], example_batch=points())
    ran.clear()
    distiller(points())
    assert sorted(ran) == ["student", "student.head", "teacher"]


def test_a_teacher_that_nothing_is_compared_with_does_not_run():
    teacher, student = mlps()
    ran = []
    teacher.register_forward_pre_hook(lambda *_: ran.append("teacher"))
    distiller = Distiller(teacher, student, [Match(None, "", loss="cross_entropy", target="labels")])
    distiller.plan(points())
    distiller(points())
    assert ran == []


def test_inplace_ops_after_a_captured_layer_change_neither_value_nor_gradient():
    teacher, student = seeded(ConvNet, seed=1), seeded(ConvNet, seed=2)
    pixels = pictures()["pixels"]
    losses = Distiller(teacher, student, [Match("norm", "norm")])(pixels)
    teacher.eval()
    with torch.no_grad():
        theirs = teacher.norm(teacher.stem(pixels))
    expected = F.mse_loss(student.norm(student.stem(pixels)), theirs)
    torch.testing.assert_close(losses.total, expected)
    assert_same_gradients(gradients(student, losses.total), gradients(student, expected))


def test_no_gradient_reaches_the_teacher_even_if_it_wants_one():
    teacher, student = mlps()
    Distiller(teacher, student, [Match("second", "second")])(points()).total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_hand_written_teacher_tensor_that_requires_grad_gets_none():
    teacher, student = pair(2, 3)
    teacher.requires_grad_()
    one(Match("", ""), teacher, student).total.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_gradients_of_gradients():
    teacher, student = pair(4, 3)
    total = one(Match("", "", loss="kl"), teacher, student).total
    (first,) = torch.autograd.grad(total, student, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student)
    assert torch.isfinite(second).all()
    assert second.abs().sum() > 0


def test_half_precision_students_give_a_total_in_single():
    teacher, student = pair(4, 3)
    half = student.detach().bfloat16().requires_grad_()
    losses = one(Match("", ""), teacher.double(), half)
    assert losses.total.is_floating_point()
    losses.total.backward()
    assert half.grad.dtype is torch.bfloat16


# Masks


def test_a_token_mask_averages_mse_over_the_valid_elements():
    teacher, student = pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    losses = one(Match("", "", mask="valid"), teacher, student, {"valid": mask})
    torch.testing.assert_close(losses.total, F.mse_loss(student[mask.bool()], teacher[mask.bool()]))


def test_a_mask_over_examples_holds_for_all_their_positions():
    teacher, student = pair(3, 4, 5)
    mask = torch.tensor([1, 0, 1])
    losses = one(Match("", "", mask="valid"), teacher, student, {"valid": mask})
    torch.testing.assert_close(losses.total, F.mse_loss(student[mask.bool()], teacher[mask.bool()]))


def test_kl_with_a_mask_averages_over_the_valid_tokens():
    teacher, student = pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    losses = one(Match("", "", loss="kl", mask="valid"), teacher, student, {"valid": mask})
    s, t = student[mask.bool()], teacher[mask.bool()]
    torch.testing.assert_close(losses.total, F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))


def test_cross_entropy_counts_positions_that_are_valid_and_labelled():
    _, student = pair(2, 3, 4)
    labels, mask = torch.tensor([[0, -100, 2], [3, 1, -100]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    match = Match(None, "", loss="cross_entropy", target="labels", mask="valid")
    losses = one(match, student, student, {"labels": labels, "valid": mask})
    counted = mask.bool() & (labels != -100)
    torch.testing.assert_close(losses.total, F.cross_entropy(student[counted], labels[counted]))


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_on_attention_maps_query_and_key_must_be_valid(loss):
    draw = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 2, 3, 3, generator=draw).softmax(-1) for _ in range(2))
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    match = Match("a:attention", "b:attention", loss=loss, mask="valid")
    losses = DistillationLoss([match])({"a": {"attention": teacher}}, {"b": {"attention": student}}, {"valid": mask})
    entries = (mask[:, None, :, None] & mask[:, None, None, :]).expand(student.shape).bool()
    if loss == "mse":
        expected = F.mse_loss(student[entries], teacher[entries])
    else:
        queries = mask[:, None, :].expand(2, 2, 3).bool()
        expected = ((teacher * (teacher / student).log()) * entries).sum(-1)[queries].mean()
    torch.testing.assert_close(losses.total, expected)


def masks(batch):
    return batch["attention_mask"]


@pytest.mark.parametrize("mask", ["attention_mask", 1, -2, masks, lambda batch: batch["attention_mask"].bool()])
def test_a_mask_is_a_key_an_index_or_a_function_of_the_batch(mask):
    teacher, student = readers()
    batch = tokens()
    valid = batch["attention_mask"].bool()
    losses = Distiller(teacher, student, [Match("layers.3", "layers.1", mask=mask)])(batch)
    ids = batch["input_ids"]
    ours, theirs = student.spelled_out(ids)["layers.1"], teacher.spelled_out(ids)["layers.3"].detach()
    torch.testing.assert_close(losses.total, F.mse_loss(ours[valid], theirs[valid]))


def test_a_mask_is_an_index_of_a_batch_without_names():
    teacher, student = readers()
    batch = tokens()
    named = Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask")])(batch)
    numbered = Distiller(teacher, student, [Match("layers.3", "layers.1", mask=1)])(
        (batch["input_ids"], batch["attention_mask"])
    )
    assert torch.equal(named.total, numbered.total)


class Gated(nn.Module):
    """Makes a mask of its own inside."""

    def __init__(self):
        super().__init__()
        self.gate = Positive()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        self.gate(x)
        return self.layer(x)


class Positive(nn.Module):
    def forward(self, x):
        return (x.sum(-1) > 0).float()


@pytest.mark.parametrize("address", ["gate", "gate:output", "gate@0", "ga{te}"])
def test_a_mask_is_an_address_in_the_student(address):
    teacher, student = seeded(Gated, seed=1), seeded(Gated, seed=2)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    losses = Distiller(teacher, student, [Match("layer", "layer", mask=address)])(x)
    valid = x.sum(-1) > 0
    assert 0 < valid.sum() < 6
    torch.testing.assert_close(losses.total, F.mse_loss(student.layer(x)[valid], teacher.layer(x)[valid].detach()))


def test_an_item_of_the_batch_comes_before_an_address_of_the_same_name():
    teacher, student = seeded(Gated, seed=1), seeded(Gated, seed=2)
    batch = {"x": torch.randn(3, 4), "gate": torch.tensor([1, 0, 0])}
    losses = Distiller(teacher, student, [Match("layer", "layer", mask="gate")])(batch)
    x = batch["x"][:1]
    torch.testing.assert_close(losses.total, F.mse_loss(student.layer(x), teacher.layer(x).detach()))


def test_masked_positions_get_no_gradient():
    teacher, student = pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    for loss in ("mse", "l1", "huber", "cosine", "normalized_mse", "kl", "cross_entropy"):
        total = one(Match("", "", loss=loss, mask="valid"), teacher, student, {"valid": mask}).total
        (gradient,) = torch.autograd.grad(total, student)
        assert (gradient[mask == 0] == 0).all(), loss
        assert (gradient[mask == 1] != 0).any(), loss


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("loss", ["mse", "cosine", "kl", "cross_entropy"])
def test_nothing_of_a_masked_position_gets_through(loss, poison):
    teacher, student = pair(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"valid": mask}
    clean = one(Match("", "", loss=loss, mask="valid"), teacher, student, batch).total
    bad_teacher, bad_student = teacher.clone(), student.detach().clone()
    bad_teacher[mask == 0] = poison
    bad_student[mask == 0] = poison
    bad_student.requires_grad_()
    total = one(Match("", "", loss=loss, mask="valid"), bad_teacher, bad_student, batch).total
    assert torch.equal(total, clean)
    (gradient,) = torch.autograd.grad(total, bad_student)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", ["mse", "cosine", "kl", "cross_entropy"])
def test_a_mask_with_nothing_valid_gives_zero_attached_to_the_graph(loss):
    teacher, student = pair(2, 3, 5)
    losses = one(Match("", "", loss=loss, mask="valid"), teacher, student, {"valid": torch.zeros(2, 3)})
    assert losses.total == 0
    losses.total.backward()
    assert (student.grad == 0).all()


def test_labels_that_are_all_ignored_give_zero_attached_to_the_graph():
    _, student = pair(2, 3, 5)
    match = Match(None, "", loss="cross_entropy", target="labels")
    losses = one(match, student, student, {"labels": torch.full((2, 3), -100)})
    assert losses.total == 0
    losses.total.backward()
    assert (student.grad == 0).all()


def test_a_masked_match_goes_through_its_adapter():
    teacher, student = readers(12, 8)
    batch = tokens()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask")], example_batch=batch)
    (adapter,) = distiller.adapters.values()
    valid, ids = batch["attention_mask"].bool(), batch["input_ids"]
    ours = student.spelled_out(ids)["layers.1"] @ adapter.project.weight.T
    expected = F.mse_loss(ours[valid], teacher.spelled_out(ids)["layers.3"].detach()[valid])
    torch.testing.assert_close(distiller(batch).total, expected)


# Targets


def labels_of(batch):
    return batch["labels"]


@pytest.mark.parametrize("target", ["labels", 1, -2, labels_of])
def test_a_target_is_a_key_an_index_or_a_function_of_the_batch(target):
    teacher, student = mlps()
    batch = points()
    losses = Distiller(teacher, student.eval(), [Match(None, "", loss="cross_entropy", target=target)])(batch)
    torch.testing.assert_close(losses.total, F.cross_entropy(student(batch["x"]), batch["labels"]))


def test_a_target_is_an_index_of_a_batch_without_names():
    teacher, student = mlps()
    batch = points()
    match = Match(None, "", loss="cross_entropy", target=1)
    losses = Distiller(teacher, student.eval(), [match])((batch["x"], batch["labels"]))
    torch.testing.assert_close(losses.total, F.cross_entropy(student(batch["x"]), batch["labels"]))


def test_a_target_is_an_address_in_the_student_which_gets_no_gradient_as_target():
    teacher, student = readers()
    batch = tokens()
    losses = Distiller(teacher, student, [Match(None, "layers.0", target="layers.1")])(batch)
    s = student.spelled_out(batch["input_ids"])
    expected = F.mse_loss(s["layers.0"], s["layers.1"].detach())
    torch.testing.assert_close(losses.total, expected)
    assert_same_gradients(gradients(student, losses.total), gradients(student, expected))


def test_an_item_used_only_as_a_target_does_not_reach_the_models():
    teacher, student = readers()
    match = Match(None, ":logits", loss="cross_entropy", target="labels")
    losses = Distiller(teacher, student, [Match(":logits", ":logits"), match])(tokens())
    assert torch.isfinite(losses.total)
    assert not teacher.got_labels
    assert not student.got_labels


def test_an_input_of_the_model_may_be_a_target_too():
    teacher, student = readers()
    match = Match(None, ":logits", loss="cross_entropy", target=lambda batch: batch["input_ids"] % 5)
    by_key = Match(None, "embed", loss=lambda s, t: s[..., 0].sub(t).abs().mean(), target="input_ids")
    losses = Distiller(teacher, student, [match, by_key])(tokens())
    assert torch.isfinite(losses.total)


# Schedules


def test_schedules_are_asked_with_the_number_of_training_forwards():
    teacher, student = mlps()
    asked = {"weight": [], "temperature": []}

    def weight(step):
        asked["weight"].append(step)
        return 1.0 + step

    def temperature(step):
        asked["temperature"].append(step)
        return 1.0 + step

    match = Match("", "", loss="kl", weight=weight, temperature=temperature, name="soft")
    distiller = Distiller(teacher, student.eval(), [match], example_batch=points())
    distiller.train()
    student.eval()
    for steps in asked.values():
        steps.clear()
    s, t = student(points()["x"]).detach(), teacher.eval()(points()["x"]).detach()
    for step in range(3):
        losses = distiller(points())
        heat = 1.0 + step
        expected = heat**2 * F.kl_div((s / heat).log_softmax(-1), (t / heat).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(losses.parts["soft"], expected)
        torch.testing.assert_close(losses.total.detach(), (1.0 + step) * expected)
    assert asked == {"weight": [0, 1, 2], "temperature": [0, 1, 2]}


def test_evaluation_and_plans_do_not_advance_the_step_and_a_step_may_be_given():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, [Match("first", "first", weight=lambda step: 1.0 + step, name="a")])
    batch = points()

    def factor(losses):
        return round(float(losses.total.detach() / losses.parts["a"]), 4)

    assert factor(distiller(batch)) == 1.0
    distiller.plan(batch)
    with torch.no_grad():
        assert factor(distiller(batch)) == 2.0
        assert factor(distiller(batch)) == 2.0
    distiller.eval()
    assert factor(distiller(batch)) == 2.0
    distiller.train()
    assert factor(distiller(batch, step=10)) == 11.0
    assert factor(distiller(batch)) == 2.0
    assert factor(distiller(batch)) == 3.0


# What trains nothing


@pytest.mark.parametrize(
    "freeze",
    [
        lambda student: student.requires_grad_(False),
        lambda student: student.first.requires_grad_(False),
        lambda student: student.first.register_forward_hook(lambda module, args, output: output.detach()),
    ],
    ids=["all frozen", "frozen below", "detached by a hook"],
)
def test_a_student_tensor_without_gradient_is_an_error_that_names_it(freeze):
    teacher, student = mlps()
    freeze(student)
    distiller = Distiller(teacher, student, [Match("first", "first", name="hidden")])
    with pytest.raises(MatchError) as caught:
        distiller(points())
    for word in ("hidden", "'first'", "gradient", "frozen"):
        assert word in str(caught.value)


def test_a_trainable_adapter_does_not_hide_that_the_student_trains_nothing():
    teacher, student = mlps(12, 8)
    student.requires_grad_(False)
    distiller = Distiller(teacher, student, [Match("second", "second")], example_batch=points())
    with pytest.raises(MatchError, match="gradient"):
        distiller(points())


def test_a_frozen_student_can_be_evaluated():
    teacher, student = mlps()
    student.requires_grad_(False)
    distiller = Distiller(teacher, student, [Match("first", "first")])
    with torch.no_grad():
        assert torch.isfinite(distiller(points()).total)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda s, t: (s - t).square(), ["[3, 5]", "scalar"]),
        (lambda s, t: (s - t).square().mean().reshape(1), ["[1]", "scalar"]),
        (lambda s, t: float((s - t).square().mean()), ["float", "scalar"]),
        (lambda s, t: None, ["NoneType", "scalar"]),
        (lambda s, t: ((s - t).square().mean(), {}), ["tuple", "scalar"]),
        (lambda s, t: (s - t).square().mean().detach(), ["gradient"]),
        (lambda s, t: torch.tensor(1.0), ["gradient"]),
        (lambda s, t: 1 / 0, ["ZeroDivisionError", "[3, 5]"]),
        (lambda s, t: s @ t, ["RuntimeError", "[3, 5]"]),
    ],
    ids=[
        "not reduced",
        "one element",
        "number",
        "none",
        "tuple",
        "detached",
        "constant",
        "raises",
        "wrong shapes",
    ],
)
def test_a_loss_of_the_users_that_gives_no_scalar_to_train_is_an_error(loss, words):
    teacher, student = pair(3, 5)
    with pytest.raises(MatchError) as caught:
        one(Match("", "", loss=loss, name="mine"), teacher, student)
    for word in ["mine", *words]:
        assert word in str(caught.value)


def test_a_loss_that_needs_more_is_an_error_when_the_match_is_made():
    with pytest.raises(MatchError, match=r"needs 'scale'; give it as an argument or by inputs="):
        Match("", "", loss=lambda s, t, scale: s.sum() * scale)


def test_a_loss_that_returns_a_double_or_a_half_is_summed_with_the_others():
    teacher, student = pair(3, 5)
    entries = [
        Match("", "", name="a"),
        Match("", "", name="b", loss=lambda s, t: (s - t).double().square().mean()),
        Match("", "", name="c", loss=lambda s, t: (s - t).bfloat16().square().mean()),
    ]
    losses = DistillationLoss(entries)({"": {"output": teacher}}, {"": {"output": student}})
    assert torch.isfinite(losses.total)
    losses.total.backward()


# The loss stage alone


def test_hand_written_dictionaries_and_captures_mix():
    teacher, student = mlps()
    batch = points()
    matches = [Match("bert_layer1:hidden_states", "first"), Match("final:logits", "", loss="kl")]
    t = teacher.eval().spelled_out(batch["x"])
    theirs = {"bert_layer1": {"hidden_states": t["first"]}, "final": {"logits": t["head"]}}
    with Capture(student.eval(), ["first", ""]) as ours:
        student(batch["x"])
    losses = DistillationLoss(matches)(theirs, ours, batch)
    s = student.spelled_out(batch["x"])
    kl = F.kl_div(s["head"].log_softmax(-1), t["head"].softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses.total, F.mse_loss(s["first"], t["first"]) + kl)


def test_a_batch_is_only_needed_where_something_is_looked_up_in_it():
    teacher, student = pair(2, 3)
    assert torch.isfinite(one(Match("", ""), teacher, student).total)
    with pytest.raises(MatchError, match="no batch"):
        one(Match("", "", mask="valid"), teacher, student)


def test_several_teachers_by_name_in_dictionaries():
    teacher, student = pair(2, 3)
    other, _ = pair(2, 3, seed=5)
    entries = [Match("", "", teacher_model="a"), Match("", "", teacher_model="b", weight=2.0)]
    theirs = {"a": {"": {"output": teacher}}, "b": {"": {"output": other}}}
    losses = DistillationLoss(entries)(theirs, {"": {"output": student}})
    torch.testing.assert_close(losses.total, F.mse_loss(student, teacher) + 2 * F.mse_loss(student, other))
    assert list(losses.parts) == [":output <- a/:output: mse", ":output <- b/:output: mse"]


def test_schedules_are_asked_with_the_step_that_is_given():
    teacher, student = pair(2, 3)
    losses = one(Match("", "", weight=lambda step: step), teacher, student, step=3)
    torch.testing.assert_close(losses.total, 3 * F.mse_loss(student, teacher))


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_implementations_agree(impl):
    teacher, student = pair(2, 3)
    loss = DistillationLoss([Match("", "", loss="kl")], impl=impl)
    value = loss({"": {"output": teacher}}, {"": {"output": student}}).total
    assert torch.equal(value, one(Match("", "", loss="kl"), teacher, student).total)


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({"lyer": {"output": torch.ones(2)}}, {"layer": {"output": torch.ones(2)}}, ["teacher", "'layer'", "'lyer'"]),
        ({"layer": {"output": torch.ones(2)}}, {"other": {"output": torch.ones(2)}}, ["student", "'layer'", "'other'"]),
        ({"layer": {"hidden": torch.ones(2)}}, {"layer": {"output": torch.ones(2)}}, ["teacher", "'output'", "'hidden'"]),
        ({"layer": {"output": [1.0]}}, {"layer": {"output": torch.ones(2)}}, ["teacher", "list"]),
        ({"layer": {"output": torch.ones(2)}}, {"layer": {"output": None}}, ["student", "NoneType"]),
        ({"layer": torch.ones(2)}, {"layer": {"output": torch.ones(2)}}, ["teacher", "layer"]),
        (None, {"layer": {"output": torch.ones(2)}}, ["teacher"]),
        ({}, {"layer": {"output": torch.ones(2)}}, ["teacher", "'layer'", "none"]),
    ],
    ids=["teacher layer", "student layer", "output name", "list", "none", "not nested", "no captures", "empty"],
)
def test_wrong_dictionaries_are_errors_that_list_what_there_is(theirs, ours, words):
    with pytest.raises(MatchError) as caught:
        DistillationLoss([Match("layer", "layer", name="hidden")])(theirs, ours)
    for word in ["hidden", *words]:
        assert word in str(caught.value)


def test_a_missing_teacher_in_the_dictionaries_is_an_error_that_lists_them():
    teacher, student = pair(2, 3)
    loss = DistillationLoss([Match("", "", teacher_model="c", name="hidden")])
    with pytest.raises(MatchError) as caught:
        loss({"a": {"": {"output": teacher}}}, {"": {"output": student}})
    for word in ("hidden", "'c'", "'a'"):
        assert word in str(caught.value)


def test_a_wildcard_without_models_is_an_error_that_says_so():
    loss_or_error = pytest.raises(MatchError, match=r"layers\.\*")
    with loss_or_error:
        DistillationLoss([Match("layers.*", "layers.*")])(
            {"layers.0": {"output": torch.ones(2)}}, {"layers.0": {"output": torch.ones(2)}}
        )
