"""From a recipe to models, data, distiller and trainer, ready to run."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader

from ..distiller import Distiller
from ..errors import HookDistillError, MatchError, RecipeError
from ..evaluation import Evaluator
from ..files import write_text
from ..initialization import initialize_student
from ..layer_similarity import Similarity, similarity
from ..matches import Match
from ..plan import Plan
from ..store import Keep, TeacherStore
from ..training import Trainer
from . import document as documents
from .batching import Collate
from .comparing import build_match, named_matches, unknown_keys
from .document import Document, Location
from .importing import look_in
from .measuring import build_evaluator
from .models import build_model, first_source, resolved
from .optimizing import optimizer, scheduler
from .problems import explain
from .rows import read_rows, split
from .schema import MatchItem, NamedMatches, OldMatch, Recipe

Made = TypeVar("Made")

RESOLVED = "recipe.yaml"
"""In the folder of a run: every setting, defaults and overrides included."""


def load(path: str | os.PathLike[str], *, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> Run:
    """Read and check a recipe file; nothing is built yet.

    Args:
        overrides: assignments such as ``"trainer.lr=3e-5"``; the value is YAML.
        environment: variables such as ``HOOKDISTILL__TRAINER__LR``, which overrides outdo; default: the process's.

    Raises:
        RecipeError: every mistake that can be seen without building anything, at most five.
    """
    document = documents.read(Path(path))
    documents.override(document, overrides, os.environ if environment is None else environment)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise RecipeError(explain(error, document)) from error
    for place in reversed(recipe.import_from):
        look_in(resolved(place, document.folder))
    return Run(recipe, document)


@dataclass
class Run:
    """A recipe, and what it names, each built when it is first asked for.

    Raises:
        RecipeError: something cannot be built; the message has file, line and key.
    """

    recipe: Recipe
    document: Document

    @cached_property
    def teacher(self) -> nn.Module | dict[str, nn.Module] | None:
        """The teacher, or the teachers by name."""
        seed = self.recipe.trainer.seed
        if self.recipe.teacher is not None:
            spec = self.recipe.teacher
            return self._built(("teacher",), lambda: build_model(spec, self.document.folder, seed=seed + 1))
        teachers = {
            name: self._built(("teachers", name), lambda s=spec, i=i: build_model(s, self.document.folder, seed=seed + 1 + i))  # type: ignore[misc]
            for i, (name, spec) in enumerate(self.recipe.teachers.items())
        }
        return teachers or None

    @cached_property
    def student(self) -> nn.Module:
        """The student as the training starts with it."""
        student = self._built(
            ("student",), lambda: build_model(self.recipe.student, self.document.folder, seed=self.recipe.trainer.seed)
        )
        start = self.recipe.initialize
        if start is not None:
            teacher = self.teacher
            assert isinstance(teacher, nn.Module)
            options: dict[str, Any] = start.model_dump()
            self._built(("initialize",), lambda: initialize_student(teacher, student, **options))
        return student

    @cached_property
    def loaders(self) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
        """Batches to train on, and to measure on."""
        data, folder, seed = self.recipe.data, self.document.folder, self.recipe.trainer.seed
        train: Any = self._built(("data", "train"), lambda: read_rows(data.train, folder))
        held_out: Any = None
        if data.eval is not None:
            spec = data.eval
            held_out = self._built(("data", "eval"), lambda: read_rows(spec, folder))
        if data.hold_out is not None:
            if isinstance(train, DataLoader):
                raise RecipeError(f"{self.document.where(('data', 'hold_out'))}: data.hold_out needs rows, not a DataLoader")
            whole, count = train, data.hold_out
            train, held_out = self._built(("data", "hold_out"), lambda: split(whole, count, seed=seed))
        return self._loader(train, training=True), self._loader(held_out, training=False)

    @cached_property
    def collate(self) -> Collate:
        """What makes a batch of rows, with the tokenizer and the image processor."""
        return self._built(("data",), self._collate)

    @cached_property
    def matches(self) -> list[Match]:
        """The entries."""
        named = self.recipe.matches
        if isinstance(named, NamedMatches):
            return self._built(("matches",), lambda: named_matches(named, self.teacher, self.student))
        return [self._match(i, item) for i, item in enumerate(named)]

    @cached_property
    def distiller(self) -> Distiller:
        """Student, matches and teacher in one module."""
        matches = self.matches
        teacher = self.teacher if self.recipe.store is None else self.store
        with self._matches():
            return Distiller(teacher, self.student, matches)

    @cached_property
    def store(self) -> TeacherStore:
        """The teacher's tensors on disk, as `cache` has written them; the teacher itself is not loaded."""
        spec = self.recipe.store
        assert spec is not None
        place = Path(spec.path)
        if not place.exists():
            raise RecipeError(
                f"{self.document.where(('store',))}: store.path: there is no store {spec.path!r} yet. Write it with "
                f"hookdistill cache {self.document.name}"
            )
        return self._built(("store",), lambda: TeacherStore.open(place, transforms=self._transforms()))

    def cache(self, *, progress: bool = True) -> TeacherStore:
        """Run the teacher once over all rows, and write what the matches need of it to ``store.path``.

        Raises:
            RecipeError: the recipe has no store, or what it names cannot be built.
        """
        spec = self.recipe.store
        if spec is None:
            raise RecipeError(f"{self.document.name} has no key store; give store: {{path: a-folder}}")
        teacher, data = self.teacher, self.recipe.data
        assert isinstance(teacher, nn.Module)
        loaders = [loader for loader in self._built(("data",), self._unshuffled) if loader is not None]
        keep = {address: Keep(**item.model_dump(exclude_none=True)) for address, item in spec.keep.items()}
        return self._built(
            ("store",),
            lambda: TeacherStore.build(
                spec.path,
                teacher,
                self.matches,
                itertools.chain(*loaders) if data.eval is not None or data.hold_out is not None else loaders[0],
                key=spec.key,
                keep=keep or None,
                student=self.student,
                transforms=self._transforms(),
                shard_bytes=spec.shard_bytes,
                seed=self.recipe.trainer.seed,
                progress=progress,
            ),
        )

    def similarity(self, *, batches: int | None = None) -> Similarity:
        """The CKA between the layers of both models, over the rows to train on."""
        if not isinstance(self.teacher, nn.Module):
            raise RecipeError("similarity compares the student with one teacher; the recipe has none, or several")
        teacher = self.teacher
        return self._built(("data",), lambda: similarity(teacher, self.student, self.loaders[0], batches=batches))

    def plan(self) -> Plan:
        """What will be compared, from one dry forward of the first batch."""
        distiller = self.distiller
        with torch.random.fork_rng():
            torch.manual_seed(self.recipe.trainer.seed)  # of the batch, and of the adapters that are made
            batch = self._built(("data",), lambda: next(iter(self.loaders[0])))
            with self._matches():
                return distiller.plan(batch)

    @cached_property
    def evaluators(self) -> list[Evaluator]:
        """What measures the held-out rows."""
        return [
            self._built(("evaluators", i), lambda item=item: build_evaluator(item, self.document.folder))  # type: ignore[misc]
            for i, item in enumerate(self.recipe.evaluators)
        ]

    def check(self) -> Plan:
        """The plan, and a look at all that a training would need later: a batch to measure on, evaluators, the optimizer."""
        made, spec = self.plan(), self.recipe.trainer
        if (held_out := self.loaders[1]) is not None:
            self._built(("data",), lambda: next(iter(held_out)))
        self._built(("trainer", "optimizer"), lambda: optimizer(spec.optimizer, lr=spec.lr))
        _ = self.evaluators
        return made

    @cached_property
    def trainer(self) -> Trainer:
        """The trainer; its plan is made already, so that mistakes in matches are found here."""
        spec = self.recipe.trainer
        self.plan()
        train, held_out = self.loaders
        return self._built(
            ("trainer",),
            lambda: Trainer(
                self.distiller,
                train,
                eval_loader=held_out,
                optimizer=optimizer(spec.optimizer, lr=spec.lr),
                scheduler=scheduler(spec.scheduler),
                epochs=spec.epochs,
                max_steps=spec.max_steps,
                accumulate=spec.accumulate,
                clip_norm=spec.clip_norm,
                mixed_precision=spec.mixed_precision,
                evaluators=self.evaluators,
                evaluate_every=spec.evaluate_every,
                best=spec.best,
                higher_is_better=spec.higher_is_better,
                output_dir=self.output_dir,
                patience=spec.patience,
                load_best_at_end=spec.load_best_at_end,
                save_every=spec.save_every,
                keep_last=spec.keep_last,
                quick_resume=spec.quick_resume,
                gradient_checkpointing=spec.gradient_checkpointing,
                compile=spec.compile,
                teacher_device=spec.teacher_device,
                ema=spec.ema,
                balance=spec.balance,
                on_nonfinite=spec.on_nonfinite,
                progress=spec.progress,
                log_every=spec.log_every,
                trackers=spec.trackers,
                project=spec.project,
                report=spec.report,
                seed=spec.seed,
                deterministic=spec.deterministic,
            ),
        )

    @property
    def output_dir(self) -> Path | None:
        """Where the run goes, relative to the working directory."""
        return None if self.recipe.trainer.output_dir is None else Path(self.recipe.trainer.output_dir)

    def resolved(self) -> str:
        """The recipe as YAML with every default, and paths that hold from anywhere: it gives the same run again."""
        data = self.recipe.model_dump(mode="json", by_alias=True)
        if not isinstance(self.recipe.matches, NamedMatches):
            data["matches"] = [item.model_dump(mode="json", exclude_none=True) for item in self.recipe.matches]
        _absolute(data, self.document.folder)
        return f"# torch {torch.__version__}, hookdistill {_version()}\n{documents.dump(data)}"

    def save(self) -> Path | None:
        """Write the resolved recipe into the folder of the run, if it has one."""
        if self.output_dir is None:
            return None
        self.output_dir.mkdir(parents=True, exist_ok=True)
        file = self.output_dir / RESOLVED
        write_text(file, self.resolved())
        return file

    def _match(self, position: int, item: MatchItem | OldMatch) -> Match:
        folder = self.document.folder
        with self.document.at("matches", position):
            for key, problem in unknown_keys(item, folder).items():
                with self.document.at("matches", position, key):
                    raise RecipeError(problem)
            return build_match(item, folder)

    def _unshuffled(self) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
        """The same rows in their own order, none left out."""
        data = self.recipe.data.model_copy(update={"shuffle": False, "drop_last": False})
        return Run(self.recipe.model_copy(update={"data": data}), self.document).loaders

    def _transforms(self) -> dict[str, Any] | None:
        found = {"tokenizer": self.collate.tokenizer, "processor": self.collate.processor}
        return {name: each for name, each in found.items() if each is not None} or None

    def _collate(self) -> Collate:
        recipe = self.recipe
        models = [recipe.student, recipe.teacher, *recipe.teachers.values()]
        trusted = any(each is not None and each.trust_remote_code for each in models)
        return Collate(recipe.data, self.document.folder, source=first_source(models), trust_remote_code=trusted)

    def _loader(self, rows: Any, *, training: bool) -> Any:
        data = self.recipe.data
        if rows is None or isinstance(rows, DataLoader):
            return rows
        return DataLoader(
            rows,
            batch_size=data.batch_size if training else data.eval_batch_size or data.batch_size,
            shuffle=training and data.shuffle,
            drop_last=training and data.drop_last,
            num_workers=data.workers,
            collate_fn=self.collate,
            persistent_workers=data.workers > 0,
        )

    def _built(self, location: Location, build: Callable[[], Made]) -> Made:
        """What ``build`` makes; its errors say which part of the recipe they come from."""
        with self.document.at(*location):
            return build()

    def _headless(self, error: str) -> str:
        """A hint, where an output is missing that models with a head have and these may not."""
        specs = {"teacher": self.recipe.teacher, "student": self.recipe.student}
        bare = [role for role, spec in specs.items() if spec is not None and not spec.architecture and not spec.factory]
        if "has no leaf" not in error or not bare:
            return ""
        kinds = " and ".join(f"{role} is a {type(getattr(self, role)).__name__}" for role in bare)
        return f" The {kinds}; a class with a head is chosen by {bare[0]}.architecture, as in AutoModelForCausalLM"

    def _without_loss(self, location: Location) -> str:
        """A hint, where the loss is one that nobody chose."""
        items = self.recipe.matches
        if len(location) < 2 or isinstance(items, NamedMatches) or "loss" in items[int(location[1])].model_fields_set:
            return ""
        return " (There is no key loss in it, so it is mse)"

    @contextlib.contextmanager
    def _matches(self) -> Iterator[None]:
        """Errors of the distiller say which entry of the recipe they come from."""
        try:
            yield
        except MatchError as error:
            location: Location = ("matches",)
            for position, match in enumerate(self.matches):
                named = isinstance(self.recipe.matches, NamedMatches)
                if not named and str(error).startswith((f"{match.label}:", f"{match.label} #")):
                    location = ("matches", position)
            with self.document.at(*location):
                raise MatchError(f"{error}{self._headless(str(error))}{self._without_loss(location)}") from error
        except HookDistillError:
            with self.document.at("data"):
                raise


