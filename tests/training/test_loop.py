"""The loop: what it trains and how far, and what it leaves behind."""

import math

import accelerate
import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from transformers import BertConfig, BertModel

import hookdistill
from hookdistill import Distiller, Match, Trainer
from pairs import flags, hooks, same, state
from runs import DATA, HIDDEN, LOGITS, Calls, by_hand, close, distiller, loader, noisy, sgd, trained

# What is trained


def test_the_loss_falls_and_the_result_tells_of_it():
    made = distiller(LOGITS, HIDDEN)
    result = Trainer(made, loader(), epochs=30, lr=1e-2, eval_loader=loader(), seed=0, progress=False).train()
    assert (result.steps, result.epochs) == (180, 30)
    first, last = result.history[0].metrics["eval/loss"], result.history[-1].metrics["eval/loss"]
    assert last < 0.2 * first
    assert list(result.losses) == ["logits", "hidden"]
    assert math.isclose(result.loss, sum(result.losses.values()), rel_tol=1e-5)
    assert result.seconds > 0


def test_a_step_is_that_of_plain_torch():
    batches = DATA.split(4)
    assert close(trained(distiller()), by_hand([[batch] for batch in batches]))


def test_accumulated_batches_train_as_one_batch_of_all():
    whole = trained(distiller(), loader(8), epochs=3)
    halves = trained(distiller(), loader(4), epochs=3, accumulate=2)
    assert close(whole, halves)
    assert not close(whole, trained(distiller(), loader(4), epochs=3))


def test_the_last_step_of_a_pass_is_the_mean_of_the_batches_that_are_left():
    batches = DATA.split(4)
    assert close(trained(distiller(), accumulate=4), by_hand([batches[:4], batches[4:]]))


def test_accelerates_own_setting_of_accumulation_is_followed():
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    assert close(trained(distiller(), accelerator=accelerator), trained(distiller(), accumulate=2))


def test_the_gradient_is_clipped():
    batches = [[batch] for batch in DATA.split(4)]
    assert close(trained(distiller(), clip_norm=0.01), by_hand(batches, clip=0.01))
    assert not close(by_hand(batches, clip=0.01), by_hand(batches))


def test_bf16_runs_near_float32_and_leaves_float32_weights():
    plain, half = trained(distiller(), epochs=5), trained(distiller(), epochs=5, mixed_precision="bf16")
    assert {tensor.dtype for tensor in half} == {torch.float32}
    assert not same(plain, half)
    assert all(torch.allclose(a, b, atol=0.05) for a, b in zip(plain, half, strict=True))


def test_one_process_trains_in_one_precision_after_another():
    plain = trained(distiller())
    trained(distiller(), mixed_precision="bf16")
    assert same(trained(distiller(), mixed_precision="no"), plain)


