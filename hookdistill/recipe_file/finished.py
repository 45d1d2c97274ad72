"""A student of a run that is over: measured, or written out to be used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, did_you_mean, listing
from ..evaluation import ADAPTERS, LOSS_MODULES, Evaluation, measure
from ..evaluators import HeldOutLosses
from ..export import save_student
from ..files import write_into
from ..running import undisturbed
from .assembly import RESOLVED, load
from .models import load_weights

WHICH = ("best", "last")
DTYPES = ("float32", "bfloat16", "float16")


def recipe_of(folder: str | os.PathLike[str]) -> Path:
    """The recipe that was saved with a run.

    Raises:
        RecipeError: it is no folder of a run.
    """
    place = Path(folder)
    if not (place / RESOLVED).exists():
        what = "there is no such folder" if not place.exists() else f"there is no {RESOLVED} in it"
        raise RecipeError(f"{str(place)!r} is not the folder of a run: {what}. A run's folder is its trainer.output_dir")
    return place / RESOLVED


class Finished:
    """The run in a folder, with a student of it loaded.

    Args:
        folder: the ``output_dir`` of the run.
        which: ``"best"`` or ``"last"``; ``None``: the best, where there is one.

    Raises:
        RecipeError: it is no such folder, or the student does not fit the recipe that lies there.
    """

    def __init__(self, folder: str | os.PathLike[str], *, which: str | None = None, overrides: Iterable[str] = ()) -> None:
        place = Path(folder)
        file = recipe_of(folder)
        there = [name for name in WHICH if (place / name).is_dir()]
        if which not in (None, *WHICH):
            raise RecipeError(f"which={which!r} is no student of a run.{did_you_mean(str(which), WHICH)} It is best or last")
        if not there or which not in (None, *there):
            raise RecipeError(f"the run in {str(place)!r} has no student {which or 'best or last'!r}; it has {listing(there)}")
        self.folder = place / (which or there[0])
        self.run = load(file, overrides=overrides, environment={})
        load_weights(self.run.student, self.folder)

    def measure(self) -> Mapping[str, float]:
        """What the recipe's evaluators measure.

        Raises:
            RecipeError: the recipe keeps no rows to measure on.
        """
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, is_initialized

        run, first = self.run, not is_initialized()
        _, loader = run.loaders
        if loader is None:
            raise RecipeError("the recipe has no rows to measure on; give data.eval by --set, as in --set data.eval.files=…")
        run.plan()
        for modules, name in ((run.distiller.adapters, ADAPTERS), (run.distiller.loss.loss_modules, LOSS_MODULES)):
            if (self.folder / name).exists():
                load_weights(modules, self.folder / name)
        evaluators = [*run.evaluators] or [HeldOutLosses()]
        accelerator = Accelerator(mixed_precision=run.recipe.trainer.mixed_precision)
        try:
            run.distiller.to(accelerator.device)
            evaluation = Evaluation(
                student=run.student,
                distiller=run.distiller,
                loader=accelerator.prepare_data_loader(loader),
                device=accelerator.device,
                accelerator=accelerator,
                step=0,
                epoch=0,
            )
            with undisturbed(run.distiller):
                return measure(evaluators, evaluation).metrics
        finally:
            run.distiller.close()
            if first:  # or a training in this process could not choose another precision
                AcceleratorState._reset_state()

    def export(self, folder: str | os.PathLike[str], *, dtype: str | None = None) -> list[Path]:
        """Write the student, and its tokenizer or image processor beside it; gives the files.

        Raises:
            RecipeError: ``dtype`` is none of `DTYPES`.
        """
        if dtype not in (None, *DTYPES):
            raise RecipeError(f"dtype={dtype!r} is not known.{did_you_mean(str(dtype), DTYPES)} It is one of {listing(DTYPES)}")
        if dtype is not None:
            self.run.student.to(getattr(torch, dtype))
        save_student(self.run.student, folder)
        collate = self.run.collate
        for part in (collate.tokenizer, collate.processor):
            if part is not None:
                write_into(folder, _saving(part))
        return sorted(each for each in Path(folder).rglob("*") if each.is_file())


def _saving(part: Any) -> Any:
    return lambda folder: part.save_pretrained(folder)
