"""Where kernels run, what is said where they do not, and what importing the package leaves alone."""

import os
import subprocess
import sys

import pytest
import torch

from hookdistill import DistillationLoss, Match, MatchError
from hookdistill.engine import fast
from hookdistill.fused.forms import FORMS
from hookdistill.fused.rows import RowTask, RowTerm
from hookdistill.kernels import availability
from hookdistill.kernels.availability import unavailable, unsuited

on_the_cpu = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")


def task(dtype=torch.float32, other=torch.float32, shape=(2, 3)):
    student, teacher = torch.zeros(shape, dtype=dtype, requires_grad=True), torch.ones(shape, dtype=other)
    return RowTask(student=student, terms=[RowTerm(form=FORMS["mse"], other=teacher)])


@on_the_cpu
def test_asking_for_triton_on_the_cpu_says_what_is_needed():
    one = {"": {"output": torch.zeros(2, 3, requires_grad=True)}}
    loss = DistillationLoss([Match("", "", name="hidden")], impl="triton")
    with pytest.raises(MatchError) as caught:
        loss({"": {"output": torch.ones(2, 3)}}, one)
    for word in ("hidden", "impl='triton'", "CUDA device", "TRITON_INTERPRET=1", "before Python starts"):
        assert word in str(caught.value)


@on_the_cpu
def test_nothing_on_the_cpu_waits_or_goes_to_kernels():
    assert not fast.waits(torch.zeros(2, 3), "auto")
    assert not fast.waits(torch.zeros(2, 3), "triton")
    assert fast.choose(task(), "auto").implementation != "triton"


def test_setting_the_interpreter_too_late_is_not_taken_for_setting_it():
    code = (
        "import triton, os, torch; os.environ['TRITON_INTERPRET'] = '1'; "
        "from hookdistill.kernels.availability import unavailable; print(unavailable(torch.device('cpu')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert "before Python starts" in done.stdout, done.stderr


def test_other_devices_are_named():
    assert "'mps'" in str(unavailable(torch.device("mps")))


@pytest.mark.parametrize(
    ("capability", "hip", "missing", "words"),
    [
        ((7, 5), None, False, ["Ampere", "Old GPU"]),
        ((9, 0), "6.0", False, ["AMD"]),
        ((9, 0), None, True, ["Triton", "pip install"]),
        ((9, 0), None, False, None),
    ],
)
def test_a_cuda_device_needs_ampere_and_triton(capability, hip, missing, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    if missing:
        monkeypatch.setitem(sys.modules, "triton", None)
    elif words is None:
        pytest.importorskip("triton", reason="Triton is not installed")
    availability._unavailable.cache_clear()
    said = unavailable(torch.device("cuda", 0))
    availability._unavailable.cache_clear()
    if words is None:
        assert said is None
    else:
        assert all(word in str(said) for word in words), said


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        ((torch.float32, torch.bfloat16), None),
        ((torch.float64, torch.float32), "float64"),
        ((torch.float16, torch.float64), "float64"),
        ((torch.float8_e4m3fn, torch.float32), "float8_e4m3fn"),
    ],
)
def test_what_the_closed_forms_do_better(dtypes, reason):
    student, teacher = torch.zeros(2, 3).to(dtypes[0]), torch.zeros(2, 3).to(dtypes[1])
    assert unsuited(RowTask(student=student, terms=[RowTerm(form=FORMS["mse"], other=teacher)])) == reason


def test_more_rows_than_an_int_counts_are_left_alone():
    many = torch.zeros(1, 1).expand(2**31, 1)
    assert unsuited(RowTask(student=many, terms=[RowTerm(form=FORMS["mse"], other=many)])) == "too many rows"


def test_a_step_imports_no_kernel_where_there_is_no_device_for_it():
    code = (
        "import sys, torch, hookdistill as h; "
        "loss = h.DistillationLoss([h.Match('', '')]); s = torch.zeros(2, 3, requires_grad=True); "
        "loss({'': {'output': torch.ones(2, 3)}}, {'': {'output': s}}).total.backward(); "
        "print([name for name in sys.modules if name.startswith('hookdistill.kernels.')])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.stdout.strip() == "['hookdistill.kernels.availability']", done.stderr
