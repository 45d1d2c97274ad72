"""Closed forms: the value of a row-wise loss at each row, and the gradient of that value, without autograd.

A row is one position: a vector of features, or of logits. Each form gives ``(values, gradient)`` for rows ``[rows, width]``;
the gradient is that of a row's own value by the student's row. What a loss *means* stands in `hookdistill.losses`; the tests
hold both together. All forms compute in the dtype they are given, which is float32 or float64.

Letters: s and t are the rows of student and teacher; for distributions x = s / T, log q = log_softmax(x), and log p that of the
teacher. A gradient by x becomes one by s through the factor 1 / T; with the losses' own factor T² that is T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..losses.features import ZERO_NORM

Values = Tensor
Gradient = Tensor
Constants = Mapping[str, float]


# --- features: form(s, t, width, constants); ``width`` is how many features a position has


def mse(s: Tensor, t: Tensor, width: int, constants: Constants) -> tuple[Values, Gradient]:
    """Mean of (s - t)² over the features."""
    d = s - t
    return d.square().sum(-1) / width, d * (2 / width)


def l1(s: Tensor, t: Tensor, width: int, constants: Constants) -> tuple[Values, Gradient]:
    """Mean of |s - t|; no gradient at a tie."""
    d = s - t
    return d.abs().sum(-1) / width, d.sign() / width


def smooth_l1(s: Tensor, t: Tensor, width: int, constants: Constants) -> tuple[Values, Gradient]:
    """d² / 2β below β, |d| - β / 2 above; β = 0 is `l1`."""
    beta = constants["beta"]
    if beta == 0:
        return l1(s, t, width, constants)
    d = s - t
    size = d.abs()
    near = size < beta
    values = torch.where(near, d * d * (0.5 / beta), size - 0.5 * beta)
    return values.sum(-1) / width, torch.where(near, d / beta, d.sign()) / width


def huber(s: Tensor, t: Tensor, width: int, constants: Constants) -> tuple[Values, Gradient]:
    """d² / 2 up to δ, δ (|d| - δ / 2) above."""
    delta = constants["delta"]
    d = s - t
    size = d.abs()
    values = torch.where(size <= delta, d * d * 0.5, (size - 0.5 * delta) * delta)
    return values.sum(-1) / width, d.clamp(-delta, delta) / width


def cosine(s: Tensor, t: Tensor, width: int, constants: Constants) -> tuple[Values, Gradient]:
    """1 - u·v of the unit vectors u, v; by s: -(v - u (u·v)) / |s|, and -v / ε where |s| is below ε."""
    u, over_s, free = _unit(s)
    v, _, _ = _unit(t)
    dot = (u * v).sum(-1, keepdim=True)
    return 1 - dot.squeeze(-1), (u * (dot * free) - v) * over_s


def normalized_mse(s: Tensor, t: Tensor, width: int, constants: Constants) -> tuple[Values, Gradient]:
    """|u - v|² of the unit vectors; by s: 2 (w - u (u·w)) / |s| with w = u - v, and 2 w / ε where |s| is below ε."""
    u, over_s, free = _unit(s)
    v, _, _ = _unit(t)
    w = u - v
    along = (u * w).sum(-1, keepdim=True) * free
    return w.square().sum(-1), (w - u * along) * (2 * over_s)


def _unit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x at length one (see ``losses.features.unit_vectors``), 1 / its length, and 1 where the length is x's own, else 0."""
    squared = x.square().sum(-1, keepdim=True)
    over = squared.clamp_min(ZERO_NORM**2).rsqrt()
    return x * over, over, (squared >= ZERO_NORM**2).to(x.dtype)


# --- distributions: form(q, p, constants) gives values and the gradient by x; both times T² and T are the caller's


@dataclass(frozen=True, slots=True)
class Softmax:
    """A distribution for each row: log-probabilities and probabilities, ``[rows, classes]``."""

    log: Tensor
    p: Tensor

    @staticmethod
    def of(x: Tensor) -> Softmax:
        """The softmax of the logits ``x``."""
        log = x.log_softmax(-1)
        return Softmax(log, log.exp())


def kl(q: Softmax, p: Softmax, constants: Constants) -> tuple[Values, Gradient]:
    """Σ p (log p - log q); by x: q - p."""
    return _divergence(p, q.log).sum(-1), q.p - p.p


def reverse_kl(q: Softmax, p: Softmax, constants: Constants) -> tuple[Values, Gradient]:
    """Σ q (log q - log p); by x: q (log q - log p - value)."""
    terms = _divergence(q, p.log)
    values = terms.sum(-1)
    return values, terms - q.p * values.unsqueeze(-1)


