"""Maps that bring a student tensor to a teacher tensor's shape. They train with the student and never leave with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import MatchError, did_you_mean, listing

ADAPTERS = ("auto", "none", "linear", "conv", "resize")

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_RESIZE_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Adapter(nn.Module):
    """A projection of the features, then a resize of lengths or grids to those of the teacher tensor at hand.

    Args:
        project: a linear map on the last dimension or a 1×1 convolution; ``None`` where the widths agree.
        feature_dim: 1 for ``[batch, channels, *grid]``, -1 for ``[batch, *positions, features]``.
        resize: interpolate the grid or the sequence, (bi-, tri-)linearly without aligned corners.
    """

    def __init__(self, project: nn.Module | None, *, feature_dim: int, resize: bool) -> None:
        super().__init__()
        self.project = project
        self.feature_dim = feature_dim
        self.resize = resize

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Args: student ``[batch, …]``; teacher, whose shape the result has and whose values are not used."""
        if self.project is not None:
            student = self.project(student)
        if not self.resize or student.shape == teacher.shape:
            return student
        if self.feature_dim == 1:
            return _interpolate(student, teacher.shape[2:])
        return _interpolate(student.movedim(-1, 1), teacher.shape[1:-1]).movedim(1, -1)

    def extra_repr(self) -> str:
        return f"feature_dim={self.feature_dim}, resize={self.resize}"


def _interpolate(student: Tensor, grid: Sequence[int]) -> Tensor:
    return F.interpolate(student, size=tuple(grid), mode=_RESIZE_MODES[len(grid)], align_corners=False)


def feature_dim(shape: Sequence[int]) -> int:
    """Where features are by torch's conventions: channels first for images and volumes, last for everything else."""
    return 1 if len(shape) in (4, 5) else -1


def check_adapter_name(adapter: object) -> None:
    """Raise a `MatchError` unless ``adapter`` is one of `ADAPTERS` or a module."""
    if isinstance(adapter, nn.Module) or adapter in ADAPTERS:
        return
    if isinstance(adapter, type) and issubclass(adapter, nn.Module):
        raise MatchError(f"adapter={adapter.__name__} is a class; pass an instance, as in {adapter.__name__}(…)")
    hint = did_you_mean(adapter, ADAPTERS) if isinstance(adapter, str) else ""
    raise MatchError(f"unknown adapter {adapter!r}.{hint} An adapter is a torch.nn.Module or one of {listing(ADAPTERS)}")


def fit_adapter(kind: str, student: Tensor, teacher: Tensor, *, dim: int) -> Adapter | None:
    """The adapter that brings tensors of ``student``'s shape to ``teacher``'s, or ``None`` where none is needed.

    Raises:
        MatchError: the shapes differ in a way that ``kind`` does not bridge.
    """
    theirs, ours = tuple(teacher.shape), tuple(student.shape)
    if len(ours) != len(theirs) or ours[:1] != theirs[:1]:
        differ = "number of dimensions" if len(ours) != len(theirs) else "batch size"
        raise MatchError(
            f"student {list(ours)} and teacher {list(theirs)} differ in their {differ}, which no built-in adapter bridges. "
            "Name tensors of the same kind, or pass a module of your own as adapter="
        )
    grid = slice(2, None) if dim == 1 else slice(1, -1)
    widths, grids_differ = (ours[dim], theirs[dim]), ours[grid] != theirs[grid]
    if kind == "none":
        if ours != theirs:
            raise MatchError(
                f"student {list(ours)} and teacher {list(theirs)} differ in shape and adapter='none' allows no map "
                "between them. Use adapter='auto', or a module of your own"
            )
        return None
    if grids_differ and kind not in ("auto", "resize"):
        raise MatchError(
            f"student {list(ours)} and teacher {list(theirs)} differ in length or grid, which adapter={kind!r} does not "
            "bridge. Use adapter='auto', or a module of your own"
        )
    if widths[0] != widths[1] and kind == "resize":
        raise MatchError(
            f"student {list(ours)} and teacher {list(theirs)} differ in width ({widths[0]} and {widths[1]}), which "
            "adapter='resize' does not bridge. Use adapter='auto', or a module of your own"
        )
    wanted = kind in ("linear", "conv") or widths[0] != widths[1]
    project = _projection(kind, student, widths, dim) if wanted else None
    return Adapter(project, feature_dim=dim, resize=grids_differ) if project is not None or grids_differ else None


def _projection(kind: str, student: Tensor, widths: tuple[int, int], dim: int) -> nn.Module:
    dtype = student.dtype if student.is_floating_point() else torch.float32
    if kind == "conv" or (kind == "auto" and dim == 1):
        if student.dim() not in _CONVOLUTIONS or dim != 1:
            raise MatchError(f"adapter='conv' needs [batch, channels, *grid], got a student tensor {list(student.shape)}")
        return _CONVOLUTIONS[student.dim()](*widths, kernel_size=1, bias=False, device=student.device, dtype=dtype)
    if dim != -1:
        raise MatchError(
            f"adapter='linear' maps the last dimension, but the features of {list(student.shape)} are dimension {dim}. "
            "Use adapter='conv'"
        )
    return nn.Linear(*widths, bias=False, device=student.device, dtype=dtype)
