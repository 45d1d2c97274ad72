"""Losses between relations of samples, and those with parameters or memory, beside others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hookdistill import losses
from parity.comparing import BY_NORM, PAIRS, PATHS, Computed, Draw, io, mm, parity, td
from parity.peers import module

# --- relations of samples

ROWS = {"student_output_path": "m", "teacher_output_path": "m"}


@parity(
    "similarity_preserving",
    "torchdistill",
    "SPKDLoss",
    differs="rows whose absolute values sum to one (the 1 in its normalize(…, 1) is the norm's order, not the dimension), "
    "where the paper's rows have length one",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    return losses.similarity_preserving(s, t), td("SPKDLoss")(**ROWS, reduction="batchmean")(io(s), io(t)), s


@parity(
    "pkt",
    "torchdistill",
    "PKTLoss",
    relation="× batch: it takes the mean over all pairs",
    tiny="adds 1e-7 to every length",
    zero_row=BY_NORM,
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    return losses.pkt(s, t), td("PKTLoss")(**PATHS)(io(s), io(t)) * 5, s


CLAMPED = "keeps a distance of 1e-6 between equal rows; the paper's is zero"


@parity("rkd_distance", "torchdistill", "RKDLoss", equal_rows=CLAMPED)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    made = td("RKDLoss")(student_output_path="m", teacher_output_path="m", dist_factor=1.0, angle_factor=0.0, reduction="mean")
    return losses.rkd_distance(s, t), made(io(s), io(t)), s


@parity("rkd_angle", "torchdistill", "RKDLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    made = td("RKDLoss")(student_output_path="m", teacher_output_path="m", dist_factor=0.0, angle_factor=1.0, reduction="mean")
    return losses.rkd_angle(s, t), made(io(s), io(t)), s


@parity("rkd_distance", "MMRazor", "DistanceWiseRKD", relation="without its default normalisation", equal_rows=CLAMPED)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    return losses.rkd_distance(s, t), mm("relational_kd", "DistanceWiseRKD")(loss_weight=1.0, with_l2_norm=False)(s, t), s


@parity("rkd_angle", "MMRazor", "AngleWiseRKD", relation="without its default normalisation")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    return losses.rkd_angle(s, t), mm("relational_kd", "AngleWiseRKD")(loss_weight=1.0, with_l2_norm=False)(s, t), s


@parity("rkd_distance", "KD_Lib", "RKDDistanceLoss", equal_rows=CLAMPED)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    return losses.rkd_distance(s, t), module("KD_Lib.KD.vision.RKD.loss_metric").RKDDistanceLoss()(t, s), s


@parity("rkd_angle", "KD_Lib", "RKDAngleLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(5, 4, teacher=(5, 6))
    return losses.rkd_angle(s, t), module("KD_Lib.KD.vision.RKD.loss_metric").RKDAngleLoss()(t, s), s


for kernel in ("bilinear", "gaussian"):

    def _congruence(draw: Draw, kernel: str = kernel) -> Computed:
        s, t = draw.pair(5, 4, teacher=(5, 6))
        config = {"type": kernel, "gamma": 0.4, "max_p": 2}
        made = td("CCKDLoss")(student_linear_path="m", teacher_linear_path="m", kernel_config=config, reduction="batchmean")
        units = [functional.normalize(side, dim=-1) if kernel == "gaussian" else side for side in (s, t)]
        return losses.correlation_congruence(s, t, kernel=kernel), (made(io(units[0]), io(units[1])) * 25) ** 2 / 25, s

    parity(
        "correlation_congruence",
        "torchdistill",
        f"CCKDLoss, {kernel}",
        relation="squared, in units of the batch: it leaves out the paper's square"
        + (", and the samples at length one" if kernel == "gaussian" else ""),
    )(_congruence)


# --- losses with modules


@parity("vid", "torchdistill", "VIDLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 2, 2, teacher=(3, 5, 2, 2))
    wrapper = module("torchdistill.models.wrapper")
    torch.manual_seed(0)
    made = wrapper.Regressor4VID(4, 6, 5, eps=1e-5, init_pred_var=3.0).double()
    state = losses.loss_spec("vid").state(s, t, mid=6).double()
    with torch.no_grad():
        for layer in (0, 2, 4):
            state.regressor[layer].weight.copy_(made.regressor[layer].weight.flatten(1))
        made.soft_plus_param.add_(torch.arange(5.0))
    theirs = td("VIDLoss")(PAIRS)(io(made(s)), io(t))
    return losses.vid(s, t, regressor=state.regressor, scale=made.soft_plus_param), theirs, s


@parity("factor_transfer", "torchdistill", "FTLoss", zero_row=BY_NORM)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 2, 2)
    made = td("FTLoss")(paraphraser_path="m", translator_path="m")
    return losses.factor_transfer(s, t, paraphraser=lambda x: x, translator=lambda x: x), made(io(s), io(t)), s


@parity("factor_transfer", "MMRazor", "FTLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 2, 2)
    theirs = mm("factor_transfer_loss", "FTLoss")()(s, t)
    return losses.factor_transfer(s, t, paraphraser=lambda x: x, translator=lambda x: x), theirs, s


@parity("mgd", "ModelOpt", "MGDLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5, 5, teacher=(3, 6, 5, 5))
    torch.manual_seed(0)
    made = module("modelopt.torch.distill.losses").MGDLoss(4, 6, lambda_mgd=0.4).double()
    torch.manual_seed(1)
    theirs = made(s, t)
    torch.manual_seed(1)
    return losses.mgd(s, t, generation=made.generation, align=made.align, ratio=0.4), theirs, s


@parity("mgd", "MMRazor", "MGDLoss", relation="÷ elements of a sample: it sums over them")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 5, 5)
    theirs = mm("mgd_loss", "MGDLoss")(alpha_mgd=1.0)(2 * s, t) / 100
    return losses.mgd(s, t, generation=lambda x: 2 * x, ratio=0.0), theirs, s


@parity("reviewkd", "torchdistill", "AttentionBasedFusion + HierarchicalContextLoss")
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 6, 4, 4, teacher=(3, 7, 4, 4))
    shallow, their_shallow = draw(3, 5, 8, 8, seed=3), draw(3, 4, 8, 8, seed=4)
    torch.manual_seed(0)
    options = {"students": [shallow], "teachers": [their_shallow]}
    fusion = losses.loss_spec("reviewkd").state(s, t, mid=3, **options).double().fusion
    fuse = module("torchdistill.models.wrapper").AttentionBasedFusion
    deep, top = fuse(6, 3, 7, uses_attention=False).double(), fuse(5, 3, 4, uses_attention=True).double()
    for number, theirs in enumerate((deep, top)):
        theirs.conv1.load_state_dict(fusion.enter[number].state_dict())
        theirs.conv2.load_state_dict(fusion.leave[number].state_dict())
    top.attention_conv.load_state_dict(fusion.share[0].state_dict())
    first = deep(s)
    second = top(shallow, first[1], 8)
    loss = td("HierarchicalContextLoss")(**PATHS)
    value = loss(io(first), io(t)) + loss(io(second), io(their_shallow))
    return losses.reviewkd(s, t, fusion=fusion, **options), value, s


def _contrast(draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    s, t = draw.pair(4, 3)
    bank = losses.memories.ContrastMemory(9, 3).double()
    index, negatives = torch.tensor([2, 0, 8, 5]), torch.tensor([[1, 3], [4, 5], [6, 7], [1, 1]])
    return s, t, index, negatives, bank


def _identity(x: Tensor) -> Tensor:
    return x


ROUNDED = "keeps temperature and momentum in float32"


@parity(
    "crd",
    "torchdistill",
    "CRDLoss",
    relation="with the negatives given: it cannot draw any (an attribute is misspelt)",
    zero_row=BY_NORM,
)
def _(draw: Draw) -> Computed:
    s, t, index, negatives, bank = _contrast(draw)
    made = td("CRDLoss")(
        "m", "e", "m", input_size=3, output_size=9, num_negative_samples=2, num_samples=9, temperature=0.5
    ).double()
    made.memory_v1.copy_(bank.student)
    made.memory_v2.copy_(bank.teacher)
    given = {"pos_idx": index, "contrast_idx": torch.cat([index[:, None], negatives], 1)}
    units = [functional.normalize(side, dim=-1) for side in (s, t)]
    theirs = made({**io(units[0]), "e": {"input": given}}, io(units[1]))
    ours = losses.crd(
        s, t, index=index, negatives=negatives, embed_student=_identity, embed_teacher=_identity, memory=bank, tau=0.5
    )
    torch.testing.assert_close(bank.student, made.memory_v1, equal_nan=True)
    return ours, theirs.squeeze(), s


@parity("crd", "MMRazor", "ContrastMemory + ContrastLoss", zero_row=BY_NORM)
def _(draw: Draw) -> Computed:
    s, t, index, negatives, bank = _contrast(draw)
    made = mm("crd_loss", "ContrastMemory")(3, 9, 2, 0.5, 0.5).double()
    made.memory_v1.copy_(bank.student)
    made.memory_v2.copy_(bank.teacher)
    contrast = mm("crd_loss", "ContrastLoss")(9)
    units = [functional.normalize(side, dim=-1) for side in (s, t)]
    outs = made(*units, index, torch.cat([index[:, None], negatives], 1))
    ours = losses.crd(
        s, t, index=index, negatives=negatives, embed_student=_identity, embed_teacher=_identity, memory=bank, tau=0.5
    )
    return ours, (contrast(outs[0]) + contrast(outs[1])).squeeze(), s
