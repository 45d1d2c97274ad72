"""The rows that a recipe names: files, data sets, arrays, or what a function of the user's returns."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import RecipeError, did_you_mean, listing
from .importing import call
from .models import resolved
from .schema import Source

Row = dict[str, Any]


class Rows(Dataset[Row]):
    """Rows by number, renamed and cut as the recipe says; ``rows[i]`` reads one."""

    def __init__(self, rows: Any, source: Source) -> None:
        self.rows = rows
        self.rename = dict(source.rename)
        self.length = len(rows) if source.rows is None else min(source.rows, len(rows))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Row:
        row = self.rows[position]
        if not isinstance(row, Mapping):
            raise RecipeError(f"row {position} is a {type(row).__name__}; rows are dicts of columns")
        return {self.rename.get(str(name), str(name)): value for name, value in row.items()}


class Columns(Dataset[Row]):
    """Arrays of one length as rows."""

    def __init__(self, columns: Mapping[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, position: int) -> Row:
        return {name: column[position] for name, column in self.columns.items()}


def read_rows(source: Source, folder: Path) -> Rows | DataLoader[Any]:
    """The rows of a source; a DataLoader that a factory returns comes back as it is.

    Raises:
        RecipeError: they cannot be read, or there are none.
    """
    if source.files is not None:
        rows: Any = _from_files([source.files] if isinstance(source.files, str) else source.files, folder)
    elif source.arrays is not None:
        rows = Columns(_arrays(resolved(source.arrays, folder)))
    elif source.dataset is not None:
        rows = _dataset(source, folder)
    else:
        assert source.factory is not None
        rows = call(source.factory, folder, source.arguments)
        if isinstance(rows, DataLoader):
            return rows
        if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
            kind = type(rows).__name__
            raise RecipeError(
                f"{source.factory} returned a {kind}; it must be a list of dicts, a Dataset with a length or a DataLoader"
            )
    if not len(rows):
        raise RecipeError("there are no rows")
    found = Rows(rows, source)
    _check_columns(found, source)
    return found


def split(rows: Rows, hold_out: int, *, seed: int) -> tuple[Dataset[Row], Dataset[Row]]:
    """Rows to train on and rows to measure on, drawn by the seed.

    Raises:
        RecipeError: nothing would be left.
    """
    if hold_out >= len(rows):
        raise RecipeError(f"hold_out is {hold_out}, but there are {len(rows)} rows; none would be left to train on")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(rows, sorted(order[hold_out:])), Subset(rows, sorted(order[:hold_out]))


def _check_columns(rows: Rows, source: Source) -> None:
    there = list(rows.rows[0])
    if unknown := [name for name in source.rename if name not in there]:
        hint = did_you_mean(unknown[0], map(str, there))
        raise RecipeError(f"rename: there is no column {unknown[0]!r}.{hint} Columns are {listing(map(str, there))}")


def _from_files(patterns: Sequence[str], folder: Path) -> list[Row]:
    rows: list[Row] = []
    for pattern in patterns:
        path = resolved(pattern, folder)
        files = [path] if path.is_file() else [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        if not files:
            near = did_you_mean(path.name, (each.name for each in path.parent.glob("*")))
            raise RecipeError(f"no file {pattern!r}; relative paths start at the folder of the recipe, {folder}.{near}")
        for file in files:
            rows += _reader(file)(file)
    return rows


def _reader(file: Path) -> Callable[[Path], list[Row]]:
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    if suffix not in _READERS:
        raise RecipeError(f"{file.name}: rows are read from {listing(_READERS)}, also with .gz behind, not from {suffix!r}")
    return _READERS[suffix]


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}") from error


def _json_lines(file: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{file}, line {number}: no JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise RecipeError(f'{file}, line {number}: a row is an object such as {{"text": …}}, not a {type(row).__name__}')
        rows.append(row)
    return rows


def _json(file: Path) -> list[Row]:
    try:
        rows = json.loads(_text(file))
    except json.JSONDecodeError:
        return _json_lines(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return _json_lines(file)
    return rows


def _separated(delimiter: str) -> Callable[[Path], list[Row]]:
    def read(file: Path) -> list[Row]:
        reader = csv.DictReader(io.StringIO(_text(file), newline=""), delimiter=delimiter, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    wide = len(reader.fieldnames or ())
                    raise RecipeError(f"{file}, line {reader.line_num}: this row has not the {wide} fields of the header")
                rows.append(dict(row))
        except csv.Error as error:
            raise RecipeError(f"{file}, line {reader.line_num}: {error}") from error
        return _numbers(rows)

    return read


def _lines(file: Path) -> list[Row]:
    return [{"text": line} for line in _text(file).splitlines() if line.strip()]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
}


def _numbers(rows: list[Row]) -> list[Row]:
    """Columns of which every value is a number, as numbers."""
    for name in rows[0] if rows else ():
        for kind in (int, float):
            try:
                values = [kind(row[name]) for row in rows]
            except ValueError:
                continue
            for row, value in zip(rows, values, strict=True):
                row[name] = value
            break
    return rows


def _arrays(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        near = did_you_mean(file.name, (each.name for each in file.parent.glob("*")))
        raise RecipeError(f"no file {str(file)!r}.{near}")
    try:
        columns = dict(_loaded(file))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    lengths = {name: len(column) if column.dim() else None for name, column in columns.items()}
    if not columns or len(set(lengths.values())) > 1 or None in lengths.values():
        raise RecipeError(f"{file}: arrays are columns, so all must have one length; theirs are {lengths}")
    return columns


def _loaded(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        yield from load_file(file).items()
    elif file.suffix == ".npz":
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                yield name, torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
    else:
        raise RecipeError(f"arrays are read from .npz and .safetensors, not from {file.name!r}")


def _dataset(source: Source, folder: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RecipeError("dataset needs the datasets library: pip install 'hookdistill[datasets]'") from error
    assert source.dataset is not None
    place = resolved(source.dataset, folder)
    try:
        if (place / "state.json").exists() or (place / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(place))
            if source.split is not None:
                if not isinstance(found, Mapping) or source.split not in found:
                    parts = list(found) if isinstance(found, Mapping) else []
                    hint = did_you_mean(source.split, parts)
                    raise RecipeError(f"the data set has no part {source.split!r}.{hint} It has {listing(parts)}")
                found = found[source.split]
        else:
            name = str(place) if place.exists() else source.dataset
            found = datasets.load_dataset(name, source.subset, split=source.split)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"the data set {source.dataset!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if isinstance(found, Mapping):
        raise RecipeError(f"the data set {source.dataset!r} has several parts; choose one as split: {listing(found)}")
    return found
