"""Blocks through Inductor: one compilation for each program, whatever the number of rows.

Its function is traced with ``make_fx`` for a symbolic number of rows and handed to Inductor as a graph. That goes round
``torch.compile``, whose guards would be checked at every call and whose limit of recompilations is shared by all programs.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import Program, block_losses
from .scores import Scores, score_loss

Compiled = Callable[..., Any]

_compiled: dict[tuple[Any, ...], Compiled | None] = {}


@functools.cache
def compiler_available() -> bool:
    """Whether Inductor finds a C++ compiler that works at all."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return shutil.which(str(get_cpp_compiler())) is not None
    except Exception:  # Inductor's own exceptions differ between releases
        return False


def compiled_block(
    program: Program,
    student: Tensor,
    others: Sequence[Tensor],
    weights: Sequence[Tensor],
    scalars: Tensor,
    gradient: Tensor | None,
) -> Tensor:
    """`block_losses`, compiled the first time that a program is seen; as it stands where it cannot be compiled."""
    if student.shape[0] < 2 or not (gradient is None or gradient.is_contiguous()):
        return block_losses(program, student, others, weights, scalars, gradient)
    # The programs are for dense tensors: the shares of unmasked rows are one number expanded, logits may be a slice.
    inputs = [tensor.contiguous() for tensor in (student, *others, *weights, scalars)]
    tensors = [*inputs, *([] if gradient is None else [gradient])]
    key = (program, gradient is None, len(others), *((tensor.dtype, tensor.device) for tensor in tensors))
    if key not in _compiled:
        _compiled[key] = _compile(program, len(others), len(weights), tensors)
    function = _compiled[key]
    if function is None:
        return block_losses(program, student, others, weights, scalars, gradient)
    value: Tensor = function(*tensors)
    return value


def _compile(program: Program, others: int, weights: int, tensors: Sequence[Tensor]) -> Compiled | None:
    def block(student: Tensor, *rest: Tensor) -> Tensor:
        theirs, rest = rest[:others], rest[others:]
        shares, (scalars, *gradient) = rest[:weights], rest[weights:]
        return block_losses(program, student, theirs, shares, scalars, gradient[0] if gradient else None)

    varying = [1] * len(tensors)
    varying[1 + others + weights] = 0  # the scalars
    return _or_none(lambda: _inductor(block, tensors, varying))


def compiled_scores(scores: Scores, s: Tensor, t: Tensor, valid: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """`score_loss`, compiled the first time that its like is seen; as it stands where it cannot be compiled."""
    if s.shape[-1] < 2 or s.shape[:-1].numel() < 2:
        return score_loss(scores, s, t, valid, gradient)
    tensors = [
        each.reshape(-1, s.shape[-1]).contiguous() for each in (s, t, *([] if valid is None else [valid.expand(s.shape)]))
    ]
    key = (scores, gradient, *((tensor.dtype, tensor.device) for tensor in tensors))
    if key not in _compiled:

        def loss(s: Tensor, t: Tensor, *valid: Tensor) -> tuple[Tensor, ...]:
            value, slope = score_loss(scores, s.clone(), t.clone(), valid[0] if valid else None, gradient)
            return (value,) if slope is None else (value, slope)

        _compiled[key] = _or_none(lambda: _inductor(loss, tensors, [2] * len(tensors)))
    function = _compiled[key]
    if function is None:
        return score_loss(scores, s, t, valid, gradient)
    value, *slope = function(*tensors)
    return value, slope[0].view(s.shape) if slope else None


def _or_none(compiling: Callable[[], Compiled]) -> Compiled | None:
    try:
        return compiling()
    except Exception as error:
        warnings.warn(
            f"Inductor could not compile a loss, which runs uncompiled now and slower: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}. impl='eager' avoids this",
            stacklevel=3,
        )
        return None


def _inductor(function: Callable[..., Any], tensors: Sequence[Tensor], varying: Sequence[int]) -> Compiled:
    """Compile for any sizes of as many first dimensions of each tensor as ``varying`` says."""
    import torch._inductor as inductor
    from torch._dynamo.source import ConstantSource
    from torch._inductor import config
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(number: int, tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC] * varying[number] + [DimDynamic.STATIC] * (tensor.dim() - varying[number])
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"tensor_{number}"))

    fakes = [fake(number, tensor) for number, tensor in enumerate(tensors)]
    with torch.no_grad(), config.patch(compile_threads=1), mode:
        graph = make_fx(function)(*fakes)
        sizes = fakes[0].shape[: varying[0]]
        if any(not isinstance(size, torch.SymInt) or size.node.maybe_as_int() is not None for size in sizes):
            raise RuntimeError("a size was taken for a constant")
        compiled: Compiled = inductor.compile(graph, list(fakes))
        return compiled
