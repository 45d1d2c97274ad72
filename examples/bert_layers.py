"""Teach 3 BERT layers what 12 of a teacher compute, naming the layers by path: the older library's example, without an adaptor.

Random weights and random data, so there is nothing to learn beyond imitation; the point is the config. Half a minute on two CPU
cores at the default width of 64; `--full` takes BERT-base's.
"""

import argparse

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

import hookdistill
from hookdistill import Match


def bert(layers: int, *, full: bool) -> BertModel:
    size = {} if full else {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256}
    return BertModel(BertConfig(num_hidden_layers=layers, **size), add_pooling_layer=False)


def batches(count: int, batch_size: int = 16, tokens: int = 32) -> DataLoader:
    input_ids = torch.randint(100, 1000, (count * batch_size, tokens))
    attention_mask = torch.ones_like(input_ids)
    data = TensorDataset(input_ids, attention_mask, torch.zeros_like(input_ids))
    return DataLoader(data, batch_size=batch_size, shuffle=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--full", action="store_true", help="BERT-base's width instead of 64")
    options.add_argument("--steps", type=int, default=100)
    options = options.parse_args()

    torch.manual_seed(0)
    teacher, student = bert(12, full=options.full), bert(3, full=options.full)
    loader = batches(options.steps)

    matches = [
        Match("embeddings", "embeddings", loss="mse", mask=1),
        Match("encoder.layer.{3,7,11}", "encoder.layer.*", loss="mse", mask=1),
        # The same as the line above for one layer, in the older library's words:
        {
            "type": "ts_distill",
            "teacher_layer_name": "encoder.layer.-1",
            "teacher_layer_output_name": "output",
            "student_layer_name": "encoder.layer.-1",
            "student_layer_output_name": "output",
            "loss": {"loss_function": "cos", "args": {}},
            "weight": 0.5,
        },
    ]
    distiller = hookdistill.Distiller(teacher, student, matches)
    print(distiller.plan(next(iter(loader))))

    result = hookdistill.Trainer(distiller, loader, max_steps=options.steps, lr=1e-3).train()
    print(f"\nafter {result.steps} steps, {result.seconds:.0f} s:")
    for name, value in result.losses.items():
        print(f"  {value:8.4f}  {name}")


if __name__ == "__main__":
    main()
