"""Making ready for a training, and leaving everything afterwards as it was."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..distiller import Distiller
from ..errors import TrainerError, listing
from ..paths import is_compiled, unwrap
from ..sharding import is_sharded
from .deepspeed_strategy import DeepSpeedStrategy, is_deepspeed, settle
from .faults import teachers_of
from .strategies import Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .trainer import Trainer

KEEP = "keep"


@contextlib.contextmanager
def accelerator_for(settings: Trainer) -> Iterator[Accelerator]:
    """The user's, or one for this training that leaves no state for the next."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import InitProcessGroupKwargs

    from .checks import check_accelerator

    if settings.accelerator is not None:
        check_processes(settings.accelerator)
        yield settings.accelerator
        return
    first = not is_initialized()
    # Left to itself, accelerate makes nothing of several processes without a GPU.
    by_gloo = _launched() > 1 and first and not torch.accelerator.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"  # cpu=True would pass over it
    try:
        accelerator = Accelerator(
            cpu=True if by_gloo and not deepspeed else None,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if by_gloo and deepspeed else None,
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulate or 1,
            log_with=list(settings.trackers) or None,
            project_dir=settings.output_dir,
        )
    except ValueError as error:
        way_out = "" if first else ". There is an Accelerator in this process already: pass it as accelerator="
        raise TrainerError(
            f"accelerate refuses mixed_precision={settings.mixed_precision!r}, trackers={list(settings.trackers)!r}: "
            f"{error}{way_out}"
        ) from error
    try:
        check_processes(accelerator)
        check_accelerator(settings, accelerator)
        yield accelerator
    finally:
        if first:  # or a second training in this process could not choose another precision
            AcceleratorState._reset_state()


@contextlib.contextmanager
def in_training(distiller: Distiller) -> Iterator[None]:
    """Training mode; afterwards modes as they were, no hooks, no gradients, and nothing of accelerate's on the distiller."""
    modes = {module: module.training for module in distiller.modules()}
    wrapping = ("forward", "_original_forward", "_is_accelerate_prepared")
    before = {name: vars(distiller)[name] for name in wrapping if name in vars(distiller)}
    distiller.train()
    distiller.zero_grad()
    try:
        yield
    finally:
        for module in distiller.modules():
            module.training = modes.get(module, modes[distiller])  # adapters of the plan were not there before
        for name in wrapping:
            vars(distiller).pop(name, None)
        vars(distiller).update(before)
        distiller.zero_grad()
        distiller.close()


@contextlib.contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms, or an error from torch where there is none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def checkpointing(student: nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing of a transformers model, of the kind that captures can live with.

    Raises:
        TrainerError: the student has none.
    """
    model: Any = unwrap(student)
    if not wanted or any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return
    # transformers has renamed the method, and its arguments with it.
    kind = next((each for each in ("activation", "gradient") if hasattr(model, f"{each}_checkpointing_enable")), None)
    if kind is None:
        raise TrainerError(
            f"gradient_checkpointing=True is for models of transformers, and {type(model).__name__} has no "
            "gradient_checkpointing_enable(). Wrap parts of it in torch.utils.checkpoint.checkpoint(…, use_reentrant=False)"
        )
    hooks = {id(module): {*module._forward_hooks} for module in model.modules()}
    try:
        getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    except ValueError as error:
        raise TrainerError(f"gradient_checkpointing=True: {error}") from error
    placed = [
        (module, number) for module in model.modules() for number in module._forward_hooks if number not in hooks[id(module)]
    ]
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()
        for module, number in placed:  # one that lets embeddings require gradients stays on otherwise
            module._forward_hooks.pop(number, None)


@contextlib.contextmanager
def compiling(distiller: Distiller, which: bool | str, options: Mapping[str, Any]) -> Iterator[None]:
    """``torch.compile`` in place, before any hook is on; what the user has compiled stays as it is."""
    models = [distiller.student] if which in (True, "student") else []
    models += teachers_of(distiller) if which in (True, "teacher") else []
    chosen = [model for model in models if not is_compiled(model)]
    for model in chosen:
        model.compile(**options)
    try:
        yield
    finally:
        for model in chosen:
            model._compiled_call_impl = None


def place(distiller: Distiller, device: torch.device, teacher_device: torch.device | str | None) -> None:
    """Move student and adapters to the device, and the teachers where they belong.

    A teacher that is sharded, quantised, or spread over devices is where it should be.
    """
    if not is_sharded(distiller.student):
        distiller.student.to(device)
    distiller.loss.to(device)
    for teacher in teachers_of(distiller):
        settled = any(hasattr(teacher, name) for name in ("hf_device_map", "hf_quantizer")) or is_sharded(teacher)
        if teacher_device != KEEP and not settled:
            teacher.to(device if teacher_device is None else teacher_device)


def check_processes(accelerator: Accelerator) -> None:
    """Raise where several processes were started and accelerate takes each for the only one: all would train alike, alone."""
    if _launched() > 1 and accelerator.num_processes == 1:
        raise TrainerError(
            f"this is one of {_launched()} processes (WORLD_SIZE), but its Accelerator runs alone; each would train by itself "
            "and write to the same place. Without a GPU make it Accelerator(cpu=True), or set ACCELERATE_USE_CPU=true"
        )


def _launched() -> int:
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdecimal() else 1


def check_engine(settings: Trainer, accelerator: Accelerator) -> None:
    """Raise a `TrainerError` where accelerate drives an engine that this trainer does not know, or not in this way."""
    kind = accelerator.distributed_type.value
    if kind in ("MEGATRON_LM", "XLA") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise TrainerError(
            f"accelerate is set to {kind}, which this trainer does not drive; it runs on one device, DDP, FSDP2 and DeepSpeed. "
            "For sharding choose fsdp_version: 2 in `accelerate config`, or call fully_shard on the models yourself"
        )
    if is_deepspeed(accelerator):
        settle(settings, accelerator)


def strategy_for(settings: Trainer, optimizer: Optimizer, accelerator: Accelerator, first: Any) -> Strategy:
    """How steps are made with what accelerate is set to."""
    if is_deepspeed(accelerator):
        return DeepSpeedStrategy(settings.distiller, optimizer, accelerator, first, clip=settings.clip_norm)
    return Strategy(settings.distiller, optimizer, accelerator, first)


def check_precision(distiller: Distiller, accelerator: Accelerator) -> None:
    """Raise a `TrainerError` where fp16 cannot work."""
    if accelerator.mixed_precision != "fp16":
        return
    if accelerator.device.type == "cpu":
        raise TrainerError("mixed_precision='fp16' needs a GPU, and this is the CPU; use 'bf16' or 'no'")
    half = [name for name, p in distiller.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise TrainerError(
            f"mixed_precision='fp16' keeps trained parameters in float32, but {listing(half, most=4)} are float16; call "
            "student.float(), or use mixed_precision='bf16'"
        )
