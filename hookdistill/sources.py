"""What may stand where a teacher stands without being a module: a store, a remote model, a function of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from .addresses import Address
from .errors import HookDistillError
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


def adjusted(match: Match, sources: Mapping[str | None, CaptureSource]) -> Match:
    """The match as the source of its teacher tensor says that it is to be read.

    Raises:
        HookDistillError: the source has nothing that would serve it; the message names the entry.
    """
    source = sources.get(match.teacher_model) if match.teacher_address is not None else None
    if not isinstance(source, AdjustingSource):
        return match
    try:
        return source.adjust(match)
    except HookDistillError as error:
        raise type(error)(f"{match.label}: {error}") from error


def skeleton(source: CaptureSource) -> nn.Module:
    """A module that has submodules where the source offers layers and does nothing, for addresses to be resolved in it."""
    root: nn.Module = type(type(source).__name__, (_Offered,), {})()
    for path in source.layers:
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
