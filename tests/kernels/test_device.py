"""What only a real device can show. The cases, too, run on it where there is one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hookdistill import DistillationLoss, Match
from hookdistill.fused.attention import AttentionTask, Heads
from hookdistill.fused.relations import RelationTask
from hookdistill.fused.rows import RowTask
from hookdistill.kernels import tables
from hookdistill.kernels.attention import attention_losses_triton
from hookdistill.kernels.relations import relation_losses_triton
from hookdistill.kernels.rows import run_rows_triton
from kernel_cases import FEATURES, LOGITS, check, computed, defined, drawn, labels, same_bits, some, term, terms

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
]


def losses(device):
    """A loss stage with terms of both families, and what it takes."""
    matches = [
        Match("a", "a", loss="mse", mask="valid"),
        Match("a", "a", loss="cosine", weight=2.0),
        Match("b", "b", loss="kl", temperature=2.0, mask="valid"),
        Match(None, "b", loss="cross_entropy", target="labels"),
    ]
    batch = {"valid": some(4, 16, device=device), "labels": labels(4, 16, classes=1000, device=device)}
    teacher = {"a": {"output": drawn(4, 16, 256, device=device)}, "b": {"output": drawn(4, 16, 1000, device=device)}}
    student = {
        name: {"output": torch.randn(4, 16, width, device=device, requires_grad=True)}
        for name, width in (("a", 256), ("b", 1000))
    }
    return matches, batch, teacher, student


def test_a_step_never_waits_for_the_device():
    matches, batch, teacher, student = losses("cuda")
    loss = DistillationLoss(matches)
    loss(teacher, student, batch).total.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for scale in (1.0, 0.5):
            (loss(teacher, student, batch).total * scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_can_be_captured_in_a_graph_and_replayed_on_new_values():
    matches, batch, teacher, student = losses("cuda")
    loss = DistillationLoss(matches, impl="triton")
    tensors = [student[name]["output"] for name in student]

    def step():
        found = loss(teacher, student, batch)
        return found.total, torch.autograd.grad(found.total * 0.5, tensors)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total, gradients = step()
    for seed in (3, 4):
        with torch.no_grad():
            for tensor in (*tensors, *(teacher[name]["output"] for name in teacher)):
                tensor.copy_(drawn(*tensor.shape, seed=seed, device="cuda"))
                seed += 10
        graph.replay()
        again_total, again = step()
        torch.testing.assert_close(total, again_total)
        torch.testing.assert_close(gradients, again)


def test_losses_between_maps_never_wait_and_can_be_captured():
    valid = some(2, 200, device="cuda")
    query, key, their_query, their_key = (
        drawn(2, 4, 200, 64, seed=seed, dtype=torch.bfloat16, device="cuda") for seed in range(4)
    )
    factor = torch.tensor(0.5, device="cuda")
    sides = [
        Heads(query=each[0], key=each[1], mask=valid[:, None, None], scale=0.125)
        for each in ((query, key), (their_query, their_key))
    ]

    def step():
        results = []
        for kind in ("kl", "mse", "scores mse"):
            task = AttentionTask(kind=kind, student=sides[0], teacher=sides[1], valid=valid, coefficient=factor)
            found = attention_losses_triton(task, gradient=True)
            results += [found.total, found.query, found.key]
        relation = RelationTask(student=query, teacher=their_query, heads=2, valid=valid, coefficient=0.3)
        found = relation_losses_triton(relation, gradient=True)
        return [*results, found.total, found.gradient]

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    query.copy_(drawn(*query.shape, seed=9, device="cuda"))
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert same_bits(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    assert torch.cuda.current_device() == 0
    student, teacher = drawn(4, 1000, device="cuda:1"), drawn(4, 1000, seed=1, device="cuda:1")
    check(RowTask(student=student, terms=terms(LOGITS, teacher, labels(4, classes=1000, device="cuda:1"))))
    here = RowTask(student=student.to("cuda:0"), terms=terms(FEATURES, teacher.to("cuda:0")))
    there = RowTask(student=student, terms=terms(FEATURES, teacher))
    for one, other in zip(*((found.gradient, found.values) for found in computed(here, there)), strict=True):
        assert same_bits(one.cpu(), other.cpu())
    assert torch.cuda.current_device() == 0


def test_tables_are_uploaded_once_for_the_same_tensors():
    student, teacher = drawn(4, 256, device="cuda"), drawn(4, 256, seed=1, device="cuda")
    task = RowTask(student=student, terms=terms(FEATURES, teacher))
    run_rows_triton([task], gradient=False)
    before = set(tables._uploaded)
    run_rows_triton([task], gradient=False)
    assert set(tables._uploaded) == before


@pytest.mark.parametrize("name", ["kl", "mse"])
def test_more_elements_than_an_int_counts(name):
    classes, rows = 131072, 16400  # 2**31 elements and some more
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * classes * rows:
        pytest.skip(f"needs 17 GB of GPU memory, and {free / 2**30:.0f} GiB are free")
    student = torch.randn(rows, classes, dtype=torch.bfloat16, device="cuda")
    teacher = torch.randn(1, classes, dtype=torch.bfloat16, device="cuda").expand(rows, classes)
    (found,) = run_rows_triton([RowTask(student=student, terms=[term(name, teacher, mean=False)])], gradient=True)
    for row in (0, rows - 1):
        alone = RowTask(student=student[row : row + 1].clone(), terms=[term(name, teacher[:1], mean=False)])
        check(alone)
        _, gradient = defined(alone, torch.float64)
        assert (found.gradient[row].double() - gradient[0]).norm() <= 0.01 * gradient.norm()


@pytest.mark.parametrize("classes", [30522, 32000, 128256])
def test_vocabularies_in_use(classes):
    for dtype in (torch.bfloat16, torch.float32):
        student = drawn(8, classes, dtype=dtype, spread=3.0, device="cuda")
        teacher = drawn(8, classes, dtype=dtype, spread=3.0, seed=1, device="cuda")
        target = labels(8, classes=classes, device="cuda")
        for names in (["kl", "cross_entropy"], ["reverse_kl"], ["js"], ["skew_kl"], ["tvd"], LOGITS):
            check(RowTask(student=student, terms=terms(names, teacher, target, temperature=2.0)))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer of the CUDA toolkit is not installed")
def test_the_sanitizer_finds_nothing(tool):
    """Out of bounds, races, barriers that not all threads reach: on cases of each kernel, without the caching allocator, which
    would hide a read behind the end of a tensor."""
    cases = Path(__file__).parent / "cases"
    files = [cases / f"test_{name}.py" for name in ("features", "distributions", "attention", "relations")]
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "float32 or bfloat16", "--maxfail=1"]
    done = subprocess.run(
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", *run, *map(str, files)],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
