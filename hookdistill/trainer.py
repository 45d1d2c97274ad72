"""A loop around ``distiller(batch)``: `Trainer` is its settings, `Trainer.train` one training with them."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .distiller import Distiller
from .engine import Losses
from .errors import TrainerError, listing
from .evaluation import Evaluation, Evaluator, HeldOutLosses, Measurement, measure, save
from .optimization import GivenOptimizer, GivenScheduler, check_optimizer, check_scheduler, make_optimizer, make_scheduler
from .running import undisturbed

if TYPE_CHECKING:
    from accelerate import Accelerator

PRECISIONS = ("no", "bf16", "fp16")
_SECONDS_BETWEEN_LOOKS = 0.5
_RECENT = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What `Trainer.train` did."""

    steps: int
    epochs: int
    """Passes over the train loader; the last one need not have come to its end."""
    seconds: float
    loss: float
    """The total, as the mean over the last batches, 50 at most."""
    losses: Mapping[str, float]
    """The parts by name, as means over the same batches."""
    history: Sequence[Measurement]
    """What the evaluators measured, from before the first step to after the last."""
    best: Measurement | None
    """The one with the best value of ``best=``."""


@dataclass(frozen=True, eq=False, repr=False)
class Trainer:
    """Trains a distiller's student, on accelerate: device, mixed precision and processes are its business.

        result = Trainer(distiller, loader, epochs=3, output_dir="student").train()

    Args:
        distiller: trained in place; its adapters are made from the first batch, where they do not exist yet.
        train_loader: a DataLoader, or any iterable of batches; without ``len`` it needs ``max_steps``.
        eval_loader: for the evaluators; read from its start at every evaluation.
        optimizer: an instance, or a callable that gets the list of trainable parameters, adapters among them. Default:
            AdamW with weight decay 0.01 on all but one-dimensional parameters (biases, norms).
        lr: of the default optimizer.
        scheduler: an instance, or a callable ``(optimizer, total_steps)``; stepped once for each optimizer step. Default: a
            cosine from the optimizer's rate to 0.
        epochs: passes over the loader; this or ``max_steps``.
        max_steps: optimizer steps, in as many passes as they take.
        accumulate: batches for one optimizer step, whose loss is the mean of theirs: every batch weighs the same, however
            many valid positions it has. The last step of a pass takes what is left. Default: accelerate's setting, 1.
        clip_norm: largest norm of the gradient.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``. Default: what ``accelerate launch`` says, else no.
        evaluators: each an `Evaluator`. Default: `HeldOutLosses`, where there is an ``eval_loader``.
        evaluate_every: ``"epoch"``, a number of optimizer steps, or ``None``. In any case they are called before the first
            step, where a mistake in them costs nothing yet, and after the last.
        best: the metric by whose value ``output_dir/best`` is kept.
        higher_is_better: whether more of it is better. Default: unless it is a ``loss``, between slashes, as in
            ``eval/loss``.
        output_dir: gets ``last``, and ``best`` if that is asked for: the student as `Distiller.export` writes it, and
            ``adapters.safetensors``.
        progress: a bar with the losses, as means over the last batches, 50 at most.
        seed: of Python's, NumPy's and torch's random numbers, set when the training starts.
        accelerator: one of your own; it then decides about precision and accumulation.

    Raises:
        TrainerError: settings that contradict each other or the distiller.
    """

    distiller: Distiller
    train_loader: Iterable[Any]
    _: KW_ONLY
    eval_loader: Iterable[Any] | None = None
    optimizer: GivenOptimizer = None
    lr: float | None = None
    scheduler: GivenScheduler = None
    epochs: int | None = None
    max_steps: int | None = None
    accumulate: int | None = None
    clip_norm: float | None = None
    mixed_precision: str | None = None
    evaluators: Sequence[Evaluator] = ()
    evaluate_every: Literal["epoch"] | int | None = "epoch"
    best: str | None = None
    higher_is_better: bool | None = None
    output_dir: str | os.PathLike[str] | None = None
    progress: bool = True
    seed: int | None = None
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_length(self)
        _check_measuring(self)
        check_optimizer(self.optimizer, self.distiller)
        check_scheduler(self.scheduler, self.optimizer)

    def train(self) -> TrainResult:
        """Train to the end; a second call is a training of its own that starts from the student as it is.

        Afterwards the models are in the modes they were in, without hooks and gradients, and on the accelerator's device.

        Raises:
            HookDistillError: before the first optimizer step, a match or a setting that does not work; later, a loader
                that gives no more batches, or a loss that is not finite.
        """
        with _accelerator(self) as accelerator, _in_training(self.distiller):
            run = _Run(self, accelerator)
            with run.bar:
                run.evaluate()
                while run.step < run.total:
                    for group in run.groups():
                        run.optimizer_step(group)
                        if run.step == run.total:
                            break
                        if isinstance(self.evaluate_every, int) and run.step % self.evaluate_every == 0:
                            run.evaluate()
                    if self.evaluate_every == "epoch" or run.step == run.total:
                        run.evaluate()
                return run.finish()


