"""Blocks of logits that are in memory already: `fused.rows.block_losses` by a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fused.forms import FORMS
from ..fused.rows import Program, RowTask, RowTerm, block_losses
from . import distributions
from .availability import unsuited
from .layout import Layout
from .rows import launch_all
from .terms import Numbered, Piece, Records


def block_losses_triton(
    program: Program,
    student: Tensor,
    others: Sequence[Tensor],
    weights: Sequence[Tensor],
    scalars: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """The terms' values on some rows, and their gradient; arguments as in `block_losses`, which does what kernels do not."""
    heats = scalars[len(program.terms) :].unbind()
    coefficients = scalars[: len(program.terms)].unbind()
    terms = []
    for term, coefficient in zip(program.terms, coefficients, strict=True):
        other = others[term.other]
        logits = FORMS[term.form].family == "distributions"
        terms.append(
            RowTerm(
                form=FORMS[term.form],
                constants=term.constants,
                other=other,
                temperature=heats[term.temperature] if logits else 1.0,
                coefficient=coefficient,
                padded=logits and term.classes == max(student.shape[1], other.shape[1]),
            )
        )
    task = RowTask(student=student, terms=terms)
    by_kernel = all(term.form.family != "features" for term in terms) and unsuited(task) is None
    if not by_kernel or not (gradient is None or gradient.is_contiguous()):
        return block_losses(program, student, others, weights, scalars, gradient)
    shares = [weights[term.weight] for term in program.terms]
    numbered = [Numbered(n, n, *each) for n, each in enumerate(zip(terms, shares, strict=True))]
    with torch.cuda.device(student.device if student.device.type == "cuda" else -1):
        records = Records(student.device, weights[0], {}, [()] * len(terms))
        piece = Piece(Layout.of(task), numbered, gradient)
        launches = distributions.plan(records, piece, gradient=gradient is not None)
        return launch_all(records, launches, [(0, len(terms))])[0]
