"""The older library's evaluator: it prints the loss and saves the student every so many steps."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..export import save_student

logger = logging.getLogger(__name__)


class MultiLayerBasedDistillationEvaluator:
    """Logs the loss every ``print_loss_step`` steps and saves the student every ``save_step``, both counted in each epoch.

    An evaluator of one's own is any object with `evaluate`.

    Args:
        save_dir: gets a folder ``<epoch>-<step>`` for each save, and the printed losses as ``LossValue.txt``. ``None``: nothing
            is written.
        save_step: ``None``: nothing is written.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str] | None, save_step: int | None = None, print_loss_step: int = 20
    ) -> None:
        self.save_dir = None if save_dir is None else Path(save_dir).absolute()
        self.save_step = save_step
        self.print_loss_step = print_loss_step
        self.losses: Path | None = None
        if self.save_dir is not None and save_step:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            self.losses = self.save_dir / "LossValue.txt"
            self.losses.write_text("", encoding="utf-8")

    def evaluate(
        self,
        teacher_model: nn.Module,
        student_model: nn.Module,
        dev_data: Any,
        dev_data_adaptor: Any,
        epoch: int,
        step: int,
        loss_value: Tensor | float,
    ) -> None:
        """Called after every optimizer step; ``epoch`` and ``step`` count from 0."""
        if step <= 0:
            return
        if self.print_loss_step and step % self.print_loss_step == 0:
            line = f"epoch:{epoch},\tstep:{step},\tloss value:{float(loss_value)}"
            logger.info(line)
            if self.losses is not None:
                with self.losses.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
        if self.save_dir is not None and self.save_step and step % self.save_step == 0:
            save_student(student_model, self.save_dir / f"{epoch}-{step}")
