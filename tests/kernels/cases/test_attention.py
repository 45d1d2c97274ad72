"""Losses between attention maps by kernels, against the same losses on whole maps in float64."""

import math

import pytest
import torch

from hookdistill import losses
from hookdistill.attention import AttentionCall, attention_probabilities, attention_scores
from hookdistill.attention.calls import hidden_at
from hookdistill.fused.attention import AttentionTask, Heads, attention_losses
from hookdistill.kernels import attention as launches
from hookdistill.kernels import maps
from hookdistill.kernels.attention import attention_losses_triton
from hookdistill.kernels.availability import interpreted
from kernel_cases import EPSILON, cut_off, distance, drawn, same_bits

KINDS = ["kl", "mse", "scores mse"]
BATCH, HEADS, TOKENS = 2, 2, 37  # two tiles of 32 each way
LOWEST = torch.finfo(torch.float32).min


@pytest.fixture(autouse=True)
def fewer_tiles(request, monkeypatch):
    """The interpreter takes its time for each."""
    if interpreted() and "own_tiles" not in request.fixturenames:
        tile = maps.Blocks(32, 32, 4)
        monkeypatch.setattr(launches.Tiles, "of", lambda *traits: launches.Tiles(tile, tile, tile))


def padding(device):
    """Tokens that count: all, and some that begin and end within tiles."""
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=device)
    valid[1, :3] = False
    valid[1, 20:] = False
    return valid


def masks(device):
    """Masks as attentions get them, and whether they are causal."""
    keys = padding(device)[:, None, None, :]
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=device).tril()
    lost = keys & causal
    lost[0, 0, 3] = False  # a query with no key
    bias = drawn(1, HEADS, TOKENS, TOKENS, seed=9, device=device)
    return {
        "none": (None, False),
        "causal": (None, True),
        "bool keys": (keys, False),
        "bool lost": (lost, False),
        "bool heads": (torch.stack([causal, causal.T])[None], False),
        "bool queries": (keys.transpose(2, 3), False),
        "bool reversed": (lost.flip(-1).contiguous().flip(-1).transpose(2, 3), False),
        "added keys": (torch.zeros(keys.shape, device=device).masked_fill(~keys, LOWEST), False),
        "added half": (torch.zeros(keys.shape, device=device).masked_fill(~keys, LOWEST).half(), False),
        "added -inf": (torch.where(lost, 0.0, -math.inf), False),
        "bias": (bias, False),
        "bias double": (bias.double(), False),
    }


def call(query, key, mask, is_causal, scale):
    return AttentionCall(query=query, key=key, value=key, mask=mask, is_causal=is_causal, scale=scale)


def side(given):
    tensors = {"query": given.query.detach(), "key": given.key.detach(), "mask": given.mask}
    return Heads(**tensors, is_causal=given.is_causal, scale=given.scale, never=hidden_at(given))


