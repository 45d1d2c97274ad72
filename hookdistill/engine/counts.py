"""How many positions a batch contributes to the mean of each term: what makes a mean over several batches right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..batches import named_items, positional_items
from ..errors import MatchError
from ..matches import Match
from .blame import in_match
from .lookup import sourced


def counts(terms: Mapping[str, Match], batch: Any) -> dict[str, Tensor]:
    """For each entry that is a mean, the number of its valid positions in ``batch``, up to a factor that all batches share.

    Known without a forward: from the mask and the labels, or else the number of examples. Entries with ``reduction="sum"`` are
    left out: sums need no denominator.

    Raises:
        MatchError: a mask is an address in the student, whose tensor is not there before the forward.
    """
    found = {}
    for name, term in terms.items():
        if term.loss_args.get("reduction", "mean") == "mean":
            with in_match(name):
                found[name] = _count(term, batch)
    return found


def _count(term: Match, batch: Any) -> Tensor:
    mask = None if term.mask is None else _of_batch("mask", term.mask, batch) != 0
    if "ignore_index" in term.spec.parameters and term.target is not None:
        labels = _of_batch("target", term.target, batch)
        if not labels.is_floating_point():
            labelled = labels != int(term.loss_args.get("ignore_index", -100))
            mask = labelled if mask is None else labelled & mask.reshape(mask.shape + (1,) * (labels.ndim - mask.ndim))
    if mask is None:
        return torch.tensor(_examples(batch), dtype=torch.float64)
    if term.spec.per == "sample" and term.loss_args.get("samples") != "positions":
        return mask.reshape(mask.shape[0], -1).any(-1).sum(dtype=torch.float64)
    if term.loss_args.get("causal_shift"):
        mask = mask[..., 1:]
    if term.spec.name == "attention_mse" and mask.ndim == 2:
        return mask.sum(-1, dtype=torch.float64).square().sum()  # pairs of tokens
    if term.spec.compares == "attention" and term.spec.name != "attention_mse" and mask.ndim > 2:
        mask = mask.any(-1)  # queries
    return mask.sum(dtype=torch.float64)


def _of_batch(what: str, source: Any, batch: Any) -> Tensor:
    try:
        return sourced(what, source, batch, {})
    except MatchError:
        raise
    except Exception as error:
        raise MatchError(
            f"the positions of {what}={source!r} cannot be counted before the forward, as gradient accumulation and several "
            f"processes need it: {error}"
        ) from error


def _examples(batch: Any) -> int:
    items = named_items(batch)
    for item in items.values() if items is not None else positional_items(batch):
        if isinstance(item, Tensor) and item.ndim:
            return item.shape[0]
    return 1
