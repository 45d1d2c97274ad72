"""Acting as one, where there are several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import HookDistillError

if TYPE_CHECKING:
    from accelerate import Accelerator


def first_process(accelerator: Accelerator, act: Callable[[], Any]) -> Any:
    """What ``act`` gives in the first process, in all; if it fails there, all fail.

    Raises:
        HookDistillError: it failed.
    """
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [act(), None]
        except HookDistillError as error:
            outcome = [None, error]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        own = outcome[1]
        outcome = broadcast_object_list(outcome)
        outcome[1] = own or outcome[1]  # that of the first process has its causes with it
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def in_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it is so in one of them at least; every one has to ask."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum"))
