"""Module paths: wildcards, ranges, negative indices, aliases, wrapper prefixes, nearest names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from capture_zoo import Mlp, bert
from hookdistill import AddressError
from hookdistill.addresses import parse
from hookdistill.paths import module_at, module_paths, resolve


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(4))
        self.stage1, self.stage2 = nn.Linear(1, 1), nn.Linear(1, 1)
        self.first = self.blocks[0]
        self.nothing = None
        self.by_name = nn.ModuleDict({"p2": nn.Linear(1, 1), "p3": nn.Linear(1, 1)})

    def forward(self) -> None: ...


def found(text: str, model: nn.Module | None = None) -> list[str]:
    return [each.path for each in resolve(model or Shared(), parse(text))]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("", [""]),
        ("blocks.1", ["blocks.1"]),
        ("blocks.-1", ["blocks.3"]),
        ("blocks.-4.layers.-1", ["blocks.0.layers.2"]),
        ("blocks.{0..2}", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.{3,0}", ["blocks.3", "blocks.0"]),
        ("blocks.{-2,-1}", ["blocks.2", "blocks.3"]),
        ("stage{1,2}", ["stage1", "stage2"]),
        ("by_name.*", ["by_name.p2", "by_name.p3"]),
        ("*", ["stage1", "stage2", "first"]),  # lists are never called
        ("first.layers.0", ["first.layers.0"]),
        ("blocks.*.act", [f"blocks.{i}.act" for i in range(4)]),
        ("**.tail", [*(f"blocks.{i}.tail" for i in range(4)), "first.tail"]),
        ("blocks.1.**", ["blocks.1", *(f"blocks.1.{n}" for n in ("layers.0", "layers.1", "layers.2", "act", "tail"))]),
        ("**.layers.{0,2}", [f"{b}.layers.{i}" for b in (*(f"blocks.{n}" for n in range(4)), "first") for i in (0, 2)]),
    ],
)
def test_paths_that_are_named(text, paths):
    assert found(text) == paths


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("block.1", r"Did you mean 'blocks.1'\?"),
        ("blocks.4", "has 4 items, '0' to '3'"),
        ("blocks.-5", "has 4 items"),
        ("blocks.{0..9}", "has 4 items"),
        ("stage{1..3}", "no module 'stage3'"),
        ("nothing", "no module 'nothing'"),
        ("blocks", "never called itself"),
        ("by_name", "Name its items: by_name"),
        ("**.block", "names none of the"),
        ("act", r"Did you mean 'blocks.0.act'"),
        ("bl*cks", "whole segment"),
        ("blocks.1.layer.0", r"Did you mean 'blocks.1.layers.0'\?"),
    ],
)
def test_paths_that_name_nothing(text, says):
    with pytest.raises(AddressError, match=says):
        found(text)


def test_every_printed_path_and_every_alias_is_valid():
    for model in (Shared(), bert()):
        printed = [path for path, _ in model.named_modules(remove_duplicate=False)]
        assert list(module_paths(model)) == printed
        for path in printed:
            assert module_at(model, path) is model.get_submodule(path)
    assert module_at(Shared(), "blocks.9") is None


@pytest.mark.parametrize("written", ["0.layers.1", "_orig_mod.0.layers.1", "0._checkpoint_wrapped_module.layers.1"])
def test_wrapper_prefixes_may_be_left_out_and_are_never_printed(written):
    model = torch.compile(nn.Sequential(checkpoint_wrapper(Mlp())), backend="eager")
    assert found(written, model) == ["0.layers.1"]
    assert set(module_paths(model)) == {"", "0", *(f"0.{n}" for n, _ in Mlp().named_modules() if n)}


def test_a_module_that_holds_its_ancestor_does_not_go_on_for_ever():
    model = Mlp()
    object.__setattr__(model.tail, "_modules", {"up": model})
    assert "tail.up" in module_paths(model)
