"""Losses between hidden states, embeddings, attention and maps beside others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hookdistill import losses
from parity.comparing import BY_NORM, PAIRS, Computed, Draw, io, mm, parity, tb, td
from parity.peers import module

# --- hidden states and embeddings


@parity("mse", "TextBrewer", "hid_mse_loss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    return losses.mse(s, t, mask=mask), tb("hid_mse_loss")(s, t, mask), s


@parity("cosine", "TextBrewer", "cos_loss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    return losses.cosine(s, t, mask=mask), tb("cos_loss")(s, t, mask), s


@parity("normalized_mse", "TextBrewer", "pkd_loss", zero_row=BY_NORM)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5)
    return losses.normalized_mse(s[:, 0], t[:, 0]), tb("pkd_loss")(s, t), s


def _st(metric: str) -> Any:
    made = module("sentence_transformers.sentence_transformer.losses").EmbedDistillLoss
    return made(model=None, distance_metric=metric)


for metric in ("l2", "mse", "cosine"):

    def _embed(draw: Draw, metric: str = metric) -> Computed:
        s, t = draw.pair(4, 6)
        return losses.embed_distill(s, t, metric=metric), _st(metric).compute_loss_from_embeddings([s], [t]), s

    parity("embed_distill", "sentence-transformers", f"EmbedDistillLoss, {metric}")(_embed)


@parity("margin_mse", "sentence-transformers", "MarginMSELoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 3)
    made = module("sentence_transformers.sentence_transformer.losses").MarginMSELoss(model=None)
    query = torch.ones(4, 1, dtype=torch.float64)
    theirs = made.compute_loss_from_embeddings([query, *(s[:, [column]] for column in range(3))], t)
    return losses.margin_mse(s, t), theirs, s


@parity("queue_kl", "LightlyTrain", "DistillationLoss", zero_row="takes a zero vector for an entry of the queue")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 5)
    queue = functional.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64), dim=-1)
    made = module("lightly_train._methods.distillation.distillation_loss").DistillationLoss(temperature=0.1)
    units = functional.normalize(t, dim=-1), functional.normalize(s, dim=-1)
    return losses.queue_kl(s, t, queue=queue, tau=0.1), made(*units, queue=torch.cat([units[0], queue])), s


@parity("activation_boundary", "torchdistill", "AltActTransferLoss", relation="÷ elements of a sample: it sums over them")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 2, 2)
    theirs = td("AltActTransferLoss")(PAIRS, margin=0.7, reduction="mean")(io(s), io(t)) / 16
    return losses.activation_boundary(s, t, margin=0.7, dim=1), theirs, s


@parity("activation_boundary", "MMRazor", "ABLoss", relation="× 1000 / 3 ÷ elements of a sample, the authors' weight")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 2, 2)
    return losses.activation_boundary(s, t, dim=1), mm("ab_loss", "ABLoss")()(s, t) * 1000 / 3 / 16, s


@parity(
    "ofd", "MMRazor", "OFDLoss", relation="× 1000 ÷ elements of a sample, the authors' weight; the margin is its connector's"
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 2, 2)
    target = torch.maximum(t, torch.tensor(-0.4, dtype=torch.float64))
    return losses.ofd(s, t, margin=-0.4, dim=1), mm("ofd_loss", "OFDLoss")()(s, target) * 1000 / 16, s


# --- attention


def _maps(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    s, t = draw.pair(3, 2, 4, 4)
    return s, t, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


@parity("attention_mse", "TextBrewer", "att_mse_loss")
def _(draw: Draw) -> Computed:
    s, t, mask = _maps(draw)
    return losses.attention_mse(s, t, mask=mask), tb("att_mse_loss")(s, t, mask), s


@parity(
    "attention_mse",
    "TextBrewer",
    "att_mse_loss without a mask",
    differs="it sets every score below -0.001 to zero on both sides, though only masked ones are to be hidden; TinyBERT eq. 7 "
    "compares all scores",
)
def _(draw: Draw) -> Computed:
    s, t, _mask = _maps(draw)
    return losses.attention_mse(s, t), tb("att_mse_loss")(s, t), s


@parity(
    "attention_kl",
    "TextBrewer",
    "att_ce_loss",
    relation="- the teacher's entropy; of scores, which it puts through a softmax itself",
)
def _(draw: Draw) -> Computed:
    s, t, _mask = _maps(draw)
    every = torch.ones(3, 4)
    entropy = torch.distributions.Categorical(logits=t).entropy().mean()
    return losses.attention_kl(s.softmax(-1), t.softmax(-1)), tb("att_ce_loss")(s, t, every) - entropy, s


# --- maps


@parity("attention_transfer", "torchdistill", "ATLoss, code")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3, teacher=(3, 6, 3, 3))
    return losses.attention_transfer(s, t), td("ATLoss")(PAIRS, mode="code")(io(s), io(t)), s


@parity(
    "attention_transfer",
    "torchdistill",
    "ATLoss, paper",
    differs="the length of the difference as in the paper's eq. 2, where ours is its mean square as in the authors' code",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3, teacher=(3, 6, 3, 3))
    return losses.attention_transfer(s, t), td("ATLoss")(PAIRS, mode="paper")(io(s), io(t)), s


@parity("attention_transfer", "MMRazor", "ATLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3, teacher=(3, 6, 3, 3))
    return losses.attention_transfer(s, t), mm("at_loss", "ATLoss")()(s, t), s


@parity(
    "attention_transfer",
    "KD_Lib",
    "ATLoss",
    differs="it does not sum over channels, so what it compares is no attention map; the paper's maps are such sums",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3)
    return losses.attention_transfer(s, t), module("KD_Lib.KD.vision.attention.loss_metric").ATLoss()([t], [s]), s


@parity(
    "nst",
    "TextBrewer",
    "mmd_loss",
    differs="a variant for text: the square difference of token-by-token products of two layers; the paper's is the "
    "discrepancy of two sets of channels",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5)
    return losses.nst(s, t), tb("mmd_loss")([s, s], [t, t]), s


@parity("fsp", "TextBrewer", "fsp_loss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    seconds = s * 2 + 1, t.flip(-1)
    ours = losses.fsp(s, t, student_second=seconds[0], teacher_second=seconds[1], mask=mask)
    return ours, tb("fsp_loss")([s, seconds[0]], [t, seconds[1]], mask), s


@parity(
    "fsp",
    "torchdistill",
    "FSPLoss",
    differs="the sum of the lengths of the columns of the difference; the paper's eq. 2 squares it",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3)
    places = {
        f"{side}_{name}": {"io": "output", "path": name} for side in ("student", "teacher") for name in ("first", "second")
    }
    sides = [{"first": {"output": side}, "second": {"output": side.flip(1)}} for side in (s, t)]
    ours = losses.fsp(s, t, student_second=s.flip(1), teacher_second=t.flip(1))
    return ours, td("FSPLoss")({"pair": places})(*sides), s


@parity("ickd", "torchdistill", "ChSimLoss", relation="× batch: it divides by the batch twice")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3)
    return losses.ickd(s, t), td("ChSimLoss")(PAIRS)(io(s), io(t)) * 3, s


@parity("cwd", "MMRazor", "ChannelWiseDivergence")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3)
    return losses.cwd(s, t, temperature=2.0), mm("cwd", "ChannelWiseDivergence")(tau=2.0)(s, t), s