def js(q: Softmax, p: Softmax, constants: Constants) -> tuple[Values, Gradient]:
    """β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q; by x: (1 - β) q (log q - log m - KL(q ‖ m))."""
    beta = constants["beta"]
    log_m = _log_mixture(p, q, beta)
    terms = _divergence(q, log_m)
    from_q = terms.sum(-1)
    values = beta * _divergence(p, log_m).sum(-1) + (1 - beta) * from_q
    return values, (terms - q.p * from_q.unsqueeze(-1)) * (1 - beta)


def skew_kl(q: Softmax, p: Softmax, constants: Constants) -> tuple[Values, Gradient]:
    """KL(p ‖ m), m = α p + (1 - α) q; by x: q (h - Σ q h) with h = -(1 - α) p / m."""
    alpha = constants["alpha"]
    log_m = _log_mixture(p, q, alpha)
    values = _divergence(p, log_m).sum(-1)
    # q p / m, and not q times p / m: the quotient can be huge where both are tiny.
    pull = (q.log + p.log - log_m).exp() * (alpha - 1)
    pull = torch.where((q.p == 0) | (p.p == 0), 0.0, pull)
    return values, pull - q.p * pull.sum(-1, keepdim=True)


def tvd(q: Softmax, p: Softmax, constants: Constants) -> tuple[Values, Gradient]:
    """Σ |p - q| / 2; by x: q (h - Σ q h) with h = -sign(p - q) / 2."""
    d = q.p - p.p
    pull = d.sign() * q.p * 0.5
    return d.abs().sum(-1) * 0.5, pull - q.p * pull.sum(-1, keepdim=True)


def soft_cross_entropy(q: Softmax, p: Softmax, constants: Constants) -> tuple[Values, Gradient]:
    """-Σ p log q; by x: q - p."""
    return -torch.where(p.p == 0, 0.0, p.p * q.log).sum(-1), q.p - p.p


def _divergence(p: Softmax, log_q: Tensor) -> Tensor:
    """p (log p - log q) for each class, nothing where p is zero."""
    return torch.where(p.p == 0, 0.0, p.p * (p.log - log_q))


def _log_mixture(p: Softmax, q: Softmax, share: float) -> Tensor:
    """log(share · p + (1 - share) · q); zero where both are, where nothing reads it."""
    mixture = torch.logaddexp(p.log + math.log(share), q.log + math.log1p(-share))
    return torch.where((p.log == -math.inf) & (q.log == -math.inf), 0.0, mixture)


# --- labels: form(q, labels, constants); a label is a class index, already made harmless where it does not count


def cross_entropy(q: Softmax, labels: Tensor, constants: Constants) -> tuple[Values, Gradient]:
    """-(1 - ε) log q[y] - ε mean log q; by x: q - (1 - ε) [class is y] - ε / classes."""
    smoothing = constants["label_smoothing"]
    classes = q.log.shape[-1]
    values = -q.log.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    hit = torch.arange(classes, device=labels.device) == labels.unsqueeze(-1)
    if not smoothing:
        return values, torch.where(hit, q.p - 1, q.p)
    values = (1 - smoothing) * values - smoothing * q.log.mean(-1)
    return values, torch.where(hit, q.p - (1 - smoothing), q.p) - smoothing / classes


Family = Literal["features", "distributions", "labels"]


@dataclass(frozen=True, slots=True)
class Form:
    """A closed form by the name of its loss, and the loss's own arguments that it knows, with their defaults."""

    name: str
    family: Family
    function: Callable[..., tuple[Values, Gradient]]
    constants: Mapping[str, float]
    allows: Callable[[Constants], bool] = lambda _: True
    """Whether the constants are such that the form holds; the loss itself says what is wrong with others."""
    elementwise: bool = False
    """A sum over features, each for itself: rows may as well be cut elsewhere."""


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Form("mse", "features", mse, {}, elementwise=True),
        Form("l1", "features", l1, {}, elementwise=True),
        Form("smooth_l1", "features", smooth_l1, {"beta": 1.0}, lambda c: c["beta"] >= 0, elementwise=True),
        Form("huber", "features", huber, {"delta": 1.0}, lambda c: c["delta"] > 0, elementwise=True),
        Form("cosine", "features", cosine, {}),
        Form("normalized_mse", "features", normalized_mse, {}),
        Form("kl", "distributions", kl, {}),
        Form("reverse_kl", "distributions", reverse_kl, {}),
        Form("js", "distributions", js, {"beta": 0.5}, lambda c: 0 < c["beta"] < 1),
        Form("skew_kl", "distributions", skew_kl, {"alpha": 0.1}, lambda c: 0 < c["alpha"] < 1),
        Form("tvd", "distributions", tvd, {}),
        Form("soft_cross_entropy", "distributions", soft_cross_entropy, {}),
        Form("cross_entropy", "labels", cross_entropy, {"label_smoothing": 0.0}, lambda c: 0 <= c["label_smoothing"] <= 1),
    )
}
