"""The losses that are timed: for each, the same thing by hand in PyTorch, compiled, by hookdistill, and by others.

A contender is a function that does one forward and backward of the loss stage alone, from tensors as two models would have
left them. By hand means as such losses are usually written, in the dtype that is common: logits in float32.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hookdistill import DistillationLoss, Match
from hookdistill.addresses import Address
from hookdistill.attention import AttentionCall
from hookdistill.engine import fast
from hookdistill.fused.head import Head

Run = Callable[[], Tensor]
HAND, COMPILED, DEFINITION, OURS, CHUNKED, LIGER = (
    *("by hand", "torch.compile", "definition", "hookdistill", "hookdistill, no compiler", "Liger"),
)
CONTENDERS = (HAND, COMPILED, DEFINITION, OURS, CHUNKED, LIGER)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One loss on one size.

    Args:
        make: ``(device, dtype) -> {contender: forward and backward}``.
        floor: bytes that must move: every input once, every gradient once; 0 where arithmetic is what takes the time.
        targets: by device, at least how many times as fast as by hand; and at most what share of its memory.
    """

    name: str
    size: str
    make: Callable[[torch.device, torch.dtype], Mapping[str, Run]]
    floor: Callable[[int], int]
    targets: Mapping[str, tuple[float, float | None]]

    @property
    def key(self) -> str:
        return f"{self.name} {self.size}"


class Contenders(dict[str, Run]):
    """Builds the usual ones around a loss by hand and matches."""

    def __init__(self, leaves: Sequence[Tensor], by_hand: Callable[[], Tensor], device: torch.device) -> None:
        super().__init__()
        self.leaves, self.device = leaves, device
        self[HAND] = self.step(by_hand)
        self[COMPILED] = self.step(torch.compile(by_hand))

    def step(self, loss: Callable[[], Tensor]) -> Run:
        def run() -> Tensor:
            for leaf in self.leaves:
                leaf.grad = None
            total = loss()
            total.backward()
            return total

        return run

    def add_ours(self, matches: Sequence[Match], teacher: Any, student: Any, batch: Any, *, whole: Any = None) -> Contenders:
        """``whole`` are captures (teacher, student) for the definition, where ours need less than the tensors compared."""
        for name, impl in ((DEFINITION, "eager"), (OURS, "auto")):
            loss = DistillationLoss(matches, impl=impl)
            if impl == "auto" or whole is None:
                self[name] = self.step(lambda loss=loss: loss(teacher, student, batch).total)
            else:
                self[name] = self.step(lambda loss=loss: loss(*whole(), batch).total)
        if self.device.type == "cpu":
            self[CHUNKED] = self.uncompiled(self[OURS])
        return self

    @staticmethod
    def uncompiled(run: Run) -> Run:
        """The same where no C++ compiler is found."""

        def chunked() -> Tensor:
            available, fast.compiler_available = fast.compiler_available, lambda: False  # type: ignore[assignment]
            try:
                return run()
            finally:
                fast.compiler_available = available

        return chunked


def normal(*shape: int, device: torch.device, dtype: torch.dtype, seed: int, spread: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * spread).to(device=device, dtype=dtype)


