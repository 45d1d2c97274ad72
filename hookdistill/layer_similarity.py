"""Which layers of two models are alike: the CKA matrix, its picture, and the best matching as a list of matches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .addresses import parse
from .batches import BatchAdaptor, BatchKey, Inputs, given_inputs, has_item, model_inputs, pick
from .capture import Capture
from .errors import BatchError, CaptureError, StructureError, listing
from .hsic import FEWEST, MOST_TOKENS, MinibatchCKA, item_features, same_tokens, token_features
from .layer_maps import Order, matching
from .matches import Match
from .running import device_of, undisturbed
from .structure import layers
from .tables import table

Examples = Literal["items", "tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Similarity:
    """The CKA of every teacher layer with every student layer; ``print(similarity)`` shows it as a table.

    ``matrix`` is float64 ``[teacher layers, student layers]``: one where two layers hold the same up to rotation, shift and
    scale, about zero where they have nothing in common, NaN for a layer whose output does not vary. ``examples`` says whether
    whole items of the batches were compared or their tokens, ``count`` how many, in ``batches`` minibatches.
    """

    matrix: Tensor
    teacher_layers: tuple[str, ...]
    student_layers: tuple[str, ...]
    examples: Examples
    count: int
    batches: int

    def __str__(self) -> str:
        best = [int(column.nan_to_num(-2.0).argmax()) for column in self.matrix.T]
        rows = [
            (name, *(f"{value:.3f}{'*' if best[j] == i else ' '}" for j, value in enumerate(row)))
            for i, (name, row) in enumerate(zip(self.teacher_layers, self.matrix.tolist(), strict=True))
        ]
        shown = table(("teacher \\ student", *self.student_layers), rows, right=self.student_layers)
        return (
            f"{shown}\n\nlinear CKA over {self.count:,} {self.examples} in {self.batches} batches; * the largest of its column"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON; NaN becomes ``None``."""
        rows = [[None if value != value else value for value in row] for row in self.matrix.tolist()]
        return {
            "teacher_layers": list(self.teacher_layers),
            "student_layers": list(self.student_layers),
            "cka": rows,
            "examples": self.examples,
            "count": self.count,
            "batches": self.batches,
        }

    def pairs(self, *, order: Order = "monotone") -> list[tuple[str, str]]:
        """The pairs (teacher layer, student layer) of largest total CKA in which no layer occurs twice, one for each student
        layer (or for each teacher layer, where these are fewer).

        ``"monotone"`` keeps the order of depth: a later student layer never learns from an earlier teacher layer. ``"any"`` is
        the unrestricted assignment and needs scipy.
        """
        found = matching(self.matrix, order=order)
        return [(self.teacher_layers[i], self.student_layers[j]) for i, j in found]

    def matches(self, *, order: Order = "monotone", **options: Any) -> list[Match]:
        """A `Match` for each of `pairs`; ``options`` are those of `Match`, as in ``matches(loss="cosine", weight=0.1)``."""
        return [Match(theirs, ours, **options) for theirs, ours in self.pairs(order=order)]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the matrix as a heat map with the monotone matching framed; the suffix of ``path`` decides the format."""
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import Rectangle
        except ImportError as error:
            raise CaptureError("plot() needs matplotlib: pip install 'hookdistill[similarity]'") from error
        rows, columns = self.matrix.shape
        figure = Figure(figsize=(2.5 + 0.55 * columns, 1.6 + 0.4 * rows), layout="constrained")
        axes = figure.add_subplot()
        shown = axes.imshow(self.matrix.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(columns), self.student_layers, rotation=45, ha="right")
        axes.set_yticks(range(rows), self.teacher_layers)
        axes.set_xlabel("student")
        axes.set_ylabel("teacher")
        for i, row in enumerate(self.matrix.tolist()):
            for j, value in enumerate(row):
                colour = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        for i, j in matching(self.matrix, order="monotone"):
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
        figure.colorbar(shown, ax=axes, label="linear CKA")
        figure.savefig(path)


def similarity(
    teacher: nn.Module,
    student: nn.Module,
    loader: Iterable[Any],
    *,
    teacher_layers: str | Sequence[str] | None = None,
    student_layers: str | Sequence[str] | None = None,
    mask: BatchKey | None = "attention_mask",
    examples: Literal["auto", "items", "tokens"] = "auto",
    max_examples: int = MOST_TOKENS,
    batches: int | None = None,
    batch_adaptor: BatchAdaptor | None = None,
) -> Similarity:
    """The linear CKA between layers of two models, over the batches of a loader.

    Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019, section 3, with the unbiased minibatch
    estimate of Nguyen et al., 2021 (arXiv 2010.15327, eq. 2 and 3). Both models run in eval mode without gradients and are left
    as they were.

    Args:
        loader: any iterable of batches as `Distiller` takes them; larger batches make the estimate scatter less.
        teacher_layers, student_layers: addresses, wildcards welcome (``"encoder.layer.*"``); by default the repeated blocks
            of a transformer, or the stages of a conv net.
        mask: item of the batch that is nonzero at valid tokens. It is used where the batch has it and the layer is
            ``[batch, tokens, width]``; other tokens then do not count.
        examples: what is compared. ``"items"``: each item of the batch, with its whole output as features. ``"tokens"``: each
            valid token, which needs the same tokens on both sides. ``"auto"`` takes tokens where all layers are
            ``[batch, tokens, width]`` with the same tokens.
        max_examples: most tokens of one batch, evenly spread; memory grows with its square times the number of layers.
        batches: how many batches to take; all by default.
        batch_adaptor: as for `Distiller`.

    Raises:
        StructureError: no layers are found by themselves; name them.
        BatchError: no batch has the four examples that the estimate needs.
        CaptureError: a layer gives no tensor, values that are not finite, or the two sides do not hold the same examples.
    """
    if max_examples < FEWEST:
        raise CaptureError(f"max_examples={max_examples} is too few; the estimate needs {FEWEST} at least")
    wanted = _addresses("teacher", teacher, teacher_layers), _addresses("student", student, student_layers)
    cka = MinibatchCKA()
    names: list[tuple[str, ...]] = []
    kind, smallest = None if examples == "auto" else examples, 0
    for number, batch in enumerate(loader):
        if number == batches:
            break
        inputs = _inputs(teacher, student, batch, batch_adaptor)
        theirs = _captured(teacher, wanted[0], inputs[0])
        ours = _captured(student, wanted[1], inputs[1])
        names = [tuple(theirs), tuple(ours)]
        valid = _mask(batch, mask)
        kind = kind or ("tokens" if same_tokens([*theirs.values(), *ours.values()]) else "items")
        if kind == "tokens":
            sides = _tokens(theirs, ours, valid, max_examples)
        else:
            sides = [[item_features(each, valid) for each in side.values()] for side in (theirs, ours)]
            _check_same_items(theirs, ours)
        if len(sides[0][0]) < FEWEST:
            smallest = max(smallest, len(sides[0][0]))
            continue
        cka.add(*sides)
    if not cka.batches:
        raise BatchError(
            f"the unbiased estimate needs batches of at least {FEWEST} examples, and the largest had {smallest}; give a loader "
            "with larger batches"
        )
    _check_finite(cka, names)
    assert kind is not None
    return Similarity(
        matrix=cka.result(),
        teacher_layers=names[0],
        student_layers=names[1],
        examples=kind,
        count=cka.examples,
        batches=cka.batches,
    )


def _addresses(role: str, model: nn.Module, given: str | Sequence[str] | None) -> list[str]:
    if isinstance(given, str):
        return [given]
    if given is not None:
        return list(given)
    try:
        return layers(model)
    except StructureError as error:
        raise StructureError(f"{error}. Name the layers of the {role}: {role}_layers=['…']") from error


def _inputs(teacher: nn.Module, student: nn.Module, batch: Any, adaptor: BatchAdaptor | None) -> tuple[Inputs, Inputs]:
    if adaptor is None:
        return model_inputs(teacher, batch, targets=(), masks=()), model_inputs(student, batch, targets=(), masks=())
    for_teacher, for_student = adaptor(device_of(student), batch)
    return given_inputs(for_teacher), given_inputs(for_student)


def _captured(model: nn.Module, addresses: list[str], inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of one forward by address, in the order asked for."""
    inputs = inputs.to(device_of(model))
    with undisturbed(model), Capture(model, addresses, detach=True) as captured:
        model(*inputs.args, **inputs.kwargs)
        found = {f"{path}:{key}": tensor for path, layer in captured.items() for key, tensor in layer.items()}
    named = {str(parse(address)): tensor for address, tensor in found.items()}
    for address, tensor in named.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            what = f"{tensor.dtype}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise CaptureError(f"{address!r} is {what}; only floating-point tensors can be compared")
    return named


