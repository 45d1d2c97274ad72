"""Every mistake ends in a `HookDistillError` before the first step: the culprit, what was expected, what exists, the way out.

One row for each mistake: what is wrong, and words that the message must have. The whole way from the first line to the first
total counts as "before the first step"; where the mistake is plain without a batch, it is found without one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hookdistill
from hookdistill import DistillationLoss, Distiller, HookDistillError, Match, MatchError
from pairs import ConvNet, Mlp, Read, Reader, flags, hooks, mlps, pictures, points, readers, same, seeded, state, tokens


@dataclass
class Mistake:
    """A mistake, made when ``matches`` is called or when the distiller runs on ``batch``."""

    name: str
    matches: Callable[[], Any]
    words: tuple[str, ...]
    pair: Callable[[], tuple[Any, Any]] = readers
    batch: Any = field(default_factory=tokens)
    early: bool = False
    """Found without a batch."""
    options: dict[str, Any] = field(default_factory=dict)


def match(*args: Any, **kwargs: Any) -> Callable[[], list[Match]]:
    return lambda: [Match("layers.0", "layers.0", name="fine"), Match(*args, **kwargs)]


def without(batch: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in keys}


class Odd(nn.Module):
    """Offers everything that can be named wrongly."""

    def __init__(self):
        super().__init__()
        self.layer, self.twice, self.never = (nn.Linear(6, 6) for _ in range(3))
        self.several, self.optional, self.text = Several(), Optional(), Text()
        self.items = nn.ModuleDict({"a": nn.Identity()})

    def forward(self, x):
        x = self.twice(self.twice(self.layer(x)))
        self.several(x), self.optional(x), self.text(x)
        return x


class Several(nn.Module):
    def forward(self, x):
        return {"a": x, "b": 2 * x, "many": [x, x]}


class Optional(nn.Module):
    def forward(self, x):
        return x, None


class Text(nn.Module):
    def forward(self, x):
        return "no tensor"


def odds():
    return seeded(Odd, seed=1), seeded(Odd, seed=2)


def odd(name, address, *words, early=False):
    matches = lambda: [Match("layer", address)]  # noqa: E731
    return Mistake(name, matches, words, pair=odds, batch=points(), early=early)


ADDRESSES = [
    Mistake("misspelt student path", match("layers.1", "layer.1"), ("student", "layer.1", "layers.1"), early=True),
    Mistake("misspelt teacher path", match("lyers.1", "layers.1"), ("teacher", "lyers.1", "layers.1"), early=True),
    Mistake("layer beyond the last", match("layers.1", "layers.2"), ("layers.2", "2 items", "'1'"), early=True),
    Mistake("negative layer beyond the first", match("layers.1", "layers.-3"), ("layers.-3", "2 items"), early=True),
    Mistake("range beyond the last", match("layers.{0..9}", "layers.*"), ("layers.{0..9}", "4 items"), early=True),
    Mistake("wildcard without a match", match("layers.*.mlp", "layers.*"), ("teacher", "layers.*.mlp"), early=True),
    Mistake("below a leaf", match("layers.0.dense", "layers.0"), ("layers.0.dense", "no submodules"), early=True),
    Mistake("prefix of another model", match("bert.layers.0", "layers.0"), ("bert.layers.0", "layers.0"), early=True),
    Mistake("a list of modules", match("layers", "layers"), ("ModuleList", "layers.*"), early=True),
    Mistake("brackets in a path", match("layers[0]", "layers.0"), ("layers[0]", "^"), early=True),
    Mistake("unclosed brace", match("layers.{0..1", "layers.0"), ("layers.{0..1", "}"), early=True),
    Mistake("backward range", match("layers.{3..1}", "layers.0"), ("3..1", "1..3"), early=True),
    Mistake("part of a name as wildcard", match("layer*", "layers.0"), ("layer*", "braces"), early=True),
    Mistake("space in a path", match("layers. 0", "layers.0"), ("layers. 0",), early=True),
    Mistake("empty selector", match("layers.0:", "layers.0"), ("layers.0:", "output"), early=True),
    Mistake("selector that begins with a digit", match("layers.0:0", "layers.0"), ("layers.0:0",), early=True),
    Mistake("call that is no number", match("layers.0@last", "layers.0"), ("@0", "@-1"), early=True),
    Mistake("list of calls", match("layers.0", "layers.0@*"), ("@*", "@-1"), early=True),
    Mistake("number as address", match(3, "layers.0"), ("3", "int", "string"), early=True),
    Mistake("module as address", lambda: [Match("layers.0", nn.Linear(2, 2))], ("Linear", "string"), early=True),
    Mistake("no student address", match("layers.0", None), ("NoneType", "string"), early=True),
    Mistake("list of addresses", match(["layers.0"], "layers.0"), ("list", "string"), early=True),
    Mistake("student and teacher exchanged", match("layers.1", "layers.3"), ("student", "layers.3", "2 items"), early=True),
    Mistake("misspelt leaf", match(":logits", ":logit"), (":logit", "output.logits", "pooled")),
    Mistake("misspelt selector", match("layers.0", "layers.0:outptu"), ("outptu", "output")),
    Mistake("leaf of the teacher that is not there", match(":hidden_states", ":logits"), ("hidden_states", "output.logits")),
    Mistake("leaf that is None", match(":logits", ":nothing"), ("nothing", "None")),
    Mistake("input that is not passed", match("layers.0", "layers.0:input.mask"), ("mask", "input")),
    Mistake("attention where there is none", match("layers.0:attention", "layers.0:attention"), ("no attention", "Linear")),
    Mistake("module that the forward never calls", match("layers.0", "unused"), ("unused", "never called")),
    Mistake("teacher module that is never called", match("unused", "layers.0"), ("unused", "never called")),
    odd("row of the batch", "layer:output[0]", "layer", "bare tensor", "batch"),
    odd("module that runs twice", "twice", "twice", "2 times", "@0", "@-1"),
    odd("call beyond the last", "twice@5", "twice", "2 times", "5"),
    odd("dict with several tensors", "several", "several", "output.a", "output.b"),
    odd("leaf that is a list", "several:output.many", "many", "[0]"),
    odd("index that is none", "optional:output[1]", "optional", "None"),
    odd("index beyond the last", "optional:output[7]", "[7]", "[0]"),
    odd("output that is no tensor", "text", "text", "str"),
    odd("module dict", "items", "items", "ModuleDict", "items.*", early=True),
    odd("attention of several modules is none", ":attention", "no attention", "Odd"),
]

MATCHES = [
    Mistake("unknown loss", match("layers.0", "layers.0", loss="mes"), ("mes", "mse", "register_loss"), early=True),
    Mistake("loss in capitals", match("layers.0", "layers.0", loss="MSE"), ("MSE", "mse"), early=True),
    Mistake("loss class", match("layers.0", "layers.0", loss=nn.MSELoss), ("MSELoss", "MSELoss()"), early=True),
    Mistake("loss of one tensor", match("layers.0", "layers.0", loss=lambda s: s.sum()), ("two",), early=True),
    Mistake("loss that is None", match("layers.0", "layers.0", loss=None), ("None",), early=True),
    Mistake("loss that is a number", match("layers.0", "layers.0", loss=0.5), ("0.5", "float"), early=True),
    Mistake("misspelt option", match("layers.0", "layers.0", wieght=2.0), ("wieght", "weight"), early=True),
    Mistake("misspelt option of a loss", match("layers.0", "layers.0", loss="huber", detla=1), ("detla", "delta"), early=True),
    Mistake("option of another loss", match("layers.0", "layers.0", delta=1.0), ("delta", "mse"), early=True),
    Mistake("plural option", match("layers.0", "layers.0", masks="attention_mask"), ("masks", "mask"), early=True),
    Mistake("wrong value of an option", match("layers.0", "layers.0", loss="huber", delta=-1.0), ("delta", "-1"), early=False),
    Mistake("dimension that is none", match("layers.0", "layers.0", dim=5, adapter="none"), ("5", "dim")),
    Mistake("dimension that is no number", match("layers.0", "layers.0", dim="channels"), ("channels", "dim"), early=True),
    Mistake("weight as text", match("layers.0", "layers.0", weight="1.0"), ("weight", "'1.0'"), early=True),
    Mistake("weight None", match("layers.0", "layers.0", weight=None), ("weight", "None"), early=True),
    Mistake("weight NaN", match("layers.0", "layers.0", weight=float("nan")), ("weight", "nan"), early=True),
    Mistake("weight infinite", match("layers.0", "layers.0", weight=float("inf")), ("weight", "inf"), early=True),
    Mistake("weight True", match("layers.0", "layers.0", weight=True), ("weight", "True"), early=True),
    Mistake("temperature zero", match(":logits", ":logits", loss="kl", temperature=0), ("temperature", "0"), early=True),
    Mistake(
        "temperature negative", match(":logits", ":logits", loss="kl", temperature=-2.0), ("temperature", "-2"), early=True
    ),
    Mistake("temperature text", match(":logits", ":logits", loss="kl", temperature="2"), ("temperature", "'2'"), early=True),
    Mistake(
        "temperature where there is none", match("layers.0", "layers.0", temperature=2.0), ("temperature", "mse"), early=True
    ),
    Mistake(
        "schedule of a temperature where there is none",
        match("layers.0", "layers.0", temperature=lambda step: 2.0),
        ("temperature", "mse"),
        early=True,
    ),
    Mistake(
        "mask for a loss without one",
        match("layers.0", "layers.0", loss=lambda s, t: (s - t).sum(), mask="attention_mask"),
        ("mask",),
        early=True,
    ),
    Mistake("mask tensor", match("layers.0", "layers.0", mask=torch.ones(3, 5)), ("mask", "Tensor", "key"), early=True),
    Mistake("mask True", match("layers.0", "layers.0", mask=True), ("mask", "bool"), early=True),
    Mistake("mask list", match("layers.0", "layers.0", mask=["attention_mask"]), ("mask", "list"), early=True),
    Mistake("target tensor", match(None, ":logits", target=torch.ones(3)), ("target", "Tensor", "key"), early=True),
    Mistake("nothing to compare with", match(None, ":logits", loss="cross_entropy"), ("teacher", "target"), early=True),
    Mistake(
        "teacher and target",
        match(":logits", ":logits", loss="cross_entropy", target="labels"),
        ("target", "labels", "two entries"),
        early=True,
    ),
    Mistake(
        "selector twice", match("layers.0:output", "layers.0", selector="input"), ("selector", "layers.0:output"), early=True
    ),
    Mistake("selector that does not parse", match("layers.0", "layers.0", selector="output["), ("output[",), early=True),
    Mistake("selector that is no text", match("layers.0", "layers.0", selector=0), ("selector", "0"), early=True),
    Mistake("misspelt adapter", match("layers.0", "layers.0", adapter="liner"), ("liner", "linear", "auto"), early=True),
    Mistake("adapter class", match("layers.0", "layers.0", adapter=nn.Identity), ("Identity", "Identity("), early=True),
    Mistake("adapter None", match("layers.0", "layers.0", adapter=None), ("None", "none"), early=True),
    Mistake("adapter function", match("layers.0", "layers.0", adapter=lambda s: s), ("adapter", "Module"), early=True),
    Mistake("adapter list", match("layers.0", "layers.0", adapter=["linear"]), ("linear", "adapter"), early=True),
    Mistake("misspelt layer map", match("layers.*", "layers.*", layer_map="unifrom"), ("unifrom", "uniform"), early=True),
    Mistake("layer map None", match("layers.*", "layers.*", layer_map=None), ("layer_map", "None"), early=True),
    Mistake("layer map list", match("layers.*", "layers.*", layer_map=[1, 3]), ("layer_map", "[1, 3]"), early=True),
    Mistake("empty name", match("layers.0", "layers.0", name=""), ("name",), early=True),
    Mistake("name that is no text", match("layers.0", "layers.0", name=3), ("name", "3"), early=True),
    Mistake("name given twice", match("layers.1", "layers.1", name="fine"), ("fine", "unique"), early=True),
    Mistake(
        "name with a teacher only", match("layers.0", "layers.0", teacher_model="big"), ("big", "teacher_model"), early=True
    ),
    Mistake("teacher_model without teacher", match(None, ":logits", target="x", teacher_model="a"), ("'a'",), early=True),
    Mistake(
        "teacher_model that is no text", match("layers.0", "layers.0", teacher_model=0), ("teacher_model", "0"), early=True
    ),
    Mistake(
        "more student layers than teacher layers",
        match("layers.*", "layers.*"),
        ("2", "4", "layers.3"),
        pair=lambda: readers(depths=(2, 4)),
        early=True,
    ),
    Mistake("many for one", match("layers.*", "layers.0"), ("4", "layers.0", "layer_map"), early=True),
    Mistake("no matches", list, ("empty", "Match"), early=True),
    Mistake("one match, no list", lambda: Match("layers.0", "layers.0"), ("list", "[Match"), early=True),
    Mistake("one dict, no list", lambda: {"type": "ts_distill"}, ("list",), early=True),
    Mistake("matches None", lambda: None, ("list", "NoneType"), early=True),
    Mistake("addresses for matches", lambda: ["layers.0"], ("entry 0", "str", "Match"), early=True),
    Mistake("pair of addresses", lambda: [("layers.0", "layers.0")], ("entry 0", "tuple", "Match"), early=True),
    Mistake("class for a match", lambda: [Match], ("entry 0", "type", "Match"), early=True),
    Mistake("unknown impl", match("layers.0", "layers.0"), ("trition", "eager"), early=True, options={"impl": "trition"}),
    Mistake(
        "schedule that raises", match("layers.0", "layers.0", weight=lambda step: 1 / step), ("weight", "ZeroDivisionError")
    ),
    Mistake("schedule without argument", match("layers.0", "layers.0", weight=lambda: 1.0), ("weight", "TypeError")),
    Mistake("schedule that gives None", match("layers.0", "layers.0", weight=lambda step: None), ("weight", "None")),
    Mistake("schedule that gives text", match("layers.0", "layers.0", weight=lambda step: "1"), ("weight", "'1'")),
    Mistake("schedule that gives NaN", match("layers.0", "layers.0", weight=lambda step: float("nan")), ("weight", "nan")),
    Mistake(
        "schedule of a temperature that gives zero",
        match(":logits", ":logits", loss="kl", temperature=lambda step: step),
        ("temperature", "0"),
    ),
    Mistake(
        "schedule of a temperature that raises",
        match(":logits", ":logits", loss="kl", temperature=lambda step: [][step]),
        ("temperature", "IndexError"),
    ),
    Mistake(
        "hard loss with soft weights",
        match(None, ":logits", loss="cross_entropy", target="labels", temperature=2.0),
        ("temperature", "cross_entropy"),
        early=True,
    ),
]

SOFT_MASK = {**tokens(), "attention_mask": torch.full((3, 5), 0.5)}
ADDITIVE = {**tokens(), "attention_mask": (1.0 - tokens()["attention_mask"].float()) * -1e4}
HARD = match(None, ":logits", loss="cross_entropy", target="labels")
MASKED = match("layers.0", "layers.0", mask="attention_mask")

BATCHES = [
    Mistake("missing mask", MASKED, ("attention_mask", "input_ids", "labels"), batch=without(tokens(), "attention_mask")),
    Mistake("misspelt mask", match("layers.0", "layers.0", mask="attention_maks"), ("attention_maks", "attention_mask")),
    Mistake("mask index beyond the last", match("layers.0", "layers.0", mask=7), ("7", "attention_mask")),
    Mistake("missing target", HARD, ("labels", "input_ids"), batch=without(tokens(), "labels")),
    Mistake("misspelt target", match(None, ":logits", target="lables"), ("lables", "labels")),
    Mistake("target index beyond the last", match(None, ":logits", target=-9), ("-9", "labels")),
    Mistake(
        "missing input",
        MASKED,
        ("input_ids", "Reader.forward", "attention_mask", "batch_adaptor"),
        batch=without(tokens(), "input_ids"),
    ),
    Mistake("no input at all", match("layers.0", "layers.0"), ("input_ids", "ids"), batch={"ids": tokens()["input_ids"]}),
    Mistake("empty dict", match("layers.0", "layers.0"), ("input_ids", "none"), batch={}),
    Mistake("empty tuple", match("layers.0", "layers.0"), ("input_ids",), batch=()),
    Mistake("batch None", match("layers.0", "layers.0"), ("NoneType", "dict"), batch=None),
    Mistake("batch text", match("layers.0", "layers.0"), ("str", "dict"), batch="a sentence"),
    Mistake("batch array", match("layers.0", "layers.0"), ("ndarray",), batch=np.zeros((2, 3), dtype=np.int64)),
    Mistake("batch of sentences", match("layers.0", "layers.0"), ("Reader", "input_ids"), batch=["a sentence", "another"]),
    Mistake("batch dataclass class", match("layers.0", "layers.0"), ("type", "dict"), batch=Read),
    Mistake("a loader", match("layers.0", "layers.0"), ("DataLoader", "dict"), batch=torch.utils.data.DataLoader([1, 2])),
    Mistake("an iterator", match("layers.0", "layers.0"), ("iterator", "dict"), batch=iter([tokens()])),
    Mistake("mask of another length", MASKED, ("[3, 4]", "[3, 5]"), batch={**tokens(), "attention_mask": torch.ones(3, 4)}),
    Mistake("mask of another batch", MASKED, ("[2, 5]", "[3, 5]"), batch={**tokens(), "attention_mask": torch.ones(2, 5)}),
    Mistake(
        "mask [batch, 1]",
        match("layers.0", "layers.0", mask="valid"),
        ("[3, 1]", "[3, 5]"),
        batch={**tokens(), "valid": torch.ones(3, 1)},
    ),
    Mistake(
        "mask with a dimension too many", MASKED, ("[3, 5, 8]",), batch={**tokens(), "attention_mask": torch.ones(3, 5, 8)}
    ),
    Mistake("mask of halves", MASKED, ("attention_mask", "0.5"), batch=SOFT_MASK),
    Mistake("additive mask", MASKED, ("attention_mask", "-10000", "lambda"), batch=ADDITIVE),
    Mistake(
        "additive mask in integers",
        MASKED,
        ("attention_mask", "-10000"),
        batch={**ADDITIVE, "attention_mask": ADDITIVE["attention_mask"].long()},
    ),
    Mistake(
        "mask with NaN", MASKED, ("attention_mask", "nan"), batch={**tokens(), "attention_mask": torch.full((3, 5), torch.nan)}
    ),
    Mistake("mask None", MASKED, ("attention_mask", "NoneType"), batch={**tokens(), "attention_mask": None}),
    Mistake("mask list", MASKED, ("attention_mask", "list"), batch={**tokens(), "attention_mask": [[1] * 5] * 3}),
    Mistake(
        "mask array",
        MASKED,
        ("attention_mask", "ndarray"),
        batch={**tokens(), "attention_mask": tokens()["attention_mask"].numpy()},
    ),
    Mistake(
        "mask function that raises",
        match("layers.0", "layers.0", mask=lambda batch: batch["maks"]),
        ("mask", "KeyError", "maks"),
    ),
    Mistake("mask function without argument", match("layers.0", "layers.0", mask=lambda: None), ("mask", "TypeError")),
    Mistake("mask function that gives None", match("layers.0", "layers.0", mask=lambda batch: None), ("mask", "NoneType")),
    Mistake("mask at an address of features", match("layers.0", "layers.0", mask="embed"), ("embed",)),
    Mistake("mask at an address not called", match("layers.0", "layers.0", mask="unused"), ("unused", "never called")),
    Mistake(
        "target function that raises",
        match(None, ":logits", target=lambda batch: batch["lables"]),
        ("target", "lables", "KeyError"),
    ),
    Mistake("target function that gives a list", match(None, ":logits", target=lambda batch: [1]), ("target", "list")),
    Mistake("target as list", HARD, ("labels", "list"), batch={**tokens(), "labels": [[1] * 5] * 3}),
    Mistake("labels of another length", HARD, ("[3, 4]", "[3, 5, 5]"), batch={**tokens(), "labels": torch.ones(3, 4).long()}),
    Mistake("labels too large", HARD, ("labels", "7", "4"), batch={**tokens(), "labels": torch.full((3, 5), 7)}),
    Mistake("labels negative", HARD, ("labels", "-1", "-100"), batch={**tokens(), "labels": torch.full((3, 5), -1)}),
    Mistake("labels as floats", HARD, ("labels", "float"), batch={**tokens(), "labels": torch.ones(3, 5)}),
    Mistake(
        "target of another width",
        match(None, ":logits", target="wanted"),
        ("[3, 5, 2]", "[3, 5, 5]"),
        batch={**tokens(), "wanted": torch.ones(3, 5, 2)},
    ),
    Mistake("labels for mse", match(None, ":logits", target="labels"), ("[3, 5]", "[3, 5, 5]")),
    Mistake(
        "class of labels against a teacher loss", match(None, ":logits", loss="kl", target="labels"), ("[3, 5]", "[3, 5, 5]")
    ),
    Mistake(
        "ids beyond the vocabulary", MASKED, ("Reader", "IndexError"), batch={**tokens(), "input_ids": torch.full((3, 5), 99)}
    ),
    Mistake("ids as floats", MASKED, ("Reader", "input_ids"), batch={**tokens(), "input_ids": torch.ones(3, 5)}),
    Mistake(
        "inputs of another width",
        lambda: [Match("first", "first")],
        ("Mlp", "x"),
        pair=mlps,
        batch={"x": torch.ones(5, 7)},
    ),
    Mistake("inputs None", lambda: [Match("first", "first")], ("Mlp", "x"), pair=mlps, batch={"x": None}),
    Mistake("inputs as a list", lambda: [Match("first", "first")], ("Mlp", "x"), pair=mlps, batch={"x": [[1.0] * 6]}),
]


def convs(theirs: dict[str, Any], ours: dict[str, Any]) -> Callable[[], tuple[Any, Any]]:
    return lambda: (seeded(ConvNet, **theirs, seed=1), seeded(ConvNet, **ours, seed=2))


class Halves(nn.Module):
    """Drops half of the batch on its way."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)

    def forward(self, x):
        return self.first(x[::2])