def padding(batch: int, tokens: int, device: torch.device) -> Tensor:
    """Lengths between a quarter of the tokens and all of them."""
    lengths = torch.randint(tokens // 4, tokens + 1, (batch, 1), generator=torch.Generator().manual_seed(7))
    return (torch.arange(tokens) < lengths).to(device)


# --- features


def features(name: str, by_hand: Callable[[Tensor, Tensor], Tensor], *, pairs: int = 7, shape: tuple[int, int, int]) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> Contenders:
        ours = [normal(*shape, device=device, dtype=dtype, seed=n).requires_grad_() for n in range(pairs)]
        theirs = [normal(*shape, device=device, dtype=dtype, seed=100 + n) for n in range(pairs)]
        mask = padding(shape[0], shape[1], device)

        def hand() -> Tensor:
            share = mask.float()
            share = share / share.sum()
            return sum(
                ((by_hand(s, t) * share).sum() for s, t in zip(ours, theirs, strict=True)), torch.zeros((), device=device)
            )

        matches = [Match(f"layer.{n}", f"layer.{n}", loss=name, mask="mask") for n in range(pairs)]
        captures = [{f"layer.{n}": {"output": each[n]} for n in range(pairs)} for each in (theirs, ours)]
        return Contenders(ours, hand, device).add_ours(matches, *captures, {"mask": mask})

    return make


def _mse(s: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(s, t, reduction="none").float().mean(-1)


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s.float(), t.float(), dim=-1)


def _normalized(s: Tensor, t: Tensor) -> Tensor:
    return (F.normalize(s.float(), dim=-1) - F.normalize(t.float(), dim=-1)).square().sum(-1)


# --- logits


def logits(
    matches: Sequence[Match], by_hand: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, classes: int, peer: Any = None
) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> Contenders:
        student = normal(rows, classes, device=device, dtype=dtype, seed=0, spread=2.0).requires_grad_()
        teacher = normal(rows, classes, device=device, dtype=dtype, seed=1, spread=2.0)
        labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(2)).to(device)
        found = Contenders([student], lambda: by_hand(student, teacher, labels), device)
        captures = [{"": {"logits": each}} for each in (teacher, student)]
        found.add_ours(matches, *captures, {"labels": labels})
        if peer is not None and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            found[LIGER] = found.step(lambda: peer()(student, teacher, labels))
        return found

    return make


