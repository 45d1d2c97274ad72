"""The ways to get at inner tensors that are compared: two baselines, hookdistill, and other libraries where they are installed.

Each is a context: attached on entry, detached on leaving, so that a run of forwards inside it shows the cost while it stands.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

import hookdistill

Names = Sequence[str]


class Attached(NamedTuple):
    """``forward`` runs the model on ids and gives its last hidden state; ``tensors`` what that forward left, in order."""

    forward: Callable[[Tensor], Tensor]
    tensors: Callable[[], list[Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Approach:
    """One way to capture. ``prepare`` makes a copy of the model for those who change it for good."""

    name: str
    attach: Callable[[Any, Names], AbstractContextManager[Attached]]
    needs: str | None = None
    prepare: Callable[[nn.Module], Any] | None = None
    modes: tuple[str, ...] = ("forward", "training step")
    layers_only: bool = False


NONE, CONTROL, BARE, OURS = "no hooks", "no hooks, again", "bare hooks", "hookdistill"


@contextmanager
def no_hooks(model: nn.Module, names: Names) -> Iterator[Attached]:
    yield Attached(lambda ids: model(ids).last_hidden_state, list)


@contextmanager
def bare_hooks(model: nn.Module, names: Names) -> Iterator[Attached]:
    """The least that a hook can do: store a reference."""
    seen: dict[str, Any] = {}

    def store(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(store(name)) for name in names]
    try:
        yield Attached(lambda ids: model(ids).last_hidden_state, lambda: [one_tensor(seen[name]) for name in names])
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def ours(model: nn.Module, names: Names) -> Iterator[Attached]:
    with hookdistill.Capture(model, names) as captured:
        yield Attached(
            lambda ids: model(ids).last_hidden_state,
            lambda: [captured[name]["output"] for name in names],
        )


@contextmanager
def ours_read(model: nn.Module, names: Names) -> Iterator[Attached]:
    """The forward, and then the look-up of every tensor, which is where an overwritten one would be noticed."""
    with ours(model, names) as (run, tensors):
        got: list[Tensor] = []

        def forward(ids: Tensor) -> Tensor:
            got.clear()
            last_hidden_state = run(ids)
            got[:] = tensors()
            return last_hidden_state

        yield Attached(forward, lambda: got)


class _Retainer:
    """A hook that is placed when made and keeps the output, as ``Trace`` of baukit does."""

    def __init__(self, model: nn.Module, name: str) -> None:
        module = next(module for path, module in model.named_modules() if path == name)
        self.output: Any = None
        self.handle = module.register_forward_hook(self.retain)

    def retain(self, module: nn.Module, args: Any, output: Any) -> Any:
        self.output = output
        return output


@contextmanager
def hooks_per_forward(model: nn.Module, names: Names) -> Iterator[Attached]:
    """Paths are looked up, hooks placed and removed again, around every forward: baukit's ``with TraceDict(…)``."""
    retainers: list[_Retainer] = []

    def forward(ids: Tensor) -> Tensor:
        retainers[:] = [_Retainer(model, name) for name in names]
        try:
            return model(ids).last_hidden_state
        finally:
            for retainer in retainers:
                retainer.handle.remove()

    yield Attached(forward, lambda: [one_tensor(retainer.output) for retainer in retainers])


@contextmanager
def hidden_states(model: nn.Module, names: Names) -> Iterator[Attached]:
    got: list[Tensor] = []

    def forward(ids: Tensor) -> Tensor:
        got.clear()
        output = model(ids, output_hidden_states=True)
        got[:] = output.hidden_states[1:]
        return output.last_hidden_state

    yield Attached(forward, lambda: got)


@contextmanager
def torchdistill(model: nn.Module, names: Names) -> Iterator[Attached]:
    manager = torchdistill_manager()(next(model.parameters()).device)
    for name in names:
        manager.add_hook(model, name, requires_input=False, requires_output=True)
    try:
        yield Attached(
            lambda ids: model(ids).last_hidden_state,
            lambda: [one_tensor(io["output"]) for io in manager.pop_io_dict().values()],
        )
    finally:
        manager.clear()


