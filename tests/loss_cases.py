"""The losses that look at a whole sample or at the whole batch, ready to be called with two tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hookdistill import losses


@dataclass(frozen=True)
class SampleCase:
    """One loss with its extra arguments; student and teacher are ``[batch, places, channels]``, or images."""

    loss: str
    args: dict[str, Any] = field(default_factory=dict)
    widths: tuple[int, int] = (4, 4)
    zero_for_equal: bool = True

    def __str__(self) -> str:
        return "-".join([self.loss, *(str(value) for value in self.args.values())])

    def tensors(self, *positions: int, seed: int = 0, dtype: torch.dtype = torch.float64, images: bool = False):
        """Student, which wants a gradient, and teacher, of the widths that the loss takes."""
        generator = torch.Generator().manual_seed(seed)
        sides = [torch.randn(*positions, width, generator=generator, dtype=torch.float64).to(dtype) for width in self.widths]
        if images:
            sides = [side.movedim(-1, 1).contiguous() for side in sides]
        return sides[0].requires_grad_(), sides[1]

    def equal(self, *positions: int, **keywords: Any) -> Tensor:
        return self.tensors(*positions, **keywords)[0]

    def __call__(self, student: Tensor, teacher: Tensor, **keywords: Any) -> Tensor:
        extras = {} if set(self.extras_of) <= keywords.keys() else self.extras(student, teacher)
        return getattr(losses, self.loss)(student, teacher, **{**self.args, **extras, **keywords})

    @property
    def extras_of(self) -> list[str]:
        """The keywords that `extras` gives."""
        return list(self.extras(None, None))

    def extras(self, student: Any, teacher: Any) -> dict[str, Any]:
        """What the loss needs besides: other layers made of these, maps with fixed weights."""
        if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
            student, teacher = torch.zeros(2, 3, self.widths[0]), torch.zeros(2, 3, self.widths[1])
        if self.loss == "fsp":
            axis = 1 if student.ndim == 4 else -1
            return {"student_second": 2 * student.roll(1, axis), "teacher_second": 2 * teacher.roll(1, axis)}
        spec = losses.loss_spec(self.loss)
        if spec.state is None:
            return {}
        with torch.random.fork_rng():
            torch.manual_seed(3)
            shapes = [(2, *[5] * (side.ndim - 2), width) for side, width in zip((student, teacher), self.widths, strict=True)]
            blank = [torch.zeros(shape).movedim(-1, 1) if len(shape) == 4 else torch.zeros(shape) for shape in shapes]
            state = spec.state(*blank).to(student.device)
        state = state.double() if torch.float64 in (student.dtype, teacher.dtype) else state
        extras = {name: getattr(state, name) for name in spec.parameters if hasattr(state, name)}
        if self.loss == "mgd":
            places = (student.shape[0], *(student.shape[2:] if student.ndim == 4 else student.shape[1:-1]))
            extras["keep"] = (torch.arange(torch.Size(places).numel()) % 3 > 0).reshape(places).to(student.device)
        return extras


MAPS = [
    SampleCase("attention_transfer", widths=(4, 6)),
    SampleCase("attention_transfer", {"power": 3.0}, widths=(4, 6)),
    SampleCase("nst", widths=(4, 6)),
    SampleCase("nst", {"degree": 1}, widths=(4, 6)),
    SampleCase("fsp"),
    SampleCase("ickd"),
    SampleCase("cwd"),
    SampleCase("cwd", {"temperature": 4.0}),
]
LEARNED = [
    SampleCase("vid", widths=(4, 6), zero_for_equal=False),
    SampleCase("mgd", widths=(4, 6), zero_for_equal=False),
    SampleCase("factor_transfer", widths=(4, 6), zero_for_equal=False),
]
COUPLED = [
    SampleCase("similarity_preserving", widths=(4, 6)),
    SampleCase("pkt", widths=(4, 6)),
    SampleCase("rkd_distance", widths=(4, 6)),
    SampleCase("rkd_angle", widths=(4, 6)),
    SampleCase("correlation_congruence", widths=(4, 6)),
    SampleCase("correlation_congruence", {"kernel": "bilinear"}, widths=(4, 6)),
    SampleCase("cka", widths=(4, 6)),
]
Function = Callable[..., Tensor]