def pair(mask="none", their_mask=None, *, groups=1, widths=(8, 12), dtype=torch.float32, device="cpu"):
    """Two attentions whose scores spread as those of models do; of several heads where that matters."""
    found, heads = [], HEADS if groups > 1 or mask in ("bool heads", "bias", "bias double") else 1
    for seed, name, width, count, scale in (
        (0, mask, widths[0], heads // groups, 0.5),
        (2, their_mask or mask, widths[1], heads, 0.4),
    ):
        query = drawn(BATCH, heads, TOKENS, width, seed=seed, dtype=dtype, device=device)
        key = drawn(BATCH, count, TOKENS, width, seed=seed + 1, dtype=dtype, device=device)
        found.append(call(query, key, *masks(device)[name], scale))
    return found


def defined(kind, ours, theirs, valid, dtype, coefficient):
    """Value and gradients of the loss on whole maps; masks are added in float64 too where that is the dtype."""
    query, key = (tensor.detach().to(dtype).requires_grad_() for tensor in (ours.query, ours.key))
    make = attention_scores if kind == "scores mse" else attention_probabilities
    loss = losses.attention_kl if kind == "kl" else losses.attention_mse
    wide = [each.mask if each.mask is None or each.mask.dtype is torch.bool else each.mask.to(dtype) for each in (ours, theirs)]
    student = call(query, key, wide[0], ours.is_causal, ours.scale)
    teacher = call(theirs.query.to(dtype), theirs.key.to(dtype), wide[1], theirs.is_causal, theirs.scale)
    value = loss(make(student), make(teacher), mask=valid)
    return value.detach(), *torch.autograd.grad(value * coefficient, (query, key))


def task(kind, ours, theirs, valid=None, **options):
    counted = valid.unsqueeze(1) if valid is not None and valid.ndim == 3 else valid
    return AttentionTask(kind=kind, student=side(ours), teacher=side(theirs), valid=counted, **options)


def computed(given, *, gradient=True):
    """By kernels, with all new memory full of NaN, and nothing that is given changed."""
    tensors = [tensor for each in (given.student, given.teacher) for tensor in (each.query, each.key, each.mask)]
    before = [(tensor, tensor.clone()) for tensor in (*tensors, given.valid) if tensor is not None]
    torch.use_deterministic_algorithms(True)
    try:
        found = attention_losses_triton(given, gradient=gradient)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor, copy in before:
        assert same_bits(tensor, copy)
    return found


def check(kind, ours, theirs, valid=None, coefficient=2.0):
    """The error against float64 is no larger than 1.5 times that of whole maps in the same dtype, plus rounding."""
    dtype = ours.query.dtype
    found = computed(task(kind, ours, theirs, valid, coefficient=coefficient))
    value, *slopes = defined(kind, ours, theirs, valid, torch.float64, coefficient)
    eager, *eager_slopes = defined(kind, ours, theirs, valid, dtype, coefficient)
    torch.testing.assert_close(found.total, found.value * coefficient)
    allowed = 1.5 * distance(eager, value) + 8 * EPSILON * (1 + abs(value.item()))
    assert distance(found.value, value) <= allowed, (found.value, value)
    for mine, true, other in zip((found.query, found.key), slopes, eager_slopes, strict=True):
        assert mine.shape == true.shape and mine.dtype is (torch.float32 if dtype is torch.float16 else dtype)
        inherent = distance(other, true)
        if interpreted() and dtype is torch.bfloat16:
            inherent = max(inherent, distance(cut_off(true), true))
        allowed = 1.5 * inherent + 8 * EPSILON * (true.norm().item() + coefficient * EPSILON)
        assert distance(mine.to(dtype), true) <= allowed, (distance(mine.to(dtype), true), allowed)
    return found


@pytest.mark.parametrize(
    ("kind", "mask", "counted", "groups"),
    [
        ("kl", "none", None, 1),
        ("kl", "causal", "tokens", 1),
        ("kl", "bool keys", "tokens", 1),
        ("kl", "bool lost", "pairs", 1),
        ("kl", "added keys", "tokens", 1),
        ("kl", "added -inf", "heads", 2),
        ("mse", "bool lost", "pairs", 1),
        ("mse", "bool heads", None, 1),
        ("mse", "bias", "pairs", 1),
        ("scores mse", "bool keys", "tokens", 1),
        ("scores mse", "added keys", None, 1),
        ("scores mse", "bias", "heads", 2),
    ],
)
def test_values_and_gradients_are_those_of_whole_maps(kind, mask, counted, groups, device):
    valid = padding(device)
    valid = {
        None: None,
        "tokens": valid,
        "pairs": valid[:, None] & valid[:, :, None],
        "heads": drawn(BATCH, HEADS, TOKENS, TOKENS, seed=5, device=device) > 0,
    }[counted]
    check(kind, *pair(mask, groups=groups, device=device), valid)


@pytest.fixture
def own_tiles():
    """Those that are taken on a device."""


@pytest.mark.usefixtures("own_tiles")
@pytest.mark.parametrize(("kind", "mask"), [("kl", "bool lost"), ("scores mse", "bool keys")])
def test_tiles_of_different_sizes(kind, mask, device):
    check(kind, *pair(mask, device=device), padding(device))


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("kl", "bool queries"),
        ("mse", "bool reversed"),
        ("scores mse", "bias double"),
    ],
)
def test_unusual_masks(kind, mask, device):
    check(kind, *pair(mask, device=device))


@pytest.mark.parametrize(
    ("kind", "mask", "their_mask"),
    [
        ("kl", "causal", "none"),
        ("kl", "none", "bool lost"),
        ("kl", "bool keys", "none"),
        ("mse", "bool lost", "none"),
        ("scores mse", "bool keys", "bool lost"),
    ],
)
def test_what_one_side_hides(kind, mask, their_mask, device):
    if kind == "scores mse":  # infinitely far from the other side, which is what whole maps say
        ours, theirs = pair(mask, their_mask, device=device)
        found = computed(task(kind, ours, theirs))
        assert found.value == defined(kind, ours, theirs, None, torch.float64, 1.0)[0] == math.inf
        return
    check(kind, *pair(mask, their_mask, device=device))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("kl", torch.float16), ("mse", torch.bfloat16), ("scores mse", torch.float16)],
    ids=str,
)
def test_half_precision_and_odd_widths(kind, dtype, device):
    check(kind, *pair("added half" if kind == "kl" else "none", widths=(7, 20), dtype=dtype, device=device), padding(device))


