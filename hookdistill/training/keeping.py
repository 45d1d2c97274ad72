"""The best student, kept as it was so that the training can end with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..distiller import Distiller
from ..errors import CheckpointError
from ..export import writing
from ..files import write_folder
from ..sharding import like, whole_state
from .states import read_state, write_state

if TYPE_CHECKING:
    from accelerate import Accelerator

_NAME = "best-state"


class BestStudent:
    """The weights of student and adapters at the best evaluation: on the disk where there is a place, else in memory."""

    def __init__(self, folder: Path | None, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.state: dict[str, Any] | None = None

    def keep(self, distiller: Distiller) -> None:
        """This one is the best so far; every process calls this."""
        state = whole_state(distiller)
        if self.folder is None:
            self.state = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        elif self.accelerator.is_main_process:
            with writing(self.folder / _NAME, CheckpointError):
                write_folder(self.folder / _NAME, lambda folder: write_state(state, folder, "model"))

    def load(self, distiller: Distiller) -> None:
        """Put the weights back; every process calls this."""
        state = self.state if self.folder is None else read_state(self.folder / _NAME, "model")
        if state is not None:
            own = distiller.state_dict()
            distiller.load_state_dict({name: like(tensor, own[name]) for name, tensor in state.items()})
