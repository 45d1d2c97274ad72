"""The loop: what it trains and how far, what it leaves behind, and what it refuses before the first step."""

import math

import accelerate
import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from transformers import BertConfig, BertModel

import hookdistill
from hookdistill import Distiller, HookDistillError, Match, MatchError, StudentMetric, Trainer, TrainerError
from pairs import flags, gradients, hooks, same, state

LOGITS = Match("2", "2", name="logits")
HIDDEN = Match("0", "0", name="hidden")
DATA = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate's state is one for the process; a test that makes an Accelerator must not decide for the next."""
    yield
    accelerate.state.AcceleratorState._reset_state()
    GradientState._reset_state()


def model(width, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def distiller(*matches):
    return Distiller(model(8, seed=1), model(5, seed=2), list(matches) or [LOGITS])


def noisy(*matches):
    """With a student that draws random numbers in training."""
    made = distiller(*matches)
    made.student[1] = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))
    return made


def loader(batch_size=4, rows=24, *, shuffle=False):
    return DataLoader(TensorDataset(DATA[:rows]), batch_size, shuffle=shuffle)


def sgd(lr=0.1):
    return lambda parameters: SGD(parameters, lr=lr)


def constant(optimizer, total_steps):
    return ConstantLR(optimizer, factor=1.0)


def trained(made, batches=None, **settings):
    """The student's state after a training."""
    settings = {"progress": False, "optimizer": sgd(), "scheduler": constant, **settings}
    if "max_steps" not in settings:
        settings.setdefault("epochs", 1)
    Trainer(made, loader() if batches is None else batches, **settings).train()
    return state(made.student)


def by_hand(batches, *, lr=0.1, clip=None):
    """The student's state after SGD on the loss spelled out; each item is the list of batches of one step."""
    made = distiller()
    parameters = list(made.student.parameters())
    for group in batches:
        total = sum(F.mse_loss(made.student(x), made.teacher(x).detach()) for x in group) / len(group)
        found = gradients(made.student, total)
        norm = torch.cat([each.flatten() for each in found]).norm()
        scale = 1.0 if clip is None else min(1.0, clip / float(norm))
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter -= lr * scale * gradient
    return state(made.student)


def close(left, right):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(left, right, strict=True))


class Calls:
    """An evaluator that keeps what it was given."""

    def __init__(self, *values):
        self.values, self.seen = list(values), []

    def __call__(self, evaluation):
        self.seen.append(evaluation)
        return {"score": self.values.pop(0) if self.values else 0.0}

    @property
    def steps(self):
        return [evaluation.step for evaluation in self.seen]


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


# Optimizer and scheduler


def spied(into):
    def make(optimizer, total_steps):
        into.append((optimizer, total_steps))
        return constant(optimizer, total_steps)

    return make


def test_the_default_optimizer_trains_adapters_and_decays_no_biases():
    made, spy = distiller(LOGITS, HIDDEN), []
    Trainer(made, loader(), epochs=1, lr=0.5, scheduler=spied(spy), progress=False).train()
    ((optimizer, total),) = spy
    assert type(optimizer) is AdamW
    assert total == 6
    decayed, others = (group["params"] for group in optimizer.param_groups)
    weights = [made.student[0].weight, made.student[2].weight, *made.adapters.parameters()]
    assert {id(each) for each in decayed} == {id(each) for each in weights}
    assert {id(each) for each in others} == {id(made.student[0].bias), id(made.student[2].bias)}
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.01), (0.5, 0.0)]


