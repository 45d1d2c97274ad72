"""A capture that stays on a model for many steps and records only when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .addresses import Address
from .attention import AttentionCall
from .batches import Inputs
from .capture import Capture, Captured
from .fused.head import Head
from .heads import FoundHead
from .paths import is_compiled
from .slots import Slot

Receiver = Callable[[Address, Tensor | AttentionCall | Head], bool]
"""Gets a tensor, or what a map or logits are made of, as soon as its module returns, and says whether it is done with it."""


class Recorder:
    """Standing hooks on one model. They stay on between steps, because a compiled model sees none that come late.

    Args:
        model: to capture from.
        addresses: what to capture.
        stop: a forward ends after the last tensor that is needed, wherever that can be known beforehand.
        hands_over: `run` may be given a receiver.
        heads: addresses of logits of which the input of the head is wanted instead, so that they need not be made.
    """

    def __init__(
        self,
        model: nn.Module,
        addresses: Iterable[Address],
        *,
        stop: bool = False,
        hands_over: bool = False,
        heads: Mapping[Address, FoundHead] | None = None,
    ) -> None:
        self.model, self.heads = model, dict(heads or {})
        addresses = [self.heads[each].input if each in self.heads else each for each in dict.fromkeys(addresses)]
        counted_from_the_end = any(each.call == "*" or (each.call or 0) < 0 for each in addresses)
        compiled = is_compiled(model)
        self.capture = Capture(model, addresses, stop=stop and not counted_from_the_end and not compiled)
        self.receiver: Receiver | None = None
        self.given: list[Slot] = []
        self._logits = {head.input: address for address, head in self.heads.items()}
        self.captured = self.capture.open(self._offered if hands_over and not compiled else None, keeps_calls=True)
        self.capture.pause()

    def run(self, inputs: Inputs, *, whole: bool = False, receiver: Receiver | None = None) -> Recorded:
        """Call the model, to its end if ``whole``, and give what was captured, until `clear`.

        Args:
            receiver: is offered each tensor first, if the recorder was made with ``hands_over``; what it takes is not kept.

        Raises:
            CaptureError: it was given the tensor of a module that then ran again.
        """
        self.receiver = receiver
        try:
            with self.capture.recording(whole=whole):
                self.model(*inputs.args, **inputs.kwargs)
            for slot in self.given:
                slot.check_calls()
        finally:
            self.receiver = None
            self.given.clear()
        return Recorded(self.captured, self.heads)

    def _offered(self, slot: Slot, value: Any) -> bool:
        address = slot.address
        if address in self._logits:
            address = self._logits[address]
            value = self.heads[address].on(value)
        taken = self.receiver is not None and self.receiver(address, value)
        if taken:
            self.given.append(slot)
        return taken

    def clear(self) -> None:
        """Let every tensor go."""
        self.captured.clear()

    def close(self) -> None:
        """Take the hooks off."""
        self.capture.close()


class Recorded(Mapping[str, Mapping[str, Tensor]]):
    """What one forward gave: the captures, and heads in place of logits that were not made."""

    def __init__(self, captured: Captured, heads: Mapping[Address, FoundHead]) -> None:
        self.captured, self.heads = captured, heads
        self.attention_call = captured.attention_call

    def head(self, address: Address) -> Head | None:
        """The head that makes the logits at ``address``, with its input; ``None`` where the logits themselves were captured."""
        if address not in self.heads:
            return None
        found = self.heads[address]
        return found.on(self.captured[found.path][found.input.key])

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        return self.captured[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.captured)

    def __len__(self) -> int:
        return len(self.captured)


@dataclass(frozen=True, slots=True)
class Recorders:
    """The recorders of one distiller: of its student, and of each teacher by name."""

    student: Recorder
    teachers: Mapping[str | None, Recorder]
    elsewhere: Sequence[Address] = ()
    """What the student is asked for besides the tensors that are compared: masks and targets."""

    def clear(self) -> None:
        """Let every tensor go."""
        for recorder in (self.student, *self.teachers.values()):
            recorder.clear()

    def close(self) -> None:
        """Take the hooks off all models."""
        for recorder in (self.student, *self.teachers.values()):
            recorder.close()
