"""Students that are kept: the last one and the best one on the disk, and the weights to end with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distiller import Distiller
from ..errors import CheckpointError
from ..evaluation import save
from ..export import writing
from ..files import write_folder
from ..sharding import is_sharded, like, whole_state
from .processes import first_process
from .states import read_state, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator

_BEST_STATE = "best-state"


class Students:
    """Saves students in the output folder, where there is one; every process calls every method.

    Args:
        load_best_at_end: keep the best weights of student and adapters besides: on the disk where there is a place, else in
            memory.
    """

    def __init__(self, distiller: Distiller, folder: Path | None, accelerator: Accelerator, *, load_best_at_end: bool) -> None:
        self.distiller, self.folder, self.accelerator = distiller, folder, accelerator
        self.load_best_at_end = load_best_at_end
        self.best_state = None if folder is None else folder / "checkpoints" / _BEST_STATE
        self._in_memory: dict[str, Any] | None = None

    def save(self, name: str) -> None:
        """Write the student as it is to the folder ``name``.

        Raises:
            ExportError: the disk is full, or the folder cannot be written.
        """
        if self.folder is None:
            return
        folder = self.folder / name
        if is_sharded(self.distiller):
            save(self.distiller, folder, first=self.accelerator.is_main_process, replace=True)
        else:
            first_process(self.accelerator, lambda: save(self.distiller, folder, replace=True))

    def save_best(self) -> None:
        """This one is the best so far."""
        self.save("best")
        if not self.load_best_at_end:
            return
        state, place = whole_state(self.distiller), self.best_state
        if place is None:
            self._in_memory = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
            return

        def write() -> None:
            with writing(place, CheckpointError):
                write_folder(place, lambda folder: write_state(state, folder, "model"))

        first_process(self.accelerator, write)

    def load_best(self) -> None:
        """Give student and adapters the best weights, if that was asked for and there are any."""
        if not self.load_best_at_end:
            return
        state = self._in_memory
        if self.best_state is not None and self.best_state.is_dir():
            state = read_state(self.best_state, "model")
        if state is not None:
            own = self.distiller.state_dict()
            self.distiller.load_state_dict({name: like(tensor, own[name]) for name, tensor in state.items()})
