"""How much of each teacher layer goes to each student layer, at the least cost: BERT-EMD.

Li et al., *BERT-EMD: Many-to-Many Layer Mapping for BERT Compression with Earth Mover's Distance*, 2020, arXiv 2010.06133.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import product

_SHARPNESS = (8, 16, 32, 64, 128, 256, 512)  # 1 / regularisation, for costs scaled to [0, 1]
_ROUNDS = 15
_LEAST = 1e-6


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
    tiny = torch.finfo(dtype).tiny
    scaled = (costs - low) / (high - low).clamp_min(tiny)
    log_rows, log_columns = rows.log(), columns.log()
    left, right = torch.zeros_like(rows), torch.zeros_like(columns)  # potentials
    for sharpness in _SHARPNESS:
        # One round on logarithms brings every row of the kernel to its sum, so that the others can multiply without overflow.
        right = (log_columns - (sharpness * (left[:, None] - scaled)).logsumexp(0)) / sharpness
        left = (log_rows - (sharpness * (right - scaled)).logsumexp(1)) / sharpness
        kernel = (sharpness * (left[:, None] + right - scaled)).exp()
        u, v = torch.ones_like(rows), torch.ones_like(columns)
        for _ in range(_ROUNDS):
            v = columns / product(u, kernel).clamp_min(tiny)
            u = rows / product(kernel, v).clamp_min(tiny)
        left, right = left + u.log() / sharpness, right + v.log() / sharpness
    flow = u[:, None] * kernel * v
    return _feasible(flow, rows, columns).to(cost.dtype)


@torch.no_grad()
def cost_attention(flow: Tensor, cost: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """New weights of the layers along the first dimension: the cheaper a layer's unit of weight is moved, the more it gets.

    With C the cost of moving layer i over its weight, softmax of (Σ C / C_i) / temperature (eq. 12 to 14). As in the authors'
    code, a layer that costs nothing gets the least; their default temperature is 1. No weight falls below 1e-6, from which no
    layer could come back.
    """
    weights, flow, cost = weights.double(), flow.double(), cost.double()
    unit = (flow * cost).sum(1) / weights
    ratio = torch.where(unit > 0, unit.sum() / unit.clamp_min(torch.finfo(unit.dtype).tiny), 0.0)
    moved = (ratio / temperature).softmax(0).clamp_min(_LEAST)
    return moved / moved.sum()


def _feasible(flow: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The flow with rows and columns scaled down to their sums, and what is then missing spread over all pairs."""
    tiny = torch.finfo(flow.dtype).tiny
    flow = flow * (rows / flow.sum(1).clamp_min(tiny)).clamp_max(1.0)[:, None]
    flow = flow * (columns / flow.sum(0).clamp_min(tiny)).clamp_max(1.0)[None, :]
    short, over = rows - flow.sum(1), columns - flow.sum(0)
    return flow + torch.outer(short, over) / short.sum().clamp_min(tiny)
