"""What can be seen of a run while it goes on: the bar, the log, the trackers, and what was run."""

import math

import pytest
import torch
from accelerate.tracking import GeneralTracker
from torch.nn import functional as F
from torch.optim import SGD

import hookdistill
from hookdistill import Match, StudentMetric, Trainer
from hookdistill.journal import read_log, read_run
from runs import DATA, HIDDEN, LOGITS, constant, distiller, loader, trainer


def lines(folder, kind=None):
    found = list(read_log(folder / "log.jsonl"))
    return [line for line in found if kind in (None, line["kind"])]


class Kept(GeneralTracker):
    """A tracker that keeps everything."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.finished = None, [], 0

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


# The log


def test_every_part_rate_norm_and_speed_is_logged(tmp_path):
    trainer(distiller(LOGITS, HIDDEN), epochs=2, output_dir=tmp_path, log_every=4, report=False).train()
    steps = lines(tmp_path, "step")
    assert [line["step"] for line in steps] == [4, 8, 12]
    for line in steps:
        assert {"loss", "parts", "lr", "gradient_norm", "memory_mib", "epoch", "time"} <= set(line)
        assert line["examples_per_second"] > 0
        assert line["steps_per_second"] > 0
        assert line["loss"] == pytest.approx(line["parts"]["logits"] + line["parts"]["hidden"], rel=1e-5)


def test_values_are_means_over_the_steps_since_the_last_line(tmp_path):
    made = distiller()
    batches = DATA.split(4)
    with torch.no_grad():
        expected = [float(F.mse_loss(made.student(x), made.teacher(x))) for x in batches]
    trainer(made, output_dir=tmp_path, log_every=3, optimizer=lambda p: SGD(p, lr=0.0), report=False).train()
    assert [line["parts"]["logits"] for line in lines(tmp_path, "step")] == pytest.approx(
        [sum(expected[:3]) / 3, sum(expected[3:]) / 3]
    )


def test_the_norm_is_that_of_the_whole_gradient_and_does_not_change_it(tmp_path):
    made, norms = distiller(), []

    def optimizer(parameters):
        made_optimizer = SGD(parameters, lr=0.1)
        made_optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))
        )
        return made_optimizer

    trainer(made, output_dir=tmp_path, log_every=1, optimizer=optimizer, report=False).train()
    assert [line["gradient_norm"] for line in lines(tmp_path, "step")] == pytest.approx(norms)


def test_events_are_in_order(tmp_path):
    trainer(distiller(), output_dir=tmp_path, eval_loader=loader(), log_every=3, report=False).train()
    kinds = [line["kind"] for line in lines(tmp_path)]
    assert kinds == ["start", "evaluation", "step", "step", "evaluation", "checkpoint", "end"]
    assert lines(tmp_path, "evaluation")[0]["metrics"].keys() == {"eval/loss", "eval/loss/logits"}
    end = lines(tmp_path, "end")[0]
    assert end["seconds"] > 0 and end["parts"].keys() == {"logits"}


def test_numbers_that_json_does_not_know_come_back(tmp_path):
    metric = StudentMetric("odd", lambda student, batches: math.inf)
    trainer(distiller(), output_dir=tmp_path, evaluators=[metric], eval_loader=[DATA], report=False).train()
    text = (tmp_path / "log.jsonl").read_text()
    assert "Infinity" not in text
    assert lines(tmp_path, "evaluation")[0]["metrics"] == {"odd": math.inf}


def test_a_new_training_begins_a_new_log(tmp_path):
    for _ in range(2):
        trainer(distiller(), output_dir=tmp_path, log_every=6, report=False).train()
    assert [line["kind"] for line in lines(tmp_path)].count("start") == 1


def test_no_log_without_a_place():
    assert trainer(distiller(), log_every=1).train().steps == 6


def test_half_a_line_is_passed_over_and_a_broken_one_is_not(tmp_path):
    (tmp_path / "log").write_text('{"kind": "a"}\n{"ki')
    assert list(read_log(tmp_path / "log")) == [{"kind": "a"}]
    (tmp_path / "log").write_text('{"ki\n{"kind": "a"}\n')
    with pytest.raises(hookdistill.TrainerError, match=r"line 1 of .*log.* is damaged"):
        list(read_log(tmp_path / "log"))


# What was run


def test_plan_settings_versions_and_machine_are_written_down(tmp_path):
    made = distiller(LOGITS, HIDDEN)
    trainer(made, output_dir=tmp_path, seed=3, clip_norm=0.5, report=False).train()
    run = read_run(tmp_path)
    assert [row["name"] for row in run["plan"]] == ["logits", "hidden"]
    assert run["plan"][1]["adapter"] == "Linear(5→8)"
    assert (run["settings"]["seed"], run["settings"]["clip_norm"], run["steps"]) == (3, 0.5, 6)
    assert run["versions"]["hookdistill"] == hookdistill.__version__
    assert run["versions"]["torch"] == torch.__version__
    assert run["student"] == {"class": "Sequential", "parameters": 53, "trained": 53}
    assert (run["optimizer"], run["scheduler"], run["processes"]) == ("SGD", "ConstantLR", 1)


def test_a_folder_that_is_none_of_a_run_is_an_error(tmp_path):
    with pytest.raises(hookdistill.TrainerError, match=r"is no output folder of a Trainer"):
        read_run(tmp_path)


# Trackers


def test_trackers_get_config_parts_and_metrics():
    kept = Kept()
    trainer(distiller(LOGITS, HIDDEN), trackers=[kept], eval_loader=loader(), log_every=2, seed=1).train()
    assert kept.config["seed"] == 1
    steps = [(step, values) for step, values in kept.logged if "loss" in values]
    assert [step for step, _ in steps] == [2, 4, 6]
    assert {"loss/logits", "loss/hidden", "lr", "gradient_norm", "examples_per_second", "memory_mib"} <= set(steps[0][1])
    assert [step for step, values in kept.logged if "eval/loss" in values] == [0, 6]
    assert kept.finished == 1


def test_trackers_of_ones_own_accelerator_get_the_same_and_stay_open():
    from accelerate import Accelerator

    kept = Kept()
    accelerator = Accelerator(log_with=[kept])
    accelerator.init_trackers("mine")
    trainer(distiller(), accelerator=accelerator, log_every=3).train()
    assert [step for step, _ in kept.logged] == [3, 6]
    assert kept.finished == 0


def test_tensorboard_files_are_written(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    trainer(distiller(), output_dir=tmp_path, trackers=["tensorboard"], project="mine", report=False).train()
    assert list((tmp_path / "mine").rglob("events.out.tfevents.*"))


# The bar


def test_the_bar_shows_losses_and_rate(capsys):
    Trainer(distiller(LOGITS, HIDDEN), loader(), epochs=1, scheduler=constant, lr=0.25).train()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "6/6" in shown
    assert all(name in shown for name in ("loss", "logits", "hidden", "lr 0.25", "step/s", "examples/s"))


def test_no_bar_without_progress(capsys):
    trainer(distiller()).train()
    assert capsys.readouterr().err == ""


def test_a_match_may_be_called_loss(tmp_path):
    result = trainer(
        distiller(Match("2", "2", name="loss", weight=3.0)), output_dir=tmp_path, log_every=6, report=False
    ).train()
    (line,) = lines(tmp_path, "step")
    assert line["loss"] == pytest.approx(3 * line["parts"]["loss"])
    assert result.loss == pytest.approx(3 * result.losses["loss"])
