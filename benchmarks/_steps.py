"""The two steps that are timed and whose memory is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from _approaches import Attached

MODES = ("forward", "training step")


def step_of(mode: str, attached: Attached, ids: Tensor) -> Callable[[], object]:
    """A forward under ``no_grad``; or forward, mean square of the output and of every captured tensor, backward."""

    def forward() -> None:
        with torch.no_grad():
            attached.forward(ids)

    def training_step() -> None:
        last_hidden_state = attached.forward(ids)
        loss = last_hidden_state.square().mean()
        for tensor in attached.tensors():
            loss = loss + tensor.square().mean()
        loss.backward()  # gradients accumulate

    return forward if mode == "forward" else training_step


def set_mode(mode: str, model: Any) -> None:
    """Dropout runs in a training step; ``model`` may be a wrapper that calls its module ``_module``."""
    getattr(model, "_module", model).train(mode == "training step")
