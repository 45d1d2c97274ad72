"""What is compared with whom: each of our losses beside an independent implementation, on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hookdistill import losses
from parity.peers import module

KINDS = ("random", "large", "tiny", "equal rows", "zero row")


@dataclass(frozen=True)
class Draw:
    """Random tensors of one kind, the same for the same seed."""

    kind: str

    def __call__(self, *shape: int, seed: int = 0) -> Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        if self.kind in ("large", "tiny"):
            values = values * (20.0 if self.kind == "large" else 1e-2)
        elif self.kind == "equal rows":
            values[1] = values[0]
        elif self.kind == "zero row":
            values[0] = 0
        return values

    def pair(self, *shape: int, teacher: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
        """Student, which wants a gradient, and teacher."""
        return self(*shape, seed=1).requires_grad_(), self(*(teacher or shape), seed=2)


Computed = tuple[Tensor, Tensor, Tensor]
"""Our value, theirs in our scale, and the student's tensor."""


@dataclass(frozen=True)
class Case:
    """One comparison.

    ``relation`` says how their value becomes ours, where it is not the same number. ``differs`` says why the two are not
    comparable, and who is right by the paper: then the values must *not* agree. ``trouble`` are kinds of input on which the
    peer gives something else, with the reason.
    """

    loss: str
    peer: str
    theirs: str
    compute: Callable[[Draw], Computed]
    relation: str
    differs: str
    trouble: dict[str, str]

    def __str__(self) -> str:
        return f"{self.loss}-{self.peer}-{self.theirs}"


CASES: list[Case] = []


def parity(loss: str, peer: str, theirs: str, *, relation: str = "", differs: str = "", **trouble: str) -> Any:
    """Register a comparison; keywords name kinds of input with ``_`` for blanks."""

    def register(compute: Callable[[Draw], Computed]) -> Callable[[Draw], Computed]:
        reasons = {kind.replace("_", " "): reason for kind, reason in trouble.items()}
        CASES.append(Case(loss, peer, theirs, compute, relation, differs, reasons))
        return compute

    return register


def io(tensor: Any) -> dict[str, dict[str, Any]]:
    """Captures as torchdistill hands them to its losses."""
    return {"m": {"output": tensor, "input": tensor}}


def td(name: str) -> Any:
    """A loss class of torchdistill."""
    return getattr(module("torchdistill.losses.mid_level"), name)


def mm(file: str, name: str) -> Any:
    """A loss class of MMRazor."""
    return getattr(module(f"mmrazor.models.losses.{file}"), name)


def tb(name: str) -> Any:
    """A loss function of TextBrewer."""
    return getattr(module("textbrewer.losses"), name)


PATHS = {"student_module_path": "m", "student_module_io": "output", "teacher_module_path": "m", "teacher_module_io": "output"}
PAIRS = {"pair": {"student": {"io": "output", "path": "m"}, "teacher": {"io": "output", "path": "m"}}}
BY_NORM = "divides by the length of the vector, which is zero: NaN"


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
    differs="it does not sum over channels, so what it compares is no attention map; the paper's eq. 1 sums",
)
def _(draw: Draw) -> Computed:
    s, t = draw.pair(3, 4, 3, 3)
    return losses.attention_transfer(s, t), module("KD_Lib.KD.vision.attention.loss_metric").ATLoss()([t], [s]), s


@parity(
    "nst",
    "TextBrewer",
    "mmd_loss",
    differs="a variant for text: the square difference of token-by-token products of two layers; the paper's eq. 6 is the "
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


# --- relations of samples

ROWS = {"student_output_path": "m", "teacher_output_path": "m"}


@parity(
    "similarity_preserving",
    "torchdistill",
    "SPKDLoss",
    differs="rows whose absolute values sum to one (the 1 in its normalize(…, 1) is the norm's order, not the dimension), "
    "where the paper's eq. 3 has rows of length one",
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
