"""What is read from a store is what the teacher makes, whatever the batch it is read for looks like."""

import pickle
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5EncoderModel,
)

from hookdistill import Distiller, Keep, Match, StoreError, TeacherStore
from pairs import ConvNet, Mlp, Reader, pictures, points, seeded
from store_zoo import batches, flat, live, padded, sentences

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def bert():
    return seeded(BertForSequenceClassification, BertConfig(**SMALL, num_hidden_layers=2, num_labels=3)).eval()


def llama():
    return seeded(LlamaForCausalLM, LlamaConfig(**SMALL, num_hidden_layers=2, num_key_value_heads=1)).eval()


def t5():
    sizes = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "num_layers": 2, "vocab_size": 20}
    return seeded(T5EncoderModel, T5Config(**sizes, use_cache=False)).eval()


TRANSFORMERS = {
    "bert": (
        bert,
        [
            "bert.encoder.layer.*",
            "bert.encoder.layer.1.attention.self:attention",
            "bert.encoder.layer.0.attention.self:query",
            "bert.encoder.layer.0.attention.self:attention_scores",
            "bert.embeddings:input.input_ids",
            ":logits",
        ],
    ),
    "llama": (llama, ["model.layers.*", "model.layers.1.self_attn:attention", "model.layers.0.self_attn:key", ":logits"]),
    "t5": (t5, ["encoder.block.*", "encoder.block.0.layer.0.SelfAttention:attention"]),
}


def assert_as_live(read, expected, valid):
    """Equal where tokens are valid on all token dimensions, NaN elsewhere; tensors without tokens equal everywhere."""
    assert read.keys() == expected.keys()
    tokens = valid.shape[1]
    for name, tensor in read.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype), name
        stored = torch.ones_like(tensor, dtype=torch.bool)
        for dim in range(1, tensor.ndim):
            if tensor.shape[dim] == tokens:
                shape = [len(valid)] + [1] * (tensor.ndim - 1)
                shape[dim] = tokens
                stored &= valid.view(shape)
        torch.testing.assert_close(tensor[stored], expected[name][stored], rtol=1e-5, atol=1e-6, equal_nan=False)
        if tensor.is_floating_point():
            assert bool(tensor[~stored].isnan().all()), name


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_any_order_batch_size_and_padding(kind, left, tmp_path):
    build, addresses = TRANSFORMERS[kind]
    if kind == "bert" and left:
        addresses = addresses[:-1]  # its pooler takes the first position, padding or not
    teacher, samples = build(), sentences()
    store = TeacherStore.build(tmp_path, teacher, addresses, batches(samples, 4), progress=False, shard_bytes=4000)
    assert len(store) == 12
    order = samples[:]
    random.Random(0).shuffle(order)
    for batch in batches(order, 5, left=left, length=13, pad=3):
        # thirteen tokens, as no other dimension is long
        positions = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)} if kind != "t5" else {}
        expected = live(teacher, {**batch, **positions}, addresses)
        assert_as_live(flat(store.captures(batch, addresses)), expected, batch["attention_mask"].bool())


def test_a_mask_with_holes(tmp_path):
    teacher, batch = seeded(Reader), padded(sentences(3, longest=6), length=6)
    batch["attention_mask"] = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]])
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], [batch], progress=False)
    assert_as_live(
        flat(store.captures(batch, ["layers.0"])), live(teacher, batch, ["layers.0"]), batch["attention_mask"].bool()
    )


def test_as_many_classes_or_features_as_tokens_are_not_taken_for_tokens(tmp_path):
    teacher = seeded(Reader, width=8, classes=8)
    batch = padded(sentences(4, longest=8), length=8)
    addresses = ["layers.0", ":logits", ":pooled"]
    store = TeacherStore.build(tmp_path, teacher, addresses, [batch], progress=False)
    dims = {stored.name: stored.token_dims for stored in store.manifest.settings.stored}
    assert dims == {"layers.0": (0,), ":logits": (0,), ":pooled": ()}
    read, expected = flat(store.captures(batch, addresses)), live(teacher, batch, addresses)
    assert torch.equal(read["", "pooled"], expected["", "pooled"])
    valid = batch["attention_mask"].bool()
    assert torch.equal(read["", "logits"][valid], expected["", "logits"][valid])


