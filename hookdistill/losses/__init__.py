"""What the losses mean: plain functions of (student, teacher), and their names."""

from .attention import attention_kl, attention_mse
from .features import cosine, huber, l1, mse, normalized_mse, smooth_l1
from .logits import cross_entropy, js, kl, reverse_kl, skew_kl, soft_cross_entropy, tvd
from .reduction import masked_mean, reduce
from .registry import LossSpec, loss_spec, register_loss, registered_losses
from .sparse import sampled_kl, top_k_tail_kl

__all__ = [
    "LossSpec",
    "attention_kl",
    "attention_mse",
    "cosine",
    "cross_entropy",
    "huber",
    "js",
    "kl",
    "l1",
    "loss_spec",
    "masked_mean",
    "mse",
    "normalized_mse",
    "reduce",
    "register_loss",
    "registered_losses",
    "reverse_kl",
    "sampled_kl",
    "skew_kl",
    "smooth_l1",
    "soft_cross_entropy",
    "top_k_tail_kl",
    "tvd",
]
