"""What is refused before a training begins."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ..balancing import BALANCES
from ..distiller import Distiller
from ..ema import EMA
from ..errors import TrainerError, did_you_mean
from ..loading import length_of
from ..optimization import check_optimizer, check_scheduler

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .trainer import Trainer

PRECISIONS = ("no", "bf16", "fp16")


def check(settings: Trainer) -> None:
    """Raise a `TrainerError` for settings that contradict each other or the distiller."""
    _check_kinds(settings)
    _check_numbers(settings)
    _check_length(settings)
    _check_measuring(settings)
    _check_saving(settings)
    check_optimizer(settings.optimizer, settings.distiller)
    check_scheduler(settings.scheduler, settings.optimizer)


def check_accelerator(settings: Trainer, accelerator: Accelerator) -> None:
    """Raise a `TrainerError` where the accelerator has decided otherwise."""
    theirs = {"mixed_precision": accelerator.mixed_precision, "accumulate": accelerator.gradient_accumulation_steps}
    for name, has in theirs.items():
        given = getattr(settings, name)
        if given not in (None, has):
            raise TrainerError(
                f"{name}={given!r} is given, but the accelerator, or the environment it is made from, has {has!r}; leave "
                f"{name}= out, or make both alike"
            )


def check_writable(folder: Path) -> None:
    """Make the folder, and raise a `TrainerError` unless something can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0" * 4096)
    except OSError as error:
        raise TrainerError(f"output_dir={str(folder)!r} cannot be written: {error}") from error


def _check_kinds(settings: Trainer) -> None:
    if not isinstance(settings.distiller, Distiller):
        raise TrainerError(
            f"distiller= is a hookdistill.Distiller, not prepared or wrapped; got {type(settings.distiller).__name__}"
        )
    for name, loader in (("train_loader", settings.train_loader), ("eval_loader", settings.eval_loader)):
        if isinstance(loader, Dataset):
            raise TrainerError(f"{name} is a data set, not batches of it; write DataLoader({name}, batch_size=…)")
        if loader is not None and not isinstance(loader, Iterable):
            raise TrainerError(f"{name} is a DataLoader or another iterable of batches, got {type(loader).__name__}")
    _check_choice("mixed_precision", settings.mixed_precision, (None, *PRECISIONS))
    _check_choice("on_nonfinite", settings.on_nonfinite, ("error", "skip"))
    _check_choice("compile", settings.compile, (True, False, "student", "teacher"))
    _check_choice("report", settings.report, (True, False, "auto"))
    if settings.compile_options and not settings.compile:
        raise TrainerError("compile_options= is given without compile=True")
    if settings.accelerator is not None:
        check_accelerator(settings, settings.accelerator)
        if settings.trackers:
            raise TrainerError("trackers= is given beside accelerator=; make it Accelerator(log_with=…) instead")
    if isinstance(settings.balance, str):
        _check_choice("balance", settings.balance, tuple(BALANCES))
    _check_options_of_default_optimizer(settings)


def _check_options_of_default_optimizer(settings: Trainer) -> None:
    for name in ("lr", "adapter_lr", "weight_decay"):
        if getattr(settings, name) is not None and settings.optimizer is not None:
            raise TrainerError(
                f"{name}={getattr(settings, name)!r} is for the default optimizer, but optimizer= is given; write it there, "
                "with hookdistill.parameter_groups(distiller, …)"
            )
    if settings.warmup is not None and settings.scheduler is not None and not isinstance(settings.scheduler, str):
        raise TrainerError(f"warmup={settings.warmup!r} is for a scheduler by name, but scheduler= is one; write it there")


