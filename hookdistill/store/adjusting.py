"""How an entry of the distillation config is read where not all was stored that the teacher made."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..addresses import Address, Selector, Step
from ..batches import pick
from ..errors import StoreError, listing
from ..losses.registry import loss_spec
from ..matches import Match
from .manifest import Stored

if TYPE_CHECKING:
    from .store import TeacherStore

LEAF = "kept_classes"
"""Selects, as a leaf, the kept classes of logits of which not all were kept: ``:logits.kept_classes``."""


def adjusted(match: Match, stored: Stored, store: TeacherStore) -> Match:
    """The match with a loss that takes kept classes, and with a mask that leaves out what was not stored."""
    changed: dict[str, Any] = {}
    if stored.keep.sparse:
        changed.update(_for_kept_classes(match, stored))
    if stored.token_dims and (stored.keep.tokens is not None or match.mask is None):
        changed["mask"] = _masked(match, stored, store)
    if not changed:
        return match
    twin = copy.copy(match)
    for name, value in changed.items():
        object.__setattr__(twin, name, value)
    return twin


class StoredTokens:
    """A mask: valid where the entry's own mask is and the store has a value."""

    def __init__(self, store: TeacherStore, stored: Stored, own: Any) -> None:
        self.store, self.stored, self.own = store, stored, own
        shown = getattr(own, "__name__", own)
        self.__name__ = "stored tokens" if own is None else f"{shown} and stored"

    def __call__(self, batch: Any) -> Tensor:
        kept = self.store.kept(batch, self.stored)
        if self.own is None:
            return kept
        own: Tensor = self.own(batch) if callable(self.own) else pick(batch, self.own)
        return kept & (own != 0).to(kept.device)


class NoPadding:
    """Stands for the mask of an entry that has none: an error where the batch has padding, of which nothing is stored."""

    __name__ = "no padding"

    def __init__(self, store: TeacherStore, stored: Stored) -> None:
        self.store, self.stored = store, stored

    def __call__(self, batch: Any) -> Tensor:
        kept = self.store.kept(batch, self.stored)
        if not bool(kept.all()):
            mask = self.store.manifest.settings.recognition.mask
            raise StoreError(
                f"the batch has padding, and of {self.stored.name!r} only the tokens that {mask!r} marks are stored. Give the "
                f"entry mask={mask!r}, or build the store with mask=None, which stores padding too"
            )
        return kept


def _masked(match: Match, stored: Stored, store: TeacherStore) -> Any:
    if not match.spec.accepts_mask:
        raise StoreError(
            f"of {stored.name!r} only some tokens are stored, and the loss {match.spec.name!r} takes no mask that could leave "
            "out the others. Build the store with mask=None and without tokens=, or choose another loss"
        )
    if stored.keep.tokens is None:
        return NoPadding(store, stored)
    return StoredTokens(store, stored, match.mask)


def _for_kept_classes(match: Match, stored: Stored) -> dict[str, Any]:
    keep, spec = stored.keep, match.spec
    how = f"top_k={keep.top_k}" if keep.top_k is not None else f"samples={keep.samples}"
    arguments = dict(match.loss_args)
    if spec.name == "top_k_kl" and keep.top_k is not None:
        # The same divergence as on whole logits, as long as it is of the classes that were kept.
        k, tail = arguments.pop("k", 64), arguments.pop("tail", True)
        if k != keep.top_k or not tail:
            raise StoreError(f"of {stored.name!r} the store has {how} and the tail, and the entry asks for k={k}, tail={tail}")
    elif spec.name != "kl":
        raise StoreError(
            f"of {stored.name!r} the store has {how} of {stored.shape[-1]} classes, which serves the loss 'kl'; the loss "
            f"{spec.name!r} needs them all. Build the store without {how.split('=')[0]}="
        )
    passed_on = {name: arguments.pop(name) for name in ("causal_shift", "ignore_index", "vocabulary") if name in arguments}
    if arguments.pop("dim", -1) != -1 or arguments:
        raise StoreError(
            f"{spec.name!r} on kept classes takes no {listing(arguments or ['dim'])}: classes are the last dimension"
        )
    if match.temperature != keep.temperature:
        raise StoreError(
            f"of {stored.name!r} the classes were kept at temperature {keep.temperature:g}, and the entry has "
            f"temperature={match.temperature!r}. Build the store with Keep({how}, temperature=…), or change the entry"
        )
    address = stored.address
    selector = Selector(address.selector.word, (*address.selector.steps, Step("name", LEAF)), address.selector.short)
    leaf = Address(address.segments, selector, address.call)
    name = "top_k_tail_kl" if keep.top_k is not None else "sampled_kl"
    return {
        "spec": loss_spec(name),
        "loss": name,
        "teacher_address": leaf,
        "loss_args": {"classes": stored.shape[-1], **passed_on},
    }
