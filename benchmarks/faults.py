"""Kill a training with SIGKILL at random moments, start it again each time, and compare its end with one that was left alone.

    python benchmarks/faults.py --kills 20

The student has dropout and an average, the data set draws random numbers, batches are accumulated, and a checkpoint is saved
after every optimizer step, so that many kills hit a save. Exits with 0 only if the final checkpoint, the last and the best
student, and everything that was measured are the same to the bit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import accelerate
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

import hookdistill
from hookdistill import Distiller, ExampleMetric, HeldOutLosses, Match, Trainer
from hookdistill.journal import LOG, read_log
from hookdistill.training.checkpoints import checkpoints, damage, newest_whole, step_of
from hookdistill.training.states import read_state

ROWS, BATCH = 160, 8


@dataclass(frozen=True)
class Kill:
    """One of them."""

    number: int
    seconds: float
    """After the training had started."""
    during: str
    step: int
    """Of the newest whole checkpoint that it left; 0 for none."""
    left: int
    """Half-written folders that it left."""


class Noisy(Dataset):
    """Rows with noise from the global random state, so that the order in which numbers are drawn matters."""

    def __init__(self) -> None:
        self.rows = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"x": self.rows[row] + 0.1 * torch.randn(32) + random.random(), "labels": torch.tensor(row % 5)}


class Network(nn.Module):
    """Large enough for a save to take a while."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, width), nn.Linear(width, width)
        self.norm, self.drop, self.head = nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.second(torch.relu(self.first(x)))))))


def trainer(folder: Path, steps: int) -> Trainer:
    """The training, made anew as a script would make it."""
    torch.manual_seed(1)
    torch.set_num_threads(1)
    matches = [
        Match("second", "second", name="hidden"),
        Match("head", "head", loss="kl", temperature=2.0, name="logits"),
        Match(None, "head", loss="cross_entropy", target="labels", name="labels"),
    ]
    held_out = Noisy()
    return Trainer(
        Distiller(Network(256), Network(192), matches),
        DataLoader(Noisy(), BATCH, shuffle=True),
        eval_loader=[{"x": held_out.rows[:40], "labels": torch.arange(40) % 5}],
        evaluators=[HeldOutLosses(), ExampleMetric("accuracy", lambda logits, batch: logits.argmax(-1) == batch["labels"])],
        evaluate_every=20,
        best="accuracy",
        load_best_at_end=True,
        max_steps=steps,
        accumulate=2,
        clip_norm=1.0,
        lr=1e-3,
        warmup=10,
        ema=0.95,
        balance="magnitude",
        seed=7,
        output_dir=folder,
        save_every=1,
        log_every=1,
        report=False,
        progress=False,
    )


def child(folder: Path, steps: int) -> None:
    """What is killed."""
    transformers.get_scheduler  # noqa: B018  # what takes seconds to be imported is there when the clock starts
    made = trainer(folder, steps)
    sys.stdout.write("started\n")
    sys.stdout.flush()
    made.train(resume=True)


def start(folder: Path, steps: int, *, fork: bool) -> tuple[int, subprocess.Popen[str] | None]:
    """Start the training in a process of its own; returns when it has come to `Trainer.train`."""
    if not fork:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(folder), "--steps", str(steps)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        return process.pid, process
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(writing, 1)
            child(folder, steps)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid, None


def wait(pid: int, process: subprocess.Popen[str] | None) -> int:
    """The exit status of a process that ends by itself or was killed."""
    if process is not None:
        process.stdout.close()  # type: ignore[union-attr]
        return process.wait()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_once(number: int, folder: Path, steps: int, draw: random.Random, mean: float, *, fork: bool) -> Kill | None:
    """Start the training, kill it at a random moment; ``None`` if it had come to its end by then.

    One kill in five comes within seconds of the start, wherever that is; the others some time after the first step, ``mean``
    seconds on average, so that the run gets on.
    """
    pid, process = start(folder, steps, fork=fork)
    began = time.perf_counter()
    if draw.random() < 0.2:
        time.sleep(draw.uniform(0, 3))
    else:
        before = newest_step(folder)
        while newest_step(folder) == before and before < steps and time.perf_counter() - began < 60:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 2 * mean))
    seconds = time.perf_counter() - began
    os.kill(pid, signal.SIGKILL)
    if wait(pid, process) != -signal.SIGKILL:
        return None
    root = folder / "checkpoints"
    left = [path for place in (folder, root) for path in place.glob(".*")]
    in_checkpoint = any(path.parent == root for path in left)
    newest = newest_whole(root)
    assert all(damage(path) is None for path in checkpoints(root)), "a checkpoint that looks whole is not"
    during = "saving a checkpoint" if in_checkpoint else "saving a student" if left else "training"
    step = 0 if newest is None else step_of(newest)
    return Kill(number=number, seconds=round(seconds, 3), during=during if step else "starting", step=step, left=len(left))