class _Run:
    """One training: what it needs, made ready for the accelerator, and how far it has come."""

    def __init__(self, settings: Trainer, accelerator: Accelerator) -> None:
        from accelerate.utils import set_seed

        self.started = time.perf_counter()
        if settings.seed is not None:
            set_seed(settings.seed)
        if accelerator.device_placement:
            settings.distiller.to(accelerator.device)
        self.settings, self.accelerator = settings, accelerator
        self.accumulate = accelerator.gradient_accumulation_steps
        self.loader = _prepared(accelerator, settings.train_loader)
        self.eval_loader = _prepared(accelerator, settings.eval_loader)
        self.total = _total_steps(settings, self.loader, self.accumulate)
        # The plan is made from the first batch of the first pass, so that no pass is begun for it and no batch is lost.
        self.batches: Iterator[Any] | None = _with_plan(settings.distiller, iter(self.loader))
        optimizer = make_optimizer(settings.optimizer, settings.distiller, lr=settings.lr)
        self.scheduler = make_scheduler(settings.scheduler, optimizer, self.total)
        _check_precision(settings.distiller, accelerator)
        self.model, self.optimizer = accelerator.prepare(settings.distiller, optimizer)
        self.step = self.epoch = 0
        self.history: list[Measurement] = []
        self.best: Measurement | None = None
        self.recent = _Recent()
        self.bar = _bar(self.total, settings.progress and accelerator.is_local_main_process)
        self.looked_at, self.next_look = 0, time.perf_counter() + _SECONDS_BETWEEN_LOOKS

    def groups(self) -> Iterator[list[Any]]:
        """One pass over the loader, in groups of the batches that make an optimizer step."""
        batches, self.batches = self.batches or iter(self.loader), None
        self.epoch += 1
        empty = True
        while group := list(itertools.islice(batches, self.accumulate)):
            empty = False
            yield group
        if empty:
            raise TrainerError(
                f"pass {self.epoch} over train_loader gave no batch, at step {self.step} of {self.total}. A generator "
                "can be read only once: pass a DataLoader or a list, or fewer max_steps"
            )

    def optimizer_step(self, group: list[Any]) -> None:
        """Forward and backward of every batch of the group, then one step."""
        for position, batch in enumerate(group, 1):
            waiting = contextlib.nullcontext() if position == len(group) else self.accelerator.no_sync(self.model)
            with waiting:
                losses = self.model(batch, step=self.step)
                # backward() divides by accumulate, which is too much for the short group at the end of a pass.
                self.accelerator.backward(losses.total * (self.accumulate / len(group)))
            self.recent.add(losses)
        if self.settings.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:  # as it is when fp16 overflows
            self.scheduler.step()
        self.model.zero_grad()
        self.step += 1
        self.bar.update()
        if time.perf_counter() >= self.next_look:
            self.look()

    def look(self) -> None:
        """Show the losses; this waits for the device, so not at every step.

        Raises:
            TrainerError: the loss is not finite.
        """
        if self.recent.unread:
            loss, parts = self.recent.means()
            shown = ", ".join(f"{name} {value:.4g}" for name, value in {"loss": loss, **parts}.items())
            if not math.isfinite(loss):
                raise TrainerError(
                    f"the loss is no longer finite; it was last looked at after step {self.looked_at} and now after step "
                    f"{self.step}: {shown}. Training ends here, and this student is not saved. A lower lr, clip_norm= or "
                    "mixed_precision='no' may help; print(distiller.plan(batch)) shows every part on one batch"
                )
            self.bar.set_postfix_str(shown, refresh=False)
        self.looked_at = self.step
        self.next_look = time.perf_counter() + _SECONDS_BETWEEN_LOOKS

    def evaluate(self) -> None:
        """Call the evaluators, and save the student if it is the best so far."""
        settings = self.settings
        evaluators = settings.evaluators or ((HeldOutLosses(),) if settings.eval_loader is not None else ())
        if not evaluators:
            return
        self.look()
        with undisturbed(settings.distiller):
            self.history.append(measure(evaluators, self._evaluation()))
        if settings.best is not None and self.history[-1].beats(self.best, settings.best, higher=settings.higher_is_better):
            self.best = self.history[-1]
            self._save("best")

    def finish(self) -> TrainResult:
        """Save the last student and sum up."""
        self.look()
        self._save("last")
        self.accelerator.wait_for_everyone()
        loss, losses = self.recent.means(self.accelerator)
        return TrainResult(
            steps=self.step,
            epochs=self.epoch,
            seconds=time.perf_counter() - self.started,
            loss=loss,
            losses=losses,
            history=tuple(self.history),
            best=self.best,
        )

    def _evaluation(self) -> Evaluation:
        return Evaluation(
            student=self.settings.distiller.student,
            distiller=self.settings.distiller,
            loader=self.eval_loader,
            device=self.accelerator.device,
            accelerator=self.accelerator,
            step=self.step,
            epoch=self.epoch,
        )

    def _save(self, name: str) -> None:
        if self.settings.output_dir is not None and self.accelerator.is_main_process:
            save(self.settings.distiller, Path(self.settings.output_dir) / name)


