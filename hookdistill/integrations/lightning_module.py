"""A ``LightningModule`` around a distiller."""

from __future__ import annotations

from typing import Any

import lightning
from torch import Tensor

from ..distiller import Distiller
from ..engine import Losses
from ..loading import rows_of
from ..optimization import GivenOptimizer, GivenScheduler, make_optimizer, make_scheduler


class DistillationModule(lightning.LightningModule):  # type: ignore[misc]
    """Trains a distiller's student with ``lightning.Trainer``: parts, total and rate are logged, and so are held-out ones.

        lightning.Trainer(max_epochs=3).fit(DistillationModule(distiller, lr=1e-3), loader)
        distiller.export("student")

    The mean of a match is over the valid positions of one batch of one process; of several processes, and of batches that are
    accumulated, Lightning takes the mean of means. `hookdistill.Trainer` does better where batches differ in their padding.

    Args:
        distiller: one whose adapters exist: ``Distiller(…, example_batch=batch)``, or after ``distiller.plan(batch)``.
        optimizer, lr, adapter_lr, weight_decay, scheduler, warmup: as for `hookdistill.Trainer`.
    """

    def __init__(
        self,
        distiller: Distiller,
        *,
        optimizer: GivenOptimizer = None,
        lr: float | None = None,
        adapter_lr: float | None = None,
        weight_decay: float | None = None,
        scheduler: GivenScheduler = None,
        warmup: float | None = None,
    ) -> None:
        super().__init__()
        self.distiller = distiller
        self._optimizer, self._scheduler, self._warmup = optimizer, scheduler, warmup
        self._rates = {"lr": lr, "adapter_lr": adapter_lr, "weight_decay": weight_decay}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The total of one batch."""
        losses = self.distiller(batch, step=self.global_step)
        self._log("train", batch, losses)
        total: Tensor = losses.total
        return total

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The losses of a held-out batch."""
        self._log("eval", batch, self.distiller(batch, step=self.global_step))

    def configure_optimizers(self) -> Any:
        """Optimizer and scheduler, as `hookdistill.Trainer` makes them."""
        optimizer = make_optimizer(self._optimizer, self.distiller, **self._rates)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = make_scheduler(self._scheduler, optimizer, steps, warmup=self._warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def teardown(self, stage: str) -> None:
        """Take the hooks off the models."""
        self.distiller.close()

    def _log(self, prefix: str, batch: Any, losses: Losses) -> None:
        values = {"loss": losses.total.detach(), **{f"loss/{name}": value for name, value in losses.parts.items()}}
        self.log_dict(
            {f"{prefix}/{name}": value for name, value in values.items()},
            batch_size=max(1, rows_of(batch)),
            sync_dist=prefix == "eval",
        )
