"""What kernels become for an H100: nothing spilled to memory, loads 16 bytes wide, nothing in double precision."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from kernels_sm90 import ALL_FEATURES, ALL_LOGITS, Case, features, figures, logits, named, scaled  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HALF, SINGLE = torch.bfloat16, torch.float32
LOGITS = [
    (logits(("kl",), 30522, HALF), 2, 2),
    (logits(("kl", "cross_entropy"), 30522, HALF), 2, 2),
    (logits(("js",), 30522, HALF), 3, 2),
    (logits(ALL_LOGITS, 30522, HALF), 3, 2),
    (logits(("kl",), 30522, SINGLE), 2, 2),
    (logits(("kl", "js"), 128256, HALF), 3, 2),
    (logits(("kl", "js", "cross_entropy"), 32000, HALF), 3, 2),
    (logits(("kl", "tvd", "soft_cross_entropy", "cross_entropy"), 32000, HALF), 3, 2),
    (logits(("cross_entropy",), 262144, HALF), 2, 1),
]
"""Each with its sweeps, and the tensors that these read."""
FEATURES = [
    features(("mse",), 768, HALF),
    features(("l1",), 768, SINGLE),
    features(("cosine",), 768, HALF),
    features(ALL_FEATURES, 8192, SINGLE),
    features(ALL_FEATURES, 16384, HALF),
]
AROUND = [
    Case("gradients from above", named(HALF), 4096, "scale", lambda: scaled(HALF)),
    Case("counts of a mask", "bool", 4, "shares", features(("mse",), 768, HALF).run),
    Case("sums", "float32", 4, "totals", features(("mse",), 768, HALF).run),
]


def label(case):
    return f"{case.losses}-{case.dtype}-{case.width}" if isinstance(case, Case) else ""


@pytest.mark.parametrize(("case", "sweeps", "tensors"), LOGITS, ids=label)
def test_logits_are_read_16_bytes_at_a_time_whatever_the_vocabulary(case, sweeps, tensors):
    found = figures(case)
    assert found.spilled == found.stack == 0
    assert found.doubles == 0
    vectors = 1 if case.dtype == "bfloat16" else 2
    assert found.loads_of_16 >= sweeps * tensors * vectors
    assert found.stores_of_16 >= vectors
    # What is left are a byte of the mask of each term, and the logit of the label.
    names = case.losses.split("+")
    assert found.narrow_loads <= len(names) + ("cross_entropy" in names)


@pytest.mark.parametrize("case", FEATURES, ids=label)
def test_features_are_read_16_bytes_at_a_time(case):
    found = figures(case)
    assert found.spilled == found.stack == 0
    assert found.doubles == 0
    assert found.loads_of_16 >= 2 and found.stores_of_16 >= 1
    assert found.narrow_loads <= 2 * len(case.losses.split("+"))  # masks


@pytest.mark.parametrize("case", AROUND, ids=label)
def test_what_stands_around_spills_nothing(case):
    found = figures(case)
    assert found.spilled == found.stack == found.doubles == 0
    assert case.kernel != "scale" or found.loads_of_16 >= 1


def test_the_committed_table_is_of_these_kernels():
    table = json.loads((BENCHMARKS / "results" / "kernels_sm90.json").read_text(encoding="utf-8"))
    assert all(row["spilled"] == 0 and row["doubles"] == 0 for row in table["rows"])
    case = LOGITS[0][0]
    rows = [
        row for row in table["rows"] if (row["losses"], row["dtype"], row["width"]) == (case.losses, case.dtype, case.width)
    ]
    assert rows[0]["loads_of_16"] == figures(case).loads_of_16
