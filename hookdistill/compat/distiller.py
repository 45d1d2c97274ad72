"""The older library's loop, on the captures and losses of this one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Inputs, given_inputs
from ..distiller import Distiller
from ..errors import MatchError, TrainerError
from ..running import teaching
from .loss import BatchView, MultiLayerBasedDistillationLoss
from .outputs import Adapted, run

logger = logging.getLogger(__name__)

DataAdaptor = Callable[[Any, Any], tuple[Any, Any]]
"""``(device, batch) -> (teacher_inputs, student_inputs)``."""

_SECONDS_BETWEEN_LOOKS = 0.5


class KnowledgeDistiller:
    """The older library's distiller: `distillate` trains ``student_model`` in place.

    Args:
        teacher_model: a module; or several by name, where items of the config say ``"teacher_model"``.
        student_model: the module to train.
        train_dataloader: any iterable of batches that can be read once for each epoch.
        dev_dataloader: handed to the evaluator as it is, and so is ``dev_data_adaptor``.
        device: where both models go.
        loss_model: a `MultiLayerBasedDistillationLoss`; or any callable
            ``(teacher_output, student_output, teacher_inputs, student_inputs) -> scalar``.
        optimizer: holds the parameters of the student. Adapters that an item needs, where widths differ, are added to it as a
            group of their own.
        evaluator: an object whose ``evaluate(teacher_model, student_model, dev_dataloader, dev_data_adaptor, epoch, step,
            loss)`` is called after every step; or ``None``.
        num_epoch: passes over the loader.
        train_data_adaptor: ``(device, batch) -> (teacher_inputs, student_inputs)``: dicts of keywords, or tuples.
    """

    def __init__(
        self,
        teacher_model: nn.Module | Mapping[str, nn.Module],
        student_model: nn.Module,
        train_dataloader: Iterable[Any],
        dev_dataloader: Any,
        device: Any,
        loss_model: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        evaluator: Any,
        num_epoch: int,
        train_data_adaptor: DataAdaptor,
        dev_data_adaptor: Any = None,
    ) -> None:
        for model in teacher_model.values() if isinstance(teacher_model, Mapping) else [teacher_model]:
            model.to(device)
        self.teacher_model = teacher_model
        self.student_model = student_model.to(device)
        self.train_dataloader = train_dataloader
        self.dev_dataloader = dev_dataloader
        self.device = device
        self.loss_model = loss_model
        self.optimizer = optimizer
        self.evaluator = evaluator
        self.num_epoch = num_epoch
        self.train_data_adaptor = train_data_adaptor
        self.dev_data_adaptor = dev_data_adaptor

    def distillate(self) -> None:
        """Train for ``num_epoch`` passes over the loader.

        Raises:
            HookDistillError: before the first step, an item that cannot be carried out; later, a loss that is not finite.
        """
        self._check_optimizer()
        ours = isinstance(self.loss_model, MultiLayerBasedDistillationLoss)
        losses: _Captured | _Outputs = _Captured(self) if ours else _Outputs(self)
        self.student_model.train()
        look = _Look()
        try:
            for epoch in range(self.num_epoch):
                step = -1
                for step, batch in enumerate(self.train_dataloader):
                    loss = losses.of(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    look.at(loss, epoch, step)
                    self._evaluate(epoch, step, loss.detach())
                if step < 0:
                    raise TrainerError(f"train_dataloader gave no batch in epoch {epoch}; a generator can be read only once")
                look.at(loss, epoch, step, now=True)
        finally:
            losses.close()

    def inputs(self, batch: Any) -> tuple[Any, Any]:
        """What the data adaptor makes of a batch.

        Raises:
            MatchError: it returns no pair.
        """
        adapted = self.train_data_adaptor(self.device, batch)
        if not isinstance(adapted, (tuple, list)) or len(adapted) != 2:
            raise MatchError(
                "train_data_adaptor(device, batch) must return a pair (teacher_inputs, student_inputs), it returned "
                f"{type(adapted).__name__}"
            )
        return adapted[0], adapted[1]

    def _evaluate(self, epoch: int, step: int, loss: Tensor) -> None:
        if self.evaluator is None:
            return
        modes = {module: module.training for module in self.student_model.modules()}
        self.evaluator.evaluate(
            self.teacher_model, self.student_model, self.dev_dataloader, self.dev_data_adaptor, epoch, step, loss
        )
        for module, training in modes.items():  # an evaluator that leaves the student in eval mode does not change the training
            module.training = training

    def _check_optimizer(self) -> None:
        held = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        if held.isdisjoint(self.student_model.parameters()):
            raise TrainerError("the optimizer holds no parameter of student_model, so nothing would be trained")


class _Captured:
    """The loss through a `Distiller`: of layers by module path, or of what output adaptors return."""

    def __init__(self, settings: KnowledgeDistiller) -> None:
        assert isinstance(settings.loss_model, MultiLayerBasedDistillationLoss)
        self.settings, self.loss_model = settings, settings.loss_model
        teachers = settings.teacher_model
        teacher: Any = (
            {name: self._teacher(each, name) for name, each in teachers.items()}
            if isinstance(teachers, Mapping)
            else self._teacher(teachers, None)
        )
        adaptor = self.loss_model.student_output_adaptor
        student = settings.student_model if adaptor is None else Adapted(settings.student_model, adaptor, "student")
        self.distiller = Distiller(teacher, student, self.loss_model.matches(), batch_adaptor=_inputs_of)
        self.planned = False

    def of(self, batch: Any) -> Tensor:
        teacher, student = self.settings.inputs(batch)
        view = BatchView(batch, teacher, student)
        self.loss_model.inputs = (teacher, student)
        if not self.planned:
            self.distiller.plan(view)
            self._train_adapters()
            self.planned = True
        total: Tensor = self.distiller(view).total
        return total

    def close(self) -> None:
        self.loss_model.inputs = (None, None)
        self.distiller.close()

    def _teacher(self, model: nn.Module, name: str | None) -> nn.Module:
        adaptor = self.loss_model.teacher_adaptor(name)
        return model if adaptor is None else Adapted(model, adaptor, "teacher")

    def _train_adapters(self) -> None:
        optimizer = self.settings.optimizer
        held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        new = [each for each in self.distiller.loss.parameters() if each.requires_grad and each not in held]
        if new:
            optimizer.add_param_group({"params": new})
            logger.info("adapters of %s are trained too", ", ".join(map(repr, self.distiller.adapters)) or "losses")


class _Outputs:
    """The loss of a loss model of the user's own, called as the older library called it."""

    def __init__(self, settings: KnowledgeDistiller) -> None:
        self.settings = settings
        if isinstance(settings.teacher_model, Mapping):
            raise MatchError("several teachers need a MultiLayerBasedDistillationLoss as loss_model")

    def of(self, batch: Any) -> Tensor:
        settings = self.settings
        teacher, student = settings.inputs(batch)
        theirs, ours = _arguments(teacher), _arguments(student)
        assert isinstance(settings.teacher_model, nn.Module)
        with teaching(settings.teacher_model):
            teacher_output = run(settings.teacher_model, theirs.args, theirs.kwargs)
        student_output = run(settings.student_model, ours.args, ours.kwargs)
        return settings.loss_model(teacher_output, student_output, teacher, student)

    def close(self) -> None:
        """Nothing is open."""


class _Look:
    """Is the loss finite? This waits for the device, so not at every step."""

    def __init__(self) -> None:
        self.next = time.perf_counter() + _SECONDS_BETWEEN_LOOKS

    def at(self, loss: Tensor, epoch: int, step: int, *, now: bool = False) -> None:
        if not now and time.perf_counter() < self.next:
            return
        self.next = time.perf_counter() + _SECONDS_BETWEEN_LOOKS
        if not math.isfinite(float(loss.detach())):
            raise TrainerError(f"the loss is no longer finite: it is {float(loss.detach())} in epoch {epoch}, step {step}")


def _inputs_of(device: Any, batch: BatchView) -> tuple[Any, Any]:
    return batch.teacher, batch.student


def _arguments(inputs: Any) -> Inputs:
    return given_inputs(inputs)