def test_the_default_schedule_is_a_cosine_to_zero():
    made = distiller()
    optimizer = SGD(made.parameters(), lr=1.0)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    Trainer(made, loader(), epochs=2, accumulate=2, optimizer=optimizer, progress=False).train()
    assert rates == pytest.approx([(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def test_a_given_scheduler_steps_with_the_optimizer():
    made = distiller()
    optimizer = SGD(made.parameters(), lr=1.0)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    trained(made, epochs=2, accumulate=2, optimizer=optimizer, scheduler=scheduler)
    assert scheduler.last_epoch == 6


def test_adapters_are_trained():
    made = distiller(HIDDEN)
    made.plan([DATA])
    before = state(made.adapters)
    trained(made)
    assert not same(before, state(made.adapters))


def test_parts_of_the_student_may_be_left_out():
    made = distiller()
    before = state(made.student[0])
    kept = []  # gradients that would pile up, as no optimizer clears them

    def look(evaluation):
        kept.extend(parameter.grad for parameter in made.parameters() if parameter.grad is not None)
        return {}

    trained(made, optimizer=SGD(made.student[2].parameters(), lr=0.1), evaluators=[look], evaluate_every=1)
    assert same(before, state(made.student[0]))
    assert kept == []


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
        made, loader(), epochs=3, evaluators=[scores, keeps], best="score", output_dir=tmp_path / "out", progress=False
    ).train()
    assert (result.best.step, result.best.epoch, result.best.metrics) == (6, 1, {"score": 0.9})
    for name, expected in (("best", seen[1]), ("last", state(made.student))):
        found = load_file(tmp_path / "out" / name / "model.safetensors")
        assert same([found[key] for key in made.student.state_dict()], expected)
    adapters = load_file(tmp_path / "out" / "last" / "adapters.safetensors")
    assert same([adapters[key] for key in made.adapters.state_dict()], state(made.adapters))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["best", "last"]


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


# Progress


def test_the_bar_shows_the_losses(capsys):
    Trainer(distiller(LOGITS, HIDDEN), loader(), epochs=1).train()
    shown = capsys.readouterr().err
    assert "6/6" in shown
    assert all(name in shown.split("\r")[-1] for name in ("loss", "logits", "hidden"))


def test_no_bar_without_progress(capsys):
    trained(distiller())
    assert capsys.readouterr().err == ""


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


# What is refused, and says so


def refused(message, made=None, batches=None, *, error=TrainerError, **settings):
    """The settings are an error, at the latest before the first optimizer step, and the student is as before."""
    made = made or distiller()
    before, modes = state(made.student), flags(made.student, made.teacher)
    if not {"epochs", "max_steps"} & set(settings):
        settings["epochs"] = 1
    with pytest.raises(error, match=message) as caught:
        Trainer(made, loader() if batches is None else batches, progress=False, **settings).train()
    assert isinstance(caught.value, HookDistillError)
    assert same(state(made.student), before)
    assert flags(made.student, made.teacher) == modes
    assert hooks(made.student, made.teacher) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1, "max_steps": 1}, r"epochs= or max_steps=.*both"),
        ({"epochs": None}, r"epochs= or max_steps=.*neither"),
        ({"epochs": 0}, r"epochs= must be a whole number above 0, got 0"),
        ({"epochs": 1.5}, r"epochs= .*1\.5"),
        ({"max_steps": -1}, r"max_steps= .*-1"),
        ({"max_steps": True}, r"max_steps= .*True"),
        ({"accumulate": 0}, r"accumulate= .*0"),
        ({"clip_norm": 0.0}, r"clip_norm= must be a number above 0"),
        ({"clip_norm": math.nan}, r"clip_norm= .*nan"),
        ({"lr": -1e-3}, r"lr= .*-0\.001"),
        ({"lr": 0.1, "optimizer": sgd()}, r"lr=0\.1 is for the default optimizer"),
        ({"mixed_precision": "half"}, r"mixed_precision='half'.*'bf16'"),
        ({"mixed_precision": "fp16"}, r"'fp16' needs a GPU"),
        ({"evaluate_every": "step"}, r"evaluate_every= .*'step'"),
        ({"evaluate_every": 0}, r"evaluate_every= .*0"),
        ({"evaluators": Calls()}, r"evaluators= is a list"),
        ({"evaluators": [3]}, r"evaluators= is a list.*3"),
        ({"best": "score"}, r"best='score'.*nothing is measured"),
        ({"best": "scor", "evaluators": [Calls()]}, r"best='scor'.*Did you mean 'score'"),
        ({"evaluators": [StudentMetric("accuracy", lambda student, batches: 0.0)]}, r"'accuracy'.*eval_loader="),
        ({"optimizer": 3}, r"optimizer= is a torch optimizer or a callable, got int"),
        ({"optimizer": lambda parameters: None}, r"optimizer= must return a torch optimizer, it returned NoneType"),
        ({"scheduler": 3}, r"scheduler= is a torch scheduler or a callable, got int"),
        ({"scheduler": lambda optimizer, total: None}, r"scheduler= must be .*NoneType"),
        ({"scheduler": lambda optimizer, total: ReduceLROnPlateau(optimizer)}, r"without a metric.*ReduceLROnPlateau"),
        ({"scheduler": lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=5)}, r"6 optimizer steps.*has 5 left"),
        ({"eval_loader": TensorDataset(DATA)}, r"eval_loader is a data set"),
        ({"eval_loader": 3}, r"eval_loader is .*int"),
        ({"eval_loader": []}, r"eval_loader gave no batch at step 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_wrong_setting_is_an_error_before_the_first_step(settings, message):
    refused(message, **settings)


@pytest.mark.parametrize(
    ("batches", "settings", "message"),
    [
        (TensorDataset(DATA), {}, r"train_loader is a data set.*DataLoader\(train_loader"),
        (3, {}, r"train_loader is a DataLoader .*int"),
        ([], {}, r"train_loader is empty"),
        (DataLoader(TensorDataset(DATA[:3]), 4, drop_last=True), {}, r"train_loader is empty.*drop_last"),
        (iter([]), {"max_steps": 2}, r"train_loader gives no batch"),
        (iter([DATA]), {"epochs": 2}, r"epochs=2 needs .* length.*max_steps="),
    ],
    ids=["data set", "number", "empty list", "empty loader", "empty generator", "generator"],
)
def test_a_wrong_loader_is_an_error_before_the_first_step(batches, settings, message):
    refused(message, batches=batches, **settings)


def test_only_a_distiller_can_be_trained():
    with pytest.raises(TrainerError, match=r"hookdistill\.Distiller.*Sequential"):
        Trainer(model(3, seed=0), loader(), epochs=1)


def test_an_optimizer_made_before_the_adapters_is_an_error_that_names_them():
    made = distiller(LOGITS, HIDDEN)
    refused(r"adapters .*'hidden'.*distiller\.plan\(batch\)", made, optimizer=SGD(made.parameters(), lr=0.1))


def test_an_optimizer_without_adapters_that_exist_is_an_error_at_once():
    made = distiller(LOGITS, HIDDEN)
    made.plan([DATA])
    with pytest.raises(TrainerError, match=r"adapters .*'hidden'"):
        Trainer(made, loader(), epochs=1, optimizer=SGD(made.student.parameters(), lr=0.1))
    trained(made, optimizer=SGD(made.parameters(), lr=0.1))


def test_an_optimizer_without_the_student_is_an_error():
    refused(r"holds no parameter of the student", optimizer=SGD(model(3, seed=0).parameters(), lr=0.1))


def test_an_optimizer_that_would_train_the_teacher_is_an_error():
    made = distiller()
    both = [*made.student.parameters(), *made.teacher.parameters()]
    refused(r"4 parameters that are not the distiller's.*\[8, 6\]", made, optimizer=SGD(both, lr=0.1))


def test_a_frozen_student_is_an_error():
    made = distiller()
    made.student.requires_grad_(False)
    refused(r"no parameter of the student requires a gradient", made)


def test_a_scheduler_of_another_optimizer_is_an_error():
    made = distiller()
    optimizer, other = (SGD(made.parameters(), lr=0.1) for _ in range(2))
    refused(r"another optimizer", made, optimizer=optimizer, scheduler=CosineAnnealingLR(other, 6))
    refused(r"another optimizer", made, scheduler=CosineAnnealingLR(other, 6))


def test_a_setting_that_contradicts_the_accelerator_is_an_error():
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    refused(r"accumulate=3 .* accelerator.* has 2", accumulate=3, accelerator=accelerator)
    refused(r"mixed_precision='bf16' .* accelerator.* has 'no'", mixed_precision="bf16", accelerator=accelerator)


def test_a_setting_that_the_environment_of_accelerate_launch_overrules_is_an_error(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    refused(r"accumulate=3 .*environment.* has 2", accumulate=3)


def test_another_precision_than_that_of_an_accelerator_in_the_process_is_an_error():
    accelerator = accelerate.Accelerator(mixed_precision="bf16")
    assert accelerator.mixed_precision == "bf16"
    refused(r"mixed_precision='no'.*accelerator=", mixed_precision="no")


def test_an_output_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    refused(r"output_dir=.*file", output_dir=tmp_path / "file")


def test_a_match_that_cannot_be_carried_out_is_an_error_before_the_first_step():
    refused(r"labels", distiller(LOGITS, Match(None, "2", loss="cross_entropy", target="labels")), error=MatchError)


def test_a_generator_that_ends_too_early_is_an_error():
    with pytest.raises(TrainerError, match=r"pass 2 over train_loader gave no batch, at step 6 of 7"):
        trained(distiller(), iter(DATA.split(4)), max_steps=7)


@pytest.mark.parametrize(
    ("settings", "seconds", "seen_after"),
    [({}, 1e6, 6), ({}, 0.0, 4), ({"evaluators": [Calls()], "evaluate_every": 1}, 1e6, 4)],
    ids=["at the end", "when losses are shown", "before measuring"],
)
def test_a_loss_that_is_not_finite_is_an_error_and_the_student_is_not_saved(
    settings, seconds, seen_after, tmp_path, monkeypatch
):
    monkeypatch.setattr("hookdistill.trainer._SECONDS_BETWEEN_LOOKS", seconds)
    batches = list(DATA.split(4))
    batches[3] = batches[3] * math.nan
    with pytest.raises(TrainerError, match=r"no longer finite.*loss nan, logits nan") as caught:
        trained(distiller(), batches, output_dir=tmp_path, **settings)
    assert f"now after step {seen_after}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
