"""Tiny models for the capture tests, and what their tensors are, found without hooks and without hookdistill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn


class Mlp(nn.Module):
    """Three linear layers; ``tail`` is never called."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.act = nn.Tanh()
        self.tail = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class Residual(nn.Module):
    """Everything that overwrites in place: ``ReLU(inplace=True)``, ``+=``, a write through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(4, 4, 1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn(self.conv(x)))
        z = self.mix(y)
        z += y
        p = self.pool(z)
        p[:, 0] = 0.5 * p[:, 1]
        return self.head(p.flatten(1))


@contextlib.contextmanager
def edited(
    model: nn.Module, paths: Sequence[str], select: Callable[[Any], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """The reference: ``forward`` of the named modules is rewritten to put a differentiable copy of its output aside.

    Only the first call of each counts, so that a recomputation in backward changes nothing.
    """
    seen: dict[str, Tensor] = {}

    def rewrite(module: nn.Module, path: str) -> None:
        forward = module.forward

        def recording(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if path not in seen:
                seen[path] = (select or first_tensor)(output).clone()
            return output

        module.forward = recording

    modules = {path: model.get_submodule(path) for path in paths}
    for path, module in modules.items():
        rewrite(module, path)
    try:
        yield seen
    finally:
        for module in modules.values():
            del module.forward


def first_tensor(output: Any) -> Tensor:
    """The tensor itself, or the first of a tuple or of a ``ModelOutput``."""
    if isinstance(output, Tensor):
        return output
    first: Tensor = output[0]
    return first


def gradients(value: Tensor, model: nn.Module) -> list[Tensor | None]:
    """What a loss on ``value`` gives every parameter of ``model``."""
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).to(value.dtype).view_as(value)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad((value * weight).sum(), parameters, allow_unused=True, retain_graph=True))


def same_gradients(a: Sequence[Tensor | None], b: Sequence[Tensor | None], *, exactly: bool = True) -> bool:
    """Whether both lists agree, bit for bit unless rounding is allowed; ``None`` counts as zero."""
    for one, other in zip(a, b, strict=True):
        if one is None or other is None:
            left = one if one is not None else other
            if left is not None and bool(left.any()):
                return False
        elif not (torch.equal(one, other) if exactly else torch.allclose(one, other, rtol=1e-4, atol=1e-6)):
            return False
    return sum(g is not None and bool(g.any()) for g in a) > 0


def hooks_on(model: nn.Module) -> int:
    """How many hooks sit on the model, of every kind that a capture could use, plus calls taken over."""
    return sum(
        len(module._forward_hooks)
        + len(module._forward_pre_hooks)
        + len(module._forward_hooks_with_kwargs)
        + len(module._forward_hooks_always_called)
        + len(module._forward_pre_hooks_with_kwargs)
        + len(module._backward_hooks)
        + ("_compiled_call_impl" in module.__dict__)
        for module in model.modules()
    )


def bert(layers: int = 3, **extra: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=16, num_attention_heads=2, intermediate_size=24, vocab_size=50, **extra
    )
    return transformers.BertForSequenceClassification(config)


def llama() -> nn.Module:
    """Grouped queries: 4 heads, 2 of keys and values."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=3,
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def albert() -> nn.Module:
    """One layer that runs four times."""
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        num_hidden_layers=4,
        hidden_size=16,
        embedding_size=8,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=50,
    )
    return transformers.AlbertModel(config)


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return transformers.ViTModel(config, add_pooling_layer=False)


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        num_layers=2, d_model=16, d_kv=8, num_heads=2, d_ff=24, vocab_size=50, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic")
    return transformers.ResNetModel(config)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def tokens(batch: int = 2, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def image(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def rows(batch: int = 4, width: int = 8) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(1))
