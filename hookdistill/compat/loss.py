"""The older library's loss model: its config list, with the names it uses for layers and losses."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..batches import named_items, pick
from ..engine import DistillationLoss
from ..errors import MatchError
from ..matches import Match, as_matches
from ..selection import select_output
from .outputs import OutputAdaptor, adapt, plain

OldLoss = Callable[..., Tensor]
"""``(teacher_output, student_output, teacher_input, student_input, **args) -> scalar``."""

_OUTPUT_NAMES = {
    "hidden_states": "output",
    "hidden_state": "output",
    "embedding": "output",
    "embeddings": "output",
    "attentions": "attention",
}
_MAPS = ("attention", "attentions")
_OF_MAPS = {"mse": "attention_mse", "mse_with_mask": "attention_mse_with_mask", "kl": "attention_kl"}


class BatchView(Mapping[str, Any]):
    """A batch of the loader, and what the data adaptor made of it: where masks and targets are looked up.

    By name: first in what the student is called with, then the teacher, then the batch itself.
    """

    def __init__(self, raw: Any, teacher: Any = None, student: Any = None) -> None:
        self.raw, self.teacher, self.student = raw, teacher, student
        views = (raw if named_items(raw) is not None else None, teacher, student)
        self.items_by_name = {
            key: value for view in views if view is not None for key, value in (named_items(view) or {}).items()
        }

    def __getitem__(self, key: str) -> Any:
        return self.items_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_by_name)

    def __len__(self) -> int:
        return len(self.items_by_name)


class MultiLayerBasedDistillationLoss(nn.Module):
    """The config list and the output adaptors; `KnowledgeDistiller` computes with it.

    Args:
        distill_config: items as in the older library. ``"type"`` may be left out (as in its last version). Losses: the five
            old names, every name of `hookdistill.losses`, or a callable ``(student, teacher, mask=None, **args)``.
            ``hard_distill`` items compare with the item ``labels`` of the batch, with what ``"target"`` names (a key, or an
            index of the loader's batch), or with what the function ``"batch_data_to_label"`` returns for the loader's batch.
        teacher_output_adaptor: ``model_output -> {layer: {output: tensor}}``; it gets the plain tuple of earlier transformers
            releases, attention maps included. ``None``: layer names are module paths, and output names are selectors
            (``output``, ``attention``, …; ``hidden_states`` and ``embedding`` mean ``output``). For several teachers, a dict
            of adaptors by name.
        student_output_adaptor: the same for the student.

    Attributes:
        loss_functions: losses of one's own by name, called as in the older library:
            ``(teacher_output, student_output, teacher_input, student_input, **args)``.
    """

    def __init__(
        self,
        distill_config: Iterable[Mapping[str, Any]] | None = None,
        teacher_output_adaptor: OutputAdaptor | Mapping[str, OutputAdaptor | None] | None = None,
        student_output_adaptor: OutputAdaptor | None = None,
    ) -> None:
        super().__init__()
        self.distill_config = distill_config
        self.teacher_output_adaptor = teacher_output_adaptor
        self.student_output_adaptor = student_output_adaptor
        self.loss_functions: dict[str, OldLoss] = {}
        self.inputs: tuple[Any, Any] = (None, None)
        """What teacher and student are called with in this step, for ``loss_functions``."""
        self._stage: DistillationLoss | None = None

    def forward(self, teacher_output: Any, student_output: Any, *inputs: Any) -> Tensor:
        """The weighted sum of the items, for two model outputs that are there already.

        Args:
            inputs: ``teacher_input_data, student_input_data``, or the loader's batch alone, where masks and targets are
                looked up.

        Raises:
            MatchError: an adaptor is missing, an item is wrong, or the adaptors give no tensor of its name.
        """
        teacher_input, student_input = inputs if len(inputs) == 2 else (None, None)
        raw = inputs[0] if len(inputs) == 1 else None
        if self._stage is None:
            self._stage = DistillationLoss(self.matches())
        self.inputs = (teacher_input, student_input)
        captures = []
        for role, output in (("teacher", teacher_output), ("student", student_output)):
            adaptor = getattr(self, f"{role}_output_adaptor")
            if not callable(adaptor):
                raise MatchError(
                    f"without {role}_output_adaptor= the layers are modules, whose tensors a model's output does not hold. "
                    "Pass this loss to a KnowledgeDistiller, which captures them; or give an adaptor"
                )
            captures.append(self._captures(adapt(adaptor, plain(output), role), role))
        total: Tensor = self._stage(*captures, BatchView(raw, teacher_input, student_input)).total
        return total

    def matches(self) -> list[Match]:
        """The config list as `Match` entries.

        Raises:
            MatchError: an item cannot be read; the message has its position.
        """
        if self.distill_config is None:
            raise MatchError("distill_config= is missing: a list of items that say which outputs are compared by which loss")
        if isinstance(self.distill_config, (str, Mapping)) or not isinstance(self.distill_config, Iterable):
            return as_matches(self.distill_config)  # which says what is wrong
        return as_matches([self._translated(item) for item in self.distill_config])

    def teacher_adaptor(self, name: str | None) -> OutputAdaptor | None:
        """The adaptor of one of several teachers, or of the only one."""
        given = self.teacher_output_adaptor
        return given.get(str(name)) if isinstance(given, Mapping) else given

    def _captures(self, adapted: Any, role: str) -> dict[str, dict[str, Tensor]]:
        assert self._stage is not None
        addresses = [getattr(term, f"{role}_address") for term in self._stage.terms.values()]
        return {"": {each.key: select_output(adapted, each.selector) for each in addresses if each is not None}}

    def _translated(self, item: Any) -> Any:
        """An item of the older config as one that `hookdistill.matches` reads; what is wrong with it is said there."""
        if not isinstance(item, Mapping) or not isinstance(item.get("loss"), Mapping):
            return item
        new = {"type": "ts_distill", **item}
        both_maps = all(new.get(f"{side}_layer_output_name") in _MAPS for side in ("teacher", "student"))
        for side, adaptor in (
            ("teacher", self.teacher_adaptor(item.get("teacher_model"))),
            ("student", self.student_output_adaptor),
        ):
            self._translate_address(new, side, adapted=adaptor is not None)
        function = new["loss"].get("loss_function")
        if isinstance(function, str):
            if function in self.loss_functions:
                new["loss"] = {**new["loss"], "loss_function": self._old_loss(function)}
            elif both_maps and new["type"] == "ts_distill":
                new["loss"] = {**new["loss"], "loss_function": _OF_MAPS.get(function, function)}
            if function.endswith("_with_mask"):
                new.setdefault("mask", _teacher_mask)
        if (labels := new.pop("batch_data_to_label", None)) is not None:
            new.setdefault("target", functools.partial(_of_raw_batch, labels))
        for key in ("mask", "target"):
            if isinstance(new.get(key), int) and not isinstance(new[key], bool):
                new[key] = functools.partial(_picked, new[key])
        return new

    def _translate_address(self, item: dict[str, Any], side: str, *, adapted: bool) -> None:
        layer, output = (item.get(f"{side}_layer_{part}") for part in ("name", "output_name"))
        if not isinstance(layer, str) or not isinstance(output, str):
            return
        if adapted:
            leaf = f"output[{json.dumps(layer, ensure_ascii=False)}][{json.dumps(output, ensure_ascii=False)}]"
            item.update({f"{side}_layer_name": "", f"{side}_layer_output_name": leaf})
        elif layer:
            item[f"{side}_layer_output_name"] = _OUTPUT_NAMES.get(output, output)

    def _old_loss(self, name: str) -> OldLoss:
        function = self.loss_functions[name]

        @functools.wraps(function)
        def loss(student: Tensor, teacher: Tensor, **args: Any) -> Tensor:
            return function(teacher, student, *self.inputs, **args)

        del loss.__wrapped__  # its signature is not the one this is called with
        return loss


def _teacher_mask(batch: BatchView) -> Tensor:
    mask: Tensor = pick(batch if batch.teacher is None else batch.teacher, "attention_mask")
    return mask


def _of_raw_batch(function: Callable[[Any], Tensor], batch: BatchView) -> Tensor:
    return function(batch.raw)


def _picked(position: int, batch: BatchView) -> Tensor:
    item: Tensor = pick(batch.raw, position)
    return item
