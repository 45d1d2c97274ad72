"""A ``transformers.Trainer`` whose loss is a distiller."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..distiller import Distiller
from ..errors import TrainerError
from ..evaluation import save
from ..paths import forward_signature
from ..randomness import forked
from ..sharding import whole_state
from ..training.agreement import Agreement
from ..training.meters import StepLosses
from ..training.states import read_state, write_state

_STATE = "distiller"


class DistillationTrainer(transformers.Trainer):
    """Trains a distiller's student with ``TrainingArguments``; what is saved is the student, with its adapters beside it.

        trainer = DistillationTrainer(distiller, args=TrainingArguments("run"), train_dataset=data, data_collator=collate)
        trainer.train()

    The mean of a match is over the valid positions of all processes and of all batches of an optimizer step. Parts are logged
    as ``loss/<part>``. ``compute_metrics`` gets the student's outputs.

    Args:
        distiller: takes the place of ``model``; its plan is made from the first batch of the train loader, or of the first
            evaluation.
        args: what `transformers.Trainer` takes, but FSDP and DeepSpeed, on which `hookdistill.Trainer` and this cannot agree
            with it about checkpoints.
        trainer_options: the other arguments of `transformers.Trainer`.

    Raises:
        TrainerError: arguments that make no sense here.
    """

    def __init__(self, distiller: Distiller, args: Any = None, **trainer_options: Any) -> None:
        if not isinstance(distiller, Distiller):
            raise TrainerError(f"the first argument is a hookdistill.Distiller, got {type(distiller).__name__}")
        for name in ("model", "model_init", "compute_loss_func"):
            if trainer_options.get(name) is not None:
                raise TrainerError(f"{name}= makes no sense here: the distiller is model and loss")
        self.distiller = distiller
        self._is_planned = False
        self._shares: deque[Mapping[str, float] | None] = deque()
        self._share: Mapping[str, float] | None = None
        self._agreement: Agreement | None = None
        self._parts: Tensor | None = None
        self._steps = 0
        super().__init__(model=distiller, args=args, **trainer_options)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise TrainerError(
                "DistillationTrainer runs on one device and on DDP; for FSDP2 and DeepSpeed take hookdistill.Trainer"
            )
        if self.args.n_gpu > 1:
            raise TrainerError(
                f"{self.args.n_gpu} GPUs in one process mean DataParallel, which captures cannot see into. Start with torchrun "
                "or accelerate launch, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        self.model_accepts_loss_kwargs = False
        if self.args.label_names is None:
            targets = [term.target for term in distiller.loss.terms.values() if isinstance(term.target, str)]
            self.label_names = list(dict.fromkeys(targets))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.train`; afterwards no hook is left on the models."""
        self._plan(self.get_train_dataloader)
        self._agreement = Agreement(self.distiller, self.accelerator)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._agreement.close()
            self._shares.clear()
            self.distiller.close()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `transformers.Trainer.evaluate`."""
        self._plan(lambda: self.get_eval_dataloader(eval_dataset))
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of the next optimizer step, whose shares in its means are found here."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._steps += 1
        if self._agreement is not None:
            self._shares = deque(self._agreement.on(batches).shares)
        return batches, items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one batch."""
        self._share = self._shares.popleft() if self._shares else None
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The total of the distiller; its losses stand for the outputs."""
        losses = model(inputs, step=self.state.global_step, shares=self._share if model.training else None)
        total = losses.total
        if model.training:
            found = StepLosses(list(self.distiller.loss.terms))
            found.add(losses, self._share)
            values = found.result(total.device)
            self._parts = values if self._parts is None else self._parts + values
            # The shares are those of the whole step already, and training_step divides by the number of batches.
            total = total * self.current_gradient_accumulation_steps
        return (total, losses) if return_outputs else total

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Loss, the student's outputs, and the labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            outputs = self.distiller.run_student(inputs)
        ignored = {*(ignore_keys or ()), "loss"}
        logits: Any = outputs
        if isinstance(outputs, Mapping):
            logits = tuple(value for name, value in outputs.items() if name not in ignored and isinstance(value, Tensor))
        elif hasattr(outputs, "logits"):
            logits = outputs.logits
        if isinstance(logits, tuple) and len(logits) == 1:
            logits = logits[0]
        labels = tuple(inputs[name] for name in self.label_names if name in inputs)
        return loss, logits, None if not labels else labels[0] if len(labels) == 1 else labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `transformers.Trainer.log`, with every part beside the loss."""
        if "loss" in logs and self._parts is not None:
            means = self.accelerator.reduce(self._parts / max(1, self._steps), "mean").tolist()
            logs = {**logs, **{f"loss/{name}": value for name, value in zip(self.distiller.loss.terms, means[1:], strict=True)}}
            self._parts, self._steps = None, 0
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student by its own ``save_pretrained``, and the adapters beside it; in checkpoints the whole state too."""
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.args.should_save:
            save(self.distiller, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            if _internal_call:
                write_state(whole_state(self.distiller), folder, _STATE)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load(self.state.best_model_checkpoint)

    def _load(self, folder: str | os.PathLike[str]) -> None:
        self.distiller.load_state_dict(read_state(Path(folder), _STATE))

    def _plan(self, loader: Any) -> None:
        """Make the adapters before the optimizer, from a batch that is not missed afterwards."""
        if self._is_planned:
            return
        with forked(self.args.device):
            for batch in loader():
                self.distiller.plan(self._prepare_inputs(batch))
                self._is_planned = True
                return
        raise TrainerError("the data set gives no batch, so nothing can be planned; is it empty?")

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that student, teachers, masks or targets take, instead of those that the distiller would."""
        if self._signature_columns is not None:
            return
        distiller, teacher = self.distiller, self.distiller.teacher
        terms = distiller.loss.terms.values()
        sources = [source for term in terms for source in (term.mask, term.target) if source is not None]
        if distiller.batch_adaptor is not None or any(callable(source) for source in sources):
            raise TrainerError(
                "which columns of the data set are used cannot be known, as functions of the batch are among batch_adaptor, "
                "masks and targets; set TrainingArguments(remove_unused_columns=False)"
            )
        models = [distiller.student, *(teacher.values() if isinstance(teacher, Mapping) else [teacher])]
        taken = [name for model in models if isinstance(model, nn.Module) for name in forward_signature(model).parameters]
        named = [source for source in sources if isinstance(source, str)]
        columns: Any = list(dict.fromkeys([*taken, *named, *self.label_names, "label", "label_ids"]))
        self._signature_columns = columns
