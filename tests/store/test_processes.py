"""Two processes with gloo, as a launcher starts them, write one store; killed together, they go on together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hookdistill import Distiller, Match, TeacherStore
from hookdistill.store import verify
from hookdistill.store.processes import Processes, is_divided, is_sharded
from pairs import Reader, readers, seeded
from store_zoo import batches, contents, files, padded, sentences

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time, warnings
import torch, torch.distributed as dist
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

sys.path.insert(0, sys.argv[1])
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from pairs import Reader, seeded
from store_zoo import batches, padded, sentences
from hookdistill import StoreError, TeacherStore

samples = sentences(21)

def slow(loader):
    for batch in loader:
        time.sleep(float(sys.argv[3]))
        yield batch

def build(folder, teacher, loader, **options):
    store = TeacherStore.build(folder, teacher, ["layers.*", ":logits"], loader, shard_bytes=1500, progress=False, **options)
    assert len(store) == 21, len(store)

folder, kinds = sys.argv[2], sys.argv[4:]
for kind in kinds:
    teacher = seeded(Reader)
    if kind == "plain":
        build(f"{folder}/{kind}", teacher, slow(batches(samples, 2)))
    elif kind == "sampler":
        dist.is_initialized() or dist.init_process_group("gloo")
        sampler = DistributedSampler(samples, shuffle=False)
        build(f"{folder}/{kind}", teacher, DataLoader(samples, 2, sampler=sampler, collate_fn=padded))
    elif kind == "accelerate":
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(DataLoader(samples, 2, shuffle=True, collate_fn=padded))
        build(f"{folder}/{kind}", teacher, loader)
    elif kind == "sharded":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        for layer in teacher.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(teacher, mesh=init_device_mesh("cpu", (2,)))
        build(f"{folder}/{kind}", teacher, slow(batches(samples, 2)))
    elif kind == "differ":
        teacher = seeded(Reader, seed=dist.get_rank())
        try:
            build(f"{folder}/{kind}", teacher, batches(samples, 2))
        except StoreError as error:
            print("refused:", error, flush=True)
    print(kind, "is fine", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def launch(folder, *kinds, sleep=0.0):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", SCRIPT, str(ROOT / "tests"), str(folder), str(sleep), *kinds]
    return [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def finished(processes):
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    outputs = finished(launch(folder, "plain", "sampler", "accelerate", "sharded", "differ"))
    return folder, outputs


@pytest.mark.parametrize("kind", ["plain", "sampler", "accelerate", "sharded"])
def test_together_they_write_what_one_would(written, tmp_path, kind):
    folder = written[0] / kind
    assert verify(folder).samples == 21
    ranks = {path.name.split("-")[1] for path in (folder / "shards").iterdir()}
    assert ranks == {"00000", "00001"}
    alone = TeacherStore.build(tmp_path, seeded(Reader), ["layers.*", ":logits"], batches(sentences(21), 2), progress=False)
    assert contents(folder).keys() == contents(tmp_path).keys()
    batch = padded(sentences(21), left=True)
    valid = batch["attention_mask"].bool()
    for address in alone.addresses:
        one, both = (
            next(iter(next(iter(store.captures(batch, [address]).values())).values()))
            for store in (alone, TeacherStore.open(folder, teacher=seeded(Reader)))
        )
        torch.testing.assert_close(one[valid], both[valid])


def test_processes_with_different_teachers_are_refused(written):
    assert any("refused:" in output and "another teacher" in output for output in written[1])


def test_a_batch_is_shared_out_once(written):
    sizes = [
        sum(path.stat().st_size for path in (written[0] / "plain" / "shards").glob(f"shard-0000{rank}-*")) for rank in (0, 1)
    ]
    assert min(sizes) > max(sizes) / 2


def test_killed_together_they_go_on_together(written, tmp_path):
    processes = launch(tmp_path, "plain", sleep=0.1)
    shards = tmp_path / "plain" / "shards"
    try:
        waited = time.monotonic() + 90
        while len(list(shards.glob("shard-*"))) < 3 and time.monotonic() < waited:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    there = {path: path.stat().st_mtime_ns for path in shards.glob("shard-*")}
    assert len(there) >= 3 and not (tmp_path / "plain" / "manifest.json").exists()
    finished(launch(tmp_path, "plain"))
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files(tmp_path / "plain") == files(written[0] / "plain")


def test_fewer_processes_go_on_where_more_were(written, tmp_path):
    import shutil

    folder = tmp_path / "store"
    shutil.copytree(written[0] / "plain", folder)
    (folder / "shards" / "shard-00001-0000000.safetensors").unlink()
    (folder / "manifest.json").unlink()
    before = {path.name for path in (folder / "shards").iterdir()}
    TeacherStore.build(folder, seeded(Reader), ["layers.*", ":logits"], batches(sentences(21), 2), progress=False)
    assert verify(folder).samples == 21
    assert {path.name for path in (folder / "shards").iterdir()} > before
    assert contents(folder) == contents(written[0] / "plain")


def test_ranks_read_one_store(written):
    student, batch = readers()[1], padded(sentences(21))
    matches = [Match("layers.-1", "layers.-1", mask="attention_mask")]
    totals = [Distiller(TeacherStore.open(written[0] / "plain"), student, matches)(batch).total for _ in range(2)]
    assert torch.equal(*totals)


def test_which_loaders_are_divided_already():
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    data = list(range(8))
    assert not is_divided(DataLoader(data)) and not is_divided(data)
    assert is_divided(DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0)))
    assert not is_sharded(seeded(Reader))
    two = [list(Processes(rank, 2).share(data, divided=False)) for rank in range(2)]
    assert two == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert list(Processes(1, 2).share(data, divided=True)) == data
