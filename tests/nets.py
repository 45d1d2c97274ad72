"""Small nets built the way torchvision, timm and torch build theirs, which are not installed here."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def convolution(width_in: int, width_out: int, *, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    layer = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, with torchvision's names."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.downsample = None
        if stride > 1 or width_in != width_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """torchvision's ResNet: ``conv1 … layer1 … layer4, avgpool, fc``."""

    def __init__(self, *widths: int, depth: int = 1, classes: int = 5, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.stages = len(widths)
        before = widths[0]
        for number, width in enumerate(widths, 1):
            blocks = [BasicBlock(before if i == 0 else width, width, 2 if i == 0 and number > 1 else 1) for i in range(depth)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            before = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for number in range(1, self.stages + 1):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class Vgg(nn.Module):
    """torchvision's VGG: bare layers in ``features``, three linear maps in ``classifier``."""

    def __init__(self, *widths: int, classes: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            for _ in range(2):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(before, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class MobileNet(nn.Module):
    """timm's MobileNets and EfficientNets: stages in ``blocks``, some at one resolution, and a wide ``conv_head``."""

    def __init__(self, *widths: int, strides: tuple[int, ...], classes: int = 5) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths[:-1])
        pairs = zip(before, widths, strides, strict=True)
        self.blocks = nn.Sequential(*(nn.Sequential(convolution(a, b, stride=s), convolution(b, b)) for a, b, s in pairs))
        self.conv_head = nn.Conv2d(widths[-1], 4 * widths[-1], 1)
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_head(self.blocks(torch.relu(self.bn1(self.conv_stem(x)))))
        return self.classifier(self.global_pool(x).flatten(1))


class TimmAttention(nn.Module):
    """Query, key and value from one linear map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class TimmBlock(nn.Module):
    """A pre-norm block of a vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), TimmAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmVit(nn.Module):
    """timm's VisionTransformer: ``patch_embed, blocks, norm, head``."""

    def __init__(self, width: int = 16, depth: int = 4, heads: int = 2, *, classes: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*(TimmBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` between an embedding and a head."""

    def __init__(self, width: int = 16, depth: int = 4, *, vocab: int = 30, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(input_ids))[:, 0])


def images(batch: int = 4, *, size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """A batch for the nets above: ``x``, ``labels``."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 3, size, size, generator=draw),
        "labels": torch.randint(5, (batch,), generator=draw),
    }
