"""How gradients come about, are exchanged and stepped with: accelerate's way, on one device, in DDP and in FSDP2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distiller import Distiller
from ..randomness import forked
from ..sharding import average_plain_gradients, broadcast_plain, gathered, is_sharded, load_optimizer
from .gradients import gradient_norm

if TYPE_CHECKING:
    from accelerate import Accelerator


class Strategy:
    """Student, adapters and losses as one module for the accelerator, and the steps that are made with it.

    Args:
        optimizer: holds the distiller's trainable parameters.
        first: a batch, by which parameters are found that no match reaches.
    """

    name = "accelerate"

    def __init__(self, distiller: Distiller, optimizer: Optimizer, accelerator: Accelerator, first: Any) -> None:
        self.torch_optimizer, self.accelerator = optimizer, accelerator
        self.sharded_by_user = is_sharded(distiller)
        self.model, self.optimizer = _prepared(distiller, optimizer, accelerator, first)

    def batch_of_step(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """For forward and backward of a batch: gradients of all but the last of a step stay in their process.

        Sharded ones go at once, to save memory.
        """
        if last or self.sharded_by_user or self.accelerator.is_fsdp2:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.model)  # type: ignore[no-any-return]

    def backward(self, total: Tensor) -> None:
        """Add the gradient of a batch's total, whose shares are those of the whole step."""
        # accelerate divides by the number of batches once more.
        batches = self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(total * batches if batches > 1 else total)

    def after_backwards(self) -> None:
        """What is left to exchange after the last batch of a step."""
        if self.sharded_by_user and self.accelerator.num_processes > 1:
            average_plain_gradients(self.model.parameters())

    def norm(self, *, clip: float | None) -> Tensor | None:
        """The norm of the gradient, which is clipped; ``None`` where only the step itself can tell."""
        return gradient_norm(self.model.parameters(), self.accelerator, clip=clip)

    def step(self) -> bool:
        """Let the optimizer step; whether it did, which it does not where a scaled gradient overflows."""
        self.optimizer.step()
        return not self.optimizer.step_was_skipped

    def norm_of_step(self) -> Tensor | None:
        """The norm of the gradient that `step` has met, where `norm` could not tell."""
        return None

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.model.zero_grad()

    def optimizer_state(self, *, keep: bool) -> dict[str, Any]:
        """The optimizer's state for a checkpoint, whole; every process has to ask.

        Args:
            keep: whether this process wants it.
        """
        state: dict[str, Any] = gathered(self.torch_optimizer.state_dict(), keep)
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on from there, after the model's own state is loaded."""
        load_optimizer(self.torch_optimizer, state)

    def close(self) -> None:
        """Leave student and adapters as the user would have them."""


def _prepared(distiller: Distiller, optimizer: Optimizer, accelerator: Accelerator, first: Any) -> tuple[nn.Module, Any]:
    if is_sharded(distiller):
        # The user has called fully_shard, which sees to the gradients of its units. DDP would refuse them.
        broadcast_plain(distiller)
        return accelerator.prepare_model(distiller, evaluation_mode=True), accelerator.prepare_optimizer(optimizer)
    if accelerator.num_processes == 1:
        return accelerator.prepare_model(distiller, device_placement=False), accelerator.prepare_optimizer(optimizer)
    if accelerator.is_fsdp2:
        broadcast_plain(distiller)  # each process has made adapters of its own
        model, optimizer = accelerator.prepare(distiller, optimizer)
        return model, optimizer
    with _unused_parameters_allowed(accelerator, bool(without_gradient(distiller, first))):
        model = accelerator.prepare_model(distiller, device_placement=False)
    return model, accelerator.prepare_optimizer(optimizer)


def without_gradient(distiller: Distiller, batch: Any) -> list[str]:
    """The trainable parameters that no match reaches, such as a head behind the last captured layer; found by one step."""
    named = {name: parameter for name, parameter in distiller.named_parameters() if parameter.requires_grad}
    buffers = {name: buffer.detach().clone() for name, buffer in distiller.named_buffers()}
    with forked(next(distiller.student.parameters()).device), torch.enable_grad():
        total = distiller(batch, step=0).total
        gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    with torch.no_grad():
        for name, buffer in distiller.named_buffers():
            buffer.copy_(buffers[name])
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is None]


@contextlib.contextmanager
def _unused_parameters_allowed(accelerator: Accelerator, wanted: bool) -> Iterator[None]:
    """Tell DDP that parameters without a gradient are no mistake, unless the user has told it already."""
    from accelerate import DistributedDataParallelKwargs

    handler = accelerator.ddp_handler
    if not wanted or (handler is not None and (handler.find_unused_parameters or handler.static_graph)):
        yield
        return
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    if handler is not None:
        for name, value in vars(handler).items():
            if name != "find_unused_parameters":
                setattr(accelerator.ddp_handler, name, value)
    try:
        yield
    finally:
        accelerator.ddp_handler = handler
