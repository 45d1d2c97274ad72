"""Small models, tokenizers and data files for recipes."""

import json
from pathlib import Path

import pytest

from tiny_models import lines, save_tiny_bert


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> Path:
    """A folder with a BERT of 6 layers and a tokenizer of whole words."""
    return save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A text file, a sentence a line, of different lengths."""
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("\n".join(lines(300)), encoding="utf-8")
    return file


@pytest.fixture
def write(tmp_path):
    """Writes a recipe, as text or as data, and gives its path."""

    def writes(recipe, name="recipe.yaml"):
        file = tmp_path / name
        file.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe, indent=1), encoding="utf-8")
        return file

    return writes
