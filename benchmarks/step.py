"""What a whole distillation step costs: both forwards, the losses and the backward; time and peak memory.

Two pairs with random weights. ``bert``: BERT-base and a student of its 6 layers, KL of logits, mse of 7 hidden states, KL of
one attention map. ``llama``: a language model and a smaller one, KL of logits over a large vocabulary. Compared, in shuffled
rounds: the step by hand (``output_hidden_states``, ``output_attentions``), the same with both models and the loss under
torch.compile, the same by torchdistill's hooks where that is installed, and hookdistill in both orders. Prints a table, writes
step_DEVICE.json.

    python benchmarks/step.py --device cpu
    python benchmarks/step.py --device cuda
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from _approaches import torchdistill_manager
from _conditions import conditions
from _memory import can_measure, peak_bytes
from _timing import ratio, take_turns, timed
from hookdistill import Distiller, Match

Step = Callable[[], Tensor]
Row = dict[str, Any]
HAND, OURS = "by hand", "hookdistill"
TEMPERATURE = 2.0


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.memory_of:
        step = contenders(options.memory_of[0], device, options.quick)[options.memory_of[1]]()
        step()
        print(json.dumps(peak_bytes(lambda: (step(), step()), device)))
        return
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    found = conditions([device], transformers=transformers.__version__, threads=options.threads, quick=options.quick)
    console.print(", ".join(f"{key} {value}" for key, value in found.items() if value is not None), soft_wrap=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"step_{device.type}.json"
    rows: list[Row] = []
    for pair in options.pairs:
        rows += measure(pair, device, options, console)
        path.write_text(json.dumps({"conditions": found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    console.print(f"wrote {path}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", nargs="+", default=["bert", "llama"], choices=("bert", "llama"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", nargs=2, metavar=("PAIR", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 2
    return options


def measure(pair: str, device: torch.device, options: argparse.Namespace, console: Console) -> list[Row]:
    running, first, values = {}, {}, {}
    for name, build in contenders(pair, device, options.quick).items():
        if name in options.without:
            continue
        step, start = build(), time.perf_counter()
        try:
            values[name] = step().item()
        except Exception as error:  # a peer that does not run here is left out, not the whole benchmark
            console.print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}", markup=False)
            continue
        running[name], first[name] = step, time.perf_counter() - start
    for name, value in values.items():
        if abs(value - values[HAND]) > 0.02 * abs(values[HAND]) + 1e-4:
            raise RuntimeError(f"{name} gives {value}, by hand it is {values[HAND]}")
    blocks = {name: lambda count, warm, run=run: timed(run, count, warm, device) for name, run in running.items()}
    rounds = take_turns(blocks, HAND, rounds=options.rounds, steps=1, warm=0)
    rows = []
    for name in running:
        seconds = median(second for block in rounds[name].values() for second in block)
        row = {"pair": pair, "contender": name, "median_ms": seconds * 1e3, "first_call_s": first[name]}
        rows.append({**row, "times_as_fast_as_by_hand": list(ratio(rounds[HAND], rounds[name]))})
    add_memory(pair, rows, options, console)
    print_rows(pair, rows, console)
    return rows


def add_memory(pair: str, rows: list[Row], options: argparse.Namespace, console: Console) -> None:
    if not can_measure(options.device) or options.quick:
        return
    for row in rows:
        command = [sys.executable, __file__, "--memory-of", pair, row["contender"], "--device", options.device]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run([*command, "--threads", str(options.threads)], env=environment, capture_output=True, text=True)
        if done.returncode:
            console.print(
                f"no peak memory of {row['contender']}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", markup=False
            )
        else:
            row["peak_bytes"] = json.loads(done.stdout.splitlines()[-1])


def print_rows(pair: str, rows: list[Row], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, title=pair, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("median ms", "times as fast as by hand", "peak MiB", "first call s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        middle, low, high = row["times_as_fast_as_by_hand"]
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if row.get("peak_bytes") else ""
        spread = escape(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
        table.add_row(row["contender"], f"{row['median_ms']:.1f}", spread, peak, f"{row['first_call_s']:.1f}")
    console.print(table)


# The steps


def contenders(pair: str, device: torch.device, quick: bool) -> Mapping[str, Callable[[], Step]]:
    """What builds each contender's step, on models of its own with the same weights."""
    return bert_contenders(device, quick) if pair == "bert" else llama_contenders(device, quick)


