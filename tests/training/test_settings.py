"""What the trainer refuses before the first step, and what it says."""

import math

import accelerate
import pytest
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from hookdistill import Match, MatchError, StudentMetric, Trainer, TrainerError
from runs import DATA, HIDDEN, LOGITS, Calls, constant, distiller, loader, model, refused, sgd, trained


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
        ({"scheduler": 3}, r"scheduler= is a torch scheduler, a name or a callable, got int"),
        ({"scheduler": lambda optimizer, total: None}, r"scheduler= must be .*NoneType"),
        ({"scheduler": lambda optimizer, total: ReduceLROnPlateau(optimizer)}, r"without a metric.*ReduceLROnPlateau"),
        ({"scheduler": lambda optimizer, total: OneCycleLR(optimizer, 0.1, total_steps=5)}, r"6 optimizer steps.*has 5 left"),
        ({"eval_loader": TensorDataset(DATA)}, r"eval_loader is a data set"),
        ({"eval_loader": 3}, r"eval_loader is .*int"),
        ({"scheduler": "linnear"}, r"no scheduler is called 'linnear'\. Did you mean 'linear'"),
        ({"scheduler": "reduce_lr_on_plateau"}, r"'reduce_lr_on_plateau'.*needs? a metric"),
        ({"scheduler": "cosine_with_min_lr"}, r"'cosine_with_min_lr' from warm-up and length alone.*lambda"),
        ({"scheduler": constant, "warmup": 3}, r"warmup=3 is for a scheduler by name"),
        ({"warmup": -1}, r"warmup= must be a number above 0"),
        ({"adapter_lr": 0.1, "optimizer": sgd()}, r"adapter_lr=0\.1 .*parameter_groups"),
        ({"weight_decay": -0.1}, r"weight_decay= .*-0\.1"),
        ({"ema": 1.0}, r"ema=1\.0 is the share"),
        ({"balance": "magnitud"}, r"balance='magnitud'.*Did you mean 'magnitude'"),
        ({"on_nonfinite": "ignore"}, r"on_nonfinite='ignore'.*'error', 'skip'"),
        ({"compile": "both"}, r"compile='both'.*'student', 'teacher'"),
        ({"compile_options": {"backend": "eager"}}, r"compile_options= is given without compile=True"),
        ({"teacher_device": "gpu0"}, r"teacher_device='gpu0' is no device"),
        ({"save_every": "step"}, r"save_every= is 'epoch', a number"),
        ({"keep_last": 0}, r"keep_last= must be a whole number above 0"),
        ({"patience": 2}, r"patience= goes by a metric; name it with best="),
        ({"load_best_at_end": True}, r"load_best_at_end= goes by a metric"),
        ({"report": True}, r"report=True needs a place"),
        ({"trackers": "tensorboard"}, r"trackers= is a list, as in trackers=\['tensorboard'\]"),
        ({"trackers": ["tensorbord"]}, r"accelerate refuses .*tensorbord"),
        ({"seed": -1}, r"seed= must be a whole number from 0"),
        ({"gradient_checkpointing": True}, r"Sequential has no gradient_checkpointing_enable.*use_reentrant=False"),
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


def test_trackers_of_ones_own_accelerator_are_set_there():
    refused(r"trackers= is given beside accelerator=", accelerator=accelerate.Accelerator(), trackers=["tensorboard"])


def test_processes_that_accelerate_does_not_know_of_are_an_error(monkeypatch):
    alone = accelerate.Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(r"one of 2 processes \(WORLD_SIZE\), but its Accelerator runs alone.*ACCELERATE_USE_CPU", accelerator=alone)
