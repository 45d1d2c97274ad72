"""What is lost in each format, and that sparse logits train as they should."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookdistill import Keep, StoreError, TeacherStore, losses
from hookdistill.store.codecs import Plain, Sampled, Scaled, TopK, codec_for
from hookdistill.store.dtypes import TAGS, cooked, raw
from pairs import Mlp, Reader, points, seeded
from store_zoo import batches, contents, live, padded, sentences

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def through(codec, rows, draws=None):
    """Rows encoded, laid down as raw numbers, taken up again: the parts of a batch of one sample."""
    parts = {name: raw(part.contiguous()) for name, part in codec.encode(rows, draws).items()}
    spread = codec.spread(parts)
    return {name: cooked(array.copy(), codec.parts[name].dtype) for name, array in spread.items()}


@pytest.mark.parametrize("dtype", TAGS, ids=str)
def test_every_dtype_is_kept_to_the_bit(dtype):
    numbers = torch.arange(12).reshape(3, 4).to(dtype)
    assert torch.equal(through(Plain(dtype, dtype), numbers)[""].view(torch.uint8), numbers.view(torch.uint8))


@given(st.integers(1, 5), st.integers(1, 9), st.floats(1e-6, 1e6), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_eight_bits_are_as_near_as_their_step(rows, width, size, seed):
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, width, generator=draw) * size
    largest = numbers.abs().amax(-1, keepdim=True)
    for kept_as, step in ((torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)):
        codec = Scaled(torch.float32, kept_as)
        error = (codec.decode(through(codec, numbers)) - numbers).abs()
        bound = largest * step if kept_as is torch.int8 else numbers.abs() * step + largest * 2**-9 / 448
        assert bool((error <= bound * 1.001).all())


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_zeros_stay_zeros_and_what_eight_bits_cannot_hold_is_refused(dtype):
    codec = codec_for(Keep(dtype), torch.float32, 4)
    assert torch.equal(codec.decode(through(codec, torch.zeros(2, 4))), torch.zeros(2, 4))
    with pytest.raises(StoreError, match="not finite"):
        codec.encode(torch.tensor([[1.0, -math.inf]]), None)


def test_float16_refuses_what_it_cannot_hold_and_keeps_infinities():
    codec = codec_for(Keep("fp16"), torch.float32, 2)
    with pytest.raises(StoreError, match="1e\\+05, which float16 cannot"):
        codec.encode(torch.tensor([[1e5, 1.0]]), None)
    kept = torch.tensor([[-math.inf, 1.0]])
    assert torch.equal(codec.decode(through(codec, kept)), kept)


def test_the_tensor_comes_back_in_the_dtype_of_the_teacher(tmp_path):
    teacher, batch = seeded(Mlp).double(), {"x": points()["x"].double()}
    for dtype in ("float32", "bf16", "int8", "fp8"):
        store = TeacherStore.build(tmp_path / dtype, teacher, ["first"], [batch], keep=dtype, progress=False)
        read, expected = store.captures(batch, ["first"])["first"]["output"], teacher.eval().first(batch["x"])
        assert read.dtype is torch.float64
        assert not torch.equal(read, expected)
        torch.testing.assert_close(read, expected, rtol=0.07, atol=0.02)


def test_integers_are_kept_as_they_are(tmp_path):
    teacher, samples = seeded(Reader), sentences(4)
    store = TeacherStore.build(tmp_path, teacher, ["embed:input"], batches(samples), progress=False)
    batch = padded(samples)
    valid = batch["attention_mask"].bool()
    assert torch.equal(store.captures(batch, ["embed:input"])["embed"]["input"][valid], batch["input_ids"][valid])
    with pytest.raises(StoreError, match=r"'embed:input'.*int64 and can only be kept as it is"):
        TeacherStore.build(tmp_path / "other", teacher, ["embed:input"], batches(samples), keep="int8", progress=False)


def test_attention_maps_in_eight_bits_have_a_scale_for_each_query(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=20, num_hidden_layers=1)
    teacher, samples, address = seeded(BertModel, config), sentences(5), "encoder.layer.0.attention.self:attention"
    store = TeacherStore.build(tmp_path, teacher, [address], batches(samples, 2), keep="int8", progress=False)
    batch = padded(samples[::-1])
    valid = batch["attention_mask"].bool()
    pairs = (valid[:, None, :, None] & valid[:, None, None, :]).expand(-1, 2, -1, -1)
    ((_, expected),) = live(teacher, batch, [address]).items()
    read = store.captures(batch, [address])["encoder.layer.0.attention.self"]["attention"]
    torch.testing.assert_close(read[pairs], expected[pairs], rtol=0, atol=1 / 254 + 1e-6)
    assert bool(read[~pairs].isnan().all())


def test_some_tokens(tmp_path):
    teacher, samples = seeded(Reader), sentences(6)
    keep = {"layers.0": Keep(tokens=[0, -1]), "layers.1": Keep("int8", tokens="answer"), "embed": Keep(tokens=5)}

    def answering(batch):
        return {**batch, "answer": (batch["input_ids"] > 9).long() * batch["attention_mask"]}

    loader = map(answering, batches(samples, 3))
    addresses = ["layers.{0,1}", "embed"]
    store = TeacherStore.build(tmp_path, teacher, addresses, loader, keep=keep, progress=False)
    batch = padded(samples[::-1], left=True, length=9)
    valid = batch["attention_mask"].bool()
    place = torch.where(valid, valid.cumsum(1) - 1, -1)
    lengths = valid.sum(1, keepdim=True)
    expected = {
        "layers.0": (place == 0) | (place == lengths - 1),
        "layers.1": valid & (batch["input_ids"] > 9),
        "embed": place == 5,
    }
    made = live(teacher, batch, addresses)
    for stored in store.manifest.settings.stored:
        kept = expected[stored.name]
        assert torch.equal(store.kept(batch, stored), kept), stored.name
        read = store.captures(batch, [stored.name])[stored.name]["output"]
        torch.testing.assert_close(read[kept], made[stored.name, "output"][kept], rtol=0.02, atol=0.02)
        assert bool(read[~kept].isnan().all())


@pytest.mark.parametrize("features", ["0:3", [5, 0, -1]])
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_some_features(tmp_path, features, dtype):
    teacher, samples = seeded(Reader), sentences(6)
    keep = Keep(dtype, features=features)
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], batches(samples), keep=keep, progress=False)
    batch = padded(samples)
    valid = batch["attention_mask"].bool()
    chosen = [0, 1, 2] if isinstance(features, str) else features
    expected = live(teacher, batch, ["layers.0"])["layers.0", "output"][..., chosen]
    read = store.captures(batch, ["layers.0"])["layers.0"]["output"]
    torch.testing.assert_close(read[valid], expected[valid], rtol=0.02, atol=0.02 if dtype == "int8" else 1e-6)


# Sparse logits


def logits(rows=4, classes=50, scale=3.0, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("k", [1, 7, 49, 50, 60])
def test_top_k_keeps_log_probabilities_and_the_mass_of_the_others(k, temperature):
    teacher = logits()
    codec = TopK(50, k, temperature, torch.float32)
    parts = through(codec, teacher)
    expected = (teacher / temperature).softmax(-1)
    top = expected.sort(descending=True).values[:, :k]
    torch.testing.assert_close(parts["#log_probs"].exp(), top, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts["#log_tail"].exp(), 1 - top.sum(-1), rtol=1e-3, atol=1e-6)
    dense = (codec.decode(parts) / temperature).softmax(-1)
    torch.testing.assert_close(dense.sort(descending=True).values[:, :k], top, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [3, 49, 50])
def test_top_k_tail_kl_is_that_of_joined_classes(k):
    teacher, student = logits(), logits(seed=1).double().requires_grad_()
    packed = (codec := TopK(50, k, 2.0, torch.float32)).packed(through(codec, teacher))
    loss = losses.top_k_tail_kl(student, packed, temperature=2.0)
    p, q = ((each.double() / 2).softmax(-1) for each in (teacher, student))
    ids = teacher.topk(k).indices

    def joined(probs):
        return torch.cat([probs.gather(-1, ids), 1 - probs.gather(-1, ids).sum(-1, keepdim=True)], -1)[:, : k + (k < 50)]

    expected = 4 * (joined(p) * (joined(p) / joined(q)).log()).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    whole = losses.kl(student, teacher, temperature=2.0)
    assert bool(loss <= whole + 1e-6)
    if k == 50:
        torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("proposal", [1.0, 0.6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_value_and_gradient_are_unbiased(proposal, temperature):
    draws, rounds = 20, 400
    teacher, student = logits(2, 12, 2.0), logits(2, 12, 2.0, seed=1).requires_grad_()
    codec = Sampled(12, draws, temperature, proposal, torch.float32)
    uniform = np.random.default_rng(0)
    values, slopes, estimates = [], [], []
    for _ in range(rounds):
        parts = through(codec, teacher, torch.from_numpy(uniform.random((2, draws))))
        loss = losses.sampled_kl(student, codec.packed(parts), temperature=temperature)
        values.append(loss.detach())
        slopes.append(torch.autograd.grad(loss, student)[0])
        estimates.append((codec.decode(parts) / temperature).exp())
    whole = losses.kl(student, teacher, temperature=temperature)
    (slope,) = torch.autograd.grad(whole, student)
    for found, expected in (
        (torch.stack(values), whole.detach()),
        (torch.stack(slopes), slope),
        (torch.stack(estimates), (teacher / temperature).softmax(-1)),
    ):
        error = (found.mean(0) - expected).abs()
        assert bool((error <= 4.5 * found.std(0) / math.sqrt(rounds) + 1e-3).all())


def test_top_k_is_biased_where_sampling_is_not():
    """Of a flat teacher, the gradient for the classes outside the first k; what the paper proves of top-k without a tail."""
    teacher, student = torch.zeros(1, 40), logits(1, 40, 1.0, seed=2).requires_grad_()
    (true,) = torch.autograd.grad(losses.kl(student, teacher), student)
    top = TopK(40, 4, 1.0, torch.float32)
    (biased,) = torch.autograd.grad(losses.top_k_tail_kl(student, top.packed(through(top, teacher))), student)
    sampled, uniform, slopes = Sampled(40, 4, 1.0, 1.0, torch.float32), np.random.default_rng(0), []
    for _ in range(600):
        parts = through(sampled, teacher, torch.from_numpy(uniform.random((1, 4))))
        slopes.append(torch.autograd.grad(losses.sampled_kl(student, sampled.packed(parts)), student)[0])
    unbiased = torch.stack(slopes).mean(0)
    assert float((biased - true).norm()) > 3 * float((unbiased - true).norm())


def test_draws_depend_on_the_sample_alone(tmp_path):
    teacher, samples = seeded(Reader), sentences(8)
    keep = {":logits": Keep(samples=15)}
    one = TeacherStore.build(tmp_path / "one", teacher, [":logits"], batches(samples, 8), keep=keep, progress=False)
    other = TeacherStore.build(tmp_path / "other", teacher, [":logits"], batches(samples[::-1], 3), keep=keep, progress=False)
    seed = TeacherStore.build(tmp_path / "seed", teacher, [":logits"], batches(samples, 8), keep=keep, seed=1, progress=False)
    batch = padded(samples)
    first, second, third = (
        each.captures(batch, [":logits.kept_classes"])[""]["logits.kept_classes"] for each in (one, other, seed)
    )
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(first[valid], second[valid])
    assert first.shape == (8, batch["input_ids"].shape[1], 31)
    assert not torch.equal(first[valid], third[valid])
    weights = first[valid][:, :15]
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))
    assert bool(first[~valid].isnan().all())
    # Samples that begin with the same token, of which this teacher makes the same logits, have draws of their own.
    alike = [
        torch.equal(first[row, 0], first[other, 0])
        for row in range(8)
        for other in range(row)
        if batch["input_ids"][row, 0] == batch["input_ids"][other, 0]
    ]
    assert alike and not all(alike)


def test_the_dense_view_of_sparse_logits(tmp_path):
    teacher, samples = seeded(Reader), sentences(6)
    batch = padded(samples)
    valid = batch["attention_mask"].bool()
    made = live(teacher, batch, [":logits"])["", "logits"]
    for keep in (Keep("float16", top_k=3), Keep(samples=300)):
        store = TeacherStore.build(tmp_path / str(keep), teacher, [":logits"], batches(samples), keep=keep, progress=False)
        read = store.captures(batch, [":logits"])[""]["logits"]
        assert read.shape == made.shape
        torch.testing.assert_close(read.softmax(-1)[valid], made.softmax(-1)[valid], rtol=0, atol=0.12)
        assert bool(read[~valid].isnan().all())
        if keep.top_k:
            assert torch.equal(read.argmax(-1)[valid], made.argmax(-1)[valid])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dtype": "flaot16"}, r"Did you mean 'float16'"),
        ({"top_k": 3, "samples": 3}, "two ways"),
        ({"top_k": 0}, "1 to 65535"),
        ({"temperature": 2.0}, "whole logits serve every temperature"),
        ({"samples": 5, "temperature": -1.0}, "positive"),
        ({"top_k": 3, "proposal": 0.5}, "goes with samples"),
        ({"dtype": "int8", "top_k": 3}, "whole tensors"),
        ({"samples": 3, "features": "0:3"}, "drop classes"),
        ({"features": "0-3"}, "no range"),
        ({"tokens": []}, "empty"),
        ({"tokens": [0.5]}, "whole numbers"),
    ],
)
def test_settings_that_make_no_sense(wrong, says):
    with pytest.raises(StoreError, match=says):
        Keep(**wrong)


def test_keep_from_plain_values_and_back():
    from hookdistill.store.keep import as_keep

    for keep in (Keep(), Keep("bf16"), Keep(tokens=[0, -1]), Keep("fp16", top_k=64, temperature=2.0), Keep(token_dims=())):
        assert as_keep(keep.as_dict()) == keep
    with pytest.raises(StoreError, match="Did you mean 'top_k'"):
        as_keep({"topk": 3})
    with pytest.raises(StoreError, match="got int"):
        as_keep(3)


@pytest.mark.parametrize("keep", [Keep("int8"), Keep("float8"), Keep(top_k=2), Keep(samples=200)], ids=str)
def test_one_row_of_logits_for_each_sample(tmp_path, keep):
    teacher, batch = seeded(Mlp).eval(), {"x": points()["x"]}
    store = TeacherStore.build(tmp_path, teacher, ["head"], [batch], keep=keep, progress=False)
    read, made = store.captures(batch, ["head"])["head"]["output"], teacher(batch["x"])
    assert read.shape == made.shape
    torch.testing.assert_close(read.softmax(-1), made.softmax(-1), rtol=0, atol=0.12)
    if keep.sparse:
        packed = store.captures(batch, ["head:output.kept_classes"])["head"]["output.kept_classes"]
        assert packed.shape == (5, 2 * (keep.top_k or keep.samples) + 1)
        assert bool(losses.registered_losses()["top_k_tail_kl" if keep.top_k else "sampled_kl"].function(made, packed) < 0.05)


@pytest.mark.parametrize("keep", [Keep(top_k=3), Keep(samples=6), Keep(samples=6, proposal=0.5)], ids=str)
def test_in_blocks_as_whole(tmp_path, monkeypatch, keep):
    from hookdistill.store import encoding

    teacher, samples = seeded(Reader), sentences(5)
    for name, block in (("whole", 10**6), ("blocks", 12)):
        monkeypatch.setattr(encoding, "_BLOCK", block)
        TeacherStore.build(tmp_path / name, teacher, [":logits"], batches(samples), keep=keep, progress=False)
    assert contents(tmp_path / "whole") == contents(tmp_path / "blocks")


@pytest.mark.parametrize("keep", [Keep(), Keep("int8"), Keep(top_k=2), Keep(samples=4), Keep(tokens=[0, -1])], ids=str)
def test_samples_without_a_token(tmp_path, keep):
    teacher = seeded(Reader)
    some, none = padded(sentences(3), length=7, pad=1), padded(sentences(2, seed=1), length=7, pad=2)
    none["attention_mask"].zero_()
    some["attention_mask"][1] = 0
    store = TeacherStore.build(tmp_path, teacher, [":logits"], [none, some], keep=keep, progress=False)
    for batch in (none, some):
        read = store.captures(batch, [":logits"])[""]["logits"]
        valid = batch["attention_mask"].bool()
        assert read.shape == (len(valid), 7, 5)
        assert bool(read[~valid].isnan().all())
    read, made = store.captures(some, [":logits"])[""]["logits"], live(teacher, some, [":logits"])["", "logits"]
    torch.testing.assert_close(read[0, 0].softmax(-1), made[0, 0].softmax(-1), atol=0.5, rtol=0)


def test_one_number_for_each_sample(tmp_path):
    class Scored(torch.nn.Module):
        def forward(self, x):
            return {"score": x.sum(-1), "x": x}

    batch = {"x": points()["x"]}
    for dtype in ("float32", "int8"):
        store = TeacherStore.build(tmp_path / dtype, Scored(), [":score"], [batch], keep=dtype, progress=False)
        read = store.captures({"x": batch["x"][[3, 0]]}, [":score"])[""]["score"]
        torch.testing.assert_close(read, batch["x"].sum(-1)[[3, 0]], rtol=0.01, atol=1e-6)
