"""How much of each teacher layer goes to each student layer, at the least cost: BERT-EMD.

Li et al., *BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance*, 2020, arXiv 2010.06133.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHARPNESS = (8, 16, 32, 64, 128, 256, 512)  # 1 / regularisation, of costs scaled to [0, 1]; exp(-500) is a normal float64
_ROUNDS = 25


@torch.no_grad()
def transport(cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
    """The flow ``[teacher, student]`` of least total cost whose rows sum to ``supply`` and columns to ``demand`` (eq. 5 to 8).

    Found by Sinkhorn's iteration with falling regularisation, then rounded to the exact marginals (Altschuler et al., 2017,
    algorithm 2): it stays on the device and reads nothing on the host, where the authors' exact solver runs on the CPU. The
    total cost is within a percent of the range of costs above the least one. Computed in float64, returned in the dtype of
    ``cost``.
    """
    dtype = torch.float32 if cost.device.type == "mps" else torch.float64
    costs, rows, columns = cost.to(dtype), supply.to(cost.device, dtype), demand.to(cost.device, dtype)
    low, high = costs.min(), costs.max()
    scaled = (costs - low) / (high - low).clamp_min(torch.finfo(dtype).tiny)
    tiny = torch.finfo(dtype).tiny
    left, right = torch.zeros_like(rows), torch.zeros_like(columns)  # potentials
    for sharpness in _SHARPNESS if dtype is torch.float64 else _SHARPNESS[:2]:
        kernel = (-sharpness * (scaled - left[:, None] - right[None, :])).exp()
        u, v = torch.ones_like(rows), torch.ones_like(columns)
        for _ in range(_ROUNDS):
            u = rows / (kernel @ v).clamp_min(tiny)
            v = columns / (kernel.T @ u).clamp_min(tiny)
        left, right = left + u.clamp_min(tiny).log() / sharpness, right + v.clamp_min(tiny).log() / sharpness
    return _feasible(u[:, None] * kernel * v[None, :], rows, columns).to(cost.dtype)


@torch.no_grad()
def cost_attention(flow: Tensor, cost: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """New weights of the layers along the first dimension: the cheaper a layer's unit of weight is moved, the more it gets.

    With C the cost of moving layer i over its weight, softmax of (Σ C / C_i) / temperature (eq. 12 to 14). As in the authors'
    code, a layer that costs nothing gets the least; their default temperature is 1.
    """
    unit = (flow * cost).sum(1) / weights.to(cost.dtype).clamp_min(torch.finfo(cost.dtype).tiny)
    ratio = torch.where(unit > 0, unit.sum() / unit.clamp_min(torch.finfo(cost.dtype).tiny), 0.0)
    return (ratio / temperature).softmax(0).to(weights.dtype)


def _feasible(flow: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The flow with rows and columns scaled down to their sums, and what is then missing spread over all pairs."""
    tiny = torch.finfo(flow.dtype).tiny
    flow = flow * (rows / flow.sum(1).clamp_min(tiny)).clamp_max(1.0)[:, None]
    flow = flow * (columns / flow.sum(0).clamp_min(tiny)).clamp_max(1.0)[None, :]
    short, over = rows - flow.sum(1), columns - flow.sum(0)
    return flow + torch.outer(short, over) / short.sum().clamp_min(tiny)
