"""Gradients that exist already, attached to the graph: backward only multiplies them by what comes from above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Again = Callable[[], tuple[Tensor, Sequence[Tensor]]]
"""The same total by the eager definition, for gradients of gradients, and the tensors that it depends on."""


def attach(total: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor], again: Again) -> Tensor:
    """``total`` as a function of ``tensors``, whose gradients are known.

    Backward may run twice where the graph is retained. Under ``create_graph=True`` it differentiates ``again()`` instead.
    """
    return _Attached.apply(total, again, gradients, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, again: Again, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.again = again
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.save_for_backward(*gradients)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            total, tensors = ctx.again()
            return None, None, None, *torch.autograd.grad(total, tensors, above, create_graph=True)
        ours = not torch._C._autograd._get_current_graph_task_keep_graph()
        scaled = scale(ctx.saved_tensors, above[0], in_place=ours)
        return None, None, None, *(each.to(dtype) for each, dtype in zip(scaled, ctx.dtypes, strict=True))


def scale(gradients: Sequence[Tensor], factor: Tensor, *, in_place: bool) -> Sequence[Tensor]:
    """The gradients times ``factor``, tensors of their own unless ``in_place``.

    In place it costs nothing where the factor can be seen to be one without waiting for a device.
    """
    if not in_place:
        return torch._foreach_mul(list(gradients), factor)
    if factor.device.type != "cpu" or factor.item() != 1:
        torch._foreach_mul_(list(gradients), factor)
    return gradients
