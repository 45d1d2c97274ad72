"""The pages agree with the program: keys of recipes, commands, the list of pages; YAML on them is read."""

import pkgutil
import re
from pathlib import Path

import pytest
import typer
import yaml

import hookdistill
from hookdistill.cli import app
from hookdistill.recipe_file.document import parse_value
from hookdistill.recipe_file.editors import reference
from hookdistill.recipe_file.schema import MatchItem, NamedMatches, Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"```yaml(?: title=\"recipe.yaml\")?\n(.*?)```", re.DOTALL)
RECIPES = [(page, block) for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(name for entry in settings["nav"] for name in entry.values()) == [page.name for page in PAGES]


def test_the_api_page_has_every_public_name_and_no_other():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: hookdistill\.(\S+)", page, re.MULTILINE)
    for name in shown:
        pkgutil.resolve_name(f"hookdistill.{name}")
    functions_and_classes = {name for name in hookdistill._HOMES if not name.endswith("Error")} - {"TrainerInterrupted"}
    assert functions_and_classes <= {name.rpartition(".")[2] for name in shown}


def test_the_table_of_keys_is_up_to_date():
    """If not, write `hookdistill.recipe_file.editors.reference()` below the comment on the page."""
    _, found, table = (ROOT / "docs" / "recipe-file.md").read_text(encoding="utf-8").partition("is out of date -->\n\n")
    assert found
    assert table == reference()


@pytest.mark.parametrize(("page", "block"), RECIPES, ids=lambda value: getattr(value, "stem", None))
def test_recipes_on_the_pages_are_recipes(page, block):
    data = parse_value(block)
    if "student" in data:
        Recipe.model_validate(data)
    elif isinstance(data["matches"], dict):
        NamedMatches.model_validate(data["matches"])
    else:
        for item in data["matches"]:
            MatchItem.model_validate(item)


def test_there_are_recipes_on_the_pages():
    assert len(RECIPES) >= 3


def test_the_page_on_commands_has_them_all():
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    assert set(re.findall(r"^\| `(\w+)", page, re.MULTILINE)) == {*commands}


def test_links_between_pages_and_to_examples_lead_somewhere():
    for page in [ROOT / "README.md", *PAGES]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), (page.name, link)
        for example in re.findall(r"\bexamples/[\w/.-]+\.(?:py|yaml)\b", page.read_text(encoding="utf-8")):
            assert (ROOT / example).exists(), (page.name, example)
