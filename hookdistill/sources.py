"""What may stand where a teacher stands without being a module: a store, a remote model, a function of the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .addresses import Address
from .matches import Match


@runtime_checkable
class CaptureSource(Protocol):
    """Hands over tensors of a teacher by address, instead of running it.

    class Remote:
        layers = ["encoder.layer.0", "encoder.layer.1"]

        def captures(self, batch, addresses):
            return {"encoder.layer.1": {"output": fetch(batch["input_ids"])}}

    Distiller(Remote(), student, matches)
    """

    @property
    def layers(self) -> Sequence[str]:
        """Module paths that it offers, against which wildcards and negative indices are expanded."""
        ...

    def captures(self, batch: Any, addresses: Sequence[Address | str]) -> Mapping[str, Mapping[str, Tensor]]:
        """The tensors for a batch: ``{layer: {output: tensor}}``, each under the path and the selector of its address.

        They carry no gradient, and lie on any device.
        """
        ...


@runtime_checkable
class AdjustingSource(CaptureSource, Protocol):
    """A source that holds less than the teacher made, and so has to say how an entry is to be read."""

    def adjust(self, match: Match) -> Match:
        """The same comparison with what the source has, or an error that says why there is none."""
        ...


def skeleton(name: str, layers: Iterable[str]) -> nn.Module:
    """A module that has submodules at these paths and does nothing, for `hookdistill.paths.resolve` to look into."""
    root: nn.Module = type(name, (_Offered,), {})()
    for path in layers:
        module = root
        *parents, last = path.split(".") if path else [""]
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]  # type: ignore[assignment]
        if last:
            offered = _Offered()
            offered._modules.update(module._modules[last]._modules if last in module._modules else {})  # type: ignore[union-attr]
            module.add_module(last, offered)
    return root


class _Offered(nn.Module):
    """Stands for a module that can be called."""

    def forward(self) -> None:
        raise AssertionError("a stand-in is never called")