def stepping(student: nn.Module, loss: Callable[[], Tensor], device: torch.device) -> Step:
    def step() -> Tensor:
        student.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            total = loss()
        total.backward()
        return total

    return step


def hand_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    log_q, p = F.log_softmax(student.float() / TEMPERATURE, -1), F.softmax(teacher.float() / TEMPERATURE, -1)
    return (F.kl_div(log_q, p, reduction="none").sum(-1) * mask).sum() / mask.sum() * TEMPERATURE**2


# BERT-base and 6 of its layers


def bert(device: torch.device, layers: int, *, quick: bool, attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 300} if quick else {}
    config = transformers.BertConfig(num_hidden_layers=layers, attn_implementation=attention, **small)
    return transformers.BertForMaskedLM(config).to(device).eval()


def bert_batch(device: torch.device, quick: bool) -> dict[str, Tensor]:
    batch, tokens = (2, 16) if quick else (32, 128) if device.type == "cuda" else (8, 128)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(300 if quick else 30522, (batch, tokens), generator=draw)
    lengths = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=draw)
    return {"input_ids": ids.to(device), "attention_mask": (torch.arange(tokens) < lengths).long().to(device)}


BERT_MATCHES = [
    Match(":logits", ":logits", loss="kl", temperature=TEMPERATURE, mask="attention_mask"),
    Match("bert.embeddings", "bert.embeddings", mask="attention_mask"),
    Match("bert.encoder.layer.*", "bert.encoder.layer.*", mask="attention_mask"),
    Match("bert.encoder.layer.11", "bert.encoder.layer.5", selector="attention", loss="kl", mask="attention_mask"),
]


def bert_contenders(device: torch.device, quick: bool) -> dict[str, Callable[[], Step]]:
    batch = bert_batch(device, quick)

    def models(attention: str) -> tuple[nn.Module, nn.Module]:
        return tuple(bert(device, layers, quick=quick, attention=attention) for layers in (12, 6))  # type: ignore[return-value]

    def hand() -> Step:
        teacher, student = models("eager")
        return stepping(student, by_hand(teacher, student, batch, bert_loss), device)

    def compiled() -> Step:
        teacher, student = models("eager")
        total = by_hand(torch.compile(teacher), torch.compile(student), batch, torch.compile(bert_loss))
        return stepping(student, total, device)

    def ours(settings: Mapping[str, str]) -> Step:
        teacher, student = models("sdpa")
        distiller = Distiller(teacher, student, BERT_MATCHES, **settings)
        return stepping(student, lambda: distiller(batch).total, device)

    def torchdistill() -> Step:
        teacher, student = models("eager")
        return stepping(student, torchdistill_bert(teacher, student, batch, device), device)

    mine = {name: partial(ours, settings) for name, settings in OURS_SETTINGS.items()}
    return {HAND: hand, "torch.compile": compiled, **mine, "torchdistill's hooks": torchdistill}


OURS_SETTINGS: Mapping[str, Mapping[str, str]] = {
    OURS: {},
    "hookdistill, teacher first": {"order": "teacher first"},
    "hookdistill, definitions": {"impl": "eager"},
}


def by_hand(teacher: nn.Module, student: nn.Module, batch: Mapping[str, Tensor], loss: Callable[..., Tensor]) -> Step:
    wanted = {"output_hidden_states": True, "output_attentions": True}

    def total() -> Tensor:
        with torch.no_grad():
            theirs = teacher(**batch, **wanted)
        ours = student(**batch, **wanted)
        sides = [(each.logits, each.hidden_states, each.attentions) for each in (ours, theirs)]
        return loss(*sides, batch["attention_mask"])

    return total


