"""What the losses mean: plain functions of (student, teacher), and their names."""

from .attention import attention_kl, attention_mse, relation_kl
from .embeddings import embed_distill, margin_mse
from .features import activation_boundary, cosine, huber, l1, mse, normalized_mse, ofd, ofd_margin, smooth_l1
from .learned import factor_transfer, mgd, reviewkd, vid
from .logit_methods import dist, dkd, logit_standardization, top_k_kl, uld
from .logits import cross_entropy, js, kl, reverse_kl, skew_kl, soft_cross_entropy, tvd
from .maps import attention_transfer, cwd, fsp, ickd, nst
from .memories import crd, queue_kl
from .reduction import masked_mean, reduce
from .registry import LossSpec, loss_spec, register_loss, registered_losses
from .samples import cka, correlation_congruence, pkt, rkd_angle, rkd_distance, similarity_preserving

__all__ = [
    "LossSpec",
    "activation_boundary",
    "attention_kl",
    "attention_mse",
    "attention_transfer",
    "cka",
    "correlation_congruence",
    "cosine",
    "crd",
    "cross_entropy",
    "cwd",
    "dist",
    "dkd",
    "embed_distill",
    "factor_transfer",
    "fsp",
    "huber",
    "ickd",
    "js",
    "kl",
    "l1",
    "logit_standardization",
    "loss_spec",
    "margin_mse",
    "masked_mean",
    "mgd",
    "mse",
    "normalized_mse",
    "nst",
    "ofd",
    "ofd_margin",
    "pkt",
    "queue_kl",
    "reduce",
    "register_loss",
    "registered_losses",
    "relation_kl",
    "reverse_kl",
    "reviewkd",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skew_kl",
    "smooth_l1",
    "soft_cross_entropy",
    "top_k_kl",
    "tvd",
    "uld",
    "vid",
]
