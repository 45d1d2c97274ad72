"""Small encoders with attention by ``F.scaled_dot_product_attention``, and a batch for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BATCH, TOKENS = 3, 9
PADDING = torch.ones(BATCH, TOKENS, dtype=torch.bool)
PADDING[1, 6:] = False
PADDING[2, :4] = False


class Encoder(nn.Module):
    """Layers of attention, with a mask of keys."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden, attention_mask)
        return self.head(hidden)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = attention_mask[:, None, None, :].bool()
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if not torch.is_grad_enabled():
            query.mul_(0)  # whoever keeps only a reference to the teacher's has nothing now
        return mixed.transpose(1, 2).flatten(2)


def encoders(heads: int = 4) -> tuple[Encoder, Encoder]:
    """Teacher and student."""
    torch.manual_seed(0)
    return Encoder(32, 3, heads), Encoder(16, 2, heads)


def token_batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {"input_ids": torch.randint(50, (BATCH, TOKENS), generator=draw), "attention_mask": PADDING.long()}