def test_without_a_mask(tmp_path):
    for name, teacher, batch, addresses in [
        ("mlp", seeded(Mlp), points(), ["first", "norm:input", ""]),
        ("conv", seeded(ConvNet), pictures(), ["stem", "norm", "head"]),
    ]:
        batch = {key: batch[key] for key in batch if key in ("x", "pixels")}
        store = TeacherStore.build(tmp_path / name, teacher, addresses, [batch], progress=False)
        read, expected = flat(store.captures(batch, addresses)), live(teacher, batch, addresses)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[key], expected[key]) for key in read)
        (x,) = batch.values()
        some = flat(store.captures({next(iter(batch)): x[[2, 0]]}, addresses))
        assert all(torch.equal(some[key], expected[key][[2, 0]]) for key in read)


def test_lengths_that_differ_between_batches_without_a_mask(tmp_path):
    teacher, samples = seeded(Reader), [ids for ids in sentences(40) if len(ids) in (3, 5)]
    short, long = ([ids for ids in samples if len(ids) == length] for length in (3, 5))
    loader = [{"input_ids": torch.stack(short)}, {"input_ids": torch.stack(long)}]
    addresses = ["layers.*", ":logits"]
    store = TeacherStore.build(tmp_path, teacher, addresses, loader, progress=False)
    for batch in (*loader, {"input_ids": torch.stack(long[::-2])}):
        read, expected = flat(store.captures(batch, addresses)), live(teacher, batch, addresses)
        assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_the_width_of_token_ids_and_the_kind_of_mask_do_not_matter(tmp_path):
    teacher, batch = seeded(Reader), padded(sentences(4))
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], [batch], progress=False)
    expected = store.captures(batch, ["layers.0"])["layers.0"]["output"]
    for mask in (batch["attention_mask"].bool(), batch["attention_mask"].float()):
        other = {"input_ids": batch["input_ids"].int(), "attention_mask": mask}
        read = store.captures(other, ["layers.0"])["layers.0"]["output"]
        assert torch.equal(read[mask.bool()], expected[mask.bool()])


def test_mask_none_keeps_the_padding(tmp_path):
    teacher, batch = seeded(Reader), padded(sentences(4), length=7)
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], [batch], mask=None, progress=False)
    assert torch.equal(
        store.captures(batch, ["layers.0"])["layers.0"]["output"], live(teacher, batch, ["layers.0"])["layers.0", "output"]
    )


def test_a_sample_in_two_batches_is_stored_once(tmp_path):
    teacher, samples = seeded(Reader), sentences(5)
    loader = [padded(samples), padded(samples[1:3], left=True), padded([samples[0], samples[0]])]
    assert len(TeacherStore.build(tmp_path, teacher, ["layers.0"], loader, progress=False)) == 5


def test_a_call_and_both_spellings_of_a_leaf(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return {"logits": self.layer(self.layer(x)), "other": x}

    teacher, batch = seeded(Twice), {"x": points()["x"]}
    store = TeacherStore.build(tmp_path, teacher, ["layer@0", "layer@-1", ":logits"], [batch], progress=False)
    read = store.captures(batch, ["layer@-1", "layer@0", ":output.logits"])
    assert torch.equal(read["layer"]["output@-1"], read[""]["output.logits"])
    assert torch.equal(read["layer"]["output@0"], teacher.layer(batch["x"]))


def test_a_shard_is_a_safetensors_file(tmp_path):
    teacher, samples = seeded(Reader), sentences(6)
    TeacherStore.build(tmp_path, teacher, ["layers.0", ":logits"], batches(samples), keep={":logits": "bf16"}, progress=False)
    (shard,) = (tmp_path / "shards").iterdir()
    tensors = load_file(shard)
    expected = live(teacher, padded(samples), ["layers.0"])["layers.0", "output"][padded(samples)["attention_mask"].bool()]
    torch.testing.assert_close(tensors["layers.0"], expected)
    assert tensors[":logits"].dtype is torch.bfloat16
    assert tensors[":logits@offsets"].tolist() == torch.tensor([0, *map(len, samples)]).cumsum(0).tolist()


def test_several_workers_and_a_copy_by_pickle(tmp_path):
    teacher, samples = seeded(Reader), sentences(8)
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], batches(samples), progress=False)
    copy = pickle.loads(pickle.dumps(store))
    loader = DataLoader(samples, batch_size=3, shuffle=True, num_workers=2, collate_fn=padded)
    for batch in loader:
        first, second = (each.captures(batch, ["layers.0"])["layers.0"]["output"] for each in (store, copy))
        valid = batch["attention_mask"].bool()
        torch.testing.assert_close(first[valid], live(teacher, batch, ["layers.0"])["layers.0", "output"][valid])
        assert torch.equal(first[valid], second[valid])