def torchdistill_manager() -> Any:
    """``torchdistill.core`` imports torchvision when it is first touched; its hook manager needs torch alone."""
    try:
        return importlib.import_module("torchdistill.core.forward_hook").ForwardHookManager
    except ImportError:
        package = importlib.import_module("torchdistill")
        core = types.ModuleType("torchdistill.core")
        core.__path__ = [str(Path(package.__path__[0]) / "core")]
        sys.modules[core.__name__] = core
        return importlib.import_module("torchdistill.core.forward_hook").ForwardHookManager


@contextmanager
def torchextractor(model: nn.Module, names: Names) -> Iterator[Attached]:
    extractor = importlib.import_module("torchextractor").Extractor(model, list(names))

    def forward(ids: Tensor) -> Tensor:
        return extractor(ids)[0].last_hidden_state

    try:
        yield Attached(forward, lambda: [one_tensor(extractor.feature_maps[name]) for name in names])
    finally:
        for handle in extractor.hook_handles:
            handle.remove()


def _nnsight_model(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # BERT has submodules called "output", which nnsight renames
        return importlib.import_module("nnsight").NNsight(copy.deepcopy(model))


@contextmanager
def nnsight(model: Any, names: Names) -> Iterator[Attached]:
    save = importlib.import_module("nnsight").save
    by_module = {id(envoy._module): envoy for envoy in model.modules()}
    envoys = [by_module[id(model._module.get_submodule(name))] for name in names]
    got: list[Any] = []

    def forward(ids: Tensor) -> Tensor:
        got.clear()
        with model.trace(ids):
            saved = save([*(envoy.output for envoy in envoys), model.output])
        *got[:], output = saved
        return output.last_hidden_state

    yield Attached(forward, lambda: [one_tensor(each) for each in got])


@contextmanager
def torchlens(model: nn.Module, names: Names) -> Iterator[Attached]:
    lens = importlib.import_module("torchlens")
    selected = reduce(or_, map(lens.module, names))
    got: list[Tensor] = []

    def forward(ids: Tensor) -> Tensor:
        got.clear()
        output, recording = lens.record(model, ids, save=selected, return_output=True)
        got[:] = [record.ram_payload for record in recording.records]
        return output.last_hidden_state

    yield Attached(forward, lambda: got)


def one_tensor(output: Any) -> Tensor:
    """The output itself, or the first element of a tuple: attention modules give ``(tensor, None)``."""
    return output if isinstance(output, Tensor) else output[0]


APPROACHES = {
    approach.name: approach
    for approach in (
        Approach(name=NONE, attach=no_hooks),
        Approach(name=CONTROL, attach=no_hooks),
        Approach(name=BARE, attach=bare_hooks),
        Approach(name=OURS, attach=ours),
        Approach(name=f"{OURS}, tensors read", attach=ours_read, modes=("forward",)),
        Approach(name="hooks placed per forward", attach=hooks_per_forward),
        Approach(
            name="transformers hidden_states",
            attach=hidden_states,
            prepare=copy.deepcopy,  # its hooks stay for good
            layers_only=True,
        ),
        Approach(name="torchdistill", attach=torchdistill, needs="torchdistill"),
        Approach(name="torchextractor", attach=torchextractor, needs="torchextractor", prepare=copy.deepcopy),
        Approach(name="nnsight", attach=nnsight, needs="nnsight", prepare=_nnsight_model),
        Approach(
            name="torchlens record", attach=torchlens, needs="torchlens", prepare=copy.deepcopy, modes=("forward",)
        ),  # what it records has no gradient
    )
}


def installed() -> tuple[list[Approach], dict[str, str]]:
    """Those that can be run here, and why the others cannot."""
    usable, left_out = [], {}
    for approach in APPROACHES.values():
        try:
            if approach.needs:
                importlib.import_module(approach.needs)
        except Exception as error:  # a broken dependency of a peer is no reason to stop
            left_out[approach.name] = f"not installed ({error})"
        else:
            usable.append(approach)
    return usable, left_out