def test_the_same_seed_gives_the_same_student():
    runs = [trained(noisy(LOGITS, HIDDEN), loader(shuffle=True), seed=seed) for seed in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_measuring_does_not_change_the_training():
    def run(**settings):
        return trained(noisy(), loader(shuffle=True), seed=0, **settings)

    def draws(evaluation):
        return {"drawn": torch.rand(3).sum()}

    assert same(run(), run(eval_loader=loader(shuffle=True), evaluators=[draws], evaluate_every=1))


def test_gradients_from_before_do_not_count():
    made = distiller()
    made.student[0].weight.grad = torch.ones(5, 6)
    assert same(trained(made), trained(distiller()))


def test_schedules_follow_optimizer_steps():
    asked = []
    made = distiller(Match("2", "2", weight=lambda step: asked.append(step) or 1.0))
    trained(made, epochs=2, accumulate=3)
    assert asked[1:] == [step for step in range(4) for _ in range(3)]  # the first is the plan's


def test_a_second_training_goes_on_from_the_student():
    made = distiller()
    trained(made, epochs=2)
    assert close(trained(made, epochs=1), trained(distiller(), epochs=3))


# How far, and over which batches


@pytest.mark.parametrize(
    ("settings", "steps", "passes"),
    [
        ({"epochs": 2}, 12, 2),
        ({"epochs": 2, "accumulate": 4}, 4, 2),
        ({"max_steps": 4}, 4, 1),
        ({"max_steps": 6}, 6, 1),
        ({"max_steps": 7}, 7, 2),
        ({"max_steps": 3, "accumulate": 4}, 3, 2),
    ],
)
def test_epochs_and_steps(settings, steps, passes):
    result = Trainer(distiller(), loader(), progress=False, **settings).train()
    assert (result.steps, result.epochs) == (steps, passes)
    assert not GradientState().in_dataloader


def test_a_generator_is_read_once_and_none_of_its_batches_is_lost():
    batches = DATA.split(4)
    assert close(trained(distiller(), iter(batches), max_steps=6), by_hand([[batch] for batch in batches]))


def test_a_stream_without_a_length_is_read_pass_after_pass():
    class Stream(IterableDataset):
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from DATA[:8]

    stream = Stream()
    assert close(trained(distiller(), DataLoader(stream, 4), max_steps=4), by_hand([[b] for b in (*DATA[:8].split(4),) * 2]))
    assert stream.passes == 2


@pytest.mark.parametrize(("first", "rows"), [(0, 24), (10, 60)])
def test_the_losses_are_means_over_the_last_fifty_batches(first, rows):
    rows = torch.randn(rows, 1, 6).unbind()
    made = distiller()
    with torch.no_grad():
        expected = [float(F.mse_loss(made.student(x), made.teacher(x))) for x in rows[first:]]
    result = Trainer(made, rows, epochs=1, optimizer=sgd(1e-12), progress=False).train()
    assert result.loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert result.losses == {"logits": result.loss}


# What is left behind


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_models_are_left_as_they_were_given(precision):
    made = distiller(LOGITS, HIDDEN)
    made.student[0].eval()
    made.student[0].bias.requires_grad_(False)
    made.teacher[1].eval()
    modes, kept, own = flags(made.student, made.teacher), state(made.teacher), set(vars(made))
    modes_seen = []

    def look(evaluation):
        modes_seen.append([module.training for module in evaluation.distiller.modules()])
        return {}

    trained(made, evaluators=[look], mixed_precision=precision)
    assert flags(made.student, made.teacher) == modes
    assert same(state(made.teacher), kept)
    assert set(vars(made)) == own
    assert hooks(made.student, made.teacher) == 0
    assert all(parameter.grad is None for parameter in [*made.parameters(), *made.teacher.parameters()])
    assert not any(map(any, modes_seen))
    assert made([DATA]).total.requires_grad


def test_the_student_is_in_training_mode_and_the_teacher_is_not():
    seen = {}
    made = distiller()
    for role, each in (("student", made.student), ("teacher", made.teacher)):
        each.register_forward_hook(lambda module, *_, role=role: seen.setdefault(role, []).append(module.training))
    made.eval()
    trained(made)
    assert seen["student"] == [False] + 6 * [True]  # the first is the plan's
    assert not any(seen["teacher"])
    assert not made.training


def test_models_are_left_as_they_were_after_an_error():
    made = distiller()
    modes = flags(made.student, made.teacher)

    def broken(evaluation):
        if evaluation.step == 3:
            raise KeyError("mine")
        return {}

    with pytest.raises(KeyError, match="mine"):
        trained(made, evaluators=[broken], evaluate_every=1, mixed_precision="bf16")
    assert flags(made.student, made.teacher) == modes
    assert hooks(made.student, made.teacher) == 0
    assert all(parameter.grad is None for parameter in made.parameters())
    assert not GradientState().in_dataloader
    trained(made)


def test_an_error_between_two_batches_of_a_step_leaves_no_gradient():
    made = distiller()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trained(made, [DATA, DATA[:, :5]], accumulate=2)
    assert all(parameter.grad is None for parameter in made.parameters())


def test_a_distiller_that_the_user_prepared_stays_prepared():
    accelerator = accelerate.Accelerator(mixed_precision="bf16")
    made = accelerator.prepare(distiller())
    forward = made.forward
    half = trained(made, accelerator=accelerator)
    assert made.forward == forward
    assert same(half, trained(distiller(), mixed_precision="bf16"))


def test_best_and_last_are_saved_and_can_be_loaded(tmp_path):
    made, seen = distiller(LOGITS, HIDDEN), []
    scores = Calls(0.1, 0.9, 0.5, 0.9)

    def keeps(evaluation):
        seen.append(state(evaluation.student))
        return {}

    result = Trainer(
        made,
        loader(),
        epochs=3,
        evaluators=[scores, keeps],
        best="score",
        output_dir=tmp_path / "out",
        report=False,
        progress=False,
    ).train()
    assert (result.best.step, result.best.epoch, result.best.metrics) == (6, 1, {"score": 0.9})
    for name, expected in (("best", seen[1]), ("last", state(made.student))):
        found = load_file(tmp_path / "out" / name / "model.safetensors")
        assert same([found[key] for key in made.student.state_dict()], expected)
    adapters = load_file(tmp_path / "out" / "last" / "adapters.safetensors")
    assert same([adapters[key] for key in made.adapters.state_dict()], state(made.adapters))
    left = ["best", "checkpoints", "last", "log.jsonl", "run.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == left


@pytest.mark.parametrize(
    ("settings", "best_step"),
    [({"best": "score"}, 12), ({"best": "score", "higher_is_better": False}, 6), ({"best": "eval/loss"}, 18)],
)
def test_which_is_best(settings, best_step):
    evaluators = [Calls(0.5, 0.1, 0.9, math.nan), hookdistill.HeldOutLosses()]
    result = Trainer(
        distiller(), loader(), epochs=3, eval_loader=loader(), evaluators=evaluators, progress=False, **settings
    ).train()
    assert result.best.step == best_step


def test_a_student_of_transformers_is_saved_its_own_way(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    teacher, student = (BertModel(BertConfig(num_hidden_layers=layers, **sizes)) for layers in (2, 1))
    made = Distiller(teacher, student, [Match("encoder.layer.1", "encoder.layer.0", mask="attention_mask")])
    ids = torch.arange(1, 17).reshape(4, 4)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 2
    Trainer(made, batches, epochs=1, output_dir=tmp_path, progress=False).train()
    loaded = BertModel.from_pretrained(tmp_path / "last")
    assert same(state(loaded), state(student))


# When the evaluators are called; what they get is in test_evaluation


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"epochs": 2}, [0, 6, 12]),
        ({"max_steps": 8}, [0, 6, 8]),
        ({"epochs": 1, "evaluate_every": 4}, [0, 4, 6]),
        ({"epochs": 1, "evaluate_every": 3}, [0, 3, 6]),
        ({"epochs": 1, "evaluate_every": 1, "accumulate": 2}, [0, 1, 2, 3]),
        ({"epochs": 2, "evaluate_every": None}, [0, 12]),
    ],
)
def test_when_evaluators_are_called(settings, steps):
    calls = Calls()
    result = Trainer(distiller(), loader(), evaluators=[calls], progress=False, **settings).train()
    assert calls.steps == steps
    assert [measurement.step for measurement in result.history] == steps
