"""Losses between scores through Inductor are those of `score_loss`, with one compilation for all sizes."""

import math

import pytest
import torch

from hookdistill import DistillationLoss, Match
from hookdistill.attention import AttentionCall
from hookdistill.engine import fast
from hookdistill.fused import compiler
from hookdistill.fused.compiler import compiled_scores, compiler_available
from hookdistill.fused.scores import Scores, score_loss

pytestmark = pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler")

KINDS = ["kl", "mse", "scores mse", "relation kl"]


def scores(*shape, seed=0):
    """With a hidden key, a key that only the student hides, and a row that hides all of them."""
    draw = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    s[..., 0] = t[..., 0] = -math.inf
    s[..., 1, 1] = -1e9
    s[0, -1] = t[0, -1] = -math.inf
    return s.float(), t.float()


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_for_any_sizes(kind, masked):
    like = Scores(kind, -1e8, -1e8)
    before = len(compiler._compiled)
    for heads, queries, keys in ((3, 7, 33), (1, 64, 64), (12, 5, 130)):
        s, t = scores(heads, queries, keys)
        if kind == "relation kl":  # its scores are finite
            s, t = s.clamp_min(-50), t.clamp_min(-50)
        valid = torch.rand(1, queries, keys, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
        given = s.clone(), t.clone()
        value, slope = compiled_scores(like, s, t, valid, True)
        assert torch.equal(s, given[0]) and torch.equal(t, given[1])
        expected, expected_slope = score_loss(like, *given, valid, True)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slope, expected_slope, rtol=1e-4, atol=1e-5)
    assert len(compiler._compiled) <= before + 1
    assert all(compiled is not None for compiled in compiler._compiled.values())


def test_a_single_row_is_left_as_it_is():
    s, t = (each[:1, :1] for each in scores(2, 3, 5))
    like = Scores("kl", -1e8, -1e8)
    found, expected = (
        compiled_scores(like, s.clone(), t.clone(), None, True),
        score_loss(like, s.clone(), t.clone(), None, True),
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def attention(seed, requires_grad=False):
    query, key = torch.randn(2, 2, 4, 48, 8, generator=torch.Generator().manual_seed(seed)).unbind()
    return AttentionCall(query=query.requires_grad_(requires_grad), key=key.requires_grad_(requires_grad), value=key, scale=0.3)


@pytest.mark.parametrize("what", ["relation", "attention"])
def test_the_engine_compiles_what_is_large(what, monkeypatch):
    """A map of as many entries as `COMPILED_FROM`, or any if it is asked for."""
    if what == "relation":
        match, key = Match(":query", ":query", loss="relation_kl"), "query"
        ours, theirs = attention(0, requires_grad=True).query, attention(1).query
        inputs = [ours]
    else:
        match, key = Match(":attention", ":attention", loss="kl"), "attention"
        ours, theirs = attention(0, requires_grad=True), attention(1)
        inputs = [ours.query, ours.key]

    class Captures(dict):
        def __init__(self, value):
            super().__init__({"": {key: value}})
            if what == "attention":
                self.attention_call = lambda layer, output: value

    def outcome(impl):
        step = DistillationLoss([match], impl=impl).begin(Captures(ours), {})
        total = step.finish(Captures(theirs)).total
        (choice,) = step.choices.values()
        return str(choice), [total, *torch.autograd.grad(total, inputs)]

    plain, expected = outcome("auto")
    assert plain == "chunked (no map)"
    asked, found = outcome("compiled")
    assert asked == "compiled (no map)"
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(fast, "COMPILED_FROM", 2 * 4 * 48 * 48)
    large, found = outcome("auto")
    assert large == "compiled (no map)"
    torch.testing.assert_close(found, expected)
    monkeypatch.setattr(fast, "COMPILED_FROM", 2 * 4 * 48 * 48 + 1)
    assert outcome("auto")[0] == "chunked (no map)"
