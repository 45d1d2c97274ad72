"""The benchmark of the store runs and writes what it promises; no time is judged here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(tmp_path, *options):
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "store.py"),
        "--out",
        str(tmp_path),
        "--folder",
        str(tmp_path),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.glob("*.json")
    return json.loads(result.read_text(encoding="utf-8"))


def test_builds_killed_at_random_moments_end_as_one_left_alone(tmp_path):
    kills = run(tmp_path, "--kills", "4")["kills"]
    assert len(kills) == 4
    assert all(row["identical"] for row in kills)


def test_rates(tmp_path):
    result = run(tmp_path, "--quick")
    assert {row["what"] for row in result["disk"]} > {"build the store", "write the same bytes", "read files, cold"}
    assert all(rate > 0 for row in result["disk"] for rate in row["mb_per_s"])
    sizes = {row["kept"]: row["bytes_per_token"] for row in result["logits"]}
    assert sizes["50 draws, float16"] < sizes["top 64, float16"] < sizes["whole, int8"] < sizes["whole, float32"]


def test_large(tmp_path):
    result = run(tmp_path, "--large", "0.02", "--quick")
    assert len(result["windows"]) >= 3 and result["opened"]["samples"] > 0
    assert [row["samples"] for row in result["index"]] == [1000, 10_000]