def _version() -> str:
    from .. import __version__

    return __version__


def _absolute(data: dict[str, Any], folder: Path) -> None:
    """Paths that the recipe's folder explains, so that a copy elsewhere finds the same files."""
    data["import_from"] = [str(folder), *(str(resolved(each, folder).absolute()) for each in data["import_from"])]
    models: list[Any] = [data["teacher"], data["student"], *data["teachers"].values()]
    for model in models:
        for key in ("pretrained", "config", "weights"):
            if model is not None and model[key] is not None and (place := resolved(model[key], folder)).exists():
                model[key] = str(place.resolve())
    for source in (data["data"]["train"], data["data"]["eval"]):
        if source is None:
            continue
        for key in ("files", "dataset", "arrays"):
            source[key] = _absolute_paths(source[key], folder, always=key != "dataset")
    for section, key in (("text", "tokenizer"), ("image", "processor")):
        part = data["data"][section]
        if part is not None and part[key] is not None and (place := resolved(part[key], folder)).exists():
            part[key] = str(place.resolve())


def _absolute_paths(value: Any, folder: Path, *, always: bool) -> Any:
    if isinstance(value, list):
        return [_absolute_paths(each, folder, always=always) for each in value]
    if value is None or not (always or resolved(value, folder).exists()):
        return value
    return str(resolved(value, folder).absolute())
