"""How a tensor is kept in a store: in which dtype, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ..addresses import Address, parse
from ..errors import AddressError, StoreError, did_you_mean, listing
from ..paths import resolve

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "float8_e4m3fn": "float8"}
SCALED = ("int8", "float8")


@dataclass(frozen=True, slots=True)
class Keep:
    """How one tensor is kept.

    Args:
        dtype: ``"auto"`` (as the teacher makes it, which loses nothing), ``"float32"``, ``"bfloat16"``, ``"float16"``, or
            ``"int8"`` and ``"float8"`` (e4m3) with one float32 scale for each token.
        tokens: only some of a sample's tokens: positions among its valid ones (``0``, ``[0, -1]``), or the name of an item
            of the batch ``[batch, tokens]`` that is nonzero where a token is to be kept. The others are masked in training.
        features: only some of the last dimension: indices, or ``"0:256"``. The tensor is narrower then.
        top_k: of logits, the log-probabilities of the most likely classes, and the mass of all others together.
        samples: of logits, classes drawn at random, this many for each token: an unbiased estimate of the distribution
            (Sparse Logit Sampling, Anshumann et al., ACL 2025, arXiv 2503.16870).
        temperature: of the distribution that ``top_k`` and ``samples`` keep; that of the loss.
        proposal: ``samples`` are drawn with probabilities proportional to ``p ** proposal`` and weighted to make up for it.
        token_dims: which dimensions of a sample's tensor (counted without the batch) are tokens; ``()`` for none, which keeps
            the padding. Found by themselves where the teacher can be run with a token more or less.

    Raises:
        StoreError: settings that contradict each other.
    """

    dtype: str = "auto"
    _: KW_ONLY
    tokens: int | Sequence[int] | str | None = None
    features: str | Sequence[int] | None = None
    top_k: int | None = None
    samples: int | None = None
    temperature: float = 1.0
    proposal: float = 1.0
    token_dims: Sequence[int] | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "dtype", ALIASES.get(self.dtype, self.dtype) if isinstance(self.dtype, str) else self.dtype)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            hint = did_you_mean(str(self.dtype), ("auto", *DTYPES))
            raise StoreError(f"dtype={self.dtype!r} is not known.{hint} Known are {listing(('auto', *DTYPES))}")
        put(self, "tokens", _tuple("tokens", [self.tokens] if isinstance(self.tokens, int) else self.tokens))
        put(self, "features", _tuple("features", self.features))
        put(
            self, "token_dims", _tuple("token_dims", self.token_dims) if self.token_dims != [] and self.token_dims != () else ()
        )
        if isinstance(self.features, str):
            _range(self.features)
        for name in ("top_k", "samples"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**16):
                raise StoreError(f"{name}= is a number of classes from 1 to 65535, got {value!r}")
        for name in ("temperature", "proposal"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise StoreError(f"{name}= is a positive number, got {value!r}")
            put(self, name, float(value))
        _check_together(self)

    @property
    def sparse(self) -> bool:
        """Whether only some classes of a distribution are kept."""
        return self.top_k is not None or self.samples is not None

    def as_dict(self) -> dict[str, Any]:
        """What differs from the default, as plain values."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        default = asdict(Keep())
        return {name: value for name, value in plain.items() if value != default[name]}

    def __str__(self) -> str:
        parts = [self.dtype] * (self.dtype != "auto" or self == Keep())
        parts += [f"{name}={value}" for name, value in self.as_dict().items() if name != "dtype"]
        return ", ".join(parts)


def as_keep(value: object) -> Keep:
    """A `Keep`, from one, the name of a dtype, or a dict of its fields.

    Raises:
        StoreError: it is something else, or has a misspelt key.
    """
    if isinstance(value, Keep):
        return value
    if isinstance(value, str):
        return Keep(value)
    if not isinstance(value, Mapping):
        raise StoreError(f"keep= is a Keep, the name of a dtype or a dict of settings, got {type(value).__name__}")
    known = [field.name for field in fields(Keep)]
    if unknown := [key for key in value if key not in known]:
        raise StoreError(f"unknown setting {unknown[0]!r}.{did_you_mean(str(unknown[0]), known)} Known are {listing(known)}")
    return Keep(**value)


def kept(given: object, teacher: nn.Module, addresses: Iterable[Address]) -> dict[Address, Keep]:
    """The `Keep` of each tensor: one for all, or from a dict by address, in which the last address that names it counts.

    Raises:
        StoreError: an address of the dict names no tensor that is stored.
    """
    result = dict.fromkeys(addresses, Keep())
    if given is None:
        return result
    if not isinstance(given, Mapping) or set(map(str, given)) & {field.name for field in fields(Keep)}:
        return dict.fromkeys(result, as_keep(given))
    for pattern, value in given.items():
        try:
            address = parse(pattern)
            paths = {found.path for found in resolve(teacher, address)}
        except AddressError as error:
            raise StoreError(f"keep={{{pattern!r}: …}}: {error}") from error
        named = [each for each in result if each.path in paths and same_tensor(each, address)]
        if not named:
            hint = did_you_mean(str(pattern), map(str, result))
            raise StoreError(
                f"keep={{{pattern!r}: …}} names none of the tensors that are stored.{hint} They are {listing(map(str, result))}"
            )
        result.update(dict.fromkeys(named, as_keep(value)))
    return result


def same_tensor(one: Address, other: Address) -> bool:
    """Whether two addresses of one module select the same tensor; ``:logits`` and ``:output.logits`` do."""
    return one.call == other.call and replace(one.selector, short=False) == replace(other.selector, short=False)


def feature_indices(keep: Keep, width: int) -> Sequence[int] | None:
    """The indices that ``features=`` keeps of ``width``, or ``None`` for all.

    Raises:
        StoreError: there are no such features.
    """
    if keep.features is None:
        return None
    if isinstance(keep.features, str):
        chosen: Sequence[int] = range(width)[_range(keep.features)]
    else:
        chosen = keep.features
    if not chosen or not all(-width <= index < width for index in chosen):
        raise StoreError(f"features={keep.features!r} does not fit a last dimension of {width}")
    return [index % width for index in chosen]


def _range(text: str) -> slice:
    parts = text.split(":")
    try:
        if len(parts) in (2, 3):
            return slice(*(int(part) if part.strip() else None for part in parts))
    except ValueError:
        pass
    raise StoreError(f"features={text!r} is no range; write indices, or a range such as '0:256'")


def _tuple(name: str, value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        raise StoreError(f"{name}= takes whole numbers, got {value!r}")
    if not (numbers := tuple(value)):
        raise StoreError(f"{name}= is empty, so nothing would be kept")
    return numbers


def _check_together(keep: Keep) -> None:
    if keep.top_k is not None and keep.samples is not None:
        raise StoreError("top_k= and samples= are two ways to keep logits; choose one")
    if not keep.sparse and (keep.temperature, keep.proposal) != (1.0, 1.0):
        raise StoreError("temperature= and proposal= go with top_k= or samples=; whole logits serve every temperature")
    if keep.proposal != 1.0 and keep.samples is None:
        raise StoreError("proposal= goes with samples=")
    if keep.sparse and keep.dtype in SCALED:
        raise StoreError(f"dtype={keep.dtype!r} is for whole tensors; of top_k= and samples= the numbers are few: float16")
    if keep.sparse and keep.features is not None:
        raise StoreError("features= would drop classes of a distribution; use top_k= or samples= alone")
