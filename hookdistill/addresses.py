"""The grammar of addresses: ``<module path>[:<selector>][@<call>]``.

Strings in, records out; nothing here knows a model, a hook or a tensor.

    encoder.layer.3                 the output of that module (its first tensor)
    encoder.layer.{0..11}.mlp       twelve modules; also {0,3,5}, layer{1..4}, *, **, -1
    backbone:output["p2"].feats[0]  a leaf of a container
    :logits                         short for :output.logits on the model itself
    layers.0.self_attn:input.hidden_states
    albert.layer@-1                 the last of several calls; @* is the list of all
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal, NoReturn

from .errors import AddressError, did_you_mean

ATTENTION_WORDS = ("attention", "attention_scores", "query", "key", "value")
SELECTOR_WORDS = ("output", "input", *ATTENTION_WORDS)

_RESERVED = set(".:@{}[]*\"'")
_INTEGER = re.compile(r"-?\d+")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_LARGEST_RANGE = 10_000


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a module path: a name, ``*``, ``**``, or a brace group spelled out in ``choices``."""

    text: str
    choices: tuple[str, ...] = ()

    @property
    def several(self) -> bool:
        """Whether the segment may stand for more than one module."""
        return self.text in ("*", "**") or "{" in self.text

    @property
    def names(self) -> tuple[str, ...]:
        """The literal names it stands for; empty for ``*`` and ``**``."""
        if self.text in ("*", "**"):
            return ()
        return self.choices or (self.text,)


@dataclass(frozen=True, slots=True)
class Step:
    """One step from a container to a leaf: ``.name``, ``[index]`` or ``["key"]``."""

    kind: Literal["name", "index", "key"]
    value: str | int

    def __str__(self) -> str:
        if self.kind == "name":
            return f".{self.value}"
        return f"[{json.dumps(self.value, ensure_ascii=False)}]"