def _mask(batch: Any, mask: BatchKey | None) -> Tensor | None:
    if mask is None or not has_item(batch, mask):
        return None
    found = pick(batch, mask)
    return found != 0 if isinstance(found, Tensor) and found.dim() == 2 else None


def _tokens(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], valid: Tensor | None, most: int) -> list[list[Tensor]]:
    everything = {**theirs, **{f"student {address}": tensor for address, tensor in ours.items()}}
    if not same_tokens(list(everything.values())):
        shapes = listing(f"{address}: {list(tensor.shape)}" for address, tensor in everything.items())
        raise CaptureError(
            "examples='tokens' needs layers [batch, tokens, width] with the same tokens on both sides, and there are "
            f"{shapes}. Use examples='items'"
        )
    features = token_features(list(everything.values()), valid, most=most)
    return [features[: len(theirs)], features[len(theirs) :]]


def _check_same_items(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    counts = {address: len(tensor) if tensor.dim() else 0 for address, tensor in (*theirs.items(), *ours.items())}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        shown = listing(f"{address}: {count}" for address, count in counts.items())
        raise CaptureError(f"the layers do not have the same number of items: {shown}. Their first dimension must be the batch")


def _check_finite(cka: MinibatchCKA, names: Sequence[Sequence[str]]) -> None:
    for role, layers_, finite in zip(("teacher", "student"), names, cka.finite(), strict=True):
        if not all(finite):
            bad = [name for name, good in zip(layers_, finite, strict=True) if not good]
            raise CaptureError(f"the {role} layers {listing(bad)} gave values that are not finite")
