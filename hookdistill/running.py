"""Calling a user's model without leaving a trace on it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from .randomness import forked


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for all modules of the models; afterwards each is in the mode it was in."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def teaching(model: nn.Module) -> Iterator[None]:
    """A teacher's forward: eval mode, no gradients."""
    with evaluating(model), torch.no_grad():
        yield
    # In torch releases without pytorch PR #165068 a weight that was cast under no_grad stays in autocast's cache without a
    # gradient; a student that shares it with its teacher would silently not train it.
    torch.clear_autocast_cache()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A forward that leaves no trace: eval mode, no gradients, and the random states put back."""
    with forked(device_of(model)), evaluating(model), torch.no_grad():
        yield


def device_of(model: nn.Module, otherwise: torch.device | None = None) -> torch.device:
    """Where the model's first parameter or buffer lies; for a model without any, ``otherwise`` or the CPU."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return otherwise or torch.device("cpu")