def _kl(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    log_q, p = F.log_softmax(s.float() / 2, -1), F.softmax(t.float() / 2, -1)
    return F.kl_div(log_q, p, reduction="batchmean") * 4


def _kl_and_labels(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return _kl(s, t, labels) + F.cross_entropy(s.float(), labels)


def _js(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    a, b = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    m = torch.logsumexp(torch.stack([a + math.log(0.5), b + math.log(0.5)]), 0)
    both = F.kl_div(m, b, reduction="none", log_target=True) + F.kl_div(m, a, reduction="none", log_target=True)
    return 0.5 * both.sum() / s.shape[0]


def _liger_kl() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerKLDIVLoss

    loss = LigerKLDIVLoss(reduction="batchmean")
    return lambda s, t, _: loss(F.log_softmax(s.float() / 2, -1), F.softmax(t.float() / 2, -1)) * 4


def _liger_kl_and_labels() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    soft, hard = _liger_kl(), LigerCrossEntropyLoss()
    return lambda s, t, labels: soft(s, t, labels) + hard(s, labels)


def _liger_js() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=0.5)
    return lambda s, t, _: loss(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1))


KL = Match(":logits", ":logits", loss="kl", temperature=2.0)
LABELS = Match(None, ":logits", loss="cross_entropy", target="labels")
JS = Match(":logits", ":logits", loss="js")


# --- attention, from what a model that runs a fused kernel leaves


class Calls(dict[str, Any]):
    """Captures that hold the query and key of an attention rather than its map."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call

    def attention_call(self, layer: str, output: str) -> AttentionCall:
        return self.call


def attention(loss: str, batch: int, tokens: int, heads: int = 12) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> Contenders:
        ours = [normal(batch, heads, tokens, 32, device=device, dtype=dtype, seed=n).requires_grad_() for n in (0, 1)]
        theirs = [normal(batch, heads, tokens, 64, device=device, dtype=dtype, seed=n) for n in (2, 3)]
        mask = padding(batch, tokens, device)
        keys = mask[:, None, None, :]
        pairs = mask[:, None, :, None] & keys

        def maps(query: Tensor, key: Tensor) -> Tensor:
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            return scores.masked_fill(~keys, torch.finfo(scores.dtype).min).softmax(-1)

        def hand() -> Tensor:
            s = maps(*ours)
            with torch.no_grad():
                t = maps(*theirs)
            if loss == "mse":
                return ((s - t).float().square() * pairs).sum() / (pairs.sum() * heads)
            rows = F.kl_div(s.float().clamp_min(1e-12).log(), t.float(), reduction="none")
            return (rows * pairs).sum() / (mask.sum() * heads)

        calls = [
            Calls(AttentionCall(query=query, key=key, value=query, mask=keys, scale=query.shape[-1] ** -0.5, module=None))
            for query, key in (theirs, ours)
        ]

        def whole() -> tuple[Any, Any]:
            with torch.no_grad():
                teacher = {"": {"attention": maps(*theirs)}}
            return teacher, {"": {"attention": maps(*ours)}}

        match = Match("", "", selector="attention", loss=loss, mask="mask")
        return Contenders(ours, hand, device).add_ours([match], *calls, {"mask": mask}, whole=whole)

    return make


def relation(batch: int, tokens: int, heads: int = 12) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> Contenders:
        ours = normal(batch, heads, tokens, 32, device=device, dtype=dtype, seed=0).requires_grad_()
        theirs = normal(batch, heads, tokens, 64, device=device, dtype=dtype, seed=1)
        mask = padding(batch, tokens, device)

        def log_relation(side: Tensor) -> Tensor:
            scores = (side @ side.transpose(-2, -1)).float() / math.sqrt(side.shape[-1])
            return scores.masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min).log_softmax(-1)

        def hand() -> Tensor:
            log_q = log_relation(ours)
            with torch.no_grad():
                log_p = log_relation(theirs)
            rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            return (rows * mask[:, None]).sum() / (mask.sum() * heads)

        captures = [{"": {"query": each}} for each in (theirs, ours)]
        match = Match("", "", selector="query", loss="relation_kl", mask="mask")
        return Contenders([ours], hand, device).add_ours([match], *captures, {"mask": mask})

    return make


# --- head and loss in one


class Heads(dict[str, Any]):
    """Captures that hold the input of a head rather than its logits."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.made = head

    def head(self, address: Address) -> Head:
        return self.made


def head(rows: int, classes: int, ours: int, theirs: int) -> Any:
    def make(device: torch.device, dtype: torch.dtype) -> Contenders:
        hidden = normal(rows, ours, device=device, dtype=dtype, seed=0).requires_grad_()
        weight = normal(classes, ours, device=device, dtype=dtype, seed=1, spread=0.05).requires_grad_()
        their_hidden = normal(rows, theirs, device=device, dtype=dtype, seed=2)
        their_weight = normal(classes, theirs, device=device, dtype=dtype, seed=3, spread=0.05)
        labels = torch.zeros(rows, dtype=torch.long, device=device)

        def hand() -> Tensor:
            student = hidden @ weight.t()
            with torch.no_grad():
                teacher = their_hidden @ their_weight.t()
            return _kl(student, teacher, labels)

        def whole() -> tuple[Any, Any]:
            with torch.no_grad():
                teacher = {"": {"logits": their_hidden @ their_weight.t()}}
            return teacher, {"": {"logits": hidden @ weight.t()}}

        heads = [Heads(Head(hidden=their_hidden, weight=their_weight)), Heads(Head(hidden=hidden, weight=weight))]
        found = Contenders([hidden, weight], hand, device).add_ours([KL], *heads, {}, whole=whole)
        if importlib.util.find_spec("liger_kernel"):
            found[LIGER] = found.step(_liger_head(hidden, weight, their_hidden, their_weight, labels, device))
        return found

    return make


def _liger_head(hidden: Tensor, weight: Tensor, their_hidden: Tensor, their_weight: Tensor, labels: Tensor, device: Any) -> Run:
    if device.type == "cuda":
        from liger_kernel.transformers import LigerFusedLinearJSD

        fused = LigerFusedLinearJSD(jsd_beta=0.0, temperature=2.0)  # at beta 0 it is the forward KL
        return lambda: fused(hidden, weight, their_hidden, their_weight, None) * 4
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    settings = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 0.0, "temperature": 2.0}
    chunked = LigerFusedLinearJSDLoss(**settings, compiled=True, chunk_size=128)
    return lambda: chunked(hidden, weight, their_hidden, their_weight, labels) * 4