class Silent(nn.Module):
    """Detaches what it computes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)

    def forward(self, x):
        with torch.no_grad():
            return self.first(x)


def frozen() -> tuple[Any, Any]:
    teacher, student = mlps()
    return teacher, student.requires_grad_(False)


def exchanged() -> tuple[Any, Any]:
    teacher, student = mlps()
    teacher.stem = nn.Identity()
    return teacher, student


def wide() -> tuple[Any, Any]:
    return mlps(12, 8)


FIRST = lambda: [Match("first", "first", name="hidden")]  # noqa: E731
TO_STUDENT = [
    Mistake("no gradient: frozen", FIRST, ("hidden", "first", "frozen", "gradient"), pair=frozen, batch=points()),
    Mistake("no gradient: no_grad", FIRST, ("hidden", "no_grad"), pair=lambda: (mlps()[0], Silent()), batch=points()),
    Mistake("no gradient: an input", lambda: [Match("first:input", "first:input")], ("gradient",), pair=mlps, batch=points()),
    Mistake("no gradient: integers", match("embed:input", "embed:input"), ("embed:input", "gradient")),
    Mistake(
        "other batch size", FIRST, ("hidden", "[3, 8]", "[5, 8]", "batch"), pair=lambda: (mlps()[0], Halves()), batch=points()
    ),
    Mistake("other width without a plan", FIRST, ("hidden", "[5, 8]", "[5, 12]", "plan(batch)"), pair=wide, batch=points()),
    Mistake(
        "other width and no adapter",
        lambda: [Match("first", "first", adapter="none")],
        ("[5, 8]", "[5, 12]", "adapter"),
        pair=wide,
        batch=points(),
    ),
    Mistake(
        "other rank",
        lambda: [Match("stem", "head")],
        ("[3, 4, 8, 8]", "[3, 3]"),
        pair=convs({}, {}),
        batch=pictures(),
    ),
    Mistake(
        "other classes",
        lambda: [Match("", "", loss="kl")],
        ("5", "3", "classes"),
        pair=convs({"classes": 5}, {"classes": 3}),
        batch=pictures(),
    ),
    Mistake(
        "other classes against a soft cross-entropy",
        lambda: [Match("", "", loss="cross_entropy")],
        ("5", "3", "classes"),
        pair=convs({"classes": 5}, {"classes": 3}),
        batch=pictures(),
    ),
    Mistake(
        "a model with other inputs",
        lambda: [Match("stem", "first")],
        ("ConvNet.forward", "pixels", "x"),
        pair=lambda: (seeded(ConvNet), seeded(Mlp)),
        batch=points(),
    ),
    Mistake("teacher None", FIRST, ("hidden", "teacher"), pair=lambda: (None, mlps()[1]), early=True),
    Mistake("student None", FIRST, ("student", "NoneType"), pair=lambda: (mlps()[0], None), early=True),
    Mistake("teacher class", FIRST, ("teacher", "Mlp", "class"), pair=lambda: (Mlp, mlps()[1]), early=True),
    Mistake("student class", FIRST, ("student", "Mlp", "class"), pair=lambda: (mlps()[0], Mlp), early=True),
    Mistake("name of a checkpoint", FIRST, ("teacher", "str"), pair=lambda: ("bert-base-uncased", mlps()[1]), early=True),
    Mistake("function", FIRST, ("teacher", "function"), pair=lambda: (lambda x: x, mlps()[1]), early=True),
    Mistake("list of teachers", FIRST, ("teacher", "list"), pair=lambda: ([mlps()[0]], mlps()[1]), early=True),
    Mistake("no teachers", FIRST, ("teacher",), pair=lambda: ({}, mlps()[1]), early=True),
    Mistake("teachers that are none", FIRST, ("big", "NoneType"), pair=lambda: ({"big": None}, mlps()[1]), early=True),
    Mistake("several students", FIRST, ("student", "dict"), pair=lambda: (mlps()[0], {"a": mlps()[1]}), early=True),
    Mistake(
        "which teacher",
        FIRST,
        ("hidden", "teacher_model", "'a'", "'b'"),
        pair=lambda: ({"a": mlps()[0], "b": mlps()[0]}, mlps()[1]),
        early=True,
    ),
    Mistake(
        "no such teacher",
        lambda: [Match("first", "first", teacher_model="c")],
        ("'c'", "'a'", "'b'"),
        pair=lambda: ({"a": mlps()[0], "b": mlps()[0]}, mlps()[1]),
        early=True,
    ),
    Mistake(
        "several heads",
        lambda: [Match("self_attn:attention", "self_attn:attention", loss="kl")],
        ("heads", "2", "4"),
        pair=lambda: (
            nn.TransformerEncoderLayer(8, 4, 8, batch_first=True),
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        ),
        batch=torch.randn(2, 3, 8),
    ),
    Mistake(
        "replicas in threads",
        FIRST,
        ("DataParallel",),
        pair=lambda: (mlps()[0], nn.DataParallel(mlps()[1])),
        batch=points(),
    ),
    Mistake("a teacher on no device", FIRST, ("meta",), pair=lambda: (mlps()[0].to("meta"), mlps()[1]), batch=points()),
]


def modules(*models: Any) -> list[nn.Module]:
    listed = [each for model in models for each in (model.values() if isinstance(model, dict) else [model])]
    return [model for model in listed if isinstance(model, nn.Module) and not any(p.is_meta for p in model.parameters())]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("mistake", [*ADDRESSES, *MATCHES, *BATCHES, *TO_STUDENT], ids=lambda mistake: mistake.name)
def test_a_mistake_is_an_error_that_helps_and_leaves_the_models_alone(mistake):
    teacher, student = mistake.pair()
    models = modules(teacher, student)
    was, before, on = flags(*models), state(*models), hooks(*models)
    distiller = None
    with pytest.raises(HookDistillError) as caught:
        distiller = Distiller(teacher, student, mistake.matches(), **mistake.options)
        assert not mistake.early, "this can be found without a batch"
        distiller(mistake.batch)
    for word in mistake.words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1500
    if "fine" not in mistake.words:
        assert "fine" not in str(caught.value), "that is the other entry"
    if distiller is not None:
        assert len(distiller.adapters) == 0
        distiller.close()
    assert hooks(*models) == on
    assert flags(*models) == was
    assert torch.is_grad_enabled()
    assert all(torch.equal(a, b) for a, b in zip(state(*models), before, strict=True)) or "batch norm" in tracked(models)
    assert all(parameter.grad is None for model in models for parameter in model.parameters())


def tracked(models: list[nn.Module]) -> str:
    """A first training forward may have updated running statistics, as it should."""
    return (
        "batch norm" if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for model in models for m in model.modules()) else ""
    )


NOT_IN_A_PLAN = ("no gradient", "other width without a plan")


@pytest.mark.parametrize(
    "mistake",
    [
        each
        for each in (*ADDRESSES, *MATCHES, *BATCHES, *TO_STUDENT)
        if not each.early and not each.name.startswith(NOT_IN_A_PLAN)
    ],
    ids=lambda mistake: mistake.name,
)
def test_the_plan_finds_it_too_and_leaves_no_trace(mistake):
    teacher, student = mistake.pair()
    models = modules(teacher, student)
    distiller = Distiller(teacher, student, mistake.matches(), **mistake.options)
    was, before, on = flags(*models), state(*models), hooks(*models)
    with pytest.raises(HookDistillError) as caught:
        distiller.plan(mistake.batch)
    for word in mistake.words:
        assert word in str(caught.value)
    assert hooks(*models) == on
    assert flags(*models) == was
    assert same(state(*models), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("mistake", [each for each in MATCHES if each.early], ids=lambda mistake: mistake.name)
def test_what_is_wrong_on_its_face_is_a_match_error_that_names_the_entry(mistake):
    with pytest.raises(MatchError) as caught:
        Distiller(*mistake.pair(), mistake.matches(), **mistake.options)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["addresses", "matches", "batches", "models"])
def test_no_two_mistakes_have_one_name(name):
    listed = {"addresses": ADDRESSES, "matches": MATCHES, "batches": BATCHES, "models": TO_STUDENT}[name]
    names = [mistake.name for mistake in listed]
    assert len(set(names)) == len(names)


# What is no mistake, and yet near one


def test_a_second_distiller_after_a_mistake_works():
    teacher, student = readers()
    for wrong in (MASKED, match("layers.0", "unused")):
        with pytest.raises(HookDistillError):
            Distiller(teacher, student, wrong())(without(tokens(), "attention_mask"))
    assert torch.isfinite(Distiller(teacher, student, MASKED())(tokens()).total)


def test_a_mistake_in_the_batch_can_be_put_right_on_the_same_distiller():
    teacher, student = readers()
    distiller = Distiller(teacher, student, MASKED())
    with pytest.raises(HookDistillError):
        distiller(without(tokens(), "attention_mask"))
    assert torch.isfinite(distiller(tokens()).total)


def test_a_mistake_in_a_later_batch_is_a_match_error_of_its_entry():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [Match("layers.0", "layers.0", mask="attention_mask", name="hidden")])
    distiller(tokens())
    for wrong in (without(tokens(), "attention_mask"), {**tokens(), "attention_mask": torch.ones(3, 4)}):
        with pytest.raises(MatchError, match="hidden"):
            distiller(wrong)


def test_masks_of_any_type_of_number_are_masks():
    teacher, student = readers()
    values = []
    for dtype in (torch.bool, torch.int8, torch.int64, torch.float16, torch.float32, torch.float64):
        batch = {**tokens(), "attention_mask": tokens()["attention_mask"].to(dtype)}
        values.append(Distiller(teacher, student, MASKED())(batch).total)
    assert all(torch.equal(value, values[0]) for value in values)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type_are_labels(dtype):
    teacher, student = readers()
    batch = tokens()
    expected = Distiller(teacher, student, HARD())(batch).total
    batch["labels"] = batch["labels"].to(dtype)
    assert torch.equal(Distiller(teacher, student, HARD())(batch).total, expected)


def test_a_loss_stage_without_models_makes_the_same_checks():
    for mistake in MATCHES:
        if mistake.early and mistake.name not in (
            *("name with a teacher only", "more student layers than teacher layers", "many for one"),
            "teacher_model that is no text",
        ):
            with pytest.raises(MatchError):
                DistillationLoss(mistake.matches(), **mistake.options)


def test_every_public_error_is_reachable_from_the_package():
    for name in ("AddressError", "BatchError", "CaptureError", "LossError", "MatchError", "TrainerError"):
        assert issubclass(getattr(hookdistill, name), HookDistillError)


def test_a_reader_is_what_the_mistakes_were_made_on():
    teacher, student = readers()
    assert isinstance(student, Reader)
    assert torch.isfinite(Distiller(teacher, student, match("layers.3", "layers.1")())(tokens()).total)
