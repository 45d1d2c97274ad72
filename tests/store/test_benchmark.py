"""The benchmark of the store runs and writes what it promises; no time is judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    options = ["--quick", "--rates", "--kills", "3", "--large", "0.02"]
    command = [sys.executable, str(ROOT / "benchmarks" / "store.py"), "--out", str(folder), "--folder", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


def test_builds_killed_at_random_moments_end_as_one_left_alone(results):
    kills = results["store_kills"]["kills"]
    assert len(kills) == 3
    assert all(row["identical"] for row in kills)


def test_rates(results):
    result = results["store_rates"]
    assert {row["what"] for row in result["disk"]} > {"build the store", "write the same bytes", "read files, cold"}
    assert all(rate > 0 for row in result["disk"] for rate in row["mb_per_s"])
    sizes = {row["kept"]: row["bytes_per_token"] for row in result["logits"]}
    assert sizes["50 draws, float16"] < sizes["top 64, float16"] < sizes["whole, int8"] < sizes["whole, float32"]


def test_large(results):
    result = results["store_large"]
    assert result["windows"] and result["opened"]["samples"] > 0
    assert [row["samples"] for row in result["index"]] == [1000, 10_000]
