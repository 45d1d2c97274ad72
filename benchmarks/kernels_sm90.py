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
from hookdistill.fused.attention import AttentionTask, Heads
from hookdistill.fused.forms import FORMS
from hookdistill.fused.relations import RelationTask
from hookdistill.fused.rows import RowTask, RowTerm
from hookdistill.kernels.attention import attention_losses_triton
from hookdistill.kernels.launching import recorded
from hookdistill.kernels.relations import relation_losses_triton
from hookdistill.kernels.rows import run_rows_triton
from hookdistill.kernels.scale import scale_triton

ROWS = 4
TOKENS = 512
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
        for width in (64, 128):
            for mask in ("keys", "causal", "full", "odd", "added", "pairs"):
                if mask == "pairs" and width > 64 and dtype is torch.float32:
                    continue  # left to the closed forms
                for kind in ("kl", "mse", "scores mse"):
                    for kernel in ("log_sums", "by_query", "by_key")[kind == "scores mse" :]:
                        yield attention(kind, mask, width, dtype, kernel)
            for kernel in ("relation_sums", "relation_slopes"):
                yield relations(width, dtype, kernel)
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


def attention(kind: str, mask: str, width: int, dtype: torch.dtype, kernel: str) -> Case:
    """A loss between attentions of heads of this width.

    ``mask`` is what hides keys: one for all queries (keys), causality, one for each whose rows are multiples of 16 bytes (full)
    or not (odd), or one that is added; and tokens count. With ``pairs`` a mask for each says what counts, too. Its launches are
    `log_sums`, but for scores, `by_query` and `by_key`.
    """
    return Case(f"attention {kind}, {mask}", named(dtype), width, kernel, lambda: heads(kind, mask, width, dtype))


def relations(width: int, dtype: torch.dtype, kernel: str) -> Case:
    """MiniLMv2's loss between relation heads of this width, with a mask.

    Its launches are `relation_sums` and `relation_slopes`.
    """
    return Case("relation_kl", named(dtype), width, kernel, lambda: related(width, dtype))


def heads(kind: str, mask: str, width: int, dtype: torch.dtype) -> None:
    tokens = TOKENS - 1 if mask == "odd" else TOKENS
    valid = torch.ones(2, tokens, dtype=torch.bool)
    pairs = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
    seen = {"keys": valid[:, None, None], "full": pairs, "odd": pairs, "pairs": pairs, "added": pairs.to(dtype)}.get(mask)
    sides = [
        Heads(
            query=torch.empty(2, 4, tokens, width, dtype=dtype),
            key=torch.empty(2, 2, tokens, width, dtype=dtype),
            mask=seen,
            is_causal=mask == "causal",
        )
        for _ in range(2)
    ]
    counted = {"open": None, "pairs": pairs}.get(mask, valid)
    task = AttentionTask(kind=kind, student=sides[0], teacher=sides[1], valid=counted, mean=False)  # type: ignore[arg-type]
    attention_losses_triton(task, gradient=True)


def related(width: int, dtype: torch.dtype) -> None:
    student, teacher = (torch.empty(2, TOKENS, 4, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    relation_losses_triton(RelationTask(student=student, teacher=teacher, heads=4, valid=valid), gradient=True)


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
