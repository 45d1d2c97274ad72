"""From rows of numbers to what is written of them, and back.

A row is the last dimension of a tensor: the features of a token, the logits over the classes. Of a map ``[channels, *grid]``
it is one channel's grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import StoreError
from .dtypes import Array
from .keep import DTYPES, SCALED, Keep

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the arrays that make a stored tensor."""

    dtype: torch.dtype
    fill: float = NAN
    """What stands where no token is; such that the decoded tensor is NaN there, if it can be."""
    ragged: bool = False
    """Holds another number of entries for each row, so that it is stored flat."""


class Codec(Protocol):
    """How rows are written."""

    parts: Mapping[str, Part]
    """By the suffix of their column."""

    def encode(self, rows: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        """Rows ``[rows, width]`` → parts ``[rows, …]``; what is ragged is flat."""
        ...

    def spread(self, sample: dict[str, Array]) -> dict[str, Array]:
        """The parts of a stored sample, with nothing ragged in them any more."""
        ...

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Parts ``[batch, …]`` → the tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """The numbers themselves, in their own or another dtype."""

    made_as: torch.dtype
    kept_as: torch.dtype

    @property
    def parts(self) -> Mapping[str, Part]:
        return {"": Part(self.kept_as, NAN if self.kept_as.is_floating_point else 0)}

    def encode(self, rows: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        kept = rows.to(self.kept_as)
        if self.kept_as is torch.float16 and self.made_as is not torch.float16 and rows.numel():
            largest = rows.masked_fill(rows.isinf(), 0).abs().amax().item()
            if largest > torch.finfo(torch.float16).max:
                raise StoreError(f"it holds {largest:.4g}, which float16 cannot (65504 at most); keep it as bfloat16")
        return {"": kept}

    def spread(self, sample: dict[str, Array]) -> dict[str, Array]:
        return sample

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts[""].to(self.made_as)


@dataclass(frozen=True, slots=True)
class Scaled:
    """8-bit numbers and one float32 scale for each row, whose largest number is mapped to the largest that there is."""

    made_as: torch.dtype
    kept_as: torch.dtype

    @property
    def parts(self) -> Mapping[str, Part]:
        return {"": Part(self.kept_as, 0), "#scale": Part(torch.float32)}

    def encode(self, rows: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        numbers = rows.float()
        if not bool(numbers.isfinite().all()):
            raise StoreError("it holds numbers that are not finite, which 8 bits and a scale cannot; keep it as bfloat16")
        most = _LARGEST[self.kept_as]
        scale = numbers.abs().amax(-1) / most if numbers.shape[-1] else numbers.new_zeros(len(numbers))
        shares = numbers / scale.where(scale > 0, 1.0)[:, None]
        if self.kept_as is torch.int8:
            shares = shares.round()
        return {"": shares.clamp(-most, most).to(self.kept_as), "#scale": scale}

    def spread(self, sample: dict[str, Array]) -> dict[str, Array]:
        return sample

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        numbers, scale = parts[""].float(), parts["#scale"]
        return numbers.mul_(scale.reshape(scale.shape + (1,) * (numbers.ndim - scale.ndim))).to(self.made_as)


@dataclass(frozen=True, slots=True)
class TopK:
    """The log-probabilities of the most likely classes at a temperature, and that of all others together."""

    classes: int
    k: int
    temperature: float
    kept_as: torch.dtype

    @property
    def parts(self) -> Mapping[str, Part]:
        return {
            "#log_probs": Part(self.kept_as),
            "#ids": Part(_ids_dtype(self.classes), 0),
            "#log_tail": Part(self.kept_as),
        }

    def encode(self, rows: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        log_probs = (rows.float() / self.temperature).log_softmax(-1)
        top = log_probs.topk(min(self.k, self.classes), dim=-1)
        # The tail by its own sum: one minus the top would be noise where the teacher is sure.
        log_tail = log_probs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
        lowest = torch.finfo(self.kept_as).min  # a class that cannot be: -inf would make NaN of zero times itself
        return {
            "#log_probs": top.values.clamp_min(lowest).to(self.kept_as),
            "#ids": top.indices.to(_ids_dtype(self.classes)),
            "#log_tail": log_tail.clamp_min(lowest).to(self.kept_as),
        }

    def spread(self, sample: dict[str, Array]) -> dict[str, Array]:
        return sample

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Logits of all classes: the tail's mass in equal shares on all that are not among the first ``k``."""
        log_probs, ids, log_tail = parts["#log_probs"].float(), parts["#ids"].long(), parts["#log_tail"].float()
        rest = max(self.classes - log_probs.shape[-1], 1)
        logits = (log_tail - float(np.log(rest)))[..., None].repeat(*[1] * log_tail.ndim, self.classes)
        return logits.scatter_(-1, ids, log_probs).mul_(self.temperature)

    def packed(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What `hookdistill.losses.top_k_tail_kl` reads: float32 ``[…, 2k + 1]``."""
        log_tail = parts["#log_tail"].float()[..., None]
        return torch.cat([parts["#log_probs"].float(), parts["#ids"].float(), log_tail], -1)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Classes drawn at random with replacement: the distinct ones of a row, and how often each was drawn.

    With draws from ``q ∝ p ** proposal`` the weight of a class, its count · p / (q · draws), is an unbiased estimate of p.
    Counts are what is written where ``proposal`` is one, weights elsewhere. The teacher's negative entropy goes with them, so
    that a divergence has its true value and not only its gradient.
    """

    classes: int
    draws: int
    temperature: float
    proposal: float
    kept_as: torch.dtype

    @property
    def weight(self) -> Part:
        if self.proposal != 1.0:
            return Part(self.kept_as, 0, ragged=True)
        return Part(torch.uint8 if self.draws < 256 else torch.uint16, 0, ragged=True)

    @property
    def parts(self) -> Mapping[str, Part]:
        return {
            "#ids": Part(_ids_dtype(self.classes), 0, ragged=True),
            "#weights": self.weight,
            "#distinct": Part(torch.uint8 if self.draws < 256 else torch.uint16, 0),
            "#neg_entropy": Part(self.kept_as),
        }

    def encode(self, rows: Tensor, draws: Tensor | None) -> dict[str, Tensor]:
        assert draws is not None
        log_probs = (rows.double() / self.temperature).log_softmax(-1)
        probs = log_probs.exp()
        proposal = probs if self.proposal == 1.0 else (log_probs * self.proposal).softmax(-1)
        ids = _inverse(proposal.cumsum(-1), draws.to(rows.device)).sort(-1).values
        numbered = ids + self.classes * torch.arange(len(ids), device=ids.device)[:, None]
        numbered, counts = torch.unique_consecutive(numbered, return_counts=True)
        row, chosen = numbered // self.classes, numbered % self.classes
        weights = counts
        if self.proposal != 1.0:
            weights = counts / self.draws * probs[row, chosen] / proposal[row, chosen]
        neg_entropy = (probs * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)
        return {
            "#ids": chosen.to(_ids_dtype(self.classes)),
            "#weights": weights.to(self.weight.dtype),
            "#distinct": row.bincount(minlength=len(ids)).to(self.parts["#distinct"].dtype),
            "#neg_entropy": neg_entropy.to(self.kept_as),
        }

    def spread(self, sample: dict[str, Array]) -> dict[str, Array]:
        distinct = sample["#distinct"].astype(np.int64).reshape(-1)
        row = np.repeat(np.arange(len(distinct)), distinct)
        column = np.arange(len(row)) - np.repeat(distinct.cumsum() - distinct, distinct)
        spread = {"#neg_entropy": sample["#neg_entropy"]}
        for name in ("#ids", "#weights"):
            wide = np.zeros((len(distinct), self.draws), sample[name].dtype)
            wide[row, column] = sample[name]
            spread[name] = wide.reshape(*sample["#distinct"].shape, self.draws)
        return spread

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Logits of all classes: those of the estimated distribution, -inf for what was never drawn."""
        weights = self._weights(parts)
        probs = weights.new_zeros(*weights.shape[:-1], self.classes)
        probs.scatter_add_(-1, parts["#ids"].long(), weights)
        nowhere = parts["#neg_entropy"].isnan()[..., None]
        return probs.log_().mul_(self.temperature).masked_fill_(nowhere, NAN)

    def packed(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What `hookdistill.losses.sampled_kl` reads: float32 ``[…, 2 · draws + 1]``."""
        neg_entropy = parts["#neg_entropy"].float()[..., None]
        packed = torch.cat([self._weights(parts), parts["#ids"].float(), neg_entropy], -1)
        return packed.masked_fill_(neg_entropy.isnan(), NAN)

    def _weights(self, parts: Mapping[str, Tensor]) -> Tensor:
        weights = parts["#weights"].float()
        return weights if self.proposal != 1.0 else weights.div_(self.draws)


def codec_for(keep: Keep, made_as: torch.dtype, width: int) -> Plain | Scaled | TopK | Sampled:
    """How a tensor of dtype ``made_as`` and last dimension ``width`` is written.

    Raises:
        StoreError: it cannot be kept that way.
    """
    if not made_as.is_floating_point:
        if keep.dtype != "auto" or keep.sparse:
            raise StoreError(f"it is {made_as} and can only be kept as it is, not as {keep}")
        return Plain(made_as, made_as)
    if keep.dtype in SCALED:
        return Scaled(made_as, DTYPES[keep.dtype])
    if not keep.sparse:
        return Plain(made_as, made_as if keep.dtype == "auto" else DTYPES[keep.dtype])
    if width >= 2**24:
        raise StoreError(f"{width} classes are more than top_k= and samples= can number (2**24)")
    kept_as = torch.float32 if keep.dtype == "auto" else DTYPES[keep.dtype]
    if keep.top_k is not None:
        return TopK(width, keep.top_k, keep.temperature, kept_as)
    assert keep.samples is not None
    return Sampled(width, keep.samples, keep.temperature, keep.proposal, kept_as)


def _inverse(cumulated: Tensor, draws: Tensor) -> Tensor:
    """The classes into which uniform draws fall; never one of probability zero."""
    total = cumulated[:, -1:]
    # The largest double below one times a total may round to the total, which would be the class after the last.
    below = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulated, torch.minimum(draws * total, below), right=True)


def _ids_dtype(classes: int) -> torch.dtype:
    return torch.uint16 if classes <= 2**16 else torch.int32
