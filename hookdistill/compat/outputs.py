"""What models returned when the older library was written: a plain tuple, with the attention maps in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..attention import AttentionCall, AttentionRecorder, attention_probabilities
from ..errors import CaptureError, HookDistillError, MatchError
from ..paths import unwrap
from ..selection import describe

OutputAdaptor = Callable[[Any], Mapping[str, Mapping[str, Tensor]]]
"""``model_output -> {layer: {output: tensor}}``."""

_NEWER_FIELDS = ("cross_attentions",)  # of which today's outputs hold an empty tuple


class Adapted(nn.Module):
    """A model that returns ``{layer: {output: tensor}}``: what its output adaptor makes of its output.

    Args:
        role: ``"teacher"`` or ``"student"``, for messages.
    """

    def __init__(self, model: nn.Module, adaptor: OutputAdaptor, role: str) -> None:
        super().__init__()
        self.model = model
        self.adaptor = adaptor
        self.role = role

    def forward(self, *args: Any, **kwargs: Any) -> Mapping[str, Mapping[str, Tensor]]:
        return adapt(self.adaptor, run(self.model, args, kwargs), self.role)


def run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the model and give its output as `plain` does, attention maps filled in where its configuration asks for them."""
    if not getattr(getattr(unwrap(model), "config", None), "output_attentions", False):
        return plain(model(*args, **kwargs))
    with _watched() as calls:
        output = model(*args, **kwargs)
    return plain(output, _Maps(model, calls))


def plain(output: Any, maps: _Maps | None = None) -> Any:
    """A ``ModelOutput`` as the tuple of its fields that are set, in order, without those that are newer than the older library.

    Anything else comes back as it is.

    Raises:
        CaptureError: attention maps are asked for and neither in the output nor to be had.
    """
    if not (isinstance(output, Mapping) and hasattr(output, "to_tuple")):
        return output
    items = {name: value for name, value in output.items() if value is not None and name not in _NEWER_FIELDS}
    if maps is not None and "attentions" in items and _lacks_maps(items["attentions"]):
        items["attentions"] = maps.for_each_layer()
    if maps is not None and (bare := [name for name in items if name.endswith("_attentions") and _lacks_maps(items[name])]):
        raise CaptureError(
            f"{bare[0]!r} of {maps.kind}'s output holds no attention maps. Leave the output adaptor out and name the layers by "
            "module path, with 'attention' as the output name; or call model.set_attn_implementation('eager')"
        )
    return tuple(items.values())


def adapt(adaptor: OutputAdaptor, output: Any, role: str) -> Mapping[str, Mapping[str, Tensor]]:
    """Call the user's output adaptor.

    Raises:
        MatchError: it raises, or returns something else than ``{layer: {output: tensor}}``.
    """
    try:
        adapted = adaptor(output)
    except HookDistillError:
        raise
    except Exception as error:
        raise MatchError(
            f"{role}_output_adaptor raised {type(error).__name__}: {error}. It was given {describe(output)}"
        ) from error
    if not isinstance(adapted, Mapping) or not all(isinstance(layer, Mapping) for layer in adapted.values()):
        raise MatchError(f"{role}_output_adaptor must return {{layer: {{output: tensor}}}}, it returned {describe(adapted)}")
    return adapted


class _Maps:
    """The attention calls of one forward, as the maps of its layers."""

    def __init__(self, model: nn.Module, calls: list[AttentionCall]) -> None:
        config = unwrap(model).config
        self.kind = type(unwrap(model)).__name__
        self.layers = getattr(config, "num_hidden_layers", None)
        self.calls = calls

    def for_each_layer(self) -> tuple[Tensor, ...]:
        if len(self.calls) != self.layers:
            raise CaptureError(
                f"{self.kind} returns no attention maps, and they cannot be filled in: {len(self.calls)} attentions ran, and "
                f"its configuration has {self.layers} layers. Leave the output adaptor out and name the layers by module path, "
                "with 'attention' as the output name; or call model.set_attn_implementation('eager')"
            )
        return tuple(attention_probabilities(call) for call in self.calls)


@contextlib.contextmanager
def _watched() -> Iterator[list[AttentionCall]]:
    recorder = AttentionRecorder()
    calls: list[AttentionCall] = []
    recorder.start()
    try:
        yield calls
    finally:
        calls += recorder.stop()


def _lacks_maps(value: Any) -> bool:
    return not value or any(each is None for each in value)