class _Recent:
    """The losses of the last batches. They stay on their device, so that nothing waits for it until they are read."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.values: deque[Tensor] = deque(maxlen=_RECENT)  # each [1 + parts]
        self.unread = False

    def add(self, losses: Losses) -> None:
        """Those of one batch more."""
        self.names = list(losses.parts)
        self.values.append(torch.stack([losses.total.detach(), *losses.parts.values()]).float())
        self.unread = True

    def means(self, accelerator: Accelerator | None = None) -> tuple[float, dict[str, float]]:
        """Total and parts, as means over the last batches: of all processes, if they all ask and give the accelerator."""
        self.unread = False
        means = torch.stack(list(self.values)).mean(0)
        total, *parts = (means if accelerator is None else accelerator.reduce(means, "mean")).tolist()
        return total, dict(zip(self.names, parts, strict=True))


@contextlib.contextmanager
def _accelerator(settings: Trainer) -> Iterator[Accelerator]:
    """The user's, or one for this training that leaves no state for the next."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, is_initialized

    if settings.accelerator is not None:
        yield settings.accelerator
        return
    first = not is_initialized()
    try:
        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulate or 1
        )
    except ValueError as error:
        way_out = "" if first else ". There is an Accelerator in this process already: pass it as accelerator="
        raise TrainerError(f"accelerate refuses mixed_precision={settings.mixed_precision!r}: {error}{way_out}") from error
    try:
        _check_accelerator(settings, accelerator)
        yield accelerator
    finally:
        if first:  # or a second training in this process could not choose another precision
            AcceleratorState._reset_state()


@contextlib.contextmanager
def _in_training(distiller: Distiller) -> Iterator[None]:
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


def _prepared(accelerator: Accelerator, loader: Any) -> Any:
    return accelerator.prepare_data_loader(loader) if isinstance(loader, DataLoader) else loader


def _with_plan(distiller: Distiller, batches: Iterator[Any]) -> Iterator[Any]:
    for first in batches:
        distiller.plan(first)
        return itertools.chain([first], batches)
    raise TrainerError("train_loader gives no batch; is its data set empty, or smaller than a batch under drop_last=True?")


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="step", disable=not shown, dynamic_ncols=True)


def _total_steps(settings: Trainer, loader: Any, accumulate: int) -> int:
    if settings.max_steps is not None:
        return settings.max_steps
    length = _length(loader)
    assert length is not None
    assert settings.epochs is not None
    return settings.epochs * math.ceil(length / accumulate)


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # an iterable, or a DataLoader of an IterableDataset without a length
        return None


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
    for name in ("epochs", "max_steps", "accumulate"):
        _check_number(name, getattr(settings, name), int)
    for name in ("lr", "clip_norm"):
        _check_number(name, getattr(settings, name), (int, float))
    if settings.mixed_precision not in (None, *PRECISIONS):
        raise TrainerError(f"mixed_precision={settings.mixed_precision!r} is not known; it is one of {listing(PRECISIONS)}")
    if settings.accelerator is not None:
        _check_accelerator(settings, settings.accelerator)
    if settings.lr is not None and settings.optimizer is not None:
        raise TrainerError(f"lr={settings.lr!r} is for the default optimizer, but optimizer= is given; write the rate there")


def _check_accelerator(settings: Trainer, accelerator: Accelerator) -> None:
    theirs = {"mixed_precision": accelerator.mixed_precision, "accumulate": accelerator.gradient_accumulation_steps}
    for name, has in theirs.items():
        given = getattr(settings, name)
        if given not in (None, has):
            raise TrainerError(
                f"{name}={given!r} is given, but the accelerator, or the environment it is made from, has {has!r}; leave "
                f"{name}= out, or make both alike"
            )


def _check_number(name: str, value: Any, kind: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < float(value) < math.inf:
        raise TrainerError(f"{name}= must be a {'whole ' if kind is int else ''}number above 0, got {value!r}")


def _check_length(settings: Trainer) -> None:
    if (settings.epochs is None) == (settings.max_steps is None):
        given = "neither" if settings.epochs is None else "both"
        raise TrainerError(f"give epochs= or max_steps=, one of them, to say how long to train; {given} is given")
    length = _length(settings.train_loader)
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
    if settings.evaluate_every not in (None, "epoch"):
        if isinstance(settings.evaluate_every, str):
            raise TrainerError(f"evaluate_every= is 'epoch', a number of steps or None, got {settings.evaluate_every!r}")
        _check_number("evaluate_every", settings.evaluate_every, int)
    if settings.best is not None and not settings.evaluators and settings.eval_loader is None:
        raise TrainerError(f"best={settings.best!r} names a metric, but nothing is measured; give evaluators= or eval_loader=")
    if settings.output_dir is not None:
        try:
            Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainerError(f"output_dir={str(settings.output_dir)!r} cannot be made: {error}") from error


def _check_precision(distiller: Distiller, accelerator: Accelerator) -> None:
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
