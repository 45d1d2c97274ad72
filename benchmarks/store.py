"""How fast a teacher store is written and read, beside plain sequential I/O of the same bytes; and what a token takes in it.

    python benchmarks/store.py                 rates, formats, and reading beside the forward of a BERT-base: a few minutes
    python benchmarks/store.py --kills 20      builds killed with SIGKILL at random moments; exit code 1 unless every store ends
                                               byte for byte as one that was left alone
    python benchmarks/store.py --large 24      a store of so many gigabytes, read at random while memory and rate are watched
    python benchmarks/store.py --quality 10    what lossy formats cost in accuracy on the digits of the quickstart, by seed
    python benchmarks/store.py --language 5    what sparse logits cost a small language model

Prints tables and writes store_*.json to --out. Nothing is downloaded. The disk is the one of --folder; what is written there
is deleted at the end. "cold" means that the system was asked to drop the files from its cache before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import _store_kills
import _store_large
import _store_rates
import hookdistill

Row = dict[str, Any]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = Console(width=None if Console().is_terminal else 130, highlight=False)
    folder = Path(tempfile.mkdtemp(prefix="hookdistill-store-", dir=options.folder))
    asked = {"kills": options.kills, "large": options.large, "quality": options.quality}
    asked["language"] = options.language
    asked["rates"] = options.rates or not any(asked.values())
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for measure in (kills, large, quality, language, rates):
            name = measure.__name__
            if asked[name]:
                result = {"conditions": conditions(), **measure(options, folder, console)}
                path = options.out / f"store_{name}.json"
                path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
                console.print(f"wrote {path}", soft_wrap=True)
                if not all(row["identical"] for row in result.get("kills", [])):
                    sys.exit("a store that was killed did not end as the one that was left alone")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", action="store_true", help="rates beside kills and a large store; alone they need no word")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the store whose rates are measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, help="how often to kill a build")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--large", type=float, help="gigabytes of the large store")
    parser.add_argument("--quality", type=int, help="how many seeds to train with each format")
    parser.add_argument("--language", type=int, help="how many seeds to train the language model with each format")
    parser.add_argument("--seconds", type=float, default=300.0, help="how long the large store is read")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: that of temporary files")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder for the JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run")
    options = parser.parse_args()
    if options.quick:
        options.gigabytes, options.rounds, options.seconds = 0.02, 1, 0.5
    return options


def conditions() -> Row:
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": [
            round(load, 1) for load in os.getloadavg()
        ],  # over the last 1, 5 and 15 minutes: others compete where it is high
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hookdistill": hookdistill.__version__,
    }


def rates(options: argparse.Namespace, folder: Path, console: Console) -> Row:
    disk = _store_rates.against_the_disk(folder, options.gigabytes, options.rounds)
    show(
        console,
        f"{disk[0]['gigabytes']:.2f} GB: seven float32 hidden states of 768 for {disk[0]['samples']:,} samples",
        ("", "MB/s", "lowest..highest", "MB per CPU s", "share of plain I/O"),
        [
            (
                row["what"],
                f"{median(row['mb_per_s']):,.0f}",
                f"{min(row['mb_per_s']):,.0f}..{max(row['mb_per_s']):,.0f}",
                f"{row['mb_per_cpu_s']:,.0f}",
                "" if row["share_of_plain"] is None else f"{row['share_of_plain']:.2f}",
            )
            for row in disk
        ],
    )
    size = {"layers": 2, "width": 48} if options.quick else {}
    teacher = _store_rates.beside_a_teacher(folder / "beside", options.rounds, **size)
    show(
        console,
        "a batch of 8 samples on one core: a BERT's forward, or seven of its hidden states from the store",
        ("kept as", "teacher ms", "read ms", "read / teacher", "bytes/token"),
        [
            (
                row["keep"],
                f"{row['teacher_ms']:,.0f}",
                f"{row['read_ms']:.1f}",
                f"{row['share']:.4f}",
                f"{row['bytes_per_token']:,.0f}",
            )
            for row in teacher
        ],
    )
    vocabulary = 500 if options.quick else 30_522
    logits = _store_rates.of_logits(folder / "logits", options.rounds, vocabulary)
    show(
        console,
        f"logits over {vocabulary:,} classes",
        ("kept", "bytes/token", "read ms", "tokens/s"),
        [
            (row["kept"], f"{row['bytes_per_token']:,.0f}", f"{row['read_ms']:.1f}", f"{row['tokens_per_s']:,.0f}")
            for row in logits
        ],
    )
    return {"disk": disk, "teacher": teacher, "logits": logits, "vocabulary": vocabulary}


def kills(options: argparse.Namespace, folder: Path, console: Console) -> Row:
    rows = _store_kills.killed(folder, options.kills, options.seed)
    show(
        console,
        f"{len(rows)} kills of {rows[-1]['store']} builds",
        ("kill", "build", "whole shards", "half written", "manifest", "ends identical"),
        [
            (
                str(number),
                str(row["store"]),
                str(row["shards"]),
                ", ".join(name[:30] for name in row["half_written"]),
                "yes" if row["finished"] else "no",
                "yes" if row["identical"] else "NO",
            )
            for number, row in enumerate(rows, 1)
        ],
    )
    return {"kills": rows}


def large(options: argparse.Namespace, folder: Path, console: Console) -> Row:
    built = _store_large.build(folder / "large", options.large)
    console.print(", ".join(f"{name} {value:,.1f}" for name, value in built.items()), soft_wrap=True)
    opened, rows = _store_large.read(folder / "large", options.seconds, options.seconds / 20)
    console.print(", ".join(f"{name} {value:,.1f}" for name, value in opened.items()), soft_wrap=True)
    index = _store_large.index_rows(folder, [10**3, 10**4] if options.quick else [10**4, 10**5, 10**6, 10**7, 3 * 10**7])
    show(
        console,
        "the index alone, cold",
        ("samples", "MB", "open ms", "find 32 ms"),
        [(f"{r['samples']:,}", f"{r['megabytes']:,.1f}", f"{r['open_ms']:.2f}", f"{r['find_32_ms']:.1f}") for r in index],
    )
    show(
        console,
        "random samples, batches of 32",
        ("after s", "samples/s", "MB/s", "MB per CPU s", "anonymous MB", "of files MB"),
        [
            (
                f"{row['seconds']:.0f}",
                f"{row['samples_per_s']:,.0f}",
                f"{row['mb_per_s']:,.0f}",
                f"{row['mb_per_cpu_s']:,.0f}",
                f"{row['rss_anonymous_mb']:,.0f}",
                f"{row['rss_files_mb']:,.0f}",
            )
            for row in rows
        ],
    )
    return {"index": index, "built": built, "opened": opened, "windows": rows}


def quality(options: argparse.Namespace, folder: Path, console: Console) -> Row:
    import _store_quality

    rows = _store_quality.quality(folder, options.quality)
    show(
        console,
        f"accuracy on 600 held-out digits, %, {options.quality} seeds; difference from the live teacher",
        ("kept", "bytes/sample", "mean", "sd", "difference", "standard error"),
        [
            (
                row["kept"],
                "" if row["bytes_per_sample"] is None else f"{row['bytes_per_sample']:,.0f}",
                f"{row['mean']:.2f}",
                f"{row['sd']:.2f}",
                f"{row['difference']:+.2f}",
                f"{row['standard_error']:.2f}",
            )
            for row in rows
        ],
    )
    return {"quality": rows}


def language(options: argparse.Namespace, folder: Path, console: Console) -> Row:
    import _store_language

    rows = _store_language.language(folder, options.language, quick=options.quick)
    show(
        console,
        f"next words of Python's documentation, {_store_language.VOCABULARY:,} classes, held out, {options.language} seeds",
        ("learnt from", "bytes/token", "KL to teacher", "sd", "perplexity", "sd"),
        [
            (
                row["kept"],
                "" if row["bytes_per_token"] is None else f"{row['bytes_per_token']:,.0f}",
                f"{row['kl_mean']:.3f}",
                f"{row['kl_sd']:.3f}",
                f"{row['perplexity_mean']:.1f}",
                f"{row['perplexity_sd']:.1f}",
            )
            for row in rows
        ],
    )
    return {"language": rows}


def show(console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
