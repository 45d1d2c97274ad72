"""The loop's front: `Trainer` is its settings, `Trainer.train` one training with them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..balancing import Balance
from ..distiller import Distiller
from ..ema import EMA
from ..evaluation import Evaluator, Measurement
from ..optimization import GivenOptimizer, GivenScheduler
from .checks import check

if TYPE_CHECKING:
    from accelerate import Accelerator

When = Literal["epoch"] | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What `Trainer.train` did; of a run that was resumed, all of it."""

    steps: int
    epochs: int
    """Passes over the train loader; the last one need not have come to its end."""
    seconds: float
    loss: float
    """The total, as the mean over the last optimizer steps, 50 at most."""
    losses: Mapping[str, float]
    """The parts by name, as means over the same steps."""
    history: Sequence[Measurement]
    """What the evaluators measured, from before the first step to after the last."""
    best: Measurement | None
    """The one with the best value of ``best=``."""
    teacher: Mapping[str, float] = field(default_factory=dict)
    """What the evaluators measured of the teacher."""
    stopped_early: bool = False
    """Whether ``patience=`` ended it."""
    skipped: int = 0
    """Steps that were passed over because they were not finite."""
    checkpoint: Path | None = None
    """The last one."""


@dataclass(frozen=True, eq=False, repr=False)
class Trainer:
    """Trains a distiller's student, on accelerate: device, mixed precision and processes are its business.

        result = Trainer(distiller, loader, epochs=3, output_dir="run").train(resume=True)

    Args:
        distiller: trained in place; its adapters are made from the first batch, where they do not exist yet.
        train_loader: a DataLoader, or any iterable of batches; without ``len`` it needs ``max_steps``. Several processes share
            the batches of a DataLoader among them; another iterable is a process's own share.
        eval_loader: for the evaluators; read from its start at every evaluation.

        optimizer: an instance, or a callable that gets the list of trainable parameters, adapters among them. Default:
            AdamW on `parameter_groups`.
        lr: of the default optimizer; 1e-3.
        adapter_lr: of the adapters in the default optimizer; as ``lr``.
        weight_decay: of the default optimizer; 0.01, and 0 for one-dimensional parameters (biases, norms).
        scheduler: an instance, a callable ``(optimizer, total_steps)``, or a name of transformers' such as ``"linear"``;
            stepped once for each optimizer step. Default: a cosine from the optimizer's rate to 0.
        warmup: steps in which the rate of a named scheduler, or of the default one, rises from 0; below 1, their share in all.

        epochs: passes over the loader; this or ``max_steps``.
        max_steps: optimizer steps, in as many passes as they take.
        accumulate: batches of each process for one optimizer step. Its loss is the mean over the valid positions of all of
            them, in all processes, as if they were one batch. The last step of a pass takes what is left. Default:
            accelerate's setting, 1.
        clip_norm: largest norm of the gradient.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``. Default: what ``accelerate launch`` says, else no.
        gradient_checkpointing: of a transformers student, for the training.
        compile: ``torch.compile`` of student and teacher for the training: ``True`` for both, or which.
        compile_options: for ``torch.compile``.
        teacher_device: where the teacher runs, or ``"keep"``: where it is. Default: where the student does.
        ema: the decay of an average of the student's weights that is evaluated and saved, and is the student at the end; or an
            `EMA`, whose model may be a teacher.
        balance: ``"magnitude"``, ``"gradnorm"`` or a `Balance`: factors on the weights of the matches.
        on_nonfinite: what to do when a loss or gradient is NaN or infinite: ``"error"``, or ``"skip"`` the step, for which
            the device is waited for at each one.

        evaluators: each an `Evaluator`. Default: `HeldOutLosses`, where there is an ``eval_loader``.
        evaluate_every: ``"epoch"``, a number of optimizer steps, or ``None``. In any case they are called before the first
            step, where a mistake in them costs nothing yet, and after the last.
        best: the metric by whose value ``output_dir/best`` is kept.
        higher_is_better: whether more of it is better. Default: unless it is a ``loss`` or ``kl``, between slashes, as in
            ``eval/loss``.
        patience: evaluations without a better ``best`` after which the training ends.
        load_best_at_end: give the student (and the adapters) the weights it had at the best evaluation.

        output_dir: gets ``last``, and ``best`` if that is asked for: the student as `Distiller.export` writes it, and
            ``adapters.safetensors``; ``checkpoints``; ``log.jsonl``, ``run.json`` and the report.
        save_every: checkpoints to resume from: ``"epoch"``, a number of optimizer steps, or ``None`` for none.
        keep_last: how many of them stay.
        quick_resume: skip to the place in the data by index instead of loading again what was trained on. The same, unless the
            data set or its worker processes have random numbers or a memory of their own.

        progress: a bar with the losses, as means over the last optimizer steps, 50 at most.
        log_every: optimizer steps between two lines of the log.
        trackers: for accelerate: ``"tensorboard"``, ``"wandb"``, … or instances of ``GeneralTracker``.
        project: the name of the run for the trackers.
        report: write ``report.html`` at the end; ``"auto"``: if there is an ``output_dir`` and matplotlib is installed.

        seed: of Python's, NumPy's and torch's random numbers, set when the training starts; each process adds its number.
        deterministic: only algorithms that give the same bits every time, or an error from torch where there is none.
        accelerator: one of your own; it then decides about precision, accumulation and trackers.

    Raises:
        TrainerError: settings that contradict each other or the distiller.
    """

    distiller: Distiller
    train_loader: Iterable[Any]
    _: KW_ONLY
    eval_loader: Iterable[Any] | None = None
    optimizer: GivenOptimizer = None
    lr: float | None = None
    adapter_lr: float | None = None
    weight_decay: float | None = None
    scheduler: GivenScheduler = None
    warmup: float | None = None
    epochs: int | None = None
    max_steps: int | None = None
    accumulate: int | None = None
    clip_norm: float | None = None
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    compile: bool | Literal["student", "teacher"] = False
    compile_options: Mapping[str, Any] = field(default_factory=dict)
    teacher_device: torch.device | str | None = None
    ema: float | EMA | None = None
    balance: str | Balance | None = None
    on_nonfinite: Literal["error", "skip"] = "error"
    evaluators: Sequence[Evaluator] = ()
    evaluate_every: When = "epoch"
    best: str | None = None
    higher_is_better: bool | None = None
    patience: int | None = None
    load_best_at_end: bool = False
    output_dir: str | os.PathLike[str] | None = None
    save_every: When = "epoch"
    keep_last: int | None = 2
    quick_resume: bool = False
    progress: bool = True
    log_every: int = 10
    trackers: Sequence[Any] = ()
    project: str = "hookdistill"
    report: bool | Literal["auto"] = "auto"
    seed: int | None = None
    deterministic: bool = False
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        check(self)

    def train(self, *, resume: bool | str | os.PathLike[str] = False) -> TrainResult:
        """Train to the end; a second call is a training of its own that starts from the student as it is.

        Afterwards the models are in the modes they were in, without hooks and gradients, and on the accelerator's device.

        Args:
            resume: ``True`` goes on from the newest whole checkpoint in ``output_dir``, or starts where there is none; a path
                names a checkpoint. What follows is the same to the bit as in a run that was never cut off: the models and the
                loader have to be made as they were for it.

        Raises:
            HookDistillError: before the first optimizer step, a match or a setting that does not work, or a checkpoint that
                does not fit; later, a loader that gives no more batches, a loss that is not finite, a disk that is full, a
                device without memory.
            TrainerInterrupted: after Ctrl-C or SIGTERM, once the step is done and a checkpoint is saved. It is a
                ``SystemExit`` with the exit code 130 or 143.
        """
        from .loop import train

        return train(self, resume)