def test_pages_are_let_go_and_many_small_shards_are_read(tmp_path):
    teacher, samples = seeded(Reader), sentences(20)
    TeacherStore.build(tmp_path, teacher, ["layers.0"], batches(samples), shard_bytes=1, progress=False)
    assert len(list((tmp_path / "shards").iterdir())) == 20
    store = TeacherStore.open(tmp_path, resident_bytes=1)
    batch = padded(samples)
    valid = batch["attention_mask"].bool()
    read = store.captures(batch, ["layers.0"])["layers.0"]["output"]
    torch.testing.assert_close(read[valid], live(teacher, batch, ["layers.0"])["layers.0", "output"][valid])


def test_keys_from_fields_of_the_batch(tmp_path):
    teacher, samples = seeded(Reader), sentences(6)
    names = [f"sample {number}" for number in range(6)]
    loader = [{**padded(samples[i : i + 2]), "id": names[i : i + 2]} for i in range(0, 6, 2)]
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], loader, key="id", progress=False)
    batch = {**padded([samples[4], samples[0]], left=True), "id": [names[4], names[0]]}
    valid = batch["attention_mask"].bool()
    read = store.captures(batch, ["layers.0"])["layers.0"]["output"]
    torch.testing.assert_close(read[valid], live(teacher, batch, ["layers.0"])["layers.0", "output"][valid])
    swapped = {**batch, "id": [names[0], names[4]]}
    with pytest.raises(StoreError, match=r"sample 0 .*id 'sample 0'.* has other inputs than the teacher saw"):
        store.captures(swapped, ["layers.0"])


def test_an_augmentation_seed_in_the_key(tmp_path):
    teacher, x = seeded(Mlp), points()["x"]

    def augmented(seed):
        noise = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        return {"x": x + noise, "id": torch.arange(5), "augmentation_seed": torch.full((5,), seed)}

    key = ("id", "augmentation_seed")
    store = TeacherStore.build(tmp_path, teacher, ["first"], map(augmented, range(3)), key=key, progress=False)
    assert len(store) == 15
    read = store.captures(augmented(2), ["first"])["first"]["output"]
    assert torch.equal(read, live(teacher, {"x": augmented(2)["x"]}, ["first"])["first", "output"])
    with pytest.raises(StoreError, match="augmentation_seed"):
        store.captures(augmented(3), ["first"])


def test_an_unaugmented_teacher_for_an_augmented_student_only_when_asked_for(tmp_path):
    teacher, x = seeded(Mlp), points()["x"]
    TeacherStore.build(tmp_path, teacher, ["first"], [{"x": x, "id": torch.arange(5)}], key="id", progress=False)
    shifted = {"x": x + 1, "id": torch.arange(5)}
    with pytest.raises(StoreError, match="check_inputs=False"):
        TeacherStore.open(tmp_path).captures(shifted, ["first"])
    read = TeacherStore.open(tmp_path, check_inputs=False).captures({"id": torch.tensor([3, 1])}, ["first"])
    assert torch.equal(read["first"]["output"], teacher.eval().first(x)[[3, 1]])


def test_inputs_by_position_and_by_a_batch_adaptor(tmp_path):
    teacher, x = seeded(Mlp), points()["x"]
    store = TeacherStore.build(tmp_path / "position", teacher, ["first"], [(x, torch.zeros(5))], progress=False)
    assert torch.equal(store.captures((x[1:2],), ["first"])["first"]["output"], teacher.eval().first(x)[1:2])
    loader = [{"features": x}]

    def adaptor(device, batch):
        return {"x": batch["features"].to(device)}, {"x": batch["features"].to(device)}

    store = TeacherStore.build(tmp_path / "adaptor", teacher, ["first"], loader, batch_adaptor=adaptor, progress=False)
    assert torch.equal(store.captures({"features": x[:2]}, ["first"])["first"]["output"], teacher.first(x)[:2])


