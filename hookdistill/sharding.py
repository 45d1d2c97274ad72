"""Models whose parameters ``torch.distributed.fsdp.fully_shard`` has divided among processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .paths import module_paths


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is divided among processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards in all processes make up; every process has to ask."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every sharded tensor gathered, one after the other, in the memory of the CPU."""
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return dict(state)
    return {name: whole(tensor).cpu() for name, tensor in state.items()}


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor as the shard of it that ``reference`` is, on its device; every process has to ask."""
    tensor = tensor.to(reference.device)
    if not hasattr(reference, "full_tensor") or tensor.shape != reference.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    return distribute_tensor(tensor.to(reference.dtype), reference.device_mesh, reference.placements)


def gathered(tree: Any, keep: bool) -> Any:
    """The tree with every sharded tensor as a whole, for the process that keeps it; every process has to ask."""
    if isinstance(tree, Tensor):
        return tree if not hasattr(tree, "full_tensor") else kept(whole(tree), keep)
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    return [gathered(value, keep) for value in tree] if isinstance(tree, list) else tree


def kept(tensor: Tensor, keep: bool) -> Tensor:
    """The tensor on the CPU for the process that keeps it, nothing for the others."""
    return tensor.cpu() if keep else torch.empty(0)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state into an optimizer, of whose parameters some may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in state["state"]:
            values = state["state"][number]
            state["state"][number] = {
                name: like(value, parameter) if isinstance(value, Tensor) and hasattr(parameter, "full_tensor") else value
                for name, value in values.items()
            }
    optimizer.load_state_dict(state)


def gather_for_backward(model: nn.Module, captured: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let backward find the weights that it needs, when a loss hangs on a tensor from inside a sharded unit.

    ``fully_shard`` gathers the weights of a unit again when a gradient reaches the unit's output. A captured tensor from inside
    gets its gradient from the loss, past that output.

    Args:
        model: the one that was run.
        captured: ``{layer: {output: tensor}}``.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or not is_sharded(model):
        return
    units = [(path, module) for path, module in module_paths(model).items() if hasattr(module, "unshard")]
    for path, outputs in captured.items():
        around = [unit for name, unit in units if name == "" or path == name or path.startswith(f"{name}.")]
        for tensor in outputs.values() if around else ():
            if tensor.requires_grad:
                tensor.register_hook(_Gather(around))  # type: ignore[no-untyped-call]


class _Gather:
    def __init__(self, units: list[nn.Module]) -> None:
        self.units = units

    def __call__(self, gradient: Tensor) -> None:
        for unit in self.units:
            unit.unshard()  # type: ignore[operator]


def reshard(model: nn.Module) -> None:
    """Divide the parameters again that a forward without a backward has left whole, as that of an outermost unit is.

    Until then ``parameters()`` gives other objects, which an optimizer would step in vain.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in model.modules():
            if callable(divide := getattr(module, "reshard", None)) and hasattr(module, "unshard"):
                divide()


def broadcast_plain(model: nn.Module, source: int = 0) -> None:
    """Give every process the values that the parameters and buffers outside sharded units have in one of them."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not hasattr(tensor, "full_tensor"):
                torch.distributed.broadcast(tensor, source)


def average_plain_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over processes the gradients that no sharded unit has averaged already."""
    for parameter in parameters:
        if not hasattr(parameter, "full_tensor") and parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.distributed.all_reduce(gradient)
            if parameter.grad is not None or bool(gradient.any()):  # nothing anywhere stays no gradient
                parameter.grad = gradient / torch.distributed.get_world_size()