# --- sizes


def families(device: str, *, quick: bool) -> list[Family]:
    """Those of a device; ``quick`` ones are so small that they only show that everything runs."""
    large, batch = device == "cuda", 2 if quick else 32
    hidden = (batch, 16 if quick else 128, 64 if quick else 768)
    vocabularies = [(8192, 32000), (4096, 30522)] if large else [(512, 30522), (256, 128256)]
    both = (8192, 128256) if large else (256, 128256)
    js = (8192, 32000) if large else (256, 30522)
    maps = (8, 512) if large else (4, 512)
    heads = (8192, 128256, 2048, 4096) if large else (512, 30522, 768, 768)
    if quick:
        vocabularies, both, js, maps, heads = [(16, 300)], (16, 300), (16, 300), (2, 24), (16, 300, 24, 32)
    elements = math.prod(hidden) * 7
    found = [
        _of_features("mse", hidden, _mse, elements, {"cuda": (6, None), "cpu": (3, None)}),
        _of_features("cosine", hidden, _cosine, elements, {"cuda": (10, None), "cpu": (4, None)}),
        _of_features("normalized_mse", hidden, _normalized, elements, {"cuda": (10, None), "cpu": (4, None)}),
    ]
    for rows, classes in vocabularies:
        targets = {"cuda": (10.0, None), "cpu": (7.0, None)}
        found.append(_of_logits("kl", [KL], _kl, rows, classes, targets, _liger_kl))
    targets = {"cuda": (12.0, None), "cpu": (7.0, None)}
    found.append(_of_logits("kl + cross_entropy", [KL, LABELS], _kl_and_labels, *both, targets, _liger_kl_and_labels))
    found.append(_of_logits("js", [JS], _js, *js, {"cuda": (15.0, None), "cpu": (8.0, None)}, _liger_js))
    for loss in ("kl", "mse"):
        size = f"[{maps[0]}, 12, {maps[1]}, {maps[1]}]"
        targets = {"cuda": (4.0, 1 / 10), "cpu": (1.5, 1 / 8)}
        found.append(
            Family(name=f"attention {loss}", size=size, make=attention(loss, *maps), floor=lambda _: 0, targets=targets)
        )
    size = f"[{maps[0]}, 12, {maps[1]}, {maps[1]}]"
    targets = {"cuda": (8.0, 1 / 10), "cpu": (2.0, 1 / 8)}
    found.append(Family(name="relation_kl", size=size, make=relation(*maps), floor=lambda _: 0, targets=targets))
    size = f"[{heads[0]}, {heads[1]}], {heads[2]} and {heads[3]} wide"
    targets = {"cuda": (2.5, 1 / 5), "cpu": (1.1, 1 / 2.5)}
    found.append(Family(name="head + kl", size=size, make=head(*heads), floor=lambda _: 0, targets=targets))
    return found


def _of_features(name: str, shape: tuple[int, int, int], by_hand: Any, elements: int, targets: Any) -> Family:
    make = features(name, by_hand, shape=shape)
    return Family(name=f"{name} x 7", size=str(list(shape)), make=make, floor=lambda size: 3 * elements * size, targets=targets)


def _of_logits(name: str, matches: Any, by_hand: Any, rows: int, classes: int, targets: Any, peer: Any) -> Family:
    make = logits(matches, by_hand, rows, classes, peer)
    floor = 3 * rows * classes
    return Family(name=name, size=f"[{rows}, {classes}]", make=make, floor=lambda size: floor * size, targets=targets)
