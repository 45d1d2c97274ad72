"""What the pages say, runs: every Python block of README.md and docs/, in order, page by page; and the example scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

import hookdistill
from hookdistill.journal import read_run

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Classifier(torch.nn.Module):
    """A BERT with a head, whose layers are at ``encoder.layer`` as on the pages."""

    def __init__(self, layers):
        super().__init__()
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
        bert = BertModel(BertConfig(num_hidden_layers=layers, **sizes), add_pooling_layer=False)
        self.embeddings, self.encoder, self.head = bert.embeddings, bert.encoder, torch.nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        allowed = attention_mask[:, None, None, :].bool()
        hidden = self.encoder(self.embeddings(input_ids), attention_mask=allowed)[0]
        return {"logits": self.head(hidden[:, 0])}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_blocks_run(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages write stores, students and runs
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (2, 6))
    rows = [{"input_ids": each, "attention_mask": torch.ones_like(each), "labels": torch.tensor(1)} for each in ids] * 4
    names = {
        "__name__": page.stem,
        "hookdistill": hookdistill,
        "Match": hookdistill.Match,
        "batch": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1])},
        "teacher": Classifier(12),
        "student": Classifier(3),
        "model": Classifier(4),
        "loader": torch.utils.data.DataLoader(rows, 4),
        "held_out_loader": torch.utils.data.DataLoader(rows[:4], 4),
        "rows": rows,
        "held_out": rows[:4],
        "theirs": torch.randn(2, 6, 8),
        "ours": torch.randn(2, 6, 8, requires_grad=True),
    }
    for block in blocks(page):
        if "DistillationLoss" in block:
            names["matches"] = [hookdistill.Match("encoder.layer.3", "encoder.layer.0", mask="attention_mask")]
        exec(compile(block, str(page), "exec"), names)
    if "losses" in names:
        assert names["losses"].total.isfinite()
    if "captured" in names:
        attention = names["captured"]["encoder.layer.0.attention"]["attention"]
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    assert {"losses", "captured"} & names.keys()


def test_the_first_screen_is_sentence_commands_code_and_table():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert max(line.startswith("│ distilled") and number for number, line in enumerate(lines)) < 40
    assert len(blocks(ROOT / "README.md")[0].splitlines()) <= 10
    commands = [line for line in lines if line.startswith("pip install -c constraints.txt")]
    assert [line.split("&& ")[1] for line in commands] == ["python examples/quickstart.py", "pytest -n 2"]


def test_the_bert_example_runs():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "bert_layers.py"), "--steps", "5"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^encoder\.layer\.2 .* encoder\.layer\.11 ", done.stdout, re.MULTILINE)
    assert "after 5 steps" in done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_the_accelerate_example_runs_as_launched(processes, tmp_path):
    script = str(ROOT / "examples" / "train_accelerate.py")
    launch = ["--multi_gpu"] * (processes > 1) + [
        "--num_processes",
        str(processes),
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--dynamo_backend", "no", script]
    done = subprocess.run(
        [*command, "--epochs", "1", "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^student 0\.\d+, teacher 0\.\d+ on held-out images$", done.stdout, re.MULTILINE)
    assert {"best", "last", "checkpoints", "log.jsonl", "run.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert read_run(tmp_path / "run")["processes"] == processes


def test_the_transformers_example_runs(tmp_path):
    script = str(ROOT / "examples" / "train_hf.py")
    command = [sys.executable, script, "--steps", "2", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout


def test_the_lightning_example_runs(tmp_path):
    pytest.importorskip("lightning", reason="lightning is not installed")
    script = str(ROOT / "examples" / "train_lightning.py")
    command = [sys.executable, script, "--epochs", "1", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "student" / "model.safetensors").exists()
