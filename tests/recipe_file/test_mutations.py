"""Every key of every shipped recipe, misspelt, mistyped or missing: an error of one screen that tells the mend."""

import copy
import re
from pathlib import Path

import pytest

from hookdistill import RecipeError
from hookdistill.recipe_file import load
from hookdistill.recipe_file.document import dump, read

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
LINES, COLUMNS = 24, 400


def places(data, location=()):
    """Every key and every position of a list, with what leads to it."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*location, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*location, key))


def parent(data, location):
    for key in location[:-1]:
        data = data[key]
    return data


def misspelt(key):
    """Two letters in the middle swapped, or one doubled."""
    middle = len(key) // 2
    swapped = key[: middle - 1] + key[middle] + key[middle - 1] + key[middle + 1 :]
    return swapped if swapped != key and len(key) > 3 else key + key[-1]


class Recipes:
    """The shipped recipes as data, with models and files that are there, in a folder of their own."""

    def __init__(self, folder, tiny_bert, sentences):
        self.folder = folder
        for module in RECIPES[0].parent.glob("*.py"):
            (folder / module.name).write_text(module.read_text(encoding="utf-8"), encoding="utf-8")
        self.tiny_bert, self.sentences = tiny_bert, sentences
        load(self.write(self.small(RECIPES[0].parent / "digits_teacher.yaml")), environment={}).trainer.train()

    def small(self, file):
        data = read(file).data
        data["trainer"].update(progress=False, output_dir=str(self.folder / "runs" / file.stem))
        if file.stem == "digits_student":
            data["teacher"]["weights"] = str(self.folder / "runs" / "digits_teacher" / "last")
        elif file.stem == "digits_teacher":
            data["trainer"]["max_steps"] = 2
        elif file.stem == "minilm":
            data["teacher"]["pretrained"] = data["student"]["pretrained"] = str(self.tiny_bert)
            data["data"]["train"]["files"] = str(self.sentences)
        return data

    def write(self, data, name="recipe.yaml"):
        file = self.folder / name
        file.write_text(dump(data), encoding="utf-8")
        return file

    def error(self, data, *, build=True):
        """What planning the recipe raises; None if it is a good one."""
        try:
            run = load(self.write(data), environment={})
            if build:
                run.plan()
        except RecipeError as error:
            return str(error)
        return None


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, tiny_bert, sentences):
    return Recipes(tmp_path_factory.mktemp("recipes"), tiny_bert, sentences)


def check(message, location, file="recipe.yaml"):
    """One screen, with the file, a line of it, and the key."""
    lines = message.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS * 2
    assert re.search(rf"{file}, line \d+", message), message
    assert str(location[-1]) in message, message
    assert "Traceback" not in message


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_as_it_is_it_can_be_planned(recipes, file):
    assert recipes.error(recipes.small(file)) is None


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_key_misspelt(recipes, file):
    good = recipes.small(file)
    for location in places(good):
        if not isinstance(location[-1], str):
            continue
        bad = copy.deepcopy(good)
        within = parent(bad, location)
        wrong = misspelt(location[-1])
        items = [(wrong if key == location[-1] else key, value) for key, value in within.items()]
        within.clear()
        within.update(items)
        message = recipes.error(bad)
        assert message is not None, location
        check(message, (*location[:-1], wrong))
        assert re.search(rf"[Dd]id you mean [^?]*'{re.escape(location[-1])}'", message), (location, message)


WRONG = {dict: "words", list: {"no": "list"}, str: {"no": "words"}, int: "many", float: "much", bool: "maybe"}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_value_mistyped(recipes, file):
    good = recipes.small(file)
    for location in places(good):
        bad = copy.deepcopy(good)
        within = parent(bad, location)
        within[location[-1]] = WRONG[type(within[location[-1]])]
        message = recipes.error(bad)
        assert message is not None, (location, within[location[-1]])
        check(message, [key for key in location if isinstance(key, str)])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_key_missing(recipes, file):
    """It has a default, or the message names it."""
    good = recipes.small(file)
    for location in places(good):
        if not isinstance(location[-1], str):
            continue
        bad = copy.deepcopy(good)
        within = parent(bad, location)
        del within[location[-1]]
        sizes = "arguments" in location and "config" in parent(bad, location[: location.index("arguments") + 1])
        message = recipes.error(bad, build=not sizes)  # for the sizes of transformers' defaults are those of 2018 or 7 billion
        if message is not None:
            check(message, location)
