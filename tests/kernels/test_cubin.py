"""What kernels become for an H100: nothing spilled to memory, loads 16 bytes wide, nothing in double precision."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from kernels_sm90 import (  # noqa: E402
    ALL_FEATURES,
    ALL_LOGITS,
    Case,
    attention,
    features,
    figures,
    logits,
    named,
    relations,
    scaled,
)

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
MAPS = [
    (attention("kl", "keys", 64, HALF, "log_sums"), 2),
    (attention("kl", "keys", 64, HALF, "by_query"), 4),
    (attention("mse", "full", 64, HALF, "by_query"), 6),
    (attention("mse", "pairs", 64, HALF, "by_key"), 4),
    (attention("kl", "odd", 128, HALF, "by_query"), 4),
    (attention("scores mse", "causal", 128, HALF, "by_key"), 4),
    (attention("kl", "added", 128, HALF, "by_key"), 6),
    (attention("mse", "full", 64, SINGLE, "by_key"), 6),
    (relations(64, HALF, "relation_slopes"), 4),
    (relations(256, HALF, "relation_slopes"), 4),
    (relations(128, SINGLE, "relation_sums"), 2),
]
"""Each with how many tensors it reads 16 bytes at a time; masks too, where they are of such a size."""
LEAST_SHARED = 101376
"""Bytes of shared memory that a program may have on the smallest of the devices with kernels, of capability 8.6."""


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


@pytest.mark.parametrize(("case", "tensors"), MAPS, ids=label)
def test_maps_stay_in_registers_and_half_precision_goes_to_tensor_cores(case, tensors):
    found = figures(case)
    assert found.spilled == found.stack == 0
    assert found.doubles == 0
    assert found.shared <= LEAST_SHARED
    assert found.loads_of_16 >= tensors
    assert (found.tensor_cores > 0) == (case.dtype == "bfloat16")
    assert "sums" in case.kernel or found.stores_of_16 >= 1


@pytest.mark.parametrize("case", AROUND, ids=label)
def test_what_stands_around_spills_nothing(case):
    found = figures(case)
    assert found.spilled == found.stack == found.doubles == 0
    assert case.kernel != "scale" or found.loads_of_16 >= 1


def test_the_committed_table_is_of_these_kernels():
    table = json.loads((BENCHMARKS / "results" / "kernels_sm90.json").read_text(encoding="utf-8"))
    assert all(row["spilled"] == 0 and row["doubles"] == 0 for row in table["rows"])
    if triton.__version__ != table["versions"]["triton"]:
        pytest.skip(f"the table was made by Triton {table['versions']['triton']}, and this is {triton.__version__}")
    case = LOGITS[0][0]
    rows = [
        row for row in table["rows"] if (row["losses"], row["dtype"], row["width"]) == (case.losses, case.dtype, case.width)
    ]
    assert rows[0]["loads_of_16"] == figures(case).loads_of_16
    case = MAPS[1][0]
    rows = [
        row
        for row in table["rows"]
        if (row["losses"], row["dtype"], row["width"], row["kernel"]) == (case.losses, case.dtype, case.width, case.kernel)
    ]
    assert rows[0]["registers"] == figures(case).registers
