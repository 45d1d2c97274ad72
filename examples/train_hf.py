"""Distil one BERT classifier into a smaller one with `transformers.Trainer` doing the work.

Random weights and random sentences: the point is how the pieces fit. A quarter of a minute on one CPU core.
"""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hookdistill import Distiller, Match
from hookdistill.integrations import DistillationTrainer


def bert(layers: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 500, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


class Sentences(Dataset):
    """Token ids with padding, and a label."""

    def __init__(self, count: int, tokens: int = 24) -> None:
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, tokens + 1, (count, 1), generator=draw)
        self.ids = torch.randint(1, 500, (count, tokens), generator=draw)
        self.mask = (torch.arange(tokens) < lengths).long()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict:
        return {"input_ids": self.ids[row], "attention_mask": self.mask[row], "labels": self.ids[row, 0] % 3}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", default="hf-run")
    options.add_argument("--steps", type=int, default=60)
    options = options.parse_args()

    torch.manual_seed(0)
    matches = [
        Match("bert.encoder.layer.{1,3}", "bert.encoder.layer.*", mask="attention_mask", weight=0.5),
        Match(":logits", ":logits", loss="kl", temperature=2.0),
        Match(None, ":logits", loss="cross_entropy", target="labels"),
    ]
    distiller = Distiller(bert(4), bert(2), matches)
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=20,
        save_steps=20,
        save_total_limit=1,
        report_to="none",
    )
    trainer = DistillationTrainer(distiller, arguments, train_dataset=Sentences(512), eval_dataset=Sentences(64))
    trainer.train()
    print(f"held-out loss {trainer.evaluate()['eval_loss']:.3f}")
    trainer.save_model()  # the student alone, for from_pretrained; adapters.safetensors beside it where there are any
    BertForSequenceClassification.from_pretrained(options.output)


if __name__ == "__main__":
    main()
