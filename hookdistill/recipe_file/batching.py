"""From rows to batches: text is tokenized, images are prepared, labels are numbered, numbers become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import RecipeError, did_you_mean, listing
from .models import local_or_id, resolved
from .rows import Row
from .schema import Data, Image, Labels, Text

Batch = dict[str, Tensor]


class Collate:
    """A list of rows as a batch.

    Columns of text that no ``text`` names are left out; all other columns must be numbers of one shape.
    """

    def __init__(self, data: Data, folder: Path, *, source: str | None, trust_remote_code: bool) -> None:
        self.folder = folder
        self.text, self.image, self.labels = data.text, data.image, data.labels
        self.tokenizer = _tokenizer(self.text, folder, source, trust_remote_code) if self.text is not None else None
        self.processor = _processor(self.image, folder, source, trust_remote_code) if self.image is not None else None
        self.numbers = {name: number for number, name in enumerate((self.labels.names if self.labels else None) or ())}

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Raises a `RecipeError` that names the column."""
        batch: Batch = {}
        used: set[str] = set()
        if self.text is not None:
            used.update(self.text.columns)
            batch.update(self._tokens(self.text, rows))
        if self.image is not None:
            used.add(self.image.column)
            batch["pixel_values"] = self._pixels(self.image, rows)
        if self.labels is not None:
            used.add(self.labels.column)
            batch["labels"] = torch.tensor([self._label(self.labels, row) for row in rows])
        for name in rows[0]:
            if name not in used and not isinstance(rows[0][name], (str, bytes, type(None), dict)):
                batch[name] = _stacked(name, [row.get(name) for row in rows])
        if not batch:
            raise RecipeError(
                f"nothing of a row becomes a tensor; its columns are {listing(rows[0])}. Text needs data.text, images need "
                "data.image"
            )
        return batch

    def _tokens(self, text: Text, rows: Sequence[Row]) -> Batch:
        assert self.tokenizer is not None
        columns = [[str(value) for value in _column(rows, name, "data.text.columns")] for name in text.columns]
        tokens = self.tokenizer(
            *columns, padding=text.padding, truncation=True, max_length=text.max_length, return_tensors="pt"
        )
        return dict(tokens)

    def _pixels(self, image: Image, rows: Sequence[Row]) -> Tensor:
        assert self.processor is not None
        images = [self._opened(value) for value in _column(rows, image.column, "data.image.column")]
        pixels: Tensor = self.processor(images, return_tensors="pt")["pixel_values"]
        return pixels

    def _opened(self, value: Any) -> Any:
        from PIL import Image as Pillow

        if isinstance(value, str):
            with Pillow.open(resolved(value, self.folder)) as file:
                return file.convert("RGB")
        if isinstance(value, (np.ndarray, Tensor)):
            array = np.asarray(value)
            return np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array
        return value.convert("RGB") if hasattr(value, "convert") else np.asarray(value)

    def _label(self, labels: Labels, row: Row) -> int:
        (value,) = _column([row], labels.column, "data.labels.column")
        if labels.names is None:
            try:
                return int(value)
            except (TypeError, ValueError) as error:
                raise RecipeError(
                    f"column {labels.column!r} has the label {value!r}; give data.labels.names, the classes in order"
                ) from error
        if value not in self.numbers:
            hint = did_you_mean(str(value), labels.names)
            raise RecipeError(f"column {labels.column!r} has the label {value!r}, which is none of data.labels.names.{hint}")
        return self.numbers[value]


def _column(rows: Sequence[Row], name: str, key: str) -> list[Any]:
    if name not in rows[0]:
        hint = did_you_mean(name, rows[0])
        raise RecipeError(f"{key}: there is no column {name!r}.{hint} Columns are {listing(rows[0])}")
    return [row[name] for row in rows]


def _stacked(name: str, values: list[Any]) -> Tensor:
    try:
        arrays = [value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) for value in values]
        stacked = torch.stack(arrays)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"column {name!r} does not become a tensor: {error}") from error
    return stacked.float() if stacked.dtype == torch.float64 else stacked


def _tokenizer(text: Text, folder: Path, source: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    name = text.tokenizer or source
    if name is None:
        raise RecipeError("data.text needs a tokenizer: no model of this recipe has one, so give data.text.tokenizer")
    tokenizer = _loaded(AutoTokenizer, name, folder, "data.text.tokenizer", trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, whatever its token
    return tokenizer


def _processor(image: Image, folder: Path, source: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoImageProcessor

    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise RecipeError("data.image needs Pillow: pip install pillow") from error
    name = image.processor or source
    if name is None:
        raise RecipeError("data.image needs an image processor: no model of this recipe has one, so give data.image.processor")
    return _loaded(AutoImageProcessor, name, folder, "data.image.processor", trust_remote_code)


def _loaded(kind: Any, name: str, folder: Path, key: str, trust_remote_code: bool) -> Any:
    try:
        return kind.from_pretrained(local_or_id(name, folder), trust_remote_code=trust_remote_code)
    except RecipeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise RecipeError(f"nothing to load from {name!r} for {key}: {type(error).__name__}: {reason}") from error
