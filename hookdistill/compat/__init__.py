"""The older KnowledgeDistillation library's names and signatures: its scripts run with the import line changed.

    from hookdistill.compat import KnowledgeDistiller, MultiLayerBasedDistillationLoss
    from hookdistill.compat import MultiLayerBasedDistillationEvaluator

What is new: output adaptors may be left out, and layer names are module paths then; items of ``distill_config`` take
``mask``, ``target``, ``teacher_model``, ``adapter``, ``temperature`` and ``name`` as well; a loss is any registered name or a
callable; ``teacher_model`` may be a dict of teachers by name.
"""

from .distiller import KnowledgeDistiller as KnowledgeDistiller
from .evaluator import MultiLayerBasedDistillationEvaluator as MultiLayerBasedDistillationEvaluator
from .loss import MultiLayerBasedDistillationLoss as MultiLayerBasedDistillationLoss
