"""One training, from the first step to the last."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..balancing import balance_for
from ..ema import average_for, teaches
from ..errors import BatchError, MatchError, TrainerError, TrainerInterrupted
from ..loading import Passes, rows_of
from ..optimization import make_optimizer, make_scheduler
from ..randomness import set_random_state, set_seed
from ..report import write_report
from ..running import undisturbed
from . import resume as states
from .agreement import Agreement, weighted
from .checkpoints import find_checkpoint, make_way, save_checkpoint, tidy
from .describe import describe
from .faults import not_finite, out_of_memory, teachers_of, too_many_skipped
from .gradients import norms_by_match
from .interruption import Interruption, exit_code
from .layers import record_similarity
from .log import Log, write_run
from .measuring import Measuring
from .meters import Meter, StepLosses, Where, memory
from .processes import first_process, in_any_process
from .setup import (
    accelerator_for,
    check_engine,
    check_precision,
    checkpointing,
    compiling,
    in_training,
    place,
    reproducible,
    strategy_for,
)
from .students import Students
from .trainer import TrainResult

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .trainer import Trainer

_SECONDS_BETWEEN_LOOKS = 0.5
_SKIPS_IN_A_ROW = 100


def train(settings: Trainer, resume: bool | str | os.PathLike[str]) -> TrainResult:
    """`Trainer.train`."""
    distiller = settings.distiller
    with contextlib.ExitStack() as stack:
        accelerator = stack.enter_context(accelerator_for(settings))
        check_engine(settings, accelerator)
        interruption = stack.enter_context(Interruption())
        stack.enter_context(reproducible(settings.deterministic))
        stack.enter_context(in_training(distiller))
        stack.enter_context(checkpointing(distiller.student, settings.gradient_checkpointing))
        stack.enter_context(compiling(distiller, settings.compile, settings.compile_options))
        run = Run(settings, accelerator, interruption, resume if isinstance(resume, bool) else Path(resume), stack)
        with run.bar:
            return run.to_the_end()


class Run:
    """What one training needs, made ready for the accelerator, and how far it has come.

    Args:
        stack: gets what is to be let go of at the end.
    """

    def __init__(
        self,
        settings: Trainer,
        accelerator: Accelerator,
        interruption: Interruption,
        resume: bool | str | Path,
        stack: contextlib.ExitStack,
    ) -> None:
        self.settings, self.accelerator, self.interruption, self.stack = settings, accelerator, interruption, stack
        self.started, self.earlier_seconds = time.perf_counter(), 0.0
        self.folder = Path(settings.output_dir) if settings.output_dir is not None else None
        self.checkpoints = None if self.folder is None else self.folder / "checkpoints"
        checkpoint = first_process(accelerator, lambda: self._checkpoint(resume))
        if settings.seed is not None:
            set_seed(settings.seed + accelerator.process_index)
        place(settings.distiller, accelerator.device, settings.teacher_device)
        self.passes = Passes(settings.train_loader, accelerator)
        self.accumulate: int = accelerator.gradient_accumulation_steps
        self.total = self._total_steps()
        position = None if checkpoint is None else states.read_position(checkpoint, accelerator)
        # The plan is made from the first batch of the first pass, so that no pass is begun for it and no batch is lost.
        self.last_batch = first = (
            self.passes.peek() if position is None else self.passes.restore(position["passes"], by_index=settings.quick_resume)
        )
        self.plan = settings.distiller.plan(first)
        self._prepare(first)
        self._begin_counting()
        if self.checkpoints is not None and settings.save_every is not None:
            states.check_can_be_saved(self)
        if checkpoint is not None and position is not None:
            states.restore(self, checkpoint)
            set_random_state(position["random"], accelerator.device)
        self._begin_log(checkpoint)

    def _prepare(self, first: Any) -> None:
        """Optimizer, scheduler, average and balance, and student, adapters and losses as one module for the accelerator."""
        settings, accelerator = self.settings, self.accelerator
        distiller = settings.distiller
        self.torch_optimizer = make_optimizer(
            settings.optimizer, distiller, lr=settings.lr, adapter_lr=settings.adapter_lr, weight_decay=settings.weight_decay
        )
        self.scheduler = make_scheduler(settings.scheduler, self.torch_optimizer, self.total, warmup=settings.warmup)
        check_precision(distiller, accelerator)
        self.strategy = strategy_for(settings, self.torch_optimizer, accelerator, first)
        self.stack.callback(self.strategy.close)
        self.average = average_for(settings.ema, distiller.student)
        self.balance = balance_for(settings.balance)
        self.agreement = Agreement(distiller, accelerator)
        self.stack.callback(self.agreement.close)

    def _begin_counting(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.stopping = False
        self.saved_at: int | None = None
        self.checkpoint: Path | None = None
        self.log = Log(self.folder, accelerator)
        self.meter = Meter(list(settings.distiller.loss.terms))
        self.students = Students(settings.distiller, self.folder, accelerator, load_best_at_end=settings.load_best_at_end)
        shown = None if teaches(settings.ema, teachers_of(settings.distiller)) else self.average
        self.measuring = Measuring(settings, accelerator, self.students, shown, self.log)
        self.bar = _bar(self.total, settings.progress and accelerator.is_local_main_process)
        self.next_look = time.perf_counter() + _SECONDS_BETWEEN_LOOKS

    @property
    def done(self) -> bool:
        """Whether there is no step left."""
        return self.step >= self.total or self.measuring.patience_is_over

    def to_the_end(self) -> TrainResult:
        """Every pass, and what is done before, between and after."""
        if self.checkpoint is None:
            self._record_layers("before")
        if not self.measuring.history:
            self.evaluate()
        if self.passes.over:
            self.after_pass()  # a run that is taken up again was cut off between a pass and what comes after it
        while not self.done:
            if self.passes.over:
                self.passes.begin()
            while not self.done and self.optimizer_step():
                self.after_step()
            self.after_pass()
        return self.finish()

    def optimizer_step(self) -> bool:
        """Forward and backward of the next batches, then one step; false when the pass is over."""
        group = self._next_batches()
        agreed = self.agreement.on(group, stop=self.interruption.received is not None)
        if not agreed.shares:
            return False
        where = Where(self.step + 1, self.passes.number, self.passes.taken - len(group) + 1, self.passes.taken)
        with self._errors_say(where, group):
            values, rows = self._gradients(group, agreed.shares)
            self.meter.add(where, values, rows)
            norm = self._norm()
            if self._is_taken(where, norm, group):
                self._step(where, group)
                norm = self.strategy.norm_of_step() if norm is None else norm
                if self.average is not None:
                    self.average.update(self.settings.distiller.student, self.step)
                self._rebalance(values)
            self.strategy.zero_grad()
        self.step += 1
        self.stopping = agreed.stop
        self.bar.update()
        self._look_and_log(norm)
        return True

    def after_step(self) -> None:
        """What is due between two steps of a pass."""
        settings = self.settings
        if self._is_due(settings.evaluate_every) and self.step < self.total:
            self.evaluate()
        if self._is_due(settings.save_every) and not self.done:
            self.save_checkpoint()
        if self.stopping or (self.interruption.received is not None and self.accelerator.num_processes == 1):
            self.interrupt()

    def after_pass(self) -> None:
        """What is due after a pass, or after the last step in the middle of one.

        Raises:
            TrainerError: the pass had no batch.
        """
        settings = self.settings
        if not self.passes.taken:
            raise TrainerError(
                f"pass {self.passes.number} over train_loader gave no batch, at step {self.step} of {self.total}. A generator "
                "can be read only once: pass a DataLoader or a list, or fewer max_steps"
            )
        if settings.evaluate_every == "epoch" or self.step == self.total:
            self.evaluate()
        if settings.save_every is not None and (settings.save_every == "epoch" or self.done):
            self.save_checkpoint()

    def evaluate(self) -> None:
        """Call the evaluators, once for a step."""
        if self.measuring.is_due(self.step):
            self.look()
            self.measuring.measure(self.step, self.passes.number if self.step else 0)
            self.meter.pause()

    def save_checkpoint(self, position: Mapping[str, Any] | None = None) -> None:
        """Save everything that is needed to go on from here, once for a step."""
        root = self.checkpoints
        if root is None or self.saved_at == self.step:
            return
        self.look()
        collected = states.collect(self, self.passes.state() if position is None else position)
        keep_last = self.settings.keep_last
        self.checkpoint = first_process(
            self.accelerator,
            lambda: save_checkpoint(root, self.step, lambda folder: states.write(collected, folder), keep_last=keep_last),
        )
        self.saved_at = self.step
        self.log.event("checkpoint", step=self.step, path=str(self.checkpoint))

    def interrupt(self, position: Mapping[str, Any] | None = None) -> None:
        """Save a checkpoint and leave.

        Raises:
            TrainerInterrupted: always.
        """
        number = self.interruption.received
        name = "another process was told to stop" if number is None else number.name
        if self.settings.save_every is not None:
            self.save_checkpoint(position)
        saved = f"the checkpoint is {self.checkpoint}; go on with train(resume=True)"
        if self.checkpoint is None:
            saved = f"nothing was saved, as there is {'no output_dir' if self.folder is None else 'save_every=None'}"
        self.log.event("interrupted", step=self.step, signal=name)
        if self.accelerator.is_main_process:
            self.bar.close()
            sys.stderr.write(f"hookdistill: {name} after step {self.step} of {self.total}; {saved}\n")
        raise TrainerInterrupted(exit_code(number) if number is not None else 1)

    def look(self) -> None:
        """Look at the losses, and show them; this waits for the device, so not at every step.

        Raises:
            TrainerError: one is not finite.
        """
        self.next_look = time.perf_counter() + _SECONDS_BETWEEN_LOOKS
        if (found := self.meter.not_finite()) is not None and self.settings.on_nonfinite == "error":
            where, losses = found
            raise not_finite(where, losses, taken=True, gradients=False)
        if not self.bar.disable and self.meter.recent:
            rate = float(self.torch_optimizer.param_groups[0]["lr"])
            speed = self.meter.examples_per_second() * self.accelerator.num_processes
            self.bar.set_postfix_str(f"{self.meter.shown()}, lr {rate:.3g}, {speed:,.0f} examples/s", refresh=False)

    def finish(self) -> TrainResult:
        """Save the last student, and sum up."""
        self.look()
        means, measured = self.meter.means(self.accelerator), self.measuring
        if measured.average is not None:
            measured.average.swap(self.settings.distiller.student)
        if measured.best is not None:
            self.students.load_best()
        self.students.save("last")
        self._record_layers("after")
        result = TrainResult(
            steps=self.step,
            epochs=self.passes.number,
            seconds=self.seconds,
            loss=means.loss,
            losses=means.parts,
            history=tuple(measured.history),
            best=measured.best,
            teacher=measured.teacher,
            stopped_early=self.step < self.total,
            skipped=self.skipped,
            checkpoint=self.checkpoint,
        )
        self.log.event("end", step=self.step, seconds=result.seconds, loss=result.loss, parts=result.losses)
        self._report()
        return result

    @property
    def seconds(self) -> float:
        """Spent on this run so far, in this process and in those that it was resumed from."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def progress(self) -> dict[str, Any]:
        """How far the run has come, for a checkpoint."""
        return {
            "step": self.step,
            "done": self.done,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "measuring": self.measuring.state_dict(),
            "meter": self.meter.state_dict(),
            "balance": None if self.balance is None else self.balance.state_dict(),
        }

    def take_progress(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """The inverse of `progress`."""
        self.step, self.earlier_seconds = state["step"], state["seconds"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.saved_at, self.checkpoint = self.step, checkpoint
        self.measuring.load_state_dict(state["measuring"])
        self.meter.load_state_dict(state["meter"], self.accelerator.device)
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])
        self.bar.n = self.bar.initial = self.step

    def _gradients(self, group: list[Any], shares: Sequence[Mapping[str, float] | None]) -> tuple[Tensor, int]:
        """Forward and backward of the batches of a step: the losses, and the number of examples."""
        from accelerate.utils import send_to_device

        device, rows = self.accelerator.device, 0
        losses = StepLosses(self.meter.names)
        factors = self.balance.factors() if self.balance is not None else {}
        for number, share in enumerate(shares, 1):
            batch = group[number - 1] if number <= len(group) else self.last_batch
            self.last_batch = batch
            rows += rows_of(batch) if number <= len(group) else 0
            batch = send_to_device(batch, device, non_blocking=True) if device.type != "cpu" else batch
            with self.strategy.batch_of_step(last=number == len(shares)):
                found = self.strategy.model(batch, step=self.step, shares=weighted(share, factors))
                self.strategy.backward(found.total)
            losses.add(found, share)
        self.strategy.after_backwards()
        return losses.result(device), rows

    def _norm(self) -> Tensor | None:
        """The norm of the gradient, which is clipped, where somebody needs it."""
        settings = self.settings
        wanted = settings.clip_norm is not None or settings.on_nonfinite == "skip" or self._is_logged(self.step + 1)
        return self.strategy.norm(clip=settings.clip_norm) if wanted else None

    def _step(self, where: Where, group: list[Any]) -> None:
        if self.strategy.step():
            self.scheduler.step()
        elif self.accelerator.scaler is None:  # with one, fp16 has overflowed, and the next step has a smaller scale
            losses = self.meter.named(self.meter.recent[-1])
            raise not_finite(where, losses, batches=group, taken=False, gradients=True)

    def _is_taken(self, where: Where, norm: Tensor | None, group: list[Any]) -> bool:
        """Whether the optimizer may make the step, as far as that can be known without waiting for a device.

        Raises:
            TrainerError: a loss or the gradient is not finite, or has not been for many steps.
        """
        skip = self.settings.on_nonfinite == "skip"
        if self.accelerator.device.type != "cpu" and not skip:
            return True
        found = self.meter.not_finite()
        # With fp16 a gradient that overflows is the scaler's business: it makes no step and tries a smaller scale.
        bad_norm = norm is not None and self.accelerator.scaler is None and not bool(norm.isfinite())
        if not in_any_process(self.accelerator, found is not None or bad_norm):
            self.skipped_in_a_row = 0
            return True
        losses = found[1] if found is not None else self.meter.named(self.meter.recent[-1])
        if not skip:
            error = not_finite(where, losses, batches=group, taken=False, gradients=found is None)
            self.strategy.zero_grad()
            raise error
        self.meter.drop_last()
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.log.event("skipped", step=where.step, epoch=where.number, batches=[where.first, where.last], **losses.as_dict())
        if self.skipped_in_a_row >= _SKIPS_IN_A_ROW:
            raise too_many_skipped(self.skipped_in_a_row, where, losses)
        return False

    def _rebalance(self, values: Tensor) -> None:
        """Show the balance what it goes by."""
        if self.balance is None:
            return
        mean = values if self.accelerator.num_processes == 1 else self.accelerator.reduce(values, "mean")
        self.balance.see_parts(dict(zip(self.meter.names, mean[1:].unbind(), strict=True)))
        if self.balance.every is not None and self.step % self.balance.every == 0:
            norms, parts = norms_by_match(self.settings.distiller, self.last_batch, self.step, self.accelerator)
            self.balance.see_gradients(norms, parts)

    def _look_and_log(self, norm: Tensor | None) -> None:
        if self._is_logged(self.step):
            losses, speed = self.meter.logged(self.accelerator)
            groups = self.torch_optimizer.param_groups
            rates = {str(group.get("name", number)): float(group["lr"]) for number, group in enumerate(groups)}
            factors = self.balance.factors() if self.balance is not None else {}
            self.log.step(
                self.step,
                losses,
                {
                    "lr": float(groups[0]["lr"]),
                    **({} if norm is None else {"gradient_norm": float(norm)}),
                    **speed,
                    **memory(self.accelerator.device),
                },
                groups={
                    "lr": rates if len(set(rates.values())) > 1 else {},
                    "balance": {name: float(factor) for name, factor in factors.items()},
                },
                epoch=self.passes.number,
            )
        if time.perf_counter() >= self.next_look:
            self.look()

    def _next_batches(self) -> list[Any]:
        before = self.passes.state()
        try:
            return self.passes.take(self.accumulate)
        except TrainerError:
            if self.interruption.received is not None:  # Ctrl-C reaches the loader's workers too
                self.interrupt(before)
            raise

    @contextlib.contextmanager
    def _errors_say(self, where: Where, group: list[Any]) -> Iterator[None]:
        try:
            yield
        except (BatchError, MatchError) as error:
            error.add_note(f"raised at {where}")
            raise
        except torch.OutOfMemoryError as error:
            rows = rows_of(group[0]) if group else 0
            raise out_of_memory(error, where, rows, self.settings.distiller, self.torch_optimizer) from error

    def _is_due(self, when: Any) -> bool:
        return isinstance(when, int) and self.step % when == 0

    def _is_logged(self, step: int) -> bool:
        return step % self.settings.log_every == 0 or step == self.total

    def _checkpoint(self, resume: bool | str | Path) -> Path | None:
        """The checkpoint to go on from, if any, in an output folder that a killed process may have left untidy."""
        for folder in (self.folder, self.checkpoints):
            tidy(folder)
        found = find_checkpoint(self.checkpoints, resume)
        if resume is False:
            make_way(self.checkpoints)
        return found

    def _total_steps(self) -> int:
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        assert self.passes.length is not None
        assert self.settings.epochs is not None
        return self.settings.epochs * math.ceil(self.passes.length / self.accumulate)

    def _begin_log(self, checkpoint: Path | None) -> None:
        settings = self.settings
        self.log.start(after=None if checkpoint is None else self.step)
        described = describe(self)
        if settings.trackers:
            self.accelerator.init_trackers(
                settings.project, config={k: v for k, v in described["settings"].items() if v is not None}
            )
            for tracker in self.accelerator.trackers:
                self.stack.callback(tracker.finish)
        if self.folder is not None and self.accelerator.is_main_process:
            write_run(self.folder, described)
        self.log.event("start" if checkpoint is None else "resumed", step=self.step, checkpoint=checkpoint and str(checkpoint))

    @property
    def _is_reported(self) -> bool:
        wanted = self.settings.report is True or (self.settings.report == "auto" and find_spec("matplotlib") is not None)
        return wanted and self.folder is not None and self.accelerator.is_main_process

    def _record_layers(self, when: str) -> None:
        if self._is_reported:
            assert self.folder is not None
            loader = self.measuring.loader
            with undisturbed(self.settings.distiller):
                record_similarity(
                    self.folder, when, self.settings.distiller, [self.last_batch] if loader is None else loader, self.log
                )

    def _report(self) -> None:
        if self._is_reported:
            assert self.folder is not None
            write_report(self.folder)


def _bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="step", disable=not shown, dynamic_ncols=True)
