"""Methods from papers, each one line: ``recipes.<name>(teacher, student)`` gives a ready list of matches.

The layers are found by structure, so that the same line serves BERT, GPT, Llama, ViT, T5, and conv nets in the manner of
torchvision and timm. The list is an ordinary one: print it, edit it, add to it, give it to a `Distiller`.
"""

from .catalogue import Matches as Matches
from .catalogue import Recipe as Recipe
from .catalogue import catalogue as catalogue
from .language import distilbert, minilm, minilm_v2, mobilebert, patient_kd, tinybert
from .maps import attention_transfer, cka, fitnet, reviewkd
from .outputs import crd, dist, dkd, gkd_losses, kd, rkd

__all__ = [
    "attention_transfer",
    "cka",
    "crd",
    "dist",
    "distilbert",
    "dkd",
    "fitnet",
    "gkd_losses",
    "kd",
    "minilm",
    "minilm_v2",
    "mobilebert",
    "patient_kd",
    "reviewkd",
    "rkd",
    "tinybert",
]
