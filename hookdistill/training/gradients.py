"""Norms of gradients: of all matches together, and of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distiller import Distiller
from ..engine import at_step
from ..randomness import forked
from ..sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator


def gradient_norm(parameters: Iterable[nn.Parameter], accelerator: Accelerator, *, clip: float | None) -> Tensor:
    """The norm of the gradient over all parameters, which are scaled to ``clip`` where it is larger."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if clip is not None:
        norm: Tensor = accelerator.clip_grad_norm_(parameters, clip)
        return whole(norm)
    if accelerator.scaler is not None:
        accelerator.unscale_gradients()
    return total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The norm of several tensors as one vector; sharded and whole ones may be among them."""
    norms = [whole(gradient.norm()) for gradient in gradients]
    return torch.stack([norm.float() for norm in norms]).norm() if norms else torch.zeros(())


def norms_by_match(
    distiller: Distiller, batch: Any, step: int, accelerator: Accelerator
) -> tuple[dict[str, float], dict[str, float]]:
    """For each match whose weight is not 0, the norm of its unweighted gradient over the student, and its value.

    A forward and a backward for each; nothing of them is left on the student. Both are means over the processes.
    """
    student = [parameter for parameter in distiller.student.parameters() if parameter.requires_grad]
    weights = {name: at_step("weight", term.weight, step) for name, term in distiller.loss.terms.items()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in distiller.buffers()]
    norms, values = {}, {}
    with forked(accelerator.device):
        for name in [name for name, weight in weights.items() if weight]:
            losses = distiller(batch, step=step, shares={other: float(other == name) for other in weights})
            found = torch.autograd.grad(losses.total, student, allow_unused=True)
            norm = total_norm(each for each in found if each is not None)
            norms[name], values[name] = float(norm) / abs(weights[name]), float(losses.parts[name])
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    return _means(norms, accelerator), _means(values, accelerator)


def _means(values: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    if accelerator.num_processes == 1:
        return values
    here = torch.tensor([value if math.isfinite(value) else 0.0 for value in values.values()], device=accelerator.device)
    return dict(zip(values, accelerator.reduce(here, "mean").tolist(), strict=True))
