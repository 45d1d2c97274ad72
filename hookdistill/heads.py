"""Finding the linear layer that makes a model's logits, and proving on a real forward that it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .addresses import Address, Segment, Selector
from .fused.head import Head
from .paths import is_compiled, module_paths, unwrap
from .session import is_own

_CHECKED_ROWS = 256
_SHARDED = ("FSDPModule", "FullyShardedDataParallel", "DistributedDataParallel", "DeepSpeedEngine")


@dataclass(frozen=True, slots=True)
class FoundHead:
    """The head behind some logits: its path, and what the model does to its output."""

    path: str
    module: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def input(self) -> Address:
        """The address of what the head is called with."""
        segments = tuple(Segment(name) for name in self.path.split(".")) if self.path else ()
        return Address(segments, Selector("input"))

    @property
    def is_plain(self) -> bool:
        """Whether the weight can be used outside of the layer: not if it is sharded."""
        return type(self.module.weight) is nn.Parameter

    def on(self, hidden: Tensor) -> Head:
        """The head with its input."""
        kind, module = hidden.device.type, self.module
        return Head(
            hidden=hidden,
            weight=module.weight,
            bias=module.bias,
            scale=self.scale,
            softcap=self.softcap,
            compute=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )


@dataclass(slots=True)
class Seen:
    """The linear layers of a model that ran once in a forward, by path, with input and output."""

    layers: dict[str, tuple[nn.Linear, Tensor, Tensor]]
    twice: set[str]


@contextlib.contextmanager
def watching(model: nn.Module) -> Iterator[Seen]:
    """What the linear layers of ``model`` get and give while this is open."""
    seen, handles = Seen({}, set()), []

    def note(path: str, layer: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
        if path in seen.layers or len(args) != 1:
            seen.twice.add(path)
        seen.layers[path] = (layer, args[0] if args else output, output)

    for path, module in module_paths(model).items():
        if type(module) is nn.Linear and not _altered(module):
            hook = lambda layer, args, output, path=path: note(path, layer, args, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find_head(model: nn.Module, logits: Tensor, seen: Seen) -> FoundHead | str:
    """The head whose output ``logits`` are, up to a scale or a soft cap that the model's config names; or why there is none.

    That it is so is checked on the values themselves.
    """
    if is_compiled(model):
        return "the model is compiled"
    wrapped = [cls.__name__ for module in (model, unwrap(model)) for cls in type(module).__mro__ if cls.__name__ in _SHARDED]
    if wrapped:
        return f"the model is wrapped in {wrapped[0]}"
    for path, (layer, hidden, output) in seen.layers.items():
        if path in seen.twice or output.shape != logits.shape or hidden.shape[:-1] != logits.shape[:-1]:
            continue
        for scale, softcap in _changes(model):
            found = FoundHead(path, layer, scale, softcap)
            if _is_what_it_gives(found, output, logits):
                return found
    return "no linear layer gives these logits"


def _is_what_it_gives(found: FoundHead, output: Tensor, logits: Tensor) -> bool:
    output, logits = (each.reshape(-1, each.shape[-1])[:_CHECKED_ROWS] for each in (output, logits))
    made = output.float() * found.scale
    made = made if found.softcap is None else found.softcap * torch.tanh(made / found.softcap)
    tolerance = 8 * torch.finfo(logits.dtype).eps * logits.float().abs().amax().clamp_min(1)
    return bool((made - logits.float()).abs().amax() <= tolerance)


def _changes(model: nn.Module) -> list[tuple[float, float | None]]:
    """Scale and soft cap as they may be: none, or what the config says (Cohere, Granite, Gemma)."""
    config = getattr(unwrap(model), "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    scale = float(getattr(text, "logit_scale", None) or 1.0) / float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return list(dict.fromkeys([(1.0, None), (scale, None), (scale, None if softcap is None else float(softcap))]))


def _altered(module: nn.Module) -> bool:
    """Whether something may come between the layer's weight and its output."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(is_own, hooks)) or parametrize.is_parametrized(module)
