"""Every address that a model offers: how a user finds out what to write."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from .addresses import ATTENTION_WORDS, parse
from .attention import AttentionCall, AttentionRecorder
from .batches import Inputs, given_inputs
from .paths import forward_signature, has_forward, module_paths, resolve, unwrap
from .running import device_of, undisturbed
from .selection import Parameters, tensors
from .tables import table


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OutlineRow:
    """One address, and what it gave in the forward of the example."""

    address: str
    module: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    calls: int
    """How often the module ran; more than once needs a call index, as in ``@0``."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outline:
    """The addresses of a model in the order of its modules; ``print(outline)`` shows them as a table."""

    rows: tuple[OutlineRow, ...]
    silent: tuple[str, ...]
    """Modules that did not run, so that nothing can be captured from them."""

    def __len__(self) -> int:
        return len(self.rows)

    def addresses(self) -> list[str]:
        """The addresses alone."""
        return [row.address for row in self.rows]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""
        return {"addresses": [dataclasses.asdict(row) for row in self.rows], "silent": list(self.silent)}

    def __str__(self) -> str:
        cells = [
            (
                row.address,
                row.module,
                str(list(row.shape)),
                row.dtype,
                _size(row.bytes),
                f"×{row.calls}" if row.calls > 1 else "",
            )
            for row in self.rows
        ]
        lines = table(("address", "module", "shape", "dtype", "size", "calls"), cells, right=("size", "calls"))
        never = f"\n\nnever called: {', '.join(self.silent)}" if self.silent else ""
        return lines + never


def outline(model: nn.Module, example_inputs: Any, *, pattern: str | None = None, inputs: bool = False) -> Outline:
    """Run ``model`` once and list every address it offers; the list is printed too.

    The forward leaves no trace: eval mode, no gradients, and the random state put back.

    Args:
        example_inputs: a dict of keywords, a tuple of arguments, or one tensor.
        pattern: an address without a selector; only modules that it names are listed, as in ``"encoder.layer.*.**"``.
        inputs: list what modules are called with as well, as ``path:input.name``.

    Raises:
        AddressError: ``pattern`` names nothing.
    """
    made = survey(model, example_inputs, pattern=pattern, inputs=inputs)
    sys.stdout.write(f"{made}\n")
    return made


def survey(model: nn.Module, example_inputs: Any, *, pattern: str | None = None, inputs: bool = False) -> Outline:
    """What `outline` does, without printing."""
    listed = dict.fromkeys(found.path for found in resolve(model, parse(pattern))) if pattern is not None else None
    watcher = _Watcher(model)
    watcher.run(given_inputs(example_inputs).to(device_of(model)))
    rows, silent = [], []
    for path, module in module_paths(model).items():
        if (listed is not None and path not in listed) or not has_forward(unwrap(module)):
            continue
        seen = watcher.seen.get(id(module))
        if seen is None:
            silent.append(path)
        else:
            rows += _rows(path, module, seen, inputs=inputs)
    return Outline(tuple(rows), tuple(silent))


@dataclasses.dataclass(slots=True)
class _Seen:
    """What one module returned and was called with in its first call, how often it ran, and the attention inside it."""

    outputs: list[tuple[str, Tensor]]
    inputs: list[tuple[str, Tensor]]
    calls: int = 1
    attention: AttentionCall | None = None


class _Watcher:
    """One forward with a hook on every module. Shapes are read at once; no tensor is kept."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[int, _Seen] = {}

    def run(self, inputs: Inputs) -> None:
        modules = {id(module): module for module in module_paths(self.model).values()}
        handles = [module.register_forward_hook(self.saw, with_kwargs=True) for module in modules.values()]
        recorder = AttentionRecorder()
        calls: list[AttentionCall] = []
        try:
            with undisturbed(self.model):
                recorder.start()
                try:
                    self.model(*inputs.args, **inputs.kwargs)
                finally:
                    calls = recorder.stop()
        finally:
            for handle in handles:
                handle.remove()
        self.place(calls)

    def saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (seen := self.seen.get(id(module))) is not None:
            seen.calls += 1
            return
        names = Parameters.of(forward_signature(module))
        passed = [(_argument(names, i), value) for i, value in enumerate(args)]
        passed += [(f".{name}", value) for name, value in kwargs.items()]
        arguments = [(name + where, _picture(tensor)) for name, value in passed for where, tensor in tensors(value)]
        self.seen[id(module)] = _Seen([(where, _picture(tensor)) for where, tensor in tensors(output)], arguments)

    def place(self, calls: Sequence[AttentionCall]) -> None:
        """Attention belongs to each module in which exactly one ran."""
        paths = module_paths(self.model)
        inside: Counter[int] = Counter()
        within: dict[int, AttentionCall] = {}
        for call in calls:
            for module in _enclosing(paths, call.module):
                inside[id(module)] += 1
                within[id(module)] = call
        for key, count in inside.items():
            if count == 1 and key in self.seen:
                self.seen[key].attention = within[key]


def _enclosing(paths: dict[str, nn.Module], inner: nn.Module | None) -> Iterable[nn.Module]:
    own = next((path for path, module in paths.items() if unwrap(module) is inner), None)
    if own is None:
        return []
    above = {id(m): m for path, m in paths.items() if own == path or own.startswith(f"{path}.") or not path}
    return above.values()


def _argument(names: Parameters, position: int) -> str:
    return f".{names.positional[position]}" if position < len(names.positional) else f"[{position}]"


def _picture(tensor: Tensor) -> Tensor:
    """Shape and dtype without the values."""
    return tensor.detach().to("meta") if not tensor.is_nested and not tensor.is_sparse else tensor


def _rows(path: str, module: nn.Module, seen: _Seen, *, inputs: bool) -> list[OutlineRow]:
    kind = type(unwrap(module)).__name__
    named = [(f"{path}:output{where}" if where or not path else path, tensor) for where, tensor in seen.outputs]
    if inputs:
        named += [(f"{path}:input{where}", tensor) for where, tensor in seen.inputs]
    rows = [_row(address, kind, tensor, seen.calls) for address, tensor in named]
    if seen.attention is not None:
        query, key = seen.attention.query, seen.attention.key
        maps = query.new_empty((*query.shape[:-1], key.shape[-2]), device="meta")
        shown = {"attention": maps, "attention_scores": maps, "query": query, "key": key, "value": seen.attention.value}
        rows += [_row(f"{path}:{word}", kind, shown[word], seen.calls) for word in ATTENTION_WORDS]
    return rows


def _row(address: str, kind: str, tensor: Tensor, calls: int) -> OutlineRow:
    size = tensor.numel() * tensor.element_size()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return OutlineRow(address=address, module=kind, shape=tuple(tensor.shape), dtype=dtype, bytes=size, calls=calls)


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
