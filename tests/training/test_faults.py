"""What goes wrong in a long run: each fault is named, nothing half-written stays, and the models are as the user gave them."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hookdistill
from hookdistill import (
    BatchError,
    CheckpointError,
    Distiller,
    HookDistillError,
    Match,
    Trainer,
    TrainerError,
    TrainerInterrupted,
)
from hookdistill.training.checkpoints import newest_whole
from hookdistill.training.interruption import Interruption
from pairs import flags, hooks, mlps, points, same, state
from runs import DATA, HIDDEN, LOGITS, Calls, by_hand, close, distiller, loader, sgd, trained, trainer


@contextlib.contextmanager
def fails(message, made, *, error=TrainerError):
    """An error of this kind, after which the models have no hooks and gradients and are in the modes they were in."""
    modes, teacher = flags(made.student, made.teacher), state(made.teacher)
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert flags(made.student, made.teacher) == modes
    assert same(state(made.teacher), teacher)
    assert hooks(made.student, made.teacher) == 0
    assert all(parameter.grad is None for parameter in made.parameters())


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith("."))


# Not finite


def spoilt(value=math.nan, at=3):
    batches = list(DATA.split(4))
    batches[at] = batches[at] * value
    return batches


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_match_and_batch_before_it_is_trained_on(value, tmp_path):
    made = distiller(LOGITS, HIDDEN)
    message = (
        r"matches 'logits', 'hidden' are no longer finite at step 4, batch 4 of pass 1: loss (nan|inf).*batch itself .* '0'"
    )
    with fails(message, made):
        trainer(made, spoilt(value), output_dir=tmp_path).train()
    assert all(bool(each.isfinite().all()) for each in state(made.student))
    assert not (tmp_path / "last").exists()


def test_one_match_that_is_not_finite_is_named():
    def breaks(student, teacher, mask=None):
        return student.square().mean() / (calls.append(1) or (0.0 if len(calls) > 3 else 1.0))

    calls = []
    made = distiller(LOGITS, Match("2", "2", loss=breaks, name="mine"))
    with fails(r"the match 'mine' is no longer finite at step 3", made):
        trainer(made).train()


def test_a_gradient_that_is_not_finite_is_an_error_where_it_is_clipped():
    made = distiller()
    made.student[0].weight.register_hook(lambda gradient: gradient * math.nan)
    before = state(made.student)
    with fails(r"the gradient is no longer finite, although the losses are, at step 1, batch 1 of pass 1", made):
        trainer(made, clip_norm=1.0).train()
    assert same(before, state(made.student))


@pytest.mark.parametrize(
    ("settings", "seconds", "seen_after"),
    [({}, 1e6, "last"), ({}, 0.0, "now"), ({"evaluators": [Calls()], "evaluate_every": 1}, 1e6, "now")],
    ids=["at the end", "when losses are shown", "before measuring"],
)
def test_on_a_device_that_nobody_waits_for_it_is_noticed_late_and_nothing_is_saved(
    settings, seconds, seen_after, tmp_path, monkeypatch
):
    monkeypatch.setattr("hookdistill.training.loop._SECONDS_BETWEEN_LOOKS", seconds)
    monkeypatch.setattr("hookdistill.training.loop.Run._is_taken", lambda *_: True)
    steps = []
    optimizer = lambda parameters: _counted(sgd()(parameters), steps)  # noqa: E731
    made = distiller()
    with fails(r"'logits' is no longer finite at step 4, batch 4 of pass 1: loss nan, logits nan.*was trained with it", made):
        trainer(made, spoilt(), output_dir=tmp_path, optimizer=optimizer, save_every=2, **settings).train()
    assert len(steps) == {"last": 4, "now": 4}[seen_after]  # the checkpoint at step 4 looks first
    assert newest_whole(tmp_path / "checkpoints").name == "step-000000002"
    assert not (tmp_path / "last").exists()


def _counted(optimizer, steps):
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    return optimizer


def test_steps_that_are_not_finite_can_be_passed_over(tmp_path):
    made = distiller()
    result = trainer(made, spoilt(), on_nonfinite="skip", output_dir=tmp_path, report=False).train()
    batches = [[batch] for number, batch in enumerate(DATA.split(4)) if number != 3]
    assert close(state(made.student), by_hand(batches))
    assert (result.steps, result.skipped) == (6, 1)
    assert math.isfinite(result.loss)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if line["kind"] == "skipped"]
    assert (skipped["step"], skipped["epoch"], skipped["batches"]) == (4, 1, [4, 4])


def test_gradients_that_are_not_finite_can_be_passed_over():
    made, calls = distiller(), []
    made.student[0].weight.register_hook(lambda gradient: gradient * (math.inf if calls.append(1) or len(calls) == 2 else 1.0))
    result = trainer(made, on_nonfinite="skip").train()
    assert result.skipped == 1
    assert all(bool(each.isfinite().all()) for each in state(made.student))


def test_not_everything_is_passed_over(monkeypatch):
    monkeypatch.setattr("hookdistill.training.loop._SKIPS_IN_A_ROW", 3)
    made = distiller()
    before = state(made.student)
    with fails(r"3 steps in a row were passed over.*step 3, batch 3 of pass 1", made):
        trainer(made, [DATA * math.nan] * 5, on_nonfinite="skip").train()
    assert same(before, state(made.student))


# Disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; where none can be mounted, a disk that is full once that much was written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tiny tmpfs needs rights that are not given here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def large():
    """Whose checkpoint does not fit twice."""
    with torch.random.fork_rng():
        student = nn.Sequential(nn.Linear(6, 800), nn.Tanh(), nn.Linear(800, 3))
    return Distiller(nn.Sequential(nn.Linear(6, 3)), student, [Match("0", "2")])


def test_a_full_disk_ends_the_run_with_a_whole_checkpoint_and_the_student_in_memory(small_disk, tmp_path):
    made = large()
    before = state(made.student)
    with fails(r"No space left on device.*MiB are free.*Nothing half-written.*distiller\.export\(path\) elsewhere", made):
        trainer(made, epochs=5, output_dir=small_disk, save_every=1, keep_last=None).train()
    assert left_in(small_disk) == []
    found = newest_whole(small_disk / "checkpoints")
    assert found is not None
    assert not same(before, state(made.student))
    made.export(tmp_path / "elsewhere")
    again = large().student
    hookdistill.load_student(again, tmp_path / "elsewhere")
    assert same(state(again), state(made.student))


def test_a_log_that_cannot_be_written_is_an_error(small_disk):
    made = distiller()
    (small_disk / "filler").write_bytes(b"\0" * 200_000)
    with fails(r"log\.jsonl' cannot be written: .*No space left.*resume=True", made):
        trainer(made, epochs=2000, output_dir=small_disk, save_every=None, log_every=1).train()


def test_a_full_disk_where_none_can_be_mounted(tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from safetensors import torch as safetensors_torch

    def save_file(tensors, file, *args, **kwargs):
        if "0000" not in file and "optimizer" in file:
            Path(file).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return real(tensors, file, *args, **kwargs)

    real = safetensors_torch.save_file
    monkeypatch.setattr(safetensors_torch, "save_file", save_file)
    made = distiller()
    with fails(r"No space left on device.*Nothing half-written", made, error=CheckpointError):
        trainer(made, output_dir=tmp_path, save_every=1, optimizer=sgd(momentum=0.9)).train()
    assert left_in(tmp_path) == []
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_read_only_folder_is_an_error_before_the_first_step(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting needs rights that are not given here: {done.stderr.strip()}")
    try:
        with pytest.raises(TrainerError, match=r"output_dir=.*cannot be written: .*Read-only file system"):
            Trainer(distiller(), loader(), epochs=1, output_dir=folder / "run")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Data


class Deadly(Dataset):
    """Kills the process that reads row 13."""

    def __len__(self):
        return 24

    def __getitem__(self, row):
        if row == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return DATA[row]


def test_a_worker_that_dies_is_named_with_the_batch(tmp_path):
    made = distiller()
    batches = DataLoader(Deadly(), 4, num_workers=1, prefetch_factor=1)
    with fails(r"a worker process of train_loader died while batch \d of pass 1 was loaded.*num_workers=0.*resume=True", made):
        trainer(made, batches, output_dir=tmp_path, save_every=1).train()
    assert newest_whole(tmp_path / "checkpoints") is not None
    assert left_in(tmp_path) == []


def test_an_error_of_the_data_set_says_at_which_batch_it_came():
    class Broken(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, row):
            return {0: DATA[row]}[row // 13]

    made = distiller()
    with fails("1", made, error=KeyError) as caught:
        trainer(made, DataLoader(Broken(), 4)).train()
    assert caught.value.__notes__ == ["raised while batch 4 of pass 1 was loaded"]


def test_a_batch_without_a_key_that_is_needed_is_named():
    batches = [points(), points(), {"x": points()["x"], "valid": points()["valid"]}]
    made = Distiller(*mlps(), [Match(None, "head", loss="cross_entropy", target="labels", name="labels")])
    with fails(r"'labels'.*'x', 'valid'", made, error=HookDistillError) as caught:
        trainer(made, batches).train()
    assert caught.value.__notes__ == ["raised at step 3, batch 3 of pass 1"]
    made = Distiller(*mlps(), [Match("head", "head")])
    with fails(r"takes 'x'; the batch has 'labels', 'y'", made, error=BatchError) as caught:
        trainer(made, [points(), {"labels": points()["labels"], "y": points()["x"]}]).train()


def test_a_generator_that_ends_too_early_is_an_error():
    with pytest.raises(TrainerError, match=r"pass 2 over train_loader gave no batch, at step 6 of 7"):
        trained(distiller(), iter(DATA.split(4)), max_steps=7)


# Memory


class Hungry(nn.Linear):
    """Runs out of memory in its third call with gradients."""

    calls = 0

    def forward(self, x):
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …\nmore lines")
        return super().forward(x)


def test_out_of_memory_says_what_holds_it_and_what_helps(tmp_path):
    made = Distiller(nn.Sequential(nn.Linear(6, 3)), nn.Sequential(Hungry(6, 300), nn.Linear(300, 3)), [Match("0", "1")])
    message = (
        r"out of memory at step 3, batch 3 of pass 1, with 4 examples: CUDA out of memory\. Tried to allocate 2\.00 GiB\. "
        r"GPU 0 has … What holds memory: the student 0 MiB.*the optimizer's state.*accumulate=.*resume=True"
    )
    with fails(message, made):
        trainer(made, output_dir=tmp_path, save_every=1, lr=1e-3).train()
    assert newest_whole(tmp_path / "checkpoints").name == "step-000000002"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_out_of_memory_on_a_gpu_says_what_is_free():
    student = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3))
    made = Distiller(nn.Sequential(nn.Linear(6, 3)), student, [Match("0", "1")])
    batches = [DATA, torch.zeros(torch.cuda.get_device_properties(0).total_memory // 20, 6)]
    with fails(r"out of memory at step 2.*MiB are free on cuda", made):
        trainer(made, batches).train()


# Signals


class Signals:
    """An evaluator that sends a signal at a step."""

    def __init__(self, number, at=2):
        self.number, self.at = number, at

    def __call__(self, evaluation):
        if evaluation.step == self.at:
            os.kill(os.getpid(), self.number)
        return {"score": 0.0}


@pytest.fixture
def as_in_a_terminal():
    """A process that was started in the background of a script ignores Ctrl-C, and the Trainer leaves that to it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_the_step_with_one_checkpoint(number, code, tmp_path, capsys):
    made = distiller()
    settings = {"output_dir": tmp_path, "evaluate_every": 1, "report": False}
    with fails(None, made, error=TrainerInterrupted) as caught:
        trainer(made, evaluators=[Signals(number)], **settings).train()
    assert caught.value.code == code
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]
    told = capsys.readouterr().err
    assert f"{number.name} after step 2 of 6; the checkpoint is {tmp_path / 'checkpoints' / 'step-000000002'}" in told
    assert "train(resume=True)" in told
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    again = distiller()
    trainer(again, evaluators=[lambda evaluation: {"score": 0.0}], **settings).train(resume=True)
    assert same(state(again.student), trained(distiller()))


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, "there is no output_dir"), ({"save_every": None, "output_dir": "here"}, "there is save_every=None")],
)
def test_a_signal_where_nothing_is_saved(settings, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainerInterrupted):
        trainer(distiller(), evaluators=[Signals(signal.SIGTERM)], evaluate_every=1, **settings).train()
    assert f"nothing was saved, as {told}" in capsys.readouterr().err


