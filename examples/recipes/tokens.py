"""Random tokens for llama_logits.yaml."""

import torch


def random_tokens(rows: int, length: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Rows of token ids, padded on the right to different lengths."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (rows, length), generator=draw)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=draw)
    mask = (torch.arange(length) < lengths).long()
    return [{"input_ids": row, "attention_mask": valid} for row, valid in zip(ids * mask, mask, strict=True)]
