"""What sparse logits cost a language model: next words of Python's own documentation, a vocabulary of 2,000.

The text is what ``help()`` prints (``pydoc_data.topics``), so that nothing is downloaded. A GRU learns it, a smaller one learns
from its logits, all of them or those that a store kept; no labels, so that what differs is the teacher's distribution alone.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, default_collate

from hookdistill import Distiller, Keep, Match, TeacherStore, Trainer

Row = dict[str, Any]
VOCABULARY, LENGTH, BATCH, EPOCHS, TEACHER_EPOCHS = 2000, 32, 32, 4, 6


class Words(nn.Module):
    """A GRU over word embeddings; ``{"logits": [batch, words, vocabulary]}``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.recur = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.recur(self.embed(input_ids))[0])}


def text() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Samples of 32 words and the ones that follow them, to train on and (every tenth topic) held out."""
    split = [re.findall(r"[a-z]+|[^\sa-z]", topics[name].lower()) for name in sorted(topics)]
    common = [word for word, _ in Counter(word for words in split for word in words).most_common(VOCABULARY - 1)]
    number = {word: index for index, word in enumerate(common, 1)}  # 0: any other word
    parts: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]] = ([], [])
    for position, words in enumerate(split):
        ids = torch.tensor([number.get(word, 0) for word in words])
        for start in range(0, len(ids) - LENGTH, LENGTH):
            piece = ids[start : start + LENGTH + 1]
            parts[position % 10 == 0].append({"input_ids": piece[:-1], "labels": piece[1:]})
    return parts


def language(folder: Path, seeds: int, *, quick: bool = False) -> list[Row]:
    """For each way to keep the logits: bytes a token, and on held-out text divergence from the teacher and perplexity."""
    samples, held_out = text()
    if quick:
        samples, held_out = samples[:64], held_out[:32]
    torch.manual_seed(0)
    teacher = Words(192)
    train(Distiller(None, teacher, [LABELS]), samples, epochs=TEACHER_EPOCHS, lr=3e-3, seed=0)
    kl, short = Match(":logits", ":logits", loss="kl"), Match(":logits", ":logits", loss="top_k_kl", k=8, tail=False)
    alone = {f"labels alone, lr {lr:g}": (LABELS, ..., lr) for lr in (3e-3, 1e-2, 3e-2)}
    arms: dict[str, tuple[Any, ...]] = {
        **alone,
        "all logits, live teacher": (kl, ...),
        "first 8 renormalised, live teacher": (short, ...),
        "all logits, int8": (kl, "int8"),
        "first 8 and tail": (kl, Keep("float16", top_k=8)),
        "first 64 and tail": (kl, Keep("float16", top_k=64)),
        "8 draws": (kl, Keep("float16", samples=8)),
        "20 draws": (kl, Keep("float16", samples=20)),
        "50 draws": (kl, Keep("float16", samples=50)),
    }
    own = scores(teacher, teacher, held_out)
    rows = [{"kept": "teacher", "bytes_per_token": None, **summed("kl", own[:1]), **summed("perplexity", own[1:])}]
    for name, (match, keep, *rate) in arms.items():
        stands, size = teacher, None
        if keep is not ...:
            loader = DataLoader(samples, BATCH)
            stands = TeacherStore.build(folder / name, teacher, [match], loader, keep=keep, progress=False)
            size = sum(stands.manifest.column_bytes.values()) / (len(stands) * LENGTH)
        found = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            student = Words(64)
            train(Distiller(stands, student, [match]), samples, epochs=EPOCHS, lr=rate[0] if rate else 1e-2, seed=seed)
            found.append(scores(student, teacher, held_out))
        kls, perplexities = zip(*found, strict=True)
        rows.append({"kept": name, "bytes_per_token": size, **summed("kl", kls), **summed("perplexity", perplexities)})
    return rows


LABELS = Match(None, ":logits", loss="cross_entropy", target="labels")


def train(distiller: Distiller, samples: list[dict[str, Tensor]], *, epochs: int, lr: float, seed: int) -> None:
    loader = DataLoader(samples, BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=lr)
    Trainer(distiller, loader, optimizer=optimizer, epochs=epochs, clip_norm=1.0, seed=seed, progress=False).train()


@torch.no_grad()
def scores(student: nn.Module, teacher: nn.Module, held_out: list[dict[str, Tensor]]) -> tuple[float, float]:
    """KL(teacher ‖ student) in nats for a word, and the student's perplexity."""
    student.eval()
    teacher.eval()
    batch = default_collate(held_out)
    ours = student(batch["input_ids"])["logits"].log_softmax(-1).flatten(0, 1)
    theirs = teacher(batch["input_ids"])["logits"].log_softmax(-1).flatten(0, 1)
    divergence = functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return divergence.item(), functional.nll_loss(ours, batch["labels"].flatten()).exp().item()


def summed(name: str, values: Any) -> Row:
    values = list(values)
    return {name: values, f"{name}_mean": mean(values), f"{name}_sd": stdev(values) if len(values) > 1 else 0.0}
