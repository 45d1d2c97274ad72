"""Adapters: sized by the dry forward, trained with the student, never exported with it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hookdistill import DistillationLoss, Distiller, Match, MatchError
from hookdistill.adapters import fit_adapter
from pairs import ConvNet, assert_same_gradients, hooks, mlps, pictures, points, readers, same, seeded, state, tokens, train


def convs(teacher_channels, student_channels, *, teacher_stride=1, student_stride=1):
    teacher = seeded(ConvNet, teacher_channels, stride=teacher_stride, seed=1)
    return teacher, seeded(ConvNet, student_channels, stride=student_stride, seed=2)


class Sequences(nn.Module):
    """``[batch, features, time]`` in, ``[batch, tokens, width]`` out of ``layer``; ``stride`` decides the number of tokens."""

    def __init__(self, width=8, stride=1):
        super().__init__()
        self.shorten = nn.AvgPool1d(stride) if stride > 1 else nn.Identity()
        self.layer = nn.Linear(6, width)

    def forward(self, x):
        return self.layer(self.shorten(x).movedim(1, 2))


def test_equal_shapes_need_no_adapter():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1")], example_batch=tokens())
    assert len(distiller.adapters) == 0
    assert list(distiller.loss.parameters()) == []


def test_different_widths_of_tokens_get_a_linear_map():
    teacher, student = readers(12, 8)
    batch = tokens()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1")], example_batch=batch)
    (weight,) = distiller.adapters.parameters()
    assert weight.shape == (12, 8)
    assert weight.requires_grad
    losses = distiller(batch)
    s = student.spelled_out(batch["input_ids"])["layers.1"]
    t = teacher.spelled_out(batch["input_ids"])["layers.3"].detach()
    expected = F.mse_loss(s @ weight.T, t)
    torch.testing.assert_close(losses.total, expected)
    everything = list(distiller.parameters())
    ours, theirs = (list(torch.autograd.grad(value, everything, allow_unused=True)) for value in (losses.total, expected))
    assert_same_gradients(ours, theirs)
    assert (torch.autograd.grad(distiller(batch).total, weight)[0] != 0).any()


def test_different_widths_of_vectors_get_a_linear_map():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second")], example_batch=points())
    assert [tuple(parameter.shape) for parameter in distiller.adapters.parameters()] == [(12, 8)]


def test_different_channels_get_a_one_by_one_convolution():
    teacher, student = convs(6, 4)
    distiller = Distiller(teacher, student, [Match("stem", "stem")], example_batch=pictures())
    (weight,) = distiller.adapters.parameters()
    assert weight.shape == (6, 4, 1, 1)
    pixels = pictures()["pixels"]
    expected = F.mse_loss(F.conv2d(student.stem(pixels), weight), teacher.stem(pixels).detach())
    torch.testing.assert_close(distiller(pictures()).total, expected)


def test_different_grids_are_interpolated_without_parameters():
    teacher, student = convs(4, 4, student_stride=2)
    distiller = Distiller(teacher, student, [Match("stem", "stem")])
    pixels = pictures()["pixels"]
    ours = F.interpolate(student.stem(pixels), size=(8, 8), mode="bilinear", align_corners=False)
    expected = F.mse_loss(ours, teacher.stem(pixels).detach())
    torch.testing.assert_close(distiller(pictures()).total, expected)
    distiller.plan(pictures())
    assert list(distiller.adapters.parameters()) == []
    torch.testing.assert_close(distiller(pictures()).total, expected)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 2), (2, 1)])
def test_channels_and_grids_together(theirs, ours):
    teacher, student = convs(6, 4, teacher_stride=theirs, student_stride=ours)
    distiller = Distiller(teacher, student, [Match("stem", "stem", adapter="auto")], example_batch=pictures())
    (weight,) = distiller.adapters.parameters()
    pixels = pictures()["pixels"]
    t = teacher.stem(pixels).detach()
    s = F.interpolate(F.conv2d(student.stem(pixels), weight), size=t.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(distiller(pictures()).total, F.mse_loss(s, t))


def test_different_numbers_of_tokens_are_interpolated_along_the_tokens():
    teacher, student = seeded(Sequences, 8, 1, seed=1), seeded(Sequences, 8, 2, seed=2)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    losses = Distiller(teacher, student, [Match("layer", "layer")])(x)
    s = F.interpolate(student(x).movedim(-1, 1), size=8, mode="linear", align_corners=False).movedim(1, -1)
    torch.testing.assert_close(losses.total, F.mse_loss(s, teacher(x).detach()))


def test_an_adapter_follows_grids_that_change_from_batch_to_batch():
    teacher, student = convs(6, 4, student_stride=2)
    distiller = Distiller(teacher, student, [Match("stem", "stem")], example_batch=pictures())
    for size in (8, 12, 16):
        assert torch.isfinite(distiller(torch.randn(2, 1, size, size)).total)


def test_logits_and_labels_are_never_adapted():
    teacher, student = seeded(ConvNet, classes=5, seed=1), seeded(ConvNet, classes=3, seed=2)
    for loss in ("kl", "soft_cross_entropy", "cross_entropy"):
        distiller = Distiller(teacher, student, [Match("", "", loss=loss)])
        with pytest.raises(MatchError, match=r"5"):
            distiller.plan(pictures())
        assert len(distiller.adapters) == 0


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_named_map_is_made_even_where_widths_agree(kind):
    teacher, student = convs(4, 4) if kind == "conv" else readers()
    batch = pictures() if kind == "conv" else tokens()
    layers = ("stem", "stem") if kind == "conv" else ("layers.3", "layers.1")
    distiller = Distiller(teacher, student, [Match(*layers, adapter=kind)], example_batch=batch)
    (weight,) = distiller.adapters.parameters()
    assert weight.shape[:2] == ((4, 4) if kind == "conv" else (8, 8))


def test_resize_alone_makes_no_parameters():
    teacher, student = convs(4, 4, student_stride=2)
    distiller = Distiller(teacher, student, [Match("stem", "stem", adapter="resize")], example_batch=pictures())
    assert list(distiller.adapters.parameters()) == []
    assert torch.isfinite(distiller(pictures()).total)


@pytest.mark.parametrize(
    ("adapter", "pair", "layer", "words"),
    [
        ("none", lambda: convs(6, 4), "stem", ["[3, 6, 8, 8]", "[3, 4, 8, 8]", "none"]),
        ("none", lambda: convs(4, 4, student_stride=2), "stem", ["[3, 4, 4, 4]", "none"]),
        ("linear", lambda: convs(6, 4), "stem", ["linear", "conv"]),
        ("linear", lambda: convs(4, 4, student_stride=2), "stem", ["linear", "auto"]),
        ("conv", lambda: convs(4, 4, student_stride=2), "stem", ["conv", "auto"]),
        ("resize", lambda: convs(6, 4), "stem", ["6", "4", "resize"]),
        ("conv", lambda: convs(6, 4), "head", ["conv"]),
    ],
    ids=["none, width", "none, grid", "linear on channels", "linear, grid", "conv, grid", "resize, width", "conv on vectors"],
)
def test_shapes_that_the_named_adapter_does_not_bridge_are_an_error(adapter, pair, layer, words):
    teacher, student = pair()
    distiller = Distiller(teacher, student, [Match(layer, layer, adapter=adapter, name="hidden")])
    with pytest.raises(MatchError) as caught:
        distiller.plan(pictures())
    for word in ["hidden", *words]:
        assert word in str(caught.value)
    assert len(distiller.adapters) == 0


def test_tensors_of_different_rank_are_an_error_that_shows_both():
    teacher, student = convs(4, 4)
    with pytest.raises(MatchError) as caught:
        Distiller(teacher, student, [Match("stem", "head")]).plan(pictures())
    assert "[3, 4, 8, 8]" in str(caught.value)
    assert "[3, 3]" in str(caught.value)


# Without a plan


def test_a_first_batch_that_needs_a_trainable_adapter_is_an_error_and_makes_none():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second", name="hidden")])
    with pytest.raises(MatchError) as caught:
        distiller(points())
    for word in ("hidden", "[5, 8]", "[5, 12]", "distiller.plan(batch)", "example_batch"):
        assert word in str(caught.value)
    assert len(distiller.adapters) == 0
    assert hooks(teacher, student) == 0
    distiller.plan(points())
    assert torch.isfinite(distiller(points()).total)


def test_the_loss_stage_alone_makes_no_adapter_either():
    loss = DistillationLoss([Match("a", "b")])
    with pytest.raises(MatchError, match="adapter"):
        loss({"a": {"output": torch.ones(2, 5)}}, {"b": {"output": torch.ones(2, 3, requires_grad=True)}})
    assert len(loss.adapters) == 0


def test_a_plan_that_fails_leaves_no_adapter():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second"), Match("second", "second", adapter="none")])
    with pytest.raises(MatchError):
        distiller.plan(points())
    assert len(distiller.adapters) == 0


def test_a_second_plan_keeps_the_adapters():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second")], example_batch=points())
    before = [id(parameter) for parameter in distiller.parameters()]
    distiller.plan(points(batch=7))
    assert [id(parameter) for parameter in distiller.parameters()] == before


def test_adapters_depend_on_the_seed_and_differ_from_each_other():
    def made():
        torch.manual_seed(0)
        matches = [Match("second", "second"), Match("first", "first")]
        return Distiller(*mlps(12, 8), matches, example_batch=points())

    one, two = state(made().adapters), state(made().adapters)
    assert same(one, two)
    assert not torch.equal(one[0], one[1])


# Training and saving


def test_adapters_train_with_the_student_and_stay_out_of_it():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second")], example_batch=points())
    (weight,) = distiller.adapters.parameters()
    assert any(parameter is weight for parameter in distiller.parameters())
    assert not any(parameter is weight for parameter in student.parameters())
    before = weight.detach().clone()
    totals = list(train(distiller, points(), steps=5))
    assert totals[-1] < totals[0]
    assert not torch.equal(before, weight)
    assert student.state_dict().keys() == seeded(type(student)).state_dict().keys()


def test_adapters_are_in_the_state_dict_and_load_after_a_plan():
    def made(seed):
        torch.manual_seed(seed)
        return Distiller(*mlps(12, 8), [Match("second", "second")], example_batch=points())

    saved, fresh = made(0), made(1)
    assert len(saved.state_dict()) == len(saved.student.state_dict()) + 1
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh.eval()(points()).total, saved.eval()(points()).total)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_have_the_dtype_of_the_student(dtype):
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student.to(dtype), [Match("second", "second")])
    teacher.to(dtype)
    batch = {"x": points()["x"].to(dtype)}
    distiller.plan(batch)
    assert [parameter.dtype for parameter in distiller.adapters.parameters()] == [dtype]
    distiller(batch).total.backward()


def test_adapters_of_many_layers_each_have_their_own():
    teacher, student = readers(12, 8)
    distiller = Distiller(teacher, student, [Match("layers.*", "layers.*")], example_batch=tokens())
    assert len(distiller.adapters) == 2
    assert len({id(parameter) for parameter in distiller.adapters.parameters()}) == 2


@pytest.mark.parametrize("name", ["a.b", "keys", "clear", "train", "weights 2 <- 1", "x/y", "x.y"])
def test_any_name_of_a_match_can_own_an_adapter(name):
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second", name=name)], example_batch=points())
    assert len(distiller.adapters) == 1
    assert list(distiller(points()).parts) == [name]


def test_names_that_differ_only_in_dots_own_two_adapters():
    teacher, student = mlps(12, 8)
    entries = [Match("second", "second", name="x.y"), Match("first", "first", name="x/y")]
    distiller = Distiller(teacher, student, entries, example_batch=points())
    assert len(distiller.adapters) == 2


# The user's own


def test_a_module_of_the_user_is_called_with_the_student_tensor_and_trained():
    teacher, student = mlps(12, 8)
    mine = nn.Sequential(nn.Linear(8, 12), nn.Tanh())
    distiller = Distiller(teacher, student, [Match("second", "second", adapter=mine)])
    assert {id(parameter) for parameter in mine.parameters()} <= {id(parameter) for parameter in distiller.parameters()}
    batch = points()
    losses = distiller(batch)
    student.eval(), teacher.eval()
    assert torch.isfinite(losses.total)
    s, t = student.spelled_out(batch["x"])["second"], teacher.spelled_out(batch["x"])["second"].detach()
    torch.testing.assert_close(distiller(batch).total, F.mse_loss(mine(s), t))
    distiller(batch).total.backward()
    assert mine[0].weight.grad is not None


def test_a_module_of_the_user_serves_labels_and_logits_too():
    teacher, student = seeded(ConvNet, classes=5, seed=1), seeded(ConvNet, classes=3, seed=2)
    mine = nn.Linear(3, 5)
    distiller = Distiller(teacher, student, [Match("", "", loss="kl", adapter=mine)])
    assert torch.isfinite(distiller(pictures()).total)
    regression = Match(None, "", loss="mse", target="wanted", adapter=nn.Linear(3, 2))
    batch = {"pixels": pictures()["pixels"], "wanted": torch.randn(3, 2)}
    assert torch.isfinite(Distiller(teacher, student, [regression])(batch).total)


def test_one_module_in_two_matches_is_shared():
    teacher, student = readers(12, 8)
    mine = nn.Linear(8, 12)
    distiller = Distiller(teacher, student, [Match("layers.*", "layers.*", adapter=mine)])
    own = [p for p in distiller.parameters() if not any(p is each for each in student.parameters())]
    assert len(own) == 2
    distiller(tokens()).total.backward()
    assert mine.weight.grad is not None


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (nn.Linear(9, 12), ["RuntimeError", "[5, 8]"]),
        (nn.Linear(8, 11), ["[5, 11]", "[5, 12]"]),
        (nn.LSTM(8, 12), ["tuple"]),
        (nn.Bilinear(8, 8, 12), ["TypeError"]),
    ],
    ids=["wrong width in", "wrong width out", "returns a tuple", "takes two tensors"],
)
def test_a_module_of_the_user_that_does_not_fit_is_an_error_that_names_the_entry(adapter, words):
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, [Match("second", "second", adapter=adapter, name="hidden")])
    with pytest.raises(MatchError) as caught:
        distiller.plan(points())
    for word in ["hidden", *words]:
        assert word in str(caught.value)


def test_the_fitted_map_gives_the_teachers_shape():
    wide, narrow = torch.ones(2, 5, 7), torch.ones(2, 5, 3)
    assert fit_adapter("auto", wide, wide, dim=-1) is None
    assert fit_adapter("none", wide, wide, dim=-1) is None
    adapter = fit_adapter("auto", narrow, wide, dim=-1)
    assert adapter(narrow, wide).shape == wide.shape
    volume, other = torch.ones(2, 3, 4, 4, 4), torch.ones(2, 5, 6, 6, 6)
    assert fit_adapter("auto", volume, other, dim=1)(volume, other).shape == other.shape
