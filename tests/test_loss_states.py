"""Losses that need more than two tensors: further inputs, and modules with parameters or memory that a match makes and owns."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hookdistill
from hookdistill import DistillationLoss, Distiller, Match, MatchError, losses
from hookdistill.evaluation import save
from hookdistill.losses import registry
from pairs import ConvNet, Mlp, hooks, mlps, pictures, points, readers, seeded, state, tokens, train


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))


def spelled_out(model, batch):
    return model.spelled_out(next(iter(batch.values())))


# Further inputs


def test_inputs_come_from_the_batch_the_student_the_teacher_and_a_function():
    seen = {}

    def loss(student, teacher, *, valid, second, teacher_second, doubled, mask=None):
        seen.update(valid=valid, second=second, teacher_second=teacher_second, doubled=doubled)
        return losses.mse(student, teacher, mask=mask)

    teacher, student = mlps()
    batch = points()
    where = {"valid": "valid", "second": "second", "teacher_second": "second", "doubled": lambda batch: 2 * batch["x"]}
    Distiller(teacher.eval(), student.eval(), [Match("first", "first", loss=loss, inputs=where)])(batch)
    torch.testing.assert_close(seen["valid"], batch["valid"])
    torch.testing.assert_close(seen["second"], spelled_out(student, batch)["second"])
    torch.testing.assert_close(seen["teacher_second"], spelled_out(teacher, batch)["second"])
    torch.testing.assert_close(seen["doubled"], 2 * batch["x"])
    assert seen["second"].requires_grad
    assert not seen["teacher_second"].requires_grad


def test_fsp_of_two_layers_of_each_side():
    teacher, student = readers()
    batch = tokens()
    match = Match(
        "layers.0",
        "layers.0",
        loss="fsp",
        inputs={"teacher_second": "layers.-1", "student_second": "layers.-1"},
        mask="attention_mask",
    )
    distiller = Distiller(teacher, student, [match])
    assert "fsp(teacher_second=layers.3, student_second=layers.-1)" in str(distiller.plan(batch))
    ours, theirs = spelled_out(student, batch), spelled_out(teacher, batch)
    expected = losses.fsp(
        ours["layers.0"],
        theirs["layers.0"],
        student_second=ours["layers.1"],
        teacher_second=theirs["layers.3"],
        mask=batch["attention_mask"],
    )
    torch.testing.assert_close(distiller(batch).total, expected)


def test_a_list_of_inputs_is_a_list_of_tensors():
    def loss(student, teacher, *, students, teachers):
        assert [each.shape for each in students] == [each.shape for each in teachers]
        return sum((s - t).square().mean() for s, t in zip([student, *students], [teacher, *teachers], strict=True))

    teacher, student = mlps()
    where = {"students": ["second", "head"], "teachers": ["second", "head"]}
    match = Match("first", "first", loss=loss, inputs=where)
    batch = points()
    found = Distiller(teacher.eval(), student.eval(), [match])(batch).total
    ours, theirs = spelled_out(student, batch), spelled_out(teacher, batch)
    expected = sum((ours[name] - theirs[name]).square().mean() for name in ("first", "second", "head"))
    torch.testing.assert_close(found, expected)


def test_a_teachers_tensor_that_another_entry_streams_is_kept_for_an_input():
    def gap(student, teacher, *, teacher_head):
        return (student.mean() - teacher_head.mean()) ** 2 + 0 * teacher.sum()

    teacher, student = (model.eval() for model in mlps())
    batch = points()
    both = [
        Match("head", "head", loss="mse"),
        Match("first", "first", loss=gap, inputs={"teacher_head": "head"}, name="gap"),
        Match("second", "second", loss="mse"),
    ]
    found = Distiller(teacher, student, both)(batch).parts
    ours, theirs = spelled_out(student, batch), spelled_out(teacher, batch)
    torch.testing.assert_close(found["gap"], (ours["first"].mean() - theirs["head"].mean()).detach() ** 2)
    torch.testing.assert_close(found["head <- head: mse"], losses.mse(ours["head"], theirs["head"]).detach())


def test_inputs_of_one_of_several_teachers():
    def loss(student, teacher, *, teacher_second):
        return (student - teacher_second).square().mean()

    teachers, student = {"a": seeded(Mlp, seed=5), "b": seeded(Mlp, seed=6)}, seeded(Mlp, seed=7)
    match = Match("first", "second", loss=loss, teacher_model="b", inputs={"teacher_second": "second"})
    batch = points()
    found = Distiller({name: each.eval() for name, each in teachers.items()}, student.eval(), [match])(batch).total
    expected = (spelled_out(student, batch)["second"] - spelled_out(teachers["b"], batch)["second"]).square().mean()
    torch.testing.assert_close(found, expected)


def test_an_item_used_as_an_input_fills_no_parameter_by_position():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, shift=None):
            assert shift is None
            return self.layer(x)

    def loss(student, teacher, *, index):
        return (student - teacher).square().mean() + 0 * index.sum()

    distiller = Distiller(Two(), Two(), [Match("layer", "layer", loss=loss, inputs={"index": 1})])
    assert distiller((torch.randn(4, 3), torch.arange(4))).total.isfinite()


def test_inputs_of_hand_written_captures():
    first, second = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 4, 5)
    match = Match("a", "a", loss="fsp", inputs={"teacher_second": "b", "student_second": "b"})
    captures = {"a": {"output": first}, "b": {"output": second}}
    found = DistillationLoss([match])({"a": {"output": second}, "b": {"output": first}}, captures).total
    torch.testing.assert_close(found, losses.fsp(first, second, student_second=second, teacher_second=first.detach()))


def test_a_target_may_be_an_input():
    teacher, student = (model.eval() for model in mlps())
    batch = points()
    one = Distiller(teacher, student, [Match("", "", loss="dkd", target="labels", temperature=2.0)])(batch)
    other = Distiller(teacher, student, [Match("", "", loss="dkd", inputs={"target": "labels"}, temperature=2.0)])(batch)
    torch.testing.assert_close(one.total, other.total)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"teacher_secnd": "layers.1"},
            r"inputs= names 'teacher_secnd', which is no argument of the loss 'fsp'.*'teacher_second'",
        ),
        ({"mask": "attention_mask"}, r"inputs= cannot hold 'mask'; it is given as mask="),
        ("layers.1", r"inputs= maps arguments of the loss to where their tensors are, got str"),
        ({"student_second": 1.5}, r"inputs\['student_second'\] is a key or index of the batch.*got float"),
        ({"teacher_second": 1}, r"inputs\['teacher_second'\] is an address in the teacher, as its name says.*got int"),
        ({"teacher_second": "layers.*"}, r"inputs\['teacher_second'\] names several tensors with 'layers\.\*'"),
        ({"teacher_second": "layers..1"}, r"layers\.\.1"),
        ({"teacher_second": "layers.1"}, r"the loss 'fsp' needs 'student_second'; give it as an argument or by inputs="),
    ],
)
def test_wrong_inputs_are_refused_when_the_match_is_made(inputs, message):
    with pytest.raises(MatchError, match=message):
        Match("layers.0", "layers.0", loss="fsp", inputs=inputs)


def test_what_a_loss_requires_is_asked_for_when_the_match_is_made():
    with pytest.raises(MatchError, match=r"the loss 'dkd' needs 'target'; give it by target=, a key of the batch"):
        Match("", "", loss="dkd")
    with pytest.raises(MatchError, match="'target' is given twice"):
        Match("", "", loss="dkd", target="labels", inputs={"target": "labels"})
    with pytest.raises(MatchError, match="is an address in the teacher, but the entry has no teacher"):
        Match(None, "", target="labels", loss=lambda s, t, teacher_second: s, inputs={"teacher_second": "second"})


def test_an_input_that_is_nowhere_is_found_when_the_plan_is_made():
    teacher, student = readers()
    given = {"teacher_second": "layers.9", "student_second": "layers.1"}
    with pytest.raises(MatchError, match=r"inputs\['teacher_second'\].*layers\.9"):
        Distiller(teacher, student, [Match("layers.0", "layers.0", loss="fsp", inputs=given)])
    given = {"teacher_second": "layers.1", "student_second": "layer.1"}
    distiller = Distiller(teacher, student, [Match("layers.0", "layers.0", loss="fsp", inputs=given)])
    with pytest.raises(MatchError, match=r"inputs\['student_second'\]='layer\.1' is neither an item of the batch.*layers\.1"):
        distiller.plan(tokens())
    assert hooks(teacher, student) == 0


# States


def vid():
    teacher, student = readers(8, 6)
    return teacher, student, [Match("layers.-1", "layers.-1", loss="vid", mask="attention_mask", name="vid")]


def test_the_state_of_a_loss_is_made_with_the_plan_trains_and_is_shown():
    teacher, student, matches = vid()
    distiller = Distiller(teacher, student, matches)
    batch = tokens()
    plan = distiller.plan(batch)
    made = distiller.loss.loss_modules["vid"]
    assert type(made).__name__ == "VidState"
    assert "VidState" in str(plan)
    assert not distiller.adapters
    before = state(made)
    totals = list(train(distiller, batch, steps=30))
    assert totals[-1] < totals[0]
    assert all(not torch.equal(left, right) for left, right in zip(before, state(made), strict=True))


def test_the_loss_is_called_with_its_state():
    teacher, student, matches = vid()
    batch = tokens()
    distiller = Distiller(teacher, student, matches, example_batch=batch)
    made = distiller.loss.loss_modules["vid"]
    expected = losses.vid(
        spelled_out(student, batch)["layers.1"],
        spelled_out(teacher, batch)["layers.3"],
        regressor=made.regressor,
        scale=made.scale,
        mask=batch["attention_mask"],
    )
    torch.testing.assert_close(distiller(batch).total, expected)


def test_without_a_plan_a_state_is_missing():
    teacher, student, matches = vid()
    with pytest.raises(
        MatchError, match=r"vid: the loss 'vid' has parameters or a memory of its own.*distiller\.plan\(batch\)"
    ):
        Distiller(teacher, student, matches)(tokens())


def test_a_second_plan_keeps_the_state_and_a_failing_one_leaves_none():
    teacher, student, matches = vid()
    distiller = Distiller(teacher, student, matches, example_batch=tokens())
    made = distiller.loss.loss_modules["vid"]
    distiller.plan(tokens(seed=4))
    assert distiller.loss.loss_modules["vid"] is made

    def wrong(student, teacher):
        raise RuntimeError("no")

    failing = Distiller(teacher, student, [*matches, Match("embed", "embed", loss=wrong, adapter="none")])
    with pytest.raises(MatchError, match="no"):
        failing.plan(tokens())
    assert not failing.loss.loss_modules


def test_states_move_are_saved_and_copied_with_the_distiller(tmp_path):
    teacher, student, matches = vid()
    distiller = Distiller(teacher, student, matches, example_batch=tokens())
    assert {"loss.loss_modules.vid.scale", "loss.loss_modules.vid.regressor.0.weight"} <= distiller.state_dict().keys()
    assert {id(each) for each in distiller.loss.loss_modules.parameters()} <= {id(each) for each in distiller.parameters()}
    save(distiller, tmp_path)
    saved = load_file(tmp_path / "loss_modules.safetensors")
    assert set(saved) == set(distiller.loss.loss_modules.state_dict())
    assert "vid" not in str(sorted(load_file(tmp_path / "model.safetensors")))
    twin = copy.deepcopy(distiller)
    twin.loss.loss_modules["vid"].scale.data.add_(5)
    batch = tokens()
    assert twin(batch).total != distiller(batch).total
    distiller.double()
    assert distiller.loss.loss_modules["vid"].scale.dtype is torch.float64
    plain = Distiller(*readers(), [Match("embed", "embed")])
    save(plain, tmp_path)
    assert not (tmp_path / "loss_modules.safetensors").exists()


def test_arguments_of_the_state_are_arguments_of_the_match():
    teacher, student, _ = vid()
    match = Match("embed", "embed", loss="vid", mid=3, variance=2.0, name="vid")
    distiller = Distiller(teacher, student, [match], example_batch=tokens())
    made = distiller.loss.loss_modules["vid"]
    assert made.regressor[0].out_features == 3
    torch.testing.assert_close(nn.functional.softplus(made.scale) + 1e-5, torch.full((8,), 2.0))
    with pytest.raises(MatchError, match=r"unknown argument 'middle'.*'mid'"):
        Match("embed", "embed", loss="vid", middle=3)


def test_a_state_that_is_given_whole_is_not_made():
    regressor = nn.Linear(6, 8)
    match = Match("embed", "embed", loss="vid", regressor=regressor, scale=torch.zeros(8), name="vid")
    teacher, student, _ = vid()
    distiller = Distiller(teacher, student, [match])
    distiller(tokens()).total.backward()
    assert regressor.weight.grad is not None
    assert {id(each) for each in regressor.parameters()} <= {id(each) for each in distiller.parameters()}


def test_part_of_a_state_may_be_given():
    paraphraser = nn.Conv2d(6, 2, 1)
    teacher, student = seeded(ConvNet, 6, seed=1), seeded(ConvNet, 4, seed=2)
    match = Match("norm", "norm", loss="factor_transfer", paraphraser=paraphraser, rate=1 / 3, name="ft")
    distiller = Distiller(teacher, student, [match], example_batch=pictures())
    made = distiller.loss.loss_modules["ft"]
    assert made.paraphraser is paraphraser
    assert list(distiller.loss.loss_modules) == ["ft"]
    before = state(paraphraser)
    list(train(distiller, pictures(), steps=3))
    assert all(torch.equal(left, right) for left, right in zip(before, state(paraphraser), strict=True))


def test_the_dry_run_leaves_states_as_they_are_and_training_moves_them():
    teacher, student = (model for model in mlps())
    batch = {**points(), "index": torch.tensor([4, 1, 0, 2, 3])}
    match = Match("second", "second", loss="crd", inputs={"index": "index"}, samples=6, width=3, k=4, name="crd")
    distiller = Distiller(teacher, student, [match])
    distiller.plan(batch)
    memory = distiller.loss.loss_modules["crd"].memory
    assert memory.training
    before = state(memory)
    distiller.plan(batch)
    with torch.no_grad():
        distiller(batch)
    distiller.eval()
    distiller(batch)
    assert all(torch.equal(left, right) for left, right in zip(before, state(memory), strict=True))
    distiller.train()
    distiller(batch).total.backward()
    assert not torch.equal(memory.student, before[0])
    with pytest.raises(MatchError, match=r"crd got index= up to 4, but samples=3"):
        Distiller(teacher, student, [Match("second", "second", loss="crd", inputs={"index": "index"}, samples=3)]).plan(batch)


def test_a_plan_in_eval_mode_leaves_a_state_in_eval_mode():
    teacher, student, matches = vid()
    distiller = Distiller(teacher, student, matches).eval()
    distiller.plan(tokens())
    assert not distiller.loss.loss_modules["vid"].training


def test_the_queue_follows_the_adapter():
    teacher, student = mlps(8, 6)
    distiller = Distiller(teacher, student, [Match("second", "second", loss="queue_kl", size=7, name="queue")])
    distiller.plan(points())
    assert distiller.adapters["queue"].project.out_features == 8
    queue = distiller.loss.loss_modules["queue"].queue
    assert queue.shape == (7, 8)
    assert (queue == 0).all()
    distiller(points()).total.backward()
    assert (queue != 0).any(-1).sum() == 5


class Two(nn.Module):
    """Two convolutional stages, the second of half the grid."""

    def __init__(self, first, second):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, first, 3, padding=1), nn.Conv2d(first, second, 3, stride=2, padding=1)

    def forward(self, pixels):
        return self.two(torch.relu(self.one(pixels)))


def test_reviewkd_of_two_stages():
    match = Match("two", "two", loss="reviewkd", inputs={"students": ["one"], "teachers": ["one"]}, mid=5, name="review")
    distiller = Distiller(Two(5, 7), Two(3, 4), [match], example_batch=pictures())
    fusion = distiller.loss.loss_modules["review"].fusion
    means = [each.running_mean.clone() for each in fusion.modules() if isinstance(each, nn.BatchNorm2d)]
    assert all((mean == 0).all() for mean in means)  # the dry run was no training step
    totals = list(train(distiller, pictures(), steps=20))
    assert totals[-1] < totals[0]
    assert all((each.running_mean != 0).any() for each in fusion.modules() if isinstance(each, nn.BatchNorm2d))


@pytest.mark.parametrize("loss", ["mgd", "factor_transfer", "vid"])
def test_convolutional_states_train(loss):
    teacher, student = seeded(ConvNet, 6, seed=1), seeded(ConvNet, 4, seed=2)
    distiller = Distiller(teacher, student, [Match("norm", "norm", loss=loss)], example_batch=pictures())
    totals = list(train(distiller, pictures(), steps=40))
    assert sum(totals[-5:]) < sum(totals[:5])


def test_relations_need_no_adapter_for_other_widths():
    teacher, student = mlps(8, 6)
    for loss in ("similarity_preserving", "pkt", "rkd_distance", "rkd_angle", "cka", "correlation_congruence"):
        distiller = Distiller(teacher, student, [Match("second", "second", loss=loss)])
        distiller.plan(points())
        assert not distiller.adapters, loss
        assert distiller(points()).total.requires_grad


def test_relations_get_the_adapter_that_is_asked_for():
    teacher, student = mlps(8, 6)
    distiller = Distiller(teacher, student, [Match("second", "second", loss="cka", adapter="linear")])
    distiller.plan(points())
    assert len(distiller.adapters) == 1


# A loss of one's own with parameters


class Gate(nn.Module):
    def __init__(self, student, teacher, *, start=0.0):
        super().__init__()
        self.gate = nn.Parameter(torch.full(teacher.shape[-1:], start))
        self.count = 0


def gated(student, teacher, *, gate, count, power=2, mask=None):
    return losses.masked_mean((gate.sigmoid() * (student - teacher).abs() ** power).mean(-1), mask)


def test_a_loss_of_ones_own_with_a_state():
    hookdistill.register_loss("gated", compares="features", state=Gate)(gated)
    teacher, student = mlps()
    distiller = Distiller(teacher, student, [Match("first", "first", loss="gated", start=1.0, power=1, name="g")])
    distiller.plan(points())
    made = distiller.loss.loss_modules["g"]
    assert made.gate[0] == 1
    distiller(points()).total.backward()
    assert (made.gate.grad != 0).all()


def test_what_a_state_takes_the_loss_gets_from_the_state():
    class Learned(nn.Module):
        def __init__(self, student, teacher, *, gate=0.0):
            super().__init__()
            self.gate, self.count = nn.Parameter(torch.tensor(gate)), 0

    hookdistill.register_loss("gated", compares="features", state=Learned)(gated)
    distiller = Distiller(*mlps(), [Match("first", "first", loss="gated", gate=3.0, name="g")], example_batch=points())
    distiller(points()).total.backward()
    assert distiller.loss.loss_modules["g"].gate == 3
    assert distiller.loss.loss_modules["g"].gate.grad != 0


def test_a_state_that_lacks_what_the_loss_requires_is_named():
    hookdistill.register_loss("gated", compares="features", state=lambda student, teacher: nn.Linear(2, 2))(gated)
    distiller = Distiller(*mlps(), [Match("first", "first", loss="gated")])
    with pytest.raises(
        MatchError, match=r"the loss 'gated' needs 'gate', 'count', which neither the entry gives nor Linear has"
    ):
        distiller.plan(points())


def test_a_state_that_is_no_module_or_fails_is_named():
    teacher, student = mlps()

    def broken(student, teacher):
        raise RuntimeError("out of luck")

    for made, message in (
        (lambda student, teacher: 3, r"must make a torch\.nn\.Module, it made a int"),
        (broken, "out of luck"),
    ):
        hookdistill.register_loss("gated", compares="features", state=made)(gated)
        with pytest.raises(MatchError, match=message):
            Distiller(teacher, student, [Match("first", "first", loss="gated")]).plan(points())


# Counting positions


def test_labels_count_for_every_loss_between_logits():
    batch = tokens()
    batch["labels"][0, :3] = -100
    labelled = int(((batch["labels"] != -100) & (batch["attention_mask"] != 0)).sum())
    stage = DistillationLoss([Match("", "", loss="kl", target="labels", mask="attention_mask", name="kl")])
    assert stage.counts(batch) == {"kl": labelled}
    shifted = DistillationLoss([Match("", "", loss="dkd", target="labels", causal_shift=True, name="dkd")])
    assert shifted.counts(batch) == {"dkd": int((batch["labels"][:, 1:] != -100).sum())}


def test_samples_count_where_a_loss_has_one_value_per_sample():
    batch = tokens()
    batch["attention_mask"][0] = 0
    of_samples = DistillationLoss([Match("a", "a", loss="cka", mask="attention_mask", name="cka")])
    assert of_samples.counts(batch) == {"cka": 2}
    of_places = DistillationLoss([Match("a", "a", loss="cka", samples="positions", mask="attention_mask", name="cka")])
    assert of_places.counts(batch) == {"cka": int(batch["attention_mask"].sum())}


@pytest.mark.parametrize("loss", ["attention_transfer", "ickd", "nst", "cwd"])
def test_two_batches_weighted_by_their_counts_are_one(loss):
    teacher, student = (model.eval() for model in readers())
    distiller = Distiller(teacher, student, [Match("embed", "embed", loss=loss, mask="attention_mask", name="one")])
    batch = tokens(4)
    batch["attention_mask"][1] = 0
    whole = distiller(batch).total
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 3), slice(3, 4))]
    counted = [distiller.counts(half)["one"] for half in halves]
    total = sum(
        distiller(half, shares={"one": count / sum(counted)}).total for half, count in zip(halves, counted, strict=True)
    )
    torch.testing.assert_close(total.float(), whole)


# Beside logits that are not made


def test_a_state_made_in_the_second_dry_run_is_in_training_mode():
    teacher, student, matches = vid()
    logits = Match(":logits", ":logits", loss="kl", name="kl")
    distiller = Distiller(teacher, student, [*matches, logits], head="fused")
    assert "head" in str(distiller.plan(tokens()))
    assert distiller.loss.loss_modules["vid"].training
    assert distiller(tokens()).total.isfinite()


def test_logits_that_are_an_input_elsewhere_are_made():
    def gap(student, teacher, *, teacher_logits):
        return (student.mean() - teacher_logits.mean()) ** 2 + 0 * teacher.sum()

    teacher, student = (model.eval() for model in readers())
    entries = [
        Match(":logits", ":logits", loss="kl", name="kl"),
        Match("embed", "embed", loss=gap, inputs={"teacher_logits": ":logits"}, name="gap"),
    ]
    with pytest.raises(MatchError, match=r"head='fused', but the teacher's logits .* are compared elsewhere too"):
        Distiller(teacher, student, entries, head="fused").plan(tokens())
    batch = tokens()
    found = Distiller(teacher, student, entries)(batch).parts
    ours, theirs = spelled_out(student, batch), spelled_out(teacher, batch)
    torch.testing.assert_close(found["gap"], (ours["embed"].mean() - theirs["logits"].mean()).detach() ** 2)
    torch.testing.assert_close(found["kl"], losses.kl(ours["logits"], theirs["logits"]).detach())