def newest_step(folder: Path) -> int:
    """Of the newest checkpoint, by its name; 0 for none."""
    return max((step_of(path) for path in checkpoints(folder / "checkpoints")), default=0)


def differences(whole: Path, cut: Path, steps: int) -> list[str]:
    """What differs between the ends of two runs: nothing, if all is well."""
    found = []
    ends = [checkpoints(folder / "checkpoints")[0] for folder in (whole, cut)]
    if [step_of(end) for end in ends] != [steps, steps]:
        found.append("the last step")
    files = ["last/model.safetensors", "last/adapters.safetensors", "best/model.safetensors", "best/adapters.safetensors"]
    pairs = [(whole / file, cut / file) for file in files]
    pairs += [(ends[0] / file.name, ends[1] / file.name) for file in sorted(ends[0].iterdir()) if file.suffix == ".safetensors"]
    found += [left.name for left, right in pairs if left.read_bytes() != right.read_bytes()]
    measured = [read_state(end, "run")["progress"]["measuring"] for end in ends]
    return found + (["what was measured"] if measured[0] != measured[1] else [])


def kill_and_compare(
    kills: int, steps: int, folder: Path, *, seed: int, fork: bool
) -> tuple[list[Kill], list[str], int, float]:
    """The kills, the differences at the end, how many runs came to their end, and the seconds of the one left alone."""
    draw = random.Random(seed)
    began = time.perf_counter()
    if wait(*start(folder / "whole", steps, fork=fork)):
        raise SystemExit("the run that was left alone failed")
    alone = time.perf_counter() - began
    times = [
        datetime.datetime.fromisoformat(line["time"])
        for line in read_log(folder / "whole" / LOG)
        if line["kind"] == "checkpoint"
    ]
    mean = (times[-1] - times[0]).total_seconds() / kills
    done: list[Kill] = []
    runs, found = 0, []
    while len(done) < kills:
        cut = folder / f"cut-{runs}"
        while len(done) < kills:
            killed = kill_once(len(done) + 1, cut, steps, draw, mean, fork=fork)
            if killed is None:
                break
            done.append(killed)
            print(f"kill {killed.number:3}: after {killed.seconds:6.3f} s, {killed.during}, step {killed.step}", flush=True)
            if killed.step == steps:  # nothing is left but to save the last student
                break
        if wait(*start(cut, steps, fork=fork)):
            raise SystemExit("a run that was started again failed")
        found += differences(folder / "whole", cut, steps)
        runs += 1
    return done, found, runs, alone


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--steps", type=int, default=120, help="optimizer steps of the training")
    options.add_argument("--seed", type=int, default=0, help="of the moments")
    options.add_argument("--out", type=Path, help="folder for faults.json")
    options.add_argument("--fork", action="store_true", help="fork instead of starting Python anew: faster, less like life")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.child is not None:
        child(options.child, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        kills, found, runs, alone = kill_and_compare(
            options.kills, options.steps, Path(folder), seed=options.seed, fork=options.fork
        )
    during = {name: sum(kill.during == name for kill in kills) for name in dict.fromkeys(kill.during for kill in kills)}
    told = ", ".join(f"{count} while {name}" for name, count in sorted(during.items()))
    verdict = "the same to the bit" if not found else f"DIFFERENT in {', '.join(found)}"
    print(f"{len(kills)} kills in {runs} run(s): {told}. The end is {verdict}.")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        conditions = {
            "date": datetime.date.today().isoformat(),
            "hookdistill": hookdistill.__version__,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "steps": options.steps,
            "seconds_alone": round(alone, 2),
            "runs": runs,
        }
        content = {"conditions": conditions, "kills": [asdict(kill) for kill in kills], "during": during, "differences": found}
        (options.out / "faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
