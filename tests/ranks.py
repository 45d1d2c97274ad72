"""A function in several processes that talk by gloo, as ``accelerate launch`` would start them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState


def in_processes(function: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 120) -> list[Any]:
    """What ``function(*args)`` returns in each process; tensors come back as they are.

    The processes are forks, so that nothing is imported again. An error in one is an error here.
    """
    context = get_context("fork")
    queue = context.Queue()
    port = _free_port()
    processes = [context.Process(target=_process, args=(rank, world, port, queue, function, args)) for rank in range(world)]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, outcome, error = queue.get(timeout=seconds)
            if error is not None:
                raise AssertionError(f"process {rank}: {error}")
            results[rank] = outcome
    finally:
        for process in processes:
            process.join(5 if len(results) == world else 0.5)
            if process.is_alive():
                process.kill()
    return [_tensors(results[rank]) for rank in range(world)]


def _process(rank: int, world: int, port: int, queue: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",  # else accelerate chooses a number, and warns
    }
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        PartialState(cpu=True, backend="gloo")
        outcome, error = _arrays(function(*args)), None
    except BaseException:
        outcome, error = None, traceback.format_exc()
    queue.put((rank, outcome, error))
    queue.close()
    queue.join_thread()
    if torch.distributed.is_initialized() and error is None:
        torch.distributed.destroy_process_group()
    os._exit(0)  # no exit handlers of the process that was forked


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _arrays(value: Any) -> Any:
    # A queue would send the memory of a tensor through a file descriptor, which ends with the process.
    if isinstance(value, torch.Tensor):
        return ("tensor", value.detach().tolist(), str(value.dtype).removeprefix("torch."))
    if isinstance(value, dict):
        return {key: _arrays(each) for key, each in value.items()}
    return [_arrays(each) for each in value] if isinstance(value, list) else value


def _tensors(value: Any) -> Any:
    if isinstance(value, tuple) and value[:1] == ("tensor",):
        return torch.tensor(value[1], dtype=getattr(torch, value[2]))
    if isinstance(value, dict):
        return {key: _tensors(each) for key, each in value.items()}
    return [_tensors(each) for each in value] if isinstance(value, list) else value