@dataclass(frozen=True, slots=True)
class Selector:
    """Which tensor of a module: one of `SELECTOR_WORDS`, then the steps to a leaf."""

    word: str = "output"
    steps: tuple[Step, ...] = ()
    short: bool = False
    """Written without the word, as ``:logits`` for ``:output.logits``."""

    def __str__(self) -> str:
        steps = "".join(map(str, self.steps))
        return steps.removeprefix(".") if self.short else self.word + steps


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed address. ``str()`` gives its canonical spelling, which parses to an equal record."""

    segments: tuple[Segment, ...] = ()
    selector: Selector = Selector()
    call: int | Literal["*"] | None = None

    @property
    def path(self) -> str:
        """The module path as written."""
        return ".".join(segment.text for segment in self.segments)

    @property
    def key(self) -> str:
        """What a capture files the tensor under: the selector, and the call where one was written."""
        return str(self.selector) if self.call is None else f"{self.selector}@{self.call}"

    @property
    def several(self) -> bool:
        """Whether the address may name more than one module."""
        return any(segment.several for segment in self.segments)

    def __str__(self) -> str:
        selector = "" if self.selector == Selector() and self.segments else f":{self.selector}"
        call = "" if self.call is None else f"@{self.call}"
        return f"{self.path}{selector}{call}"


def parse(text: str) -> Address:
    """Read an address.

    Raises:
        AddressError: with a caret under the place where the grammar was left.
    """
    if not isinstance(text, str):
        raise AddressError(
            f"an address is a string such as 'encoder.layer.3' or ':logits', got {type(text).__name__}: {text!r}"
        )
    return _Parser(text).address()


class _Parser:
    """A cursor over the text; every method reads one construct and leaves the cursor behind it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def address(self) -> Address:
        segments = self.path()
        selector = self.selector() if self.take(":") else Selector()
        call = self.call() if self.take("@") else None
        if self.at < len(self.text):
            self.fail(f"expected ':', '@' or the end, found {self.text[self.at]!r}")
        return Address(segments, selector, call)

    def path(self) -> tuple[Segment, ...]:
        if not self.text or self.peek() in (":", "@"):
            return ()
        segments = [self.segment()]
        while self.take("."):
            segments.append(self.segment())
        return tuple(segments)

    def segment(self) -> Segment:
        start = self.at
        if self.take("**"):
            segment = Segment("**")
        elif self.take("*"):
            segment = Segment("*")
        else:
            return self.literal_or_braces()
        if self.peek() not in ("", ".", ":", "@"):
            self.at = start
            self.fail("'*' stands for a whole segment of the path; for part of a name use braces, as in layer{1..4}")
        return segment

    def literal_or_braces(self) -> Segment:
        text, choices = "", [""]
        while (ch := self.peek()) not in ("", ".", ":", "@"):
            if ch == "{":
                canonical, items = self.braces()
                text += canonical
                choices = [head + item for head in choices for item in items]
            elif ch == "*":
                self.fail("'*' stands for a whole segment of the path; for part of a name use braces, as in layer{1..4}")
            elif ch in _RESERVED or ch.isspace():
                hint = "; a leaf of a container is a selector, after ':'" if ch == "[" else ""
                self.fail(f"{ch!r} cannot stand in a module path{hint}")
            else:
                text += ch
                choices = [head + ch for head in choices]
                self.at += 1
        if not text:
            self.fail("expected the name of a module" + ("" if self.at else " or ':'"))
        return Segment(text, tuple(choices) if "{" in text else ())

    def braces(self) -> tuple[str, list[str]]:
        start = self.at
        end = self.text.find("}", start)
        if end < 0:
            self.fail("this '{' is never closed; ranges look like {0..11}, lists like {0,3,5}")
        items: list[str] = []
        written: list[str] = []
        for raw in self.text[start + 1 : end].split(","):
            item = raw.strip()
            written.append(item)
            items += self.brace_item(item)
        self.at = end + 1
        return "{" + ",".join(written) + "}", items

    def brace_item(self, item: str) -> list[str]:
        if found := _RANGE.fullmatch(item):
            low, high = int(found[1]), int(found[2])
            if low > high:
                self.fail(f"the range {item} runs backwards; write {high}..{low}")
            if high - low >= _LARGEST_RANGE:
                self.fail(f"the range {item} holds more than {_LARGEST_RANGE} numbers")
            return [str(number) for number in range(low, high + 1)]
        if not item or ".." in item or any(ch in _RESERVED or ch.isspace() for ch in item):
            self.fail(f"cannot read {item!r} in braces; ranges look like {{0..11}}, lists like {{0,3,5}}")
        return [item]

    def selector(self) -> Selector:
        if self.peek() == "[":
            return Selector(steps=self.steps(), short=True)
        word = self.name("a selector: " + ", ".join(SELECTOR_WORDS) + ", or a leaf of the output")
        if word not in SELECTOR_WORDS:
            return Selector(steps=(Step("name", word), *self.steps()), short=True)
        if word in ATTENTION_WORDS and self.peek() in (".", "["):
            self.fail(f"{word!r} is one tensor and has no leaves; a field of that name is output.{word}")
        return Selector(word, self.steps())

    def steps(self) -> tuple[Step, ...]:
        steps: list[Step] = []
        while True:
            if self.take("."):
                steps.append(Step("name", self.name("the name of a leaf")))
            elif self.take("["):
                steps.append(self.bracket())
            else:
                return tuple(steps)

    def name(self, expected: str) -> str:
        start = self.at
        while (ch := self.peek()) and ch not in _RESERVED and not ch.isspace():
            self.at += 1
        word = self.text[start : self.at]
        if not word.isidentifier():
            self.at = start
            if word.isdigit():
                self.fail(f"an element is chosen with brackets: [{word}]")
            self.fail(f"expected {expected}")
        return word

    def bracket(self) -> Step:
        if (quote := self.peek()) in ('"', "'"):
            step = Step("key", self.quoted(quote))
        else:
            step = Step("index", self.integer('an index such as [1], or a key in quotes such as ["p2"]'))
        if not self.take("]"):
            self.fail("expected ']'")
        return step

    def quoted(self, quote: str) -> str:
        pattern = re.compile(rf"{quote}((?:[^\\{quote}]|\\.)*){quote}", re.DOTALL)
        found = pattern.match(self.text, self.at)
        if not found:
            self.fail(f"this {quote} is never closed")
        inner = re.sub(r"\\.|\"", lambda part: {"\\'": "'", '"': '\\"'}.get(part[0], part[0]), found[1], flags=re.DOTALL)
        try:
            key = json.loads(f'"{inner}"', strict=False)
        except json.JSONDecodeError:
            self.fail("unknown escape in this key; backslash sequences are those of JSON")
        self.at = found.end()
        return str(key)

    def integer(self, expected: str) -> int:
        found = _INTEGER.match(self.text, self.at)
        if not found:
            self.fail(f"expected {expected}")
        self.at = found.end()
        return int(found[0])

    def call(self) -> int | Literal["*"]:
        if self.take("*"):
            return "*"
        return self.integer("the number of a call: @0 the first, @-1 the last, @* all of them")

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def take(self, token: str) -> bool:
        if self.text.startswith(token, self.at):
            self.at += len(token)
            return True
        return False

    def fail(self, expected: str) -> NoReturn:
        quoted = json.dumps(self.text, ensure_ascii=False)
        shift = len(json.dumps(self.text[: self.at], ensure_ascii=False)) - 1
        word = re.match(r"\w+", self.text[self.at :])
        hint = did_you_mean(word[0], SELECTOR_WORDS) if word and "a selector" in expected else ""
        lead = "cannot read the address "
        raise AddressError(f"{lead}{quoted}\n{' ' * (len(lead) + shift)}^ {expected}{hint}")