@pytest.mark.parametrize(("kind", "spread"), [("kl", 1e-5), ("mse", 1.0), ("scores mse", 1.0)])
def test_slopes_rounded_for_tensor_cores(kind, spread, device, monkeypatch):
    """Near the teacher they are too small for float16, unless they are lifted."""
    ours, _ = pair("bool keys", dtype=torch.float16, device=device)
    query = ours.query.float() + spread * drawn(*ours.query.shape, seed=3, device=device)
    given = task(kind, ours, call(query, ours.key.float(), ours.mask, False, ours.scale), padding(device))
    results = []
    for exact in (True, False):
        monkeypatch.setattr(maps, "exact", lambda tensor, exact=exact: exact or tensor.dtype is torch.float32)
        results.append(computed(given))
    for one, other in ((getattr(each, name) for each in results) for name in ("query", "key")):
        assert 0 < distance(one, other) <= 3e-3 * one.norm().item()


def test_any_strides_and_a_teacher_of_another_dtype(device):
    wide = drawn(BATCH, TOKENS, 3, HEADS, 10, device=device)
    query, key = wide[:, :, 0].transpose(1, 2), wide[:, :, 1].transpose(1, 2)[..., ::2][..., :5]
    query = query[..., :5]
    assert query.stride(-1) == 1 and key.stride(-1) == 2
    their_query = drawn(1, HEADS, TOKENS, 16, seed=1, dtype=torch.bfloat16, device=device).expand(BATCH, -1, -1, -1)
    their_key = drawn(BATCH, 1, TOKENS, 16, seed=2, dtype=torch.bfloat16, device=device).expand(-1, HEADS, -1, -1)
    ours, theirs = call(query, key, None, True, 0.5), call(their_query, their_key, None, True, 0.25)
    found = computed(task("kl", ours, theirs))
    exact = call(their_query.double(), their_key.double(), None, True, 0.25)
    expected = defined("kl", ours, exact, None, torch.float64, 1.0)
    torch.testing.assert_close((found.value, found.query, found.key), tuple(map(torch.Tensor.float, expected)))


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_several_groups_of_heads(kind, device):
    sides = []
    for seed, key_heads in ((0, 2), (2, 1)):
        query, key = drawn(1, 4, 20, 8, seed=seed, device=device), drawn(1, key_heads, 20, 8, seed=seed + 1, device=device)
        sides.append(call(query, key, drawn(1, 4, 20, 20, seed=seed + 4, device=device), False, 0.3))
    check(kind, *sides)


@pytest.mark.parametrize("kind", ["kl", "scores mse"])
def test_more_keys_than_queries_and_wide_heads(kind, device):
    sides = [
        call(drawn(1, 1, 5, 80, seed=seed, device=device), drawn(1, 1, 40, 80, seed=seed + 1, device=device), None, False, 0.1)
        for seed in (0, 2)
    ]
    valid = drawn(1, 5, 40, seed=4, device=device) > -0.5
    valid[0, 2] = False
    check(kind, *sides, valid)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_masked_tokens_may_hold_anything_and_get_no_gradient(kind, device):
    valid = padding(device)
    results = []
    for poison in (0.0, math.nan):
        ours, theirs = pair("bool keys", device=device)
        for tensor in (ours.query, ours.key, theirs.query, theirs.key):
            tensor.transpose(1, 2)[~valid] = poison
        results.append(computed(task(kind, ours, theirs, valid)))
    for one, other in ((getattr(each, name) for each in results) for name in ("value", "query", "key")):
        assert same_bits(one, other) and torch.isfinite(one).all()
    assert all((slope.transpose(1, 2)[~valid] == 0).all() for slope in (results[1].query, results[1].key))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_counts_is_zero(kind, device):
    for valid, mean in ((torch.zeros(BATCH, TOKENS), True), (torch.zeros(BATCH, TOKENS, TOKENS), kind == "kl")):
        found = computed(task(kind, *pair("bool keys", device=device), valid.bool().to(device), mean=mean))
        assert found.value == 0 and (found.query == 0).all() and (found.key == 0).all()


@pytest.mark.parametrize("kind", ["kl", "scores mse"])
def test_sums_evaluations_and_factors_on_the_device(kind, device):
    given = pair("bool lost", device=device)
    options = {"mean": False, "coefficient": torch.tensor(0.5, device=device)}
    found = computed(task(kind, *given, padding(device), **options))
    again = computed(task(kind, *given, padding(device), **options))
    assert all(same_bits(getattr(found, name), getattr(again, name)) for name in ("value", "total", "query", "key"))
    alone = computed(task(kind, *given, padding(device), **options), gradient=False)
    assert same_bits(alone.value, found.value) and alone.query is alone.key is None
    expected = attention_losses(task(kind, *given, padding(device), **options), gradient=True)
    for name in ("value", "total", "query", "key"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_identical_attentions_cost_nothing(kind, device):
    ours, _ = pair("causal", device=device)
    found = computed(task(kind, ours, ours))
    assert abs(found.value.item()) < 1e-6
    assert max(found.query.abs().max(), found.key.abs().max()) < 1e-6
