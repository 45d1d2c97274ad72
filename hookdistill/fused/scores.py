"""Losses between the scores of two attentions or relations, with softmax and gradient, once the scores are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Between = Literal["kl", "mse", "scores mse", "relation kl"]
"""The losses between scores. ``relation kl`` is of log-probabilities; ``kl``, of probabilities, takes the log of the smallest
normal number for that of anything smaller."""

HIDDEN = torch.finfo(torch.float16).min
"""Scores at and below this are hidden by a mask: -65504, as in ``losses.attention_mse``."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What is computed of scores, apart from the tensors; equal ones can share compiled code.

    A row none of whose scores is above ``never`` attends to nothing.
    """

    between: Between
    our_never: float
    their_never: float


ScoreFunction = Callable[[Scores, Tensor, Tensor, Tensor | None, bool], tuple[Tensor, Tensor | None]]


def score_loss(scores: Scores, s: Tensor, t: Tensor, valid: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of a loss over scores ``[…, keys]`` of student and teacher, and its gradient by ``s``.

    Overwrites ``s`` and ``t``. ``valid`` broadcasts to them.
    """
    if scores.between == "scores mse":
        hidden = ~_seen(s, t, valid)
        d = s.sub_(t).masked_fill_(hidden, 0)
        return d.square().sum(), d.mul_(2) if gradient else None
    log_q, log_p = _log_softmax(s, scores.our_never), _log_softmax(t, scores.their_never)
    q, p = log_q.exp(), log_p.exp()
    if scores.between == "mse":
        d = q - p
        if valid is not None:
            d = d.masked_fill_(~valid, 0)
        total = d.square().sum()
        if not gradient:
            return total, None
        pull = d.mul_(2).mul_(q)
        return total, pull - q.mul_(pull.sum(-1, keepdim=True))
    if valid is not None:
        p = p.masked_fill_(~valid, 0)
    if scores.between == "relation kl":
        total = log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum()
        return total, q.mul_(p.sum(-1, keepdim=True)).sub_(p) if gradient else None
    least = math.log(torch.finfo(s.dtype).tiny)
    alive = log_q >= least
    # What either side hides has a log of -inf: bounded, it costs nothing where p is zero.
    total = (log_p.clamp_min_(least) - log_q.clamp_min_(least)).mul_(p).sum()
    if not gradient:
        return total, None
    p = p.masked_fill_(~alive, 0)
    return total, q.mul_(p.sum(-1, keepdim=True)).sub_(p)


def score_count(between: Between, s: Tensor, t: Tensor, valid: Tensor | None) -> Tensor:
    """What the mean over a block is of: queries that count, or entries for the losses that are means over these."""
    if between == "scores mse":
        return _seen(s, t, valid).sum()
    if between == "mse":
        return torch.tensor(float(s.numel())) if valid is None else valid.expand_as(s).sum()
    queries = s.shape[:-1]
    return torch.tensor(float(queries.numel())) if valid is None else valid.any(-1).expand(queries).sum()


def _seen(s: Tensor, t: Tensor, valid: Tensor | None) -> Tensor:
    """The entries that at least one side does not hide."""
    seen = (s > HIDDEN) | (t > HIDDEN)
    return seen if valid is None else seen & valid


def _log_softmax(scores: Tensor, never: float) -> Tensor:
    """In place; -inf in rows that hide every key."""
    most = scores.amax(-1, keepdim=True)
    lost = most <= never
    scores.sub_(torch.where(lost, 0, most)).masked_fill_(lost, 0)
    return scores.sub_(scores.exp().sum(-1, keepdim=True).log_()).masked_fill_(lost, -math.inf)
