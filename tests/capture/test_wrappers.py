"""Rows: DDP, FSDP2, DataParallel, ``accelerate.prepare``; and the wrappers that only add a prefix."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from capture_zoo import Mlp, bert, edited, gradients, rows, same_gradients, tokens
from hookdistill import Capture, CaptureError

ROOT = Path(__file__).parents[2]


def test_dataparallel_is_refused_with_a_reason():
    with pytest.raises(CaptureError, match="the model is a DataParallel, whose replicas run in threads"):
        Capture(nn.DataParallel(Mlp()), "layers.0")
    with pytest.raises(CaptureError, match="'0' is a DataParallel"):
        Capture(nn.Sequential(nn.DataParallel(Mlp())), "0.layers.0")


@pytest.mark.parametrize(
    "wrap",
    [checkpoint_wrapper, lambda m: torch.compile(m, backend="aot_eager"), AveragedModel],
    ids=["checkpoint", "compile", "averaged"],
)
@pytest.mark.parametrize("where", ["model", "inside"])
def test_prefixes_of_wrappers_need_not_be_written(wrap, where):
    model, x = Mlp(), rows()
    if where == "model":
        outer, addresses = wrap(model), ["layers.1", "layers.1:input"]
    else:
        outer, addresses = nn.Sequential(wrap(model)), ["0.layers.1", "0.layers.1:input"]
    parameters = next(child for child in outer.modules() if type(child) is Mlp)
    with Capture(outer, addresses) as captured:
        outer(x)
    (layer,) = captured.values()
    before = nn.functional.linear(x, *parameters.layers[0].parameters()).tanh()
    want = nn.functional.linear(before, *parameters.layers[1].parameters())
    assert torch.equal(layer["input"], before)
    assert torch.equal(layer["output"], want)
    assert same_gradients(gradients(layer["output"], parameters), gradients(want, parameters))


def test_accelerate_prepare_on_one_process():
    model, batch = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), tokens()
    with edited(model, ["bert.encoder.layer.1"]) as want, torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    with Capture(prepared, ["bert.encoder.layer.1", ":logits", ":input.attention_mask"]) as captured:
        out = prepared(**batch)
    got = captured["bert.encoder.layer.1"]["output"]
    assert got.dtype is want["bert.encoder.layer.1"].dtype
    assert torch.equal(got, want["bert.encoder.layer.1"])
    assert captured[""]["logits"] is out.logits
    assert torch.equal(captured[""]["input.attention_mask"], batch["attention_mask"])


# Two processes with gloo. Each runs on its half of the batch; the reference is one process on the whole of it.

DISTRIBUTED = """
import sys, warnings
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hookdistill import Capture

warnings.simplefilter("ignore")
dist.init_process_group("gloo")
rank = dist.get_rank()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x

def loss_of(layer1, entered, out):
    return layer1.square().mean() + entered.sin().mean() + out.square().mean()

def wrap(kind, model):
    if kind.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model, static_graph=kind == "ddp static")
    if kind == "accelerate":
        from accelerate import Accelerator
        return Accelerator(cpu=True).prepare(model)
    for layer in model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

def check(kind):
    torch.manual_seed(0)
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict())
    whole = torch.randn(4, 8)
    x = whole[rank::2]

    # By hand, on the whole batch, without hookdistill and without a wrapper.
    first = reference.layers[0](whole).tanh()
    second = reference.layers[1](first)
    third = reference.layers[2](second.tanh()).tanh()
    loss_of(second, second.tanh(), third).backward()

    wrapped = wrap(kind, model)
    with Capture(wrapped, ["layers.1", "layers.2:input", ":output"]) as captured:
        for step in range(2):  # a second forward replaces the first
            wrapped.zero_grad()
            out = wrapped(x)
            layer1, entered, last = captured["layers.1"]["output"], captured["layers.2"]["input"], captured[""]["output"]
            assert torch.allclose(layer1, second[rank::2], atol=1e-6), "value"
            assert torch.allclose(entered, second.tanh()[rank::2], atol=1e-6), "input"
            assert torch.equal(last, out), "output"
            assert type(layer1) is torch.Tensor
            loss_of(layer1, entered, last).backward()
    assert list(captured) == ["layers.1", "layers.2", ""]
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert torch.allclose(gradient, other.grad, atol=1e-5), name

for kind in sys.argv[1:]:
    try:
        check(kind)
    except AssertionError as error:
        print(kind, "differs in", error, flush=True)
    else:
        print(kind, "is fine", flush=True)
dist.barrier()
dist.destroy_process_group()
"""
KINDS = ["ddp", "ddp static", "fsdp2", "accelerate"]


@pytest.fixture(scope="module")
def said_by_both_ranks(tmp_path_factory) -> list[str]:
    script = tmp_path_factory.mktemp("distributed") / "worker.py"
    script.write_text(DISTRIBUTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared |= {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), *KINDS],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return ["\n".join(worker.communicate(timeout=180)) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_distributed_paths_as_on_the_bare_model_and_gradients_synchronised(kind, said_by_both_ranks):
    for said in said_by_both_ranks:
        assert f"{kind} is fine" in said
