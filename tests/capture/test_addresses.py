"""The grammar of addresses: one canonical spelling, and errors with a caret."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hookdistill import AddressError
from hookdistill.addresses import ATTENTION_WORDS, SELECTOR_WORDS, Address, Segment, Step, parse

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
plain = st.one_of(names, st.integers(-20, 20).map(str), st.sampled_from(["layer-1", "größe", "a b".replace(" ", "_")]))
items = st.one_of(
    st.integers(0, 30).map(str),
    st.tuples(st.integers(-5, 5), st.integers(0, 5)).map(lambda r: f"{r[0]}..{r[0] + r[1]}"),
    names,
)
braces = st.lists(items, min_size=1, max_size=3).map(lambda each: "{" + ",".join(each) + "}")
segments = st.one_of(
    plain,
    st.sampled_from(["*", "**"]),
    braces,
    st.tuples(names, braces).map("".join),
    st.tuples(names, braces, braces).map("".join),
)
paths = st.lists(segments, max_size=4).map(".".join)
steps = st.lists(
    st.one_of(
        names.map(lambda n: f".{n}"),
        st.integers(-9, 99).map(lambda n: f"[{n}]"),
        st.text(max_size=5).map(lambda key: f"[{json.dumps(key)}]"),
        st.text(max_size=5).map(lambda key: f"[{json.dumps(key, ensure_ascii=False)}]"),
    ),
    max_size=3,
).map("".join)
selectors = st.one_of(
    st.just(""),
    st.tuples(st.sampled_from(["output", "input"]), steps).map(lambda s: ":" + "".join(s)),
    st.sampled_from(ATTENTION_WORDS).map(lambda word: f":{word}"),
    st.tuples(names.filter(lambda n: n not in SELECTOR_WORDS), steps).map(lambda s: ":" + "".join(s)),
    steps.filter(lambda s: s.startswith("[")).map(lambda s: f":{s}"),
)
calls = st.one_of(st.just(""), st.just("@*"), st.integers(-9, 99).map(lambda n: f"@{n}"))
addresses = st.tuples(paths, selectors, calls).map("".join)


@given(addresses)
def test_every_address_has_one_spelling_that_reads_back_as_the_same_record(text):
    address = parse(text)
    spelled = str(address)
    assert parse(spelled) == address
    assert str(parse(spelled)) == spelled
    assert (address.path, address.key) == (parse(spelled).path, parse(spelled).key)


@given(st.text(max_size=20))
def test_any_text_is_an_address_or_an_error_that_shows_where(text):
    try:
        address = parse(text)
    except AddressError as error:
        first, second = str(error).split("\n")[:2]
        assert json.dumps(text, ensure_ascii=False) in first
        assert second.lstrip(" ").startswith("^ ")
    else:
        assert parse(str(address)) == address


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", Address()),
        ("encoder.layer.3", Address((Segment("encoder"), Segment("layer"), Segment("3")))),
        (":logits", {"steps": (Step("name", "logits"),), "short": True}),
        (":output.logits", {"steps": (Step("name", "logits"),), "short": False}),
        (':output["p2"].feats[0]', {"steps": (Step("key", "p2"), Step("name", "feats"), Step("index", 0))}),
        (":output['p2']", {"steps": (Step("key", "p2"),)}),
        (":[1]", {"steps": (Step("index", 1),), "short": True}),
        ("a:attention_scores@-1", {"word": "attention_scores", "call": -1}),
        ("a@*", {"call": "*"}),
    ],
)
def test_what_an_address_means(text: str, expected: Any):
    address = parse(text)
    if isinstance(expected, Address):
        assert address == expected
        return
    call = expected.pop("call", None)
    assert address.call == call
    for field, value in expected.items():
        assert getattr(address.selector, field) == value


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a{1..3}", ("a1", "a2", "a3")),
        ("{0,3,5}", ("0", "3", "5")),
        ("{-2..1}", ("-2", "-1", "0", "1")),
        ("{a,b}x{1,2}", ("ax1", "ax2", "bx1", "bx2")),
        ("{0,2..4}", ("0", "2", "3", "4")),
        ("*", ()),
        ("x", ("x",)),
    ],
)
def test_braces_spell_out_names(text, names):
    (segment,) = parse(text).segments
    assert segment.names == names


@pytest.mark.parametrize(
    ("text", "at", "says"),
    [
        ("layer[0]", 5, "a leaf of a container is a selector"),
        ("layer*", 5, "'*' stands for a whole segment"),
        ("***", 0, "'*' stands for a whole segment"),
        ("a..b", 2, "expected the name of a module"),
        ("a.", 2, "expected the name of a module"),
        ("a b", 1, "cannot stand in a module path"),
        ("{3..0}", 1, "runs backwards"),
        ("{1,", 0, "never closed"),
        ("a:", 2, "expected a selector"),
        ("a:output.0", 9, r"brackets: \[0\]"),
        ("a:output[x]", 9, "an index such as"),
        ("a:output[1", 10, r"expected '\]'"),
        ('a:output["x]', 9, "never closed"),
        ("a:attention[0]", 11, "one tensor and has no leaves"),
        ("a@", 2, "the number of a call"),
        ("a@x", 2, "the number of a call"),
        ("a@1x", 3, "expected ':', '@' or the end"),
        ("a@1:output", 3, "expected ':', '@' or the end"),
    ],
)
def test_errors_point_at_the_place(text, at, says):
    with pytest.raises(AddressError, match=says) as error:
        parse(text)
    first, second = str(error.value).split("\n")[:2]
    caret = second.index("^")
    start = first.index('"') + 1
    if "{3..0}" not in text:
        assert caret == start + at


@pytest.mark.parametrize("value", [3, None, b"x", ["layer"]])
def test_an_address_is_a_string(value):
    with pytest.raises(AddressError, match="an address is a string"):
        parse(value)