def test_token_dimensions_can_be_said(tmp_path):
    class Fixed(nn.Module):
        """Refuses any other length than seven."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 4)

        def forward(self, input_ids, attention_mask):
            assert input_ids.shape[1] == 7, "seven tokens"
            return self.embed(input_ids)

    teacher, batch = seeded(Fixed), padded(sentences(3), length=7)
    with pytest.raises(StoreError, match=r"refuses .*seven tokens.*token_dims"):
        TeacherStore.build(tmp_path / "a", teacher, ["embed"], [batch], progress=False)
    store = TeacherStore.build(tmp_path / "b", teacher, ["embed"], [batch], keep=Keep(token_dims=(0,)), progress=False)
    read = store.captures(batch, ["embed"])["embed"]["output"]
    valid = batch["attention_mask"].bool()
    assert torch.equal(read[valid], teacher.embed(batch["input_ids"])[valid])
    assert bool(read[~valid].isnan().all())


class Anything(Reader):
    """Takes every keyword that it is given."""

    def forward(self, **inputs):
        assert set(inputs) <= {"input_ids", "attention_mask"}, set(inputs)
        return super().forward(**inputs)


def test_the_workers_of_a_loader_read(tmp_path, monkeypatch):
    teacher, samples = seeded(Reader), sentences(12)
    matches = [
        Match("layers.0", "layers.0", mask="attention_mask"),
        Match("layers.1", "layers.1", mask="attention_mask"),
        Match(":logits", ":logits", loss="kl", mask="attention_mask"),
    ]
    keep = {"layers.0": "int8", "layers.1": Keep(tokens=[0]), ":logits": Keep(samples=5)}
    store = TeacherStore.build(tmp_path, teacher, matches, batches(samples), keep=keep, progress=False)
    student = seeded(Anything, seed=3)
    expected = [float(Distiller(store, student, matches)(batch).total.detach()) for batch in batches(samples, 5)]
    loader = DataLoader(samples, 5, num_workers=2, collate_fn=store.collated(padded))
    distiller = Distiller(store, student, matches)
    found = []
    for batch in loader:
        monkeypatch.setattr(TeacherStore, "parts_of", lambda *_: pytest.fail("read in the main process"))
        distiller.plan(batch)
        found.append(float(distiller(batch).total.detach()))
    assert found == expected
    monkeypatch.undo()
    some = next(iter(DataLoader(samples, 5, collate_fn=store.collated(padded, ["layers.0"]))))
    assert list(some[store.item]) == ["layers.0"]
    assert float(Distiller(store, student, matches)(some).total.detach()) == expected[0]
    with pytest.raises(StoreError, match="sample 0 of the batch"):
        next(iter(DataLoader([torch.tensor([1, 1, 1, 1])], num_workers=1, collate_fn=store.collated(padded))))
    with pytest.raises(StoreError, match="needs a collate_fn that returns a dict, and it returned list"):
        store.collated(lambda rows: rows)([1])


def test_a_batch_that_is_changed_in_place_is_looked_up_anew(tmp_path):
    teacher, samples = seeded(Reader), sentences(8)
    store = TeacherStore.build(tmp_path, teacher, ["layers.0"], batches(samples), progress=False)
    batch, other = padded(samples[:4], length=7), padded(samples[4:], length=7)
    store.captures(batch, ["layers.0"])
    for name, tensor in batch.items():
        tensor.copy_(other[name])
    valid = batch["attention_mask"].bool()
    read = store.captures(batch, ["layers.0"])["layers.0"]["output"]
    torch.testing.assert_close(read[valid], live(teacher, other, ["layers.0"])["layers.0", "output"][valid])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_and_to_a_gpu(tmp_path):
    teacher, samples = seeded(Reader).cuda(), sentences(12)
    keep = {"layers.1": "int8", "layers.2": "fp8", ":logits": Keep(samples=30), "embed": Keep(tokens=[0])}
    addresses = ["layers.*", "embed", ":logits"]
    store = TeacherStore.build(tmp_path / "gpu", teacher, addresses, batches(samples), keep=keep, progress=False)
    host = TeacherStore.build(tmp_path / "cpu", teacher.cpu(), addresses, batches(samples), keep=keep, progress=False)
    batch = padded(samples[::-1])
    there = store.captures({name: tensor.cuda() for name, tensor in batch.items()}, addresses)
    for (name, read), expected in zip(flat(there).items(), flat(host.captures(batch, addresses)).values(), strict=True):
        assert read.is_cuda
        torch.testing.assert_close(read.cpu().nan_to_num(9), expected.nan_to_num(9), rtol=1e-2, atol=2e-2, msg=str(name))
