"""The plan: every match resolved by one dry forward that leaves no trace."""

import pytest
import torch
from torch import nn

from hookdistill import Distiller, Match, MatchError, Plan
from hookdistill.layer_maps import STATIC
from pairs import ConvNet, flags, hooks, mlps, pictures, points, readers, same, seeded, state, tokens


def example():
    teacher, student = readers(12, 8)
    matches = [
        Match("layers.3", "layers.1", mask="attention_mask", weight=0.5, name="hidden"),
        Match(":logits", ":logits", loss="kl", temperature=2.0, name="soft"),
        Match(None, ":logits", loss="cross_entropy", target="labels", weight=lambda step: 1.0, name="hard"),
    ]
    return Distiller(teacher, student, matches)


def test_the_plan_is_a_table_of_what_is_compared_with_what():
    distiller = example()
    plan = distiller.plan(tokens())
    assert isinstance(plan, Plan)
    assert len(plan) == 3
    hidden, soft, hard = plan
    assert (hidden.name, hidden.teacher, hidden.student) == ("hidden", "layers.3", "layers.1")
    assert (hidden.teacher_shape, hidden.student_shape) == ((3, 5, 12), (3, 5, 8))
    assert (hidden.mask, hidden.weight, soft.weight, hard.weight) == ("attention_mask", "0.5", "1", "schedule")
    assert "8" in hidden.adapter
    assert "12" in hidden.adapter
    assert (soft.adapter, hard.adapter) == ("", "")
    assert "2" in soft.loss
    assert "labels" in hard.teacher
    shown = str(plan)
    for word in ("layers.3", "layers.1", "[3, 5, 12]", "[3, 5, 8]", "float32", "int64", "kl", "attention_mask", "labels"):
        assert word in shown
    assert "teacher is called with input_ids = batch['input_ids']" in shown
    assert "student is called with input_ids = batch['input_ids']" in shown


def test_the_plan_prints_a_line_for_each_match(capsys):
    distiller = example()
    shown = str(distiller.plan(tokens()))
    assert capsys.readouterr().out == ""
    assert all(sum(name in line for line in shown.splitlines()) >= 1 for name in ("layers.1", "cross_entropy", "kl"))


def test_the_plan_shows_the_value_of_each_part():
    teacher, student = mlps()
    teacher.eval(), student.eval()
    distiller = Distiller(teacher, student, [Match("first", "first", weight=3.0)])
    (row,) = distiller.plan(points())
    student.eval()
    assert row.value == pytest.approx(float(next(iter(distiller(points()).parts.values()))))


def test_values_in_the_plan_are_those_of_eval_mode():
    teacher, student = mlps(dropout=0.9)
    distiller = Distiller(teacher, student, [Match("second", "second")])
    (row,) = distiller.plan(points())
    student.eval()
    assert row.value == pytest.approx(float(next(iter(distiller(points()).parts.values()))))


def test_a_distiller_with_an_example_batch_has_its_plan_at_once():
    teacher, student = mlps(12, 8)
    assert len(Distiller(teacher, student, [Match("second", "second")], example_batch=points()).adapters) == 1


