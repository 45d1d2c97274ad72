"""Losses between logits, and elementwise ones, beside others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from hookdistill import losses
from parity.comparing import PATHS, Computed, Draw, io, mm, parity, tb, td
from parity.peers import module

# --- torch

for name, function in {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "smooth_l1": functional.smooth_l1_loss,
    "huber": functional.huber_loss,
}.items():

    def _elementwise(draw: Draw, loss: str = name, function: Callable[..., Tensor] = function) -> Computed:
        s, t = draw.pair(4, 3, 6)
        return getattr(losses, loss)(s, t), function(s, t), s

    parity(name, "torch", function.__name__)(_elementwise)


@parity("cosine", "torch", "cosine_similarity")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 6)
    return losses.cosine(s, t), 1 - functional.cosine_similarity(s, t, dim=-1).mean(), s


@parity("kl", "torch", "kl_div")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 6)
    theirs = functional.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean") * 4
    return losses.kl(s, t, temperature=2.0), theirs, s


@parity("soft_cross_entropy", "torch", "cross_entropy")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 6)
    return losses.soft_cross_entropy(s, t), functional.cross_entropy(s, t.softmax(-1)), s


@parity("cross_entropy", "torch", "cross_entropy")
def _(draw: Draw) -> Computed:
    s = draw(4, 6).requires_grad_()
    target = torch.tensor([0, 5, -100, 2])
    return losses.cross_entropy(s, target, label_smoothing=0.1), functional.cross_entropy(s, target, label_smoothing=0.1), s


# --- logits


@parity("kl", "torchdistill", "KDLoss", relation="× T², which it has only beside a hard loss (alpha)")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 7)
    theirs = td("KDLoss")(**PATHS, temperature=2.0, beta=1.0)(io(s), io(t)) * 4
    return losses.kl(s, t, temperature=2.0), theirs, s


@parity("kl", "MMRazor", "KLDivergence")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 7)
    return losses.kl(s, t, temperature=3.0), mm("kl_divergence", "KLDivergence")(tau=3.0)(s, t), s


@parity(
    "kl",
    "ModelOpt",
    "LogitsDistillationLoss",
    relation='with its reduction="none" and a mean; its "mean" divides by classes too',
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 3, 7)
    made = module("modelopt.torch.distill.losses").LogitsDistillationLoss(temperature=2.0, reduction="none")
    return losses.kl(s, t, temperature=2.0), made(s, t).mean(), s


def _jsd(beta: float, heat: float, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    trainer = module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    return trainer.generalized_jsd_loss(s, t, labels=labels, beta=beta, temperature=heat)


for loss, beta, options in (("kl", 0.0, {}), ("reverse_kl", 1.0, {}), ("js", 0.3, {"beta": 0.3})):

    def _divergence(draw: Draw, loss: str = loss, beta: float = beta, options: dict[str, float] = options) -> Computed:
        s, t = draw.pair(2, 4, 7)
        labels = torch.tensor([[0, 1, -100, 2], [-100, -100, 3, 4]])
        theirs = _jsd(beta, 2.0, s, t, labels) * 4
        return getattr(losses, loss)(s, t, temperature=2.0, target=labels, **options), theirs, s

    parity(loss, "TRL", f"generalized_jsd_loss, beta={beta:g}", relation="× T², which it leaves out")(_divergence)


@parity("kl", "sentence-transformers", "DistillKLDivLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 3)
    made = module("sentence_transformers.sentence_transformer.losses").DistillKLDivLoss(model=None, temperature=2.0)
    made._checked_teacher_scale = True  # a warning about the scores' scale
    query = torch.ones(4, 1, dtype=torch.float64)
    theirs = made.compute_loss_from_embeddings([query, *(s[:, [column]] for column in range(3))], t)
    return losses.kl(s, t, temperature=2.0), theirs, s


@parity("soft_cross_entropy", "TextBrewer", "kd_ce_loss", relation="× T², which it leaves out")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 3, 6)
    return losses.soft_cross_entropy(s, t, temperature=4.0), tb("kd_ce_loss")(s, t, temperature=4.0) * 16, s


@parity("dkd", "MMRazor", "DKDLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 7)
    target = torch.tensor([0, 6, 2, 3, 3])
    made = mm("decoupled_kd", "DKDLoss")(tau=2.0, alpha=1.0, beta=3.0)
    return losses.dkd(s, t, target=target, alpha=1.0, beta=3.0, temperature=2.0), made(s, t, target), s


@parity("dist", "torchdistill", "DISTLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(6, 5)
    theirs = td("DISTLoss")(**PATHS, beta=2.0, gamma=0.5, tau=3.0)(io(s), io(t))
    return losses.dist(s, t, beta=2.0, gamma=0.5, temperature=3.0), theirs, s


@parity("dist", "MMRazor", "DISTLoss", tiny="adds 1e-8 to the product of two lengths, which hides small ones")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(6, 5)
    theirs = mm("dist_loss", "DISTLoss")(inter_loss_weight=2.0, intra_loss_weight=0.5, tau=3.0)(s, t)
    return losses.dist(s, t, beta=2.0, gamma=0.5, temperature=3.0), theirs, s


@parity(
    "logit_standardization",
    "torchdistill",
    "LogitStdKDLoss",
    relation="× T², which it has only beside a hard loss (alpha)",
    tiny="adds 1e-7 to every deviation",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 7)
    theirs = td("LogitStdKDLoss")(**PATHS, temperature=2.0, beta=1.0)(io(s), io(t)) * 4
    return losses.logit_standardization(s, t, temperature=2.0), theirs, s


@parity(
    "top_k_kl", "TRL", "add_tail_bucket", relation="its tail under our divergence: its own loss takes the student's k classes"
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(4, 7)
    tail = module("trl.experimental.sdft.loss_utils").add_tail_bucket
    top = t.topk(3, -1).indices
    log_s, log_t = (tail(side.log_softmax(-1).gather(-1, top)) for side in (s, t))
    return losses.top_k_kl(s, t, k=3), functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean"), s


@parity("uld", "TRL", "ULDLoss", relation="at T = 1; it has no factor T², and its mean is over rows")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(2, 5, 6, teacher=(2, 6, 8))
    config = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="observed",
    )
    made = module("trl.experimental.gold.gold_trainer").ULDLoss(config)
    ours = torch.tensor([[-100, 1, 2, 3, -100], [-100, -100, 1, 2, 3]])
    theirs = torch.tensor([[-100, -100, 1, 2, 3, -100], [1, 2, 3, -100, -100, -100]])
    found = made._compute_distillation_loss(s, t, ours, theirs, ours, theirs)
    return losses.uld(s, t, mask=ours != -100, teacher_mask=theirs != -100), found, s
