"""The benchmark scripts run and write what they promise; no time is judged here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks"
ALWAYS = {"no hooks", "no hooks, again", "bare hooks", "hookdistill", "hooks placed per forward"}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, str(SCRIPTS / "capture_overhead.py"), "--quick", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "150"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "every module" in done.stdout
    return json.loads((out / "capture_overhead.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("mode", ["forward", "training step"])
@pytest.mark.parametrize("captured", ["1 layer", "12 layers", "every module"])
def test_every_approach_has_a_row_for_every_set_and_mode(result, mode, captured):
    rows = {row["approach"]: row for row in result["timings"] if (row["mode"], row["captured"]) == (mode, captured)}
    assert set(rows) >= ALWAYS
    for row in rows.values():
        assert row["median_ms"] > 0
        for key in ("added_us", "ratio_to_none", "ratio_to_bare"):
            middle, low, high = row[key]
            assert math.isfinite(middle) and low <= high
    assert rows["no hooks"]["ratio_to_none"] == [1, 1, 1]


def test_the_sets_are_as_large_as_they_say(result):
    sizes = {row["captured"]: row["modules"] for row in result["timings"]}
    assert (sizes["1 layer"], sizes["12 layers"]) == (1, 12)
    assert sizes["every module"] > 12 * 10


def test_each_target_has_a_verdict(result):
    assert all(each["met"] in (True, False, None) and each["figures"] for each in result["targets"])
    assert sum("1.10" in each["wanted"] for each in result["targets"]) == 3


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is reset through Linux's /proc")
def test_memory_has_a_row_per_mode_and_set(result):
    rows = {(row["approach"], row["mode"], row["captured"]) for row in result["memory"]}
    assert len(rows) == 2 * 2 * 2
    assert all(row["peak_bytes"] > 0 for row in result["memory"])


def test_the_conditions_are_written_down(result):
    assert {"date", "cpu", "torch", "transformers", "hookdistill", "threads"} <= set(result["conditions"])


def test_the_comparison_of_methods_runs_and_writes_its_page(tmp_path):
    script = str(SCRIPTS / "methods.py")
    command = [sys.executable, script, "--quick", "--tasks", "digits", "--seeds", "2", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--page", str(tmp_path / "page.md")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "methods.json").read_text(encoding="utf-8"))
    (task,) = result["results"]
    rows = {row["arm"]: row for row in task["rows"]}
    assert {"alone", "kd", "dkd", "dist", "fitnet", "rkd", "cka", "crd", "attention_transfer", "reviewkd"} == set(rows)
    assert all(len(row["accuracies"]) == 2 and 0 <= row["mean"] <= 100 and row["cost"]["ms"] > 0 for row in rows.values())
    assert (task["labelled"], task["unlabelled"]) == (100, 897)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in page for name in rows)


def test_the_committed_table_of_methods_is_the_one_of_the_committed_figures():
    stored = SCRIPTS / "results" / "methods.json"
    sys.path.insert(0, str(SCRIPTS))
    try:
        import methods
    finally:
        sys.path.remove(str(SCRIPTS))
    result = json.loads(stored.read_text(encoding="utf-8"))
    page = (SCRIPTS.parent / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods.page(result["results"], result["conditions"])