@pytest.mark.parametrize("train", [True, False])
def test_the_plan_leaves_no_trace(train):
    teacher, student = mlps(12, 8, dropout=0.5)
    teacher.train(train), student.train(train)
    teacher.norm.train(not train)
    student.drop.train(not train)
    student.first.bias.requires_grad_(False)
    distiller = Distiller(
        teacher, student, [Match("second", "second"), Match("first", "first", weight=lambda step: 1.0 + step)]
    )
    distiller.train(train)
    student.drop.train(not train)
    was, before, random = flags(teacher, student), state(teacher, student), torch.random.get_rng_state()
    distiller.plan(points())
    assert flags(teacher, student) == was
    assert same(state(teacher, student), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(p.grad is None for p in (*teacher.parameters(), *student.parameters()))
    assert torch.is_grad_enabled()


def test_a_first_batch_without_a_plan_leaves_the_trace_of_one_forward():
    teacher, student = mlps(dropout=0.5)
    distiller = Distiller(teacher, student, [Match("second", "second")])
    planned = Distiller(*mlps(dropout=0.5), [Match("second", "second")], example_batch=points())
    torch.manual_seed(0)
    first = distiller(points())
    torch.manual_seed(0)
    second = planned(points())
    assert torch.equal(first.total, second.total)
    assert int(student.norm.num_batches_tracked) == 1
    assert int(teacher.norm.num_batches_tracked) == 0
    assert same(state(student), state(planned.student))


class Fails(nn.Module):
    """Raises in the middle, with submodules in different modes."""

    def __init__(self, error=RuntimeError):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 8)
        self.error = error

    def forward(self, x):
        x = self.drop(self.first(x))
        if self.error is not None:
            raise self.error("the model cannot go on")
        return self.last(x)


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_plan_that_is_interrupted_leaves_no_trace_either(role, error):
    teacher, student = (Fails(error if role == each else None) for each in ("teacher", "student"))
    teacher.drop.eval(), student.first.eval()
    distiller = Distiller(teacher, student, [Match("last", "last"), Match("first", "first")])
    student.first.eval()
    was, before, random = flags(teacher, student), state(teacher, student), torch.random.get_rng_state()
    with pytest.raises(BaseException, match="cannot go on"):
        distiller.plan(points()["x"])
    assert flags(teacher, student) == was
    assert same(state(teacher, student), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert hooks(teacher, student) == 0
    assert torch.is_grad_enabled()
    teacher.error = student.error = None
    distiller.plan(points()["x"])


def test_hooks_are_gone_after_close_and_come_back_when_needed():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, [Match("first", "first")])
    assert hooks(teacher, student) == 0
    distiller.plan(points())
    distiller.close()
    assert hooks(teacher, student) == 0
    first = distiller(points()).total
    distiller.close()
    distiller.close()
    assert hooks(teacher, student) == 0
    assert torch.isfinite(first)


def test_hooks_go_when_the_distiller_does():
    import gc

    teacher, student = mlps()
    distiller = Distiller(teacher, student, [Match("first", "first")], example_batch=points())
    assert hooks(teacher, student) > 0
    del distiller
    gc.collect()
    assert hooks(teacher, student) == 0


def test_models_run_as_before_between_steps_and_keep_nothing_alive():
    import gc
    import weakref

    teacher, student = mlps()
    alone = student.eval()(points()["x"]), teacher.eval()(points()["x"])
    distiller = Distiller(teacher, student, [Match("first", "first")], example_batch=points())
    seen = []
    handle = student.first.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    losses = distiller(points())
    handle.remove()
    del losses
    gc.collect()
    assert seen[-1]() is None
    student.eval()
    assert torch.equal(student(points()["x"]), alone[0])
    assert torch.equal(teacher(points()["x"]), alone[1])


def test_a_plan_for_another_batch_and_in_the_middle_of_training():
    distiller = example()
    distiller.plan(tokens())
    distiller(tokens()).total.backward()
    plan = distiller.plan(tokens(batch=2, length=7))
    assert plan.rows[0].student_shape == (2, 7, 8)


# Wildcards


@pytest.mark.parametrize(
    ("layer_map", "depths", "pairs"),
    [
        ("uniform", (12, 3), [(3, 0), (7, 1), (11, 2)]),
        ("uniform", (4, 2), [(1, 0), (3, 1)]),
        ("uniform", (5, 3), [(1, 0), (3, 1), (4, 2)]),
        ("first", (4, 2), [(0, 0), (1, 1)]),
        ("last", (4, 2), [(2, 0), (3, 1)]),
        ("last", (3, 3), [(0, 0), (1, 1), (2, 2)]),
    ],
)
def test_wildcards_on_both_sides_are_paired_by_the_layer_map(layer_map, depths, pairs):
    teacher, student = readers(depths=depths)
    plan = Distiller(teacher, student, [Match("layers.*", "layers.*", layer_map=layer_map)]).plan(tokens())
    assert [(row.teacher, row.student) for row in plan] == [(f"layers.{t}", f"layers.{s}") for t, s in pairs]


