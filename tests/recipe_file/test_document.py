"""Reading YAML and JSON with lines, and what is laid over it."""

import pytest

from hookdistill import RecipeError
from hookdistill.recipe_file.document import dump, override, parse_value, read


def test_numbers_and_words_are_those_of_yaml_1_2(write):
    text = "a: 3e-5\nb: no\nc: 2020-01-01\nd: 1:30\ne: true\nf: ~\ng: .5\nh: 0o7\ni: on\nj: -2\n"
    assert read(write(text)).data == {
        "a": 3e-5,
        "b": "no",
        "c": "2020-01-01",
        "d": "1:30",
        "e": True,
        "f": None,
        "g": 0.5,
        "h": "0o7",
        "i": "on",
        "j": -2,
    }


@pytest.mark.parametrize("value", ["3e-5", "no", "null", "1:30", "2020-01-01", "~", "true", "", " x", "a: b", 3e-5, None, [1]])
def test_what_is_dumped_is_read_back(write, value):
    assert read(write(dump({"key": value, "list": [value]}))).data == {"key": value, "list": [value]}


def test_lines_in_yaml_and_json(write):
    document = read(write("a:\n  b: 1\n  c:\n  - 1\n  - d: 2\n"))
    assert [document.lines[each] for each in (("a",), ("a", "b"), ("a", "c"), ("a", "c", 1), ("a", "c", 1, "d"))] == [
        1,
        2,
        3,
        5,
        5,
    ]
    document = read(write('{\n\t"a": {\n\t\t"b": [1,\n 2]}}', "recipe.json"))
    assert document.data == {"a": {"b": [1, 2]}}
    assert [document.lines[each] for each in (("a",), ("a", "b"), ("a", "b", 1))] == [2, 3, 4]


def test_anchors_and_merges(write):
    document = read(write("a: &x\n  lr: 1\n  k: 2\nb:\n  <<: *x\n  lr: 3\n"))
    assert document.data["b"] == {"lr": 3, "k": 2}


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("a: 1\nb: [1\n", "r.yaml", r"r\.yaml, line 3: no YAML"),
        ("a: 1\na: 2\n", "r.yaml", r"line 2: the key 'a' stands here and in line 1"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml", r"line 1: no YAML: could not determine a constructor"),
        ("a: &x [*x]\n", "r.yaml", r"contains itself"),
        ("1: a\n", "r.yaml", r"line 1: the key '1' is no word"),
        ("- a\n", "r.yaml", r"is a list; a recipe is a mapping"),
        ("", "r.yaml", r"is empty; a recipe is a mapping"),
        ("a:\n\tb: 1\n", "r.yaml", r"line 2: no YAML"),
        ('{"a": 1,}', "r.json", r"r\.json, line 1: no JSON"),
        ('{"a": 1, "a": 2}', "r.json", r"the key 'a' stands twice"),
    ],
)
def test_a_file_that_is_none_says_where(write, text, name, says):
    with pytest.raises(RecipeError, match=says):
        read(write(text, name))


def test_a_file_that_is_not_there_names_the_nearest(write):
    there = write("a: 1", "digits.yaml")
    with pytest.raises(RecipeError, match=r"Did you mean 'digits\.yaml'"):
        read(there.with_name("digit.yaml"))


def test_overrides_come_after_the_environment(write):
    document = read(write("trainer: {lr: 1, seed: 2}\nmatches: [{loss: a}]\n"))
    environment = {"HOOKDISTILL__TRAINER__LR": "3e-5", "HOOKDISTILL__DATA__TRAIN__ROWS": "4", "OTHER": "1"}
    override(document, ["trainer.lr=1e-4", "matches.0.loss=kl", "matches.0.mask=null"], environment)
    assert document.data == {
        "trainer": {"lr": 1e-4, "seed": 2},
        "matches": [{"loss": "kl", "mask": None}],
        "data": {"train": {"rows": 4}},
    }
    assert document.where(("matches", 0, "loss")) == "--set matches.0.loss=kl"
    assert document.where(("data", "train", "rows")) == "environment variable HOOKDISTILL__DATA__TRAIN__ROWS"
    assert document.where(("trainer", "seed")).endswith("recipe.yaml, line 1")


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("trainer.lr", "is no assignment"),
        ("=1", "is no assignment"),
        ("matches.2.loss=kl", "is a list of 1"),
        ("trainer.lr.x=1", "which has no 'x' in it"),
        ("trainer.lr=[1", "is no YAML value"),
    ],
)
def test_an_override_that_is_none(write, assignment, says):
    document = read(write("trainer: {lr: 1}\nmatches: [{loss: a}]\n"))
    with pytest.raises(RecipeError, match=says):
        override(document, [assignment], {})


def test_one_value():
    assert parse_value("{a: [1, 2e3]}") == {"a": [1, 2000.0]}
