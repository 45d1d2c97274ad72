"""What the evaluators measure during a training, and what follows from it: the best student, and an early end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..ema import Average
from ..evaluation import Evaluation, Evaluator, Measurement, OnDevice, measure
from ..evaluators import HeldOutLosses
from ..randomness import set_seed
from ..running import undisturbed
from ..sharding import reshard
from .log import Log
from .students import Students

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .trainer import Trainer


class Measuring:
    """The measurements of a training.

    Args:
        average: of the student's weights, to be evaluated and saved in place of them; ``None`` for the student as it is.
    """

    def __init__(
        self, settings: Trainer, accelerator: Accelerator, students: Students, average: Average | None, log: Log
    ) -> None:
        self.settings, self.accelerator, self.students, self.average, self.log = settings, accelerator, students, average, log
        default = (HeldOutLosses(),) if settings.eval_loader is not None else ()
        self.evaluators: Sequence[Evaluator] = settings.evaluators or default
        self.loader = None if settings.eval_loader is None else OnDevice(settings.eval_loader, accelerator.device)
        self.history: list[Measurement] = []
        self.best: Measurement | None = None
        self.teacher: dict[str, float] = {}
        self.waited = 0
        """Evaluations since the best one."""

    @property
    def patience_is_over(self) -> bool:
        """Whether the training is to end."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def is_due(self, step: int) -> bool:
        """Whether there is something to measure that was not yet measured at this step."""
        return bool(self.evaluators) and (not self.history or self.history[-1].step != step)

    def measure(self, step: int, epoch: int) -> None:
        """Call the evaluators, and save the student if it is the best so far."""
        settings = self.settings
        with self._evaluated_student(), undisturbed(settings.distiller):
            if self.accelerator.num_processes > 1:
                set_seed(step)  # so that all processes draw the same order of examples
            evaluation = Evaluation(
                student=settings.distiller.student,
                distiller=settings.distiller,
                loader=self.loader,
                device=self.accelerator.device,
                accelerator=self.accelerator,
                step=step,
                epoch=epoch,
            )
            if not self.history:
                self.teacher = self._of_teacher(evaluation)
                if self.teacher:
                    self.log.event("teacher", step=step, metrics=self.teacher)
            self.history.append(measure(self.evaluators, evaluation))
            metrics = self.history[-1].metrics
            self.log.event("evaluation", step=step, epoch=epoch, metrics=metrics)
            self.log.track(metrics, step)
            if settings.best is not None:
                self._keep_best(settings.best)
            reshard(settings.distiller)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "history": [dataclasses.asdict(each) for each in self.history],
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "teacher": dict(self.teacher),
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.history = [Measurement(**each) for each in state["history"]]
        self.best = None if state["best"] is None else Measurement(**state["best"])
        self.teacher, self.waited = dict(state["teacher"]), state["waited"]

    def _keep_best(self, metric: str) -> None:
        if self.history[-1].beats(self.best, metric, higher=self.settings.higher_is_better):
            self.best, self.waited = self.history[-1], 0
            self.students.save_best()
        else:
            self.waited += 1

    @contextlib.contextmanager
    def _evaluated_student(self) -> Iterator[None]:
        """The student has its averaged weights inside, if there is an average."""
        if self.average is None:
            yield
        else:
            with self.average.in_place_of(self.settings.distiller.student):
                yield

    def _of_teacher(self, evaluation: Evaluation) -> dict[str, float]:
        """What is measured of the teacher; an evaluator that cannot says so in the log, for nothing is trained by it."""
        found: dict[str, float] = {}
        for evaluator in self.evaluators:
            if not callable(of_teacher := getattr(evaluator, "of_teacher", None)):
                continue
            try:
                found |= {name: float(value) for name, value in of_teacher(evaluation).items()}
            except Exception as error:
                note = f"{evaluator!r:.80} could not be measured on the teacher: {type(error).__name__}: {error}"
                self.log.event("note", step=evaluation.step, note=note)
        return found