def bert_loss(ours: Any, theirs: Any, attention_mask: Tensor) -> Tensor:
    mask = attention_mask.float()
    total = hand_kl(ours[0], theirs[0], mask)
    for student, teacher in zip(ours[1], theirs[1][::2], strict=True):
        total = total + (F.mse_loss(student, teacher, reduction="none").float().mean(-1) * mask).sum() / mask.sum()
    s, t = ours[2][5].float(), theirs[2][11].float()
    pairs = mask[:, None, :, None] * mask[:, None, None, :]
    rows = F.kl_div(s.clamp_min(1e-12).log(), t, reduction="none") * pairs
    return total + rows.sum() / (mask.sum() * s.shape[1])


def torchdistill_bert(teacher: nn.Module, student: nn.Module, batch: Mapping[str, Tensor], device: torch.device) -> Step:
    """Its hooks on the same layers; its losses take no masks, so that the losses are those by hand."""

    def total() -> Tensor:
        if not managers:
            for model, count in ((teacher, 12), (student, 6)):
                manager = torchdistill_manager()(device)
                for path in ["bert.embeddings", *(f"bert.encoder.layer.{n}" for n in range(count)), "cls"]:
                    manager.add_hook(model, path, requires_input=False, requires_output=True)
                manager.add_hook(
                    model, f"bert.encoder.layer.{count - 1}.attention.self", requires_input=False, requires_output=True
                )
                managers.append(manager)
        with torch.no_grad():
            teacher(**batch, output_attentions=True)
        student(**batch, output_attentions=True)
        sides = [side(manager.pop_io_dict(), count) for manager, count in zip(managers, (12, 6), strict=True)]
        return bert_loss(sides[1], sides[0], batch["attention_mask"])

    def side(seen: Mapping[str, Any], count: int) -> Any:
        hidden = [seen[path]["output"] for path in ["bert.embeddings", *(f"bert.encoder.layer.{n}" for n in range(count))]]
        maps = [None] * (count - 1) + [seen[f"bert.encoder.layer.{count - 1}.attention.self"]["output"][1]]
        return seen["cls"]["output"], hidden, maps

    managers: list[Any] = []
    return total


# A language model and a smaller one


def llama(device: torch.device, *, width: int, layers: int, vocabulary: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 2),
        num_key_value_heads=max(width // 256, 1),
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(device)
    return model.to(torch.bfloat16) if device.type == "cuda" else model


def llama_contenders(device: torch.device, quick: bool) -> dict[str, Callable[[], Step]]:
    large = device.type == "cuda"
    vocabulary, batch, tokens = (300, 2, 16) if quick else (128256, 4, 2048) if large else (32000, 2, 256)
    sizes = ((64, 2), (32, 1)) if quick else ((2048, 16), (960, 16)) if large else ((512, 4), (256, 2))
    ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def models() -> list[nn.Module]:
        return [llama(device, width=w, layers=n, vocabulary=vocabulary, seed=seed) for seed, (w, n) in enumerate(sizes)]

    def hand(compiler: Callable[..., Any]) -> Step:
        teacher, student = models()
        run_teacher, run_student, kl = compiler(teacher), compiler(student), compiler(hand_kl)

        def total() -> Tensor:
            with torch.no_grad():
                theirs = run_teacher(**inputs, use_cache=False).logits
            return kl(run_student(**inputs, use_cache=False).logits, theirs, inputs["attention_mask"])

        return stepping(student, total, device)

    def ours(head: str) -> Step:
        teacher, student = models()
        matches = [Match(":logits", ":logits", loss="kl", temperature=TEMPERATURE, mask="attention_mask")]
        distiller = Distiller(teacher, student, matches, head=head)
        return stepping(student, lambda: distiller({**inputs, "use_cache": False}).total, device)

    return {
        HAND: partial(hand, lambda function: function),
        "torch.compile": partial(hand, torch.compile),
        OURS: partial(ours, "fused"),
        "hookdistill, whole logits": partial(ours, "whole"),
    }


if __name__ == "__main__":
    main()
