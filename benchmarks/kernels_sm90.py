"""What the kernels become for an H100: registers, spills, width of loads. No GPU is needed.

Each kernel is compiled for the very arguments that it would be launched with, in the configuration that the library takes for
them, and assembled by the tools that come with Triton. A kernel that keeps values in local memory because registers were not
enough, or reads half precision two bytes at a time, is slow wherever it runs; the tests refuse it. Prints a table, writes
kernels_sm90.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from _cubin import Compiled, compiled
from hookdistill.fused.forms import FORMS
from hookdistill.fused.rows import RowTask, RowTerm
from hookdistill.kernels.launching import recorded
from hookdistill.kernels.rows import run_rows_triton
from hookdistill.kernels.scale import scale_triton

ROWS = 4
DISTRIBUTIONS = ("kl", "reverse_kl", "js", "skew_kl", "tvd", "soft_cross_entropy")
ALL_LOGITS = (*DISTRIBUTIONS, "cross_entropy")
ALL_FEATURES = ("mse", "l1", "smooth_l1", "huber", "cosine", "normalized_mse")


@dataclass(frozen=True, slots=True)
class Case:
    """Something that is computed, in words, and how; ``kernel`` is which of its launches the case is about."""

    losses: str
    dtype: str
    width: int
    kernel: str
    run: Callable[[], object]


def cases() -> Iterator[Case]:
    """Losses on logits of vocabularies in use, features of widths in use, and what stands around them."""
    for dtype in (torch.bfloat16, torch.float32):
        for classes in (30522, 32000, 128256, 262144):
            for names in (
                *((name,) for name in ALL_LOGITS),
                ("kl", "cross_entropy"),
                ("kl", "js", "cross_entropy"),
                ALL_LOGITS,
            ):
                yield logits(names, classes, dtype)
        for width in (768, 1024, 4096, 8192, 16384):
            for names in (("mse",), ("l1",), ("cosine",), ("mse", "cosine"), ALL_FEATURES):
                yield features(names, width, dtype)
        yield Case("gradients from above", named(dtype), 4096, "scale", lambda dtype=dtype: scaled(dtype))
    yield Case("counts of a mask", "bool", ROWS, "shares", features(("mse",), 768, torch.bfloat16).run)
    yield Case("sums", "float32", ROWS, "totals", features(("mse",), 768, torch.bfloat16).run)


def logits(names: tuple[str, ...], classes: int, dtype: torch.dtype) -> Case:
    """Terms on logits, with a mask, at temperature two."""
    return Case("+".join(names), named(dtype), classes, "distribution_rows", lambda: rows(names, classes, dtype))


def features(names: tuple[str, ...], width: int, dtype: torch.dtype) -> Case:
    """Terms on features, with a mask."""
    kernel = "narrow_rows" if width <= 8192 else "wide_rows"
    return Case("+".join(names), named(dtype), width, kernel, lambda: rows(names, width, dtype))


def rows(names: tuple[str, ...], width: int, dtype: torch.dtype) -> None:
    student, teacher = torch.empty(ROWS, width, dtype=dtype), torch.empty(ROWS, width, dtype=dtype)
    labels, valid = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS, dtype=torch.bool)
    terms = []
    for name in names:
        form = FORMS[name]
        other = labels if form.family == "labels" else teacher
        heat = 2.0 if form.family == "distributions" else 1.0
        terms.append(RowTerm(form=form, other=other, constants=tuple(form.constants.items()), valid=valid, temperature=heat))
    run_rows_triton([RowTask(student=student, terms=terms)], gradient=True)


def scaled(dtype: torch.dtype) -> None:
    scale_triton([torch.empty(ROWS, 4096, dtype=dtype)] * 2, torch.ones(()), in_place=True)


def figures(case: Case) -> Compiled:
    """The kernel of a case, compiled."""
    with recorded() as launches:
        case.run()
    (launched,) = (each for each in launches if each.kernel.__name__ == case.kernel)
    return compiled(launched)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="the folder of kernels_sm90.json")
    options = parser.parse_args()
    console = Console(width=None if Console().is_terminal else 190, highlight=False)
    table = Table(box=SIMPLE_HEAD)
    columns = [field.name for field in dataclasses.fields(Compiled)]
    for column in ("losses", "dtype", "width", *columns):
        table.add_column(column.replace("_", " "), justify="left" if column in ("losses", "dtype", "kernel") else "right")
    found = []
    for case in cases():
        row = {"losses": case.losses, "dtype": case.dtype, "width": case.width, **dataclasses.asdict(figures(case))}
        found.append(row)
        table.add_row(*map(str, row.values()))
    console.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"triton": triton.__version__, "torch": torch.__version__, "target": "sm_90a"}
    text = json.dumps({"versions": versions, "rows": found}, indent=1)
    (options.out / "kernels_sm90.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