def _check_numbers(settings: Trainer) -> None:
    for name in ("epochs", "max_steps", "accumulate", "keep_last", "patience", "log_every"):
        check_number(name, getattr(settings, name), int)
    for name in ("lr", "adapter_lr", "clip_norm", "warmup"):
        check_number(name, getattr(settings, name), (int, float))
    if settings.weight_decay != 0:
        check_number("weight_decay", settings.weight_decay, (int, float))
    seed = settings.seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise TrainerError(f"seed= must be a whole number from 0, got {seed!r}")
    if not isinstance(settings.ema, EMA):
        check_number("ema", settings.ema, (int, float))
        if settings.ema is not None and settings.ema >= 1:
            raise TrainerError(f"ema={settings.ema!r} is the share of the average that stays at a step, such as 0.999")


def check_number(name: str, value: Any, kind: Any) -> None:
    """Raise a `TrainerError` unless it is ``None`` or a number above 0 of the kind."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < float(value) < math.inf:
        raise TrainerError(f"{name}= must be a {'whole ' if kind is int else ''}number above 0, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not isinstance(value, (str, bool, type(None))) or value not in choices:
        hint = did_you_mean(str(value), [str(choice) for choice in choices])
        known = ", ".join(repr(choice) for choice in choices if choice is not None)
        raise TrainerError(f"{name}={value!r} is not known; it is one of {known}.{hint}")


def _check_length(settings: Trainer) -> None:
    if (settings.epochs is None) == (settings.max_steps is None):
        given = "neither" if settings.epochs is None else "both"
        raise TrainerError(f"give epochs= or max_steps=, one of them, to say how long to train; {given} is given")
    length = length_of(settings.train_loader)
    if length == 0:
        raise TrainerError(
            "train_loader is empty: it has 0 batches. Is the data set smaller than a batch under drop_last=True?"
        )
    if length is None and settings.max_steps is None:
        kind = type(settings.train_loader).__name__
        raise TrainerError(
            f"epochs={settings.epochs} needs a train_loader with a length, and this {kind} has none; give max_steps="
        )


def _check_measuring(settings: Trainer) -> None:
    if callable(settings.evaluators) or not all(callable(evaluator) for evaluator in settings.evaluators):
        raise TrainerError(f"evaluators= is a list of callables that get an Evaluation, got {settings.evaluators!r:.80}")
    _check_when("evaluate_every", settings.evaluate_every)
    if settings.best is not None and not settings.evaluators and settings.eval_loader is None:
        raise TrainerError(f"best={settings.best!r} names a metric, but nothing is measured; give evaluators= or eval_loader=")
    for name, on in (("patience", settings.patience is not None), ("load_best_at_end", settings.load_best_at_end)):
        if on and settings.best is None:
            raise TrainerError(f"{name}= goes by a metric; name it with best=")


def _check_saving(settings: Trainer) -> None:
    _check_when("save_every", settings.save_every)
    if isinstance(settings.trackers, str) or not isinstance(settings.trackers, Iterable):
        raise TrainerError(f"trackers= is a list, as in trackers=['tensorboard'], got {settings.trackers!r:.80}")
    if not isinstance(settings.compile_options, Mapping):
        raise TrainerError(f"compile_options= is a dict of keywords of torch.compile, got {settings.compile_options!r:.80}")
    if settings.report is True and settings.output_dir is None:
        raise TrainerError("report=True needs a place for the page: give output_dir=")
    if settings.report is True and find_spec("matplotlib") is None:
        raise TrainerError("report=True draws with matplotlib, which is not installed: pip install 'hookdistill[report]'")
    if settings.teacher_device not in (None, "keep"):
        try:
            torch.device(settings.teacher_device)
        except (RuntimeError, TypeError) as error:
            raise TrainerError(f"teacher_device={settings.teacher_device!r} is no device and not 'keep': {error}") from error
    if settings.output_dir is not None:
        check_writable(Path(settings.output_dir))


def _check_when(name: str, when: Any) -> None:
    if when in (None, "epoch"):
        return
    if isinstance(when, str):
        raise TrainerError(f"{name}= is 'epoch', a number of steps or None, got {when!r}")
    check_number(name, when, int)
