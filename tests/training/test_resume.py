"""A run that is cut off and taken up again ends as one that never was, to the bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

import hookdistill
from hookdistill import CheckpointError, Distiller, MagnitudeBalance, Match, StudentMetric, Trainer
from hookdistill.training import load_checkpoint
from hookdistill.training.checkpoints import checkpoints, newest_whole
from hookdistill.training.states import read_state
from pairs import mlps, points, same, state
from runs import DATA, HIDDEN, LOGITS, distiller, loader, noisy, sgd, trainer


class Boom(Exception):
    """What a test raises to cut a run off."""


class CutsOff:
    """An evaluator that raises at a step, and measures something that goes up and down."""

    def __init__(self, at=None):
        self.at = at

    def __call__(self, evaluation):
        if evaluation.step == self.at:
            raise Boom
        return {"score": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7][evaluation.step % 14]}


class Jittered(Dataset):
    """Rows with noise from every global random state that a data set may use."""

    def __len__(self):
        return 24

    def __getitem__(self, row):
        noise = random.random() + float(np.random.rand()) + torch.rand(())  # noqa: NPY002  # the global one is meant
        return DATA[row] * (1 + 0.1 * noise)


class Stream(IterableDataset):
    """The same, without a length."""

    def __iter__(self):
        for row in torch.randperm(24).tolist():
            yield Jittered()[row]


def weighted():
    draw = torch.Generator().manual_seed(7)
    return DataLoader(TensorDataset(DATA), 4, sampler=WeightedRandomSampler(torch.rand(24, generator=draw), 24, generator=draw))


def run(
    folder, *, cut=None, resume=False, make=lambda: noisy(LOGITS, HIDDEN), batches=lambda: loader(shuffle=True), **settings
):
    """A training of 12 steps, two passes; its student, adapters and result, or nothing if it was cut off."""
    made = make()
    options = {"epochs": 2, "optimizer": lambda parameters: AdamW(parameters, lr=0.05), "scheduler": "cosine", "seed": 3}
    options |= {"save_every": 1, "evaluate_every": 1, "evaluators": [CutsOff(cut)], "report": False, **settings}
    if "lr" in options or "adapter_lr" in options:
        del options["optimizer"]
    training = trainer(made, batches(), output_dir=folder, **options)
    try:
        result = training.train(resume=resume)
    except Boom:
        return None
    return state(made.student, made.adapters), result


def whole_and_resumed(tmp_path, cut, **settings):
    whole = run(tmp_path / "whole", **settings)
    assert run(tmp_path / "cut", cut=cut, **settings) is None
    return whole, run(tmp_path / "cut", resume=True, **settings)


CASES = {
    "as it is": {},
    "momentum and a staircase": {
        "optimizer": sgd(momentum=0.9, nesterov=True),
        "scheduler": lambda optimizer, total: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 8]),
    },
    "accumulation, clipping, own rate for adapters": {"accumulate": 2, "clip_norm": 0.1, "lr": 0.05, "adapter_lr": 0.01},
    "an average": {"ema": 0.9},
    "magnitude balance": {"balance": MagnitudeBalance(decay=0.5)},
    "gradient balance": {"balance": hookdistill.GradNormBalance(every=2, alpha=0.5, decay=0.5)},
    "bf16": {"mixed_precision": "bf16"},
    "noise in the data": {"batches": lambda: DataLoader(Jittered(), 4, shuffle=True)},
    "a stream": {"batches": lambda: DataLoader(Stream(), 4), "epochs": None, "max_steps": 12},
    "weighted draws": {"batches": weighted},
    "a list": {"batches": lambda: list(DATA.split(4))},
    "indices skipped": {"batches": lambda: DataLoader(Jittered(), 4, shuffle=True), "quick_resume": True},
    "no seed": {"seed": None},
}


# Before the first checkpoint, between two passes, and in the middle of one.
CUTS = [("as it is", 1), ("as it is", 6), ("noise in the data", 6), ("a stream", 6), *[(name, 8) for name in CASES]]


@pytest.mark.parametrize(("name", "cut"), CUTS)
def test_the_end_is_the_same_to_the_bit(name, cut, tmp_path):
    settings = dict(CASES[name])
    cut = cut // settings.get("accumulate", 1)
    torch.manual_seed(11)
    whole = run(tmp_path / "whole", **settings)
    torch.manual_seed(11)
    assert run(tmp_path / "cut", cut=cut, **settings) is None
    torch.manual_seed(12)  # whatever the process that goes on has drawn before
    resumed = run(tmp_path / "cut", resume=True, **settings)
    assert same(whole[0], resumed[0])
    assert whole[1].history == resumed[1].history
    assert whole[1].losses == resumed[1].losses
    assert (whole[1].steps, whole[1].epochs, whole[1].best) == (resumed[1].steps, resumed[1].epochs, resumed[1].best)


def test_worker_processes_draw_the_same_again(tmp_path):
    whole, resumed = whole_and_resumed(
        tmp_path, 4, epochs=1, batches=lambda: DataLoader(Jittered(), 4, shuffle=True, num_workers=2)
    )
    assert same(whole[0], resumed[0])


def test_a_run_cut_off_twice_and_one_that_was_done_are_taken_up(tmp_path):
    whole = run(tmp_path / "whole")
    assert run(tmp_path / "cut", cut=3) is None
    assert run(tmp_path / "cut", cut=9, resume=True) is None
    first = run(tmp_path / "cut", resume=True)
    again = run(tmp_path / "cut", resume=True)
    for resumed in (first, again):
        assert same(whole[0], resumed[0])
        assert resumed[1].history == whole[1].history


@pytest.mark.parametrize("settings", [{"save_every": "epoch"}, {"save_every": 5, "evaluate_every": "epoch"}])
def test_what_was_done_after_the_last_checkpoint_is_done_again(settings, tmp_path):
    class AtTheEnd(CutsOff):
        def __call__(self, evaluation):
            if self.at is not None and evaluation.step == 12:
                raise Boom
            return super().__call__(evaluation)

    whole = run(tmp_path / "whole", **{**settings, "evaluators": [AtTheEnd()]})
    assert run(tmp_path / "cut", **{**settings, "evaluators": [AtTheEnd(0.5)]}) is None
    resumed = run(tmp_path / "cut", resume=True, **{**settings, "evaluators": [AtTheEnd()]})
    assert same(whole[0], resumed[0])
    assert whole[1].history == resumed[1].history


def test_the_evaluation_after_a_pass_is_not_lost_when_the_checkpoint_was_saved_before_it(tmp_path):
    settings = {"evaluate_every": "epoch", "save_every": 6, "epochs": 3}
    whole, resumed = whole_and_resumed(tmp_path, 6, **settings)
    assert [each.step for each in resumed[1].history] == [0, 6, 12, 18]
    assert whole[1].history == resumed[1].history
    assert same(whole[0], resumed[0])


def test_best_and_patience_go_on(tmp_path):
    settings = {"best": "score", "patience": 3, "load_best_at_end": True}
    whole, resumed = whole_and_resumed(tmp_path, 7, **settings)
    assert (resumed[1].best.step, resumed[1].steps, resumed[1].stopped_early) == (5, 8, True)
    assert same(whole[0], resumed[0])
    assert run(tmp_path / "cut", resume=True, **settings)[1].steps == 8


def test_batch_norm_and_tied_weights_are_in_the_checkpoint(tmp_path):
    def make():
        made = Distiller(*mlps(student_width=6, dropout=0.3), [Match("head", "head", loss="kl"), Match("second", "second")])
        made.student.twin = made.student.second
        return made

    rows = {key: value for key, value in points(24).items() if key == "x"}

    def batches():
        return DataLoader([{"x": row} for row in rows["x"]], 4, shuffle=True)

    whole, resumed = whole_and_resumed(tmp_path, 5, make=make, batches=batches)
    assert same(whole[0], resumed[0])


def test_training_goes_on_in_the_log_without_what_was_cut_off(tmp_path):
    run(tmp_path, cut=7, save_every=5, log_every=1)
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "st')
    run(tmp_path, resume=True, save_every=5, log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "resumed"] == [5]


# What is on the disk


def test_only_safetensors_and_json_are_on_the_disk(tmp_path):
    run(tmp_path, ema=0.9, best="score", load_best_at_end=True)
    suffixes = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".jsonl", ".safetensors"}
    checkpoint = newest_whole(tmp_path / "checkpoints")
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) >= {"student.0.weight", "student.2.bias", "loss.adapters.hidden.project.weight"}
    ranks = read_state(checkpoint, "run")["ranks"]
    assert set(ranks[0]["random"]) == {"python", "numpy", "torch"}
    assert not list(tmp_path.rglob(".partial-*"))


@pytest.mark.parametrize(("settings", "kept"), [({}, [12, 11]), ({"keep_last": 1}, [12]), ({"save_every": "epoch"}, [12, 6])])
def test_which_checkpoints_stay(settings, kept, tmp_path):
    result = run(tmp_path, **settings)[1]
    assert [int(path.name[5:]) for path in checkpoints(tmp_path / "checkpoints")] == kept
    assert result.checkpoint == tmp_path / "checkpoints" / f"step-{kept[0]:09d}"


def test_without_a_place_nothing_is_saved(tmp_path):
    assert run(tmp_path, save_every=None)[1].checkpoint is None
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", cut=8)
    newest = checkpoints(tmp_path / "cut" / "checkpoints")[0]
    os.truncate(newest / "model.safetensors", 10)
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        resumed = run(tmp_path / "cut", resume=True)
    assert same(whole[0], resumed[0])


def test_a_path_names_a_checkpoint_and_a_run_may_have_another_folder(tmp_path):
    whole = run(tmp_path / "whole", keep_last=None)
    old = tmp_path / "whole" / "checkpoints" / "step-000000004"
    resumed = run(tmp_path / "other", resume=old)
    assert same(whole[0], resumed[0])
    assert same(run(tmp_path / "third", resume=str(tmp_path / "whole"))[0], whole[0])


# What cannot be gone on with


def test_a_checkpoint_of_another_run_is_an_error_that_lists_the_differences(tmp_path):
    run(tmp_path, cut=4)
    with pytest.raises(
        CheckpointError, match=r"another run.*optimizer steps in all \(12 then, 18 now\).*seed \(3 then, 4 now\)"
    ):
        run(tmp_path, resume=True, epochs=3, seed=4)
    with pytest.raises(CheckpointError, match=r"matches \(hidden: mse then, none now\); parameters \(loss\.adapters"):
        run(tmp_path, resume=True, make=lambda: noisy(LOGITS))
    with pytest.raises(CheckpointError, match=r"optimizer \(AdamW then, SGD now\)"):
        run(tmp_path, resume=True, optimizer=sgd())
    with pytest.raises(CheckpointError, match=r"batches of a pass \(6 then, 5 now\)"):
        run(tmp_path, resume=True, batches=lambda: loader(rows=20), epochs=None, max_steps=12)


def test_a_state_that_cannot_be_saved_is_an_error_before_the_first_step(tmp_path):
    class Odd(AdamW):
        def state_dict(self):
            return {**super().state_dict(), "odd": object()}

    made = distiller()
    before = state(made.student)
    with pytest.raises(CheckpointError, match=r"optimizer\.odd is a object.*save_every=None"):
        trainer(made, optimizer=lambda parameters: Odd(parameters), output_dir=tmp_path).train()
    assert same(state(made.student), before)
    trainer(made, optimizer=lambda parameters: Odd(parameters), output_dir=tmp_path, save_every=None, report=False).train()


def test_a_loader_that_has_become_shorter_is_an_error(tmp_path):
    settings = {"epochs": None, "max_steps": 12}
    run(tmp_path, cut=4, batches=lambda: iter(list(DATA.split(2))), **settings)
    with pytest.raises(hookdistill.TrainerError, match=r"after 3 batches of pass 1, but now train_loader gives 2"):
        run(tmp_path, resume=True, batches=lambda: iter(list(DATA.split(12))), **settings)


# Killed for real


def killed_run(folder, steps_then_kill):
    class Kills:
        def __call__(self, evaluation):
            if evaluation.step == steps_then_kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"score": 0.0}

    run(folder, resume=True, evaluators=[Kills()])


def test_killed_again_and_again(tmp_path):
    whole = run(tmp_path / "whole", evaluators=[StudentMetric("score", lambda student, _: 0.0)], eval_loader=[DATA])
    for step in (1, 5, 6, 11):
        process = get_context("fork").Process(target=killed_run, args=(tmp_path / "cut", step))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    resumed = run(tmp_path / "cut", resume=True, evaluators=[lambda evaluation: {"score": 0.0}])
    assert same(whole[0], resumed[0])
    last = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "cut")]
    assert same(list(last[0].values()), list(last[1].values()))
    assert not list(Path(tmp_path / "cut").rglob(".partial-*"))


def test_a_folder_that_a_killed_process_left_untidy_is_tidied(tmp_path):
    run(tmp_path, cut=6)
    (tmp_path / "checkpoints" / ".partial-x").mkdir()
    (tmp_path / ".partial-y").mkdir()
    shutil.move(tmp_path / "checkpoints" / "step-000000005", tmp_path / "checkpoints" / ".replaced-step-000000005")
    result = run(tmp_path, resume=True, cut=None)[1]
    assert result.steps == 12
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "resumed"] == [5]
    assert not list(tmp_path.rglob(".*"))


def test_a_second_training_is_no_resumption(tmp_path):
    made = distiller()
    first = Trainer(made, loader(), epochs=1, output_dir=tmp_path, report=False, progress=False)
    first.train()
    before = state(made.student)
    assert first.train().steps == 6
    assert not same(before, state(made.student))


def test_a_run_that_was_cut_off_is_not_overwritten_and_one_that_was_done_is(tmp_path):
    run(tmp_path, cut=4)
    with pytest.raises(CheckpointError, match=r"has a checkpoint of step 3 of a run that has not come to its end.*resume=True"):
        run(tmp_path)
    whole = run(tmp_path, resume=True)
    again = run(tmp_path, epochs=None, max_steps=2)
    assert (whole[1].steps, again[1].steps) == (12, 2)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path / "checkpoints")] == [2, 1]


def test_the_weights_of_a_checkpoint_are_loaded_into_a_distiller(tmp_path):
    whole = run(tmp_path, keep_last=None)
    made = noisy(LOGITS, HIDDEN)
    with pytest.raises(CheckpointError, match=r"weights \(loss\.adapters\.hidden\.project\.weight: \[8, 5\] then, none now\)"):
        load_checkpoint(made, tmp_path)
    made.plan([DATA])
    assert load_checkpoint(made, tmp_path) == 12
    assert same(state(made.student, made.adapters), whole[0])
    assert load_checkpoint(made, tmp_path / "checkpoints" / "step-000000003") == 3
    assert not same(state(made.student, made.adapters), whole[0])
    with pytest.raises(CheckpointError, match="is no folder"):
        load_checkpoint(made, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        load_checkpoint(made, tmp_path / "last")


def test_the_fault_script_kills_and_compares(tmp_path):
    script = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "faults.py"
    command = [sys.executable, str(script), "--kills", "2", "--steps", "10", "--fork", "--out", str(tmp_path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert len(found["kills"]) == 2
    assert found["differences"] == []
    assert "The end is the same to the bit." in done.stdout