@pytest.mark.usefixtures("as_in_a_terminal")
def test_a_second_ctrl_c_does_not_wait():
    class Impatient(Signals):
        def __call__(self, evaluation):
            for _ in range(2 * (evaluation.step == self.at)):
                os.kill(os.getpid(), self.number)
            return {}

    made = distiller()
    with fails(None, made, error=KeyboardInterrupt):
        trainer(made, evaluators=[Impatient(signal.SIGINT)], evaluate_every=1).train()


def test_handlers_of_others_and_other_threads_are_left_alone():
    def theirs(*_):
        pass

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with Interruption():
            assert signal.getsignal(signal.SIGTERM) is theirs
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    done = []
    thread = threading.Thread(target=lambda: done.append(trained(distiller())))
    thread.start()
    thread.join()
    assert same(done[0], trained(distiller()))


SCRIPT = """
import os, signal, sys
sys.path[:0] = {paths!r}
from runs import distiller, trainer

class Stops:
    def __call__(self, evaluation):
        if evaluation.step == 3:
            os.kill(os.getpid(), signal.{name})
        return {{}}

trainer(distiller(), epochs=50, output_dir={folder!r}, evaluators=[Stops()], evaluate_every=1, save_every=None).train()
print("not reached")
"""


def test_a_script_ends_without_a_traceback_and_with_the_code_of_the_signal(tmp_path):
    paths = [path for path in sys.path if path]
    script = SCRIPT.format(paths=paths, name="SIGTERM", folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (143, "")
    assert "hookdistill: SIGTERM after step 3 of 300" in done.stderr
    assert "Traceback" not in done.stderr