@pytest.mark.parametrize("name", STATIC)
def test_every_layer_map_is_increasing_and_one_to_one_where_depths_agree(name):
    for teacher in range(1, 9):
        assert STATIC[name](teacher, teacher) == list(range(teacher))
        for student in range(1, teacher + 1):
            chosen = STATIC[name](teacher, student)
            assert len(chosen) == student
            assert sorted(set(chosen)) == chosen
            assert 0 <= chosen[0] <= chosen[-1] < teacher


def test_uniform_and_last_end_with_the_teachers_last_layer():
    for teacher in range(1, 9):
        for student in range(1, teacher + 1):
            assert STATIC["uniform"](teacher, student)[-1] == STATIC["last"](teacher, student)[-1] == teacher - 1


def test_ranges_are_wildcards_in_the_order_written():
    teacher, student = readers()
    plan = Distiller(teacher, student, [Match("layers.{3,0}", "layers.{0..1}")]).plan(tokens())
    assert [(row.teacher, row.student) for row in plan] == [("layers.3", "layers.0"), ("layers.0", "layers.1")]


def test_one_teacher_tensor_serves_every_student_layer():
    teacher, student = readers()
    plan = Distiller(teacher, student, [Match("layers.-1", "layers.*")]).plan(tokens())
    assert [(row.teacher, row.student) for row in plan] == [("layers.3", "layers.0"), ("layers.3", "layers.1")]


def test_a_named_wildcard_gives_numbered_names_and_weights_each_pair():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [Match("layers.*", "layers.*", name="hidden", weight=0.5)])
    losses = distiller(tokens())
    assert list(losses.parts) == ["hidden.0", "hidden.1"]
    torch.testing.assert_close(losses.total.detach(), 0.5 * sum(losses.parts.values()))


def test_wildcards_keep_the_call_and_the_selector():
    teacher, student = readers()
    plan = Distiller(teacher, student, [Match("layers.*:input@0", "layers.*:input@0")]).plan(tokens())
    assert [row.student for row in plan] == ["layers.0:input@0", "layers.1:input@0"]


def test_more_student_layers_than_teacher_layers_are_an_error():
    teacher, student = readers(depths=(2, 4))
    with pytest.raises(MatchError) as caught:
        Distiller(teacher, student, [Match("layers.*", "layers.*", name="hidden")])
    for word in ("hidden", "2", "4", "layers.1", "layers.3"):
        assert word in str(caught.value)


def test_several_teacher_layers_for_one_student_layer_are_an_error():
    teacher, student = readers()
    with pytest.raises(MatchError, match="4"):
        Distiller(teacher, student, [Match("layers.*", "layers.0")])


def test_images_of_logits_show_the_dimension_of_their_classes():
    teacher, student = seeded(ConvNet, seed=1), seeded(ConvNet, seed=2)
    (row,) = Distiller(teacher, student, [Match("stem", "stem", loss="kl")]).plan(pictures())
    assert "dim=1" in row.loss


def test_the_plan_shows_every_adapter_by_what_it_does():
    teacher = seeded(ConvNet, 6, seed=1)
    student = seeded(ConvNet, 4, stride=2, seed=2)
    matches = [Match("stem", "stem"), Match("head", "head", adapter=nn.Linear(3, 3))]
    stem, head = Distiller(teacher, student, matches).plan(pictures())
    for word in ("Conv2d", "4", "6", "resize"):
        assert word in stem.adapter
    assert "Linear" in head.adapter


def test_a_lambda_as_mask_or_target_is_shown_as_something():
    teacher, student = mlps()
    matches = [
        Match("first", "first", mask=lambda batch: batch["valid"]),
        Match(None, "", loss="cross_entropy", target=lambda batch: batch["labels"]),
    ]
    plan = Distiller(teacher, student, matches).plan(points())
    assert plan.rows[0].mask
    assert str(plan)
