"""The state of a run: written into a checkpoint and taken from one, so that what follows is the same to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..distiller import Distiller
from ..errors import CheckpointError
from ..randomness import random_state
from ..sharding import gathered, like
from .checkpoints import find_checkpoint, step_of
from .states import check_packable, read_state, write_state
from .strategies import Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .loop import Run


def collect(run: Run, position: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a run has come to, by the name of the file it goes into; every process has to ask.

    Args:
        position: where each process is in its data.
    """
    accelerator, keep = run.accelerator, run.accelerator.is_main_process
    ranks = [{"random": random_state(accelerator.device), "passes": dict(position)}]
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        ranks = gather_object(ranks)
    return {
        "model": gathered(dict(run.settings.distiller.state_dict()), keep),
        "optimizer": run.strategy.optimizer_state(keep=keep),
        **({"average": gathered(run.average.state_dict(), keep)} if run.average is not None else {}),
        "run": {
            "identity": identity(run),
            "progress": run.progress(),
            "scheduler": run.scheduler.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "ranks": ranks,
        },
    }


def write(states: Mapping[str, Any], folder: Path) -> None:
    """Write what `collect` gave into an empty folder."""
    for name, state in states.items():
        write_state(state, folder, name)


def check_can_be_saved(run: Run) -> None:
    """Raise a `CheckpointError` now rather than at the first checkpoint, where a state is of a kind that cannot be saved."""
    check_packable(run.torch_optimizer.state_dict(), name="optimizer")
    check_packable(run.scheduler.state_dict(), name="scheduler")
    check_packable(dict(run.settings.distiller.state_dict()), name="model")


def read_position(checkpoint: Path, accelerator: Accelerator) -> dict[str, Any]:
    """What this process was at: its random state and its place in the data.

    Raises:
        CheckpointError: it was saved by another number of processes.
    """
    ranks = read_state(checkpoint, "run")["ranks"]
    if len(ranks) != accelerator.num_processes:
        raise CheckpointError(
            f"the checkpoint {str(checkpoint)!r} was saved by {len(ranks)} processes and this run has "
            f"{accelerator.num_processes}, among which the data would be divided otherwise. Start as many"
        )
    return dict(ranks[accelerator.process_index])


def restore(run: Run, checkpoint: Path) -> None:
    """Bring a run that is ready for its first step to where the checkpoint was saved.

    Raises:
        CheckpointError: the checkpoint is of another run.
    """
    saved = read_state(checkpoint, "run")
    check_identity({"strategy": Strategy.name, **saved["identity"]}, identity(run), checkpoint)
    distiller = run.settings.distiller
    _load_model(distiller, read_state(checkpoint, "model"))
    run.strategy.load_optimizer_state(read_state(checkpoint, "optimizer"))
    run.scheduler.load_state_dict(saved["scheduler"])
    if run.accelerator.scaler is not None and saved["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    if run.average is not None:
        own = run.average.state_dict()
        state = read_state(checkpoint, "average")
        run.average.load_state_dict({name: like(state[name], tensor) for name, tensor in own.items()})
    run.take_progress(saved["progress"], checkpoint)


def load_checkpoint(distiller: Distiller, path: str | os.PathLike[str]) -> int:
    """Give student, adapters and losses the weights of a checkpoint; returns its step.

    Args:
        distiller: one whose adapters exist, as after ``distiller.plan(batch)``.
        path: a checkpoint, or the output folder of a run, whose newest whole one is taken.

    Raises:
        CheckpointError: there is none, it is damaged, or of another distiller.
    """
    found = find_checkpoint(None, Path(path))
    if found is None:
        raise CheckpointError(f"there is no checkpoint in {os.fspath(path)!r}")
    state, own = read_state(found, "model"), distiller.state_dict()
    theirs = {name: list(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    ours = {name: list(value.shape) for name, value in own.items() if isinstance(value, Tensor)}
    check_identity({"weights": theirs}, {"weights": ours}, found)
    _load_model(distiller, state)
    return step_of(found)


def identity(run: Run) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped."""
    settings = run.settings
    return {
        "optimizer steps in all": run.total,
        "accumulate": run.accumulate,
        "processes": run.accelerator.num_processes,
        "mixed_precision": run.accelerator.mixed_precision,
        "batches of a pass": run.passes.length,
        "seed": settings.seed,
        "matches": {name: term.spec.name for name, term in settings.distiller.loss.terms.items()},
        "parameters": {name: list(each.shape) for name, each in settings.distiller.named_parameters()},
        "optimizer": type(run.torch_optimizer).__name__,
        "groups of parameters": [len(group["params"]) for group in run.torch_optimizer.param_groups],
        "scheduler": type(run.scheduler).__name__,
        "ema": run.average is not None,
        "balance": type(run.balance).__name__,
        "strategy": run.strategy.name,
    }


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise a `CheckpointError` that lists the differences, if there are any."""
    differences = []
    for name, ours in own.items():
        theirs = saved.get(name)
        if theirs == ours:
            continue
        if isinstance(theirs, dict) and isinstance(ours, dict):
            keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
            shown = ", ".join(f"{key}: {theirs.get(key, 'none')} then, {ours.get(key, 'none')} now" for key in keys[:3])
            differences.append(f"{name} ({shown}{', …' if len(keys) > 3 else ''})")
        else:
            differences.append(f"{name} ({theirs} then, {ours} now)")
    if differences:
        raise CheckpointError(
            f"the checkpoint {str(checkpoint)!r} is of another run, which this one cannot go on with. They differ in: "
            f"{'; '.join(differences)}. Make the settings alike; or start a new run, from the old student if you like, whose "
            "weights are in output_dir/last and output_dir/best"
        )


def _load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    model.load_state_dict(
        {name: like(value, own[name]) if isinstance(value, Tensor) else value for name, value in state.items()}
    )
