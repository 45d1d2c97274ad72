"""Trainings on rows with padding of very different lengths, on one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from hookdistill import Distiller, Match, Trainer
from pairs import readers, state, tokens
from runs import constant

MATCHES = [
    Match("layers.3", "layers.1", name="hidden", mask="attention_mask", weight=0.5),
    Match("embed", "embed", loss="cosine", name="embedding", mask="attention_mask"),
    Match(":logits", ":logits", loss="kl", temperature=2.0, name="logits", mask="attention_mask"),
    Match(None, ":logits", loss="cross_entropy", target="labels", name="labels"),
]


def reading(matches: Sequence[Match] = MATCHES, teacher_width: int = 12) -> Distiller:
    """A distiller of readers, with adapters where the widths differ."""
    torch.manual_seed(4)  # of the adapters
    return Distiller(*readers(teacher_width, 8), matches, example_batch=tokens())


def examples(count: int = 12, length: int = 7) -> list[dict[str, Tensor]]:
    """Rows with padding of very different lengths, and labels that are ignored here and there."""
    draw = torch.Generator().manual_seed(5)
    rows = []
    for row in range(count):
        valid = 1 + (row * row + 3) % length
        labels = torch.randint(5, (length,), generator=draw)
        labels[valid:] = -100
        labels[:: 2 + row % 3] = -100
        rows.append(
            {
                "input_ids": torch.randint(20, (length,), generator=draw),
                "attention_mask": (torch.arange(length) < valid).long(),
                "labels": labels,
            }
        )
    return rows


def steps(batch_size: int, **settings: Any) -> dict[str, Any]:
    """Some passes over rows that do not come out even, on one process or several."""
    made = reading(settings.pop("matches", MATCHES))
    settings = {"epochs": 2, "optimizer": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9), **settings}
    result = Trainer(made, DataLoader(examples(11), batch_size), scheduler=constant, progress=False, **settings).train()
    return {"state": state(made.student, made.adapters), "steps": result.steps, "losses": dict(result.losses)}


def interrupted_run(folder: str, shard: bool, cut: int) -> dict[str, Any]:
    """The end of a training that was left alone, and of one that was cut off at an evaluation and taken up again."""

    def score(evaluation: Any) -> dict[str, float]:
        return {"score": -abs(evaluation.step - 5.0)}  # the best one comes after the cut, and is not the last

    class Cut:
        def __call__(self, evaluation):
            if evaluation.step == cut:
                raise KeyError("cut")
            return score(evaluation)

    def run(where, evaluators, resume):
        torch.manual_seed(3)
        made = reading(MATCHES)
        made.student.layers[0] = nn.Sequential(made.student.layers[0], nn.Dropout(0.3))
        if shard:
            for layer in made.student.layers:
                fully_shard(layer)
            fully_shard(made.student)
        trainer = Trainer(
            made,
            DataLoader(examples(11), 2, shuffle=True),
            epochs=2,
            optimizer=lambda parameters: AdamW(parameters, lr=0.01, foreach=False),
            output_dir=where,
            save_every=1,
            evaluate_every=1,
            evaluators=evaluators,
            best="score",
            load_best_at_end=True,
            ema=0.5,
            clip_norm=0.5,
            seed=1,
            report=False,
            progress=False,
        )
        result = trainer.train(resume=resume)
        end = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in made.state_dict().values()]
        return {"state": end, "history": [dict(each.metrics) for each in result.history], "steps": result.steps}

    whole = run(f"{folder}/whole", [score], False)
    try:
        run(f"{folder}/cut", [Cut()], False)
    except KeyError:
        pass
    else:
        raise AssertionError("was not cut off")
    return {"whole": whole, "resumed": run(f"{folder}/cut", [score], True)}
