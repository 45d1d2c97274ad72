"""Never the wrong teacher: every mismatch is a StoreError that says which."""

import json
import os
import random
import re

import pytest
import torch
from torch import nn

import hookdistill
from hookdistill import AddressError, BatchError, Distiller, Keep, Match, StoreError, TeacherStore
from hookdistill.store import info, verify
from hookdistill.store.fingerprint import settings_hash
from pairs import Reader, points, readers, seeded
from store_zoo import Interrupted, batches, padded, sentences, until

ADDRESSES = ["layers.0", "layers.1", ":logits"]


@pytest.fixture
def samples():
    return sentences(12)


@pytest.fixture
def folder(tmp_path, samples):
    TeacherStore.build(
        tmp_path / "store",
        seeded(Reader),
        ADDRESSES,
        batches(samples),
        shard_bytes=1500,
        transforms={"tokenizer": Tokenizer(["a", "b"])},
        progress=False,
    )
    return tmp_path / "store"


class Tokenizer:
    """As much of a tokenizer as a fingerprint looks at."""

    def __init__(self, words):
        self.words = words
        self.special_tokens_map = {"pad_token": "[PAD]"}

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)}


def shards(folder):
    return sorted((folder / "shards").iterdir())


def damage(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def test_no_store_and_an_unfinished_one(tmp_path, samples):
    with pytest.raises(StoreError, match="no such folder"):
        TeacherStore.open(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"is no store: it has no manifest\.json"):
        TeacherStore.open(tmp_path)
    loader = until(batches(samples, 2), 5)
    with pytest.raises(Interrupted):
        TeacherStore.build(tmp_path, seeded(Reader), ADDRESSES, loader, shard_bytes=500, progress=False)
    with pytest.raises(StoreError, match=r"is not finished: [1-9]\d* shards .*Run the same build again"):
        TeacherStore.open(tmp_path)
    for check in (info, verify):
        with pytest.raises(StoreError, match="not finished"):
            check(tmp_path)


def test_a_missing_shard(folder):
    shards(folder)[1].unlink()
    with pytest.raises(StoreError, match=r"shard-00000-0000001\.safetensors is missing.*run the same build again"):
        TeacherStore.open(folder)
    with pytest.raises(StoreError, match=r"0000001\.safetensors is missing"):
        verify(folder)


def test_a_shard_cut_short(folder):
    path = shards(folder)[0]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(StoreError, match=r"0000000\.safetensors is damaged: it has \d+ bytes and should have \d+"):
        TeacherStore.open(folder)


def test_a_flipped_bit_is_found_by_verify_wherever_it_is(folder):
    for path in (shards(folder)[-1], next(folder.glob("index-*"))):
        size = path.stat().st_size
        for at in (*range(8, size, size // 23), size - 1):
            damage(path, at)
            with pytest.raises(StoreError, match=f"(?s){re.escape(path.name)} is damaged"):
                verify(folder)
            with pytest.raises(StoreError, match=f"(?s){re.escape(path.name)} is damaged"):
                TeacherStore.open(folder, verify=True)
            damage(path, at)
    assert verify(folder).samples == 12


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_read(folder, samples):
    store, batch = TeacherStore.open(folder), padded(samples)
    store.captures(batch, ADDRESSES)
    from hookdistill.store.shards import Shard

    path = shards(folder)[0]
    _, end = Shard(path).file.entries["layers.1"].range
    damage(path, end - 1, 64)
    with pytest.raises(StoreError, match=r"0000000\.safetensors is damaged: the checksum of 'layers\.1' of its sample"):
        TeacherStore.open(folder).captures(batch, ADDRESSES)
    TeacherStore.open(folder).captures(batch, ["layers.0", ":logits"])  # of which nothing is wrong


def test_whatever_bit_is_flipped_what_is_read_is_right_or_an_error(folder, samples):
    """Without `verify`: in shards, index and manifest, wherever it is."""
    batch, draw = padded(samples), random.Random(0)
    expected = TeacherStore.open(folder).captures(batch, ADDRESSES)
    right = wrong = 0
    for path in (*shards(folder)[:2], next(folder.glob("index-*")), folder / "manifest.json"):
        for _ in range(60):
            at, bit = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
            damage(path, at, bit)
            try:
                read = TeacherStore.open(folder).captures(batch, ADDRESSES)
            except StoreError:
                wrong += 1
            else:
                right += 1
                for layer, tensors in expected.items():
                    for key, tensor in tensors.items():
                        assert torch.equal(read[layer][key].nan_to_num(7), tensor.nan_to_num(7)), (path.name, at, bit)
            damage(path, at, bit)
    assert wrong > right


def test_another_teacher(folder):
    assert len(TeacherStore.open(folder, teacher=seeded(Reader))) == 12
    with pytest.raises(StoreError, match=r"of another teacher: the weights of this pairs\.Reader have the sha256"):
        TeacherStore.open(folder, teacher=seeded(Reader, seed=1))
    wide = seeded(Reader)
    wide.unused = nn.Sequential(wide.unused)
    with pytest.raises(StoreError, match="of another teacher"):
        TeacherStore.open(folder, teacher=wide)


def test_the_same_weights_in_another_model_are_another_teacher(tmp_path):
    one, other = nn.Sequential(nn.Linear(6, 4), nn.ReLU()), nn.Sequential(nn.Linear(6, 4), nn.GELU())
    other.load_state_dict(one.state_dict())
    batch = points()["x"]
    TeacherStore.build(tmp_path, one, ["1"], [batch], progress=False)
    with pytest.raises(StoreError, match="of another teacher: the structure"):
        TeacherStore.open(tmp_path, teacher=other)
    with pytest.raises(StoreError, match="holds tensors of another teacher: the modules"):
        TeacherStore.build(tmp_path, other, ["1"], [batch], progress=False)


@pytest.mark.parametrize(
    "wrap",
    [lambda m: torch.compile(m, backend="aot_eager"), torch.optim.swa_utils.AveragedModel],
    ids=["compile", "averaged"],
)
def test_a_wrapper_is_no_other_teacher(folder, wrap):
    if wrap is torch.optim.swa_utils.AveragedModel:
        wrapped = wrap(seeded(Reader))
        del wrapped._buffers["n_averaged"]
    else:
        wrapped = wrap(seeded(Reader))
    TeacherStore.open(folder, teacher=wrapped)


def test_another_tokenizer(folder, samples):
    TeacherStore.open(folder, transforms={"tokenizer": Tokenizer(["a", "b"])})
    with pytest.raises(StoreError, match=r"built with another 'tokenizer': there Tokenizer [0-9a-f]{64}, here Tokenizer"):
        TeacherStore.open(folder, transforms={"tokenizer": Tokenizer(["b", "a"])})
    with pytest.raises(StoreError, match="built without the transform 'processor'; it knows 'tokenizer'"):
        TeacherStore.open(folder, transforms={"tokenizer": Tokenizer(["a", "b"]), "processor": "x"})
    with pytest.raises(StoreError, match=r"built with another 'tokenizer': .*here none was given"):
        TeacherStore.build(folder, seeded(Reader), ADDRESSES, batches(samples), progress=False)


def test_a_fast_tokenizer_is_known_by_its_vocabulary_and_rules_not_by_its_last_padding(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from hookdistill.store.fingerprint import transforms_facts

    def fast(*words):
        backend = Backend(WordLevel({word: i for i, word in enumerate(("[UNK]", "[PAD]", *words))}, unk_token="[UNK]"))
        backend.pre_tokenizer = Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")

    tokenizer = fast("a", "b")
    before = transforms_facts(tokenizer)
    tokenizer(["a b", "a"], padding=True, truncation=True, max_length=2)
    assert transforms_facts(tokenizer) == before
    assert transforms_facts(fast("a", "c")) != before
    assert list(before) == [type(tokenizer).__name__]


def test_an_unknown_sample(folder, samples):
    batch = padded([samples[3], torch.tensor([7, 7, 7, 7])])
    with pytest.raises(StoreError, match=r"sample 1 of the batch \(input_ids \[7, 7, 7, 7, …\].*not among the 12 of the store"):
        TeacherStore.open(folder).captures(batch, ["layers.0"])
    cut = padded([ids[:-1] for ids in samples if len(ids) > 1])
    with pytest.raises(StoreError, match="tokenised, cut, normalised or augmented otherwise"):
        TeacherStore.open(folder).captures(cut, ["layers.0"])
    with pytest.raises(StoreError, match="recognised by 'input_ids', which the batch does not have; it has 'tokens'"):
        TeacherStore.open(folder).captures({"tokens": batch["input_ids"]}, ["layers.0"])


def test_matches_of_another_teacher(folder):
    student = seeded(Reader, depth=2)
    with pytest.raises(StoreError, match=r"no 'embed' of its teacher Reader.*It holds 'layers\.0', 'layers\.1', ':logits'"):
        Distiller(TeacherStore.open(folder), student, [Match("embed", "embed")])
    with pytest.raises(StoreError, match=r"holds no 'layers\.0:input'"):
        Distiller(TeacherStore.open(folder), student, [Match("layers.0", "layers.0", selector="input")])
    with pytest.raises(hookdistill.MatchError, match=r"no module 'encoder\.layer\.3'"):
        Distiller(TeacherStore.open(folder), student, [Match("encoder.layer.3", "layers.0")])
    with pytest.raises(AddressError, match="no module 'layer'"):
        TeacherStore.open(folder).captures({}, ["layer"])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"teacher": 1}, "the weights of the teacher"),
        ({"addresses": ADDRESSES[:2]}, "other tensors: here 2, there 3"),
        ({"keep": {"layers.1": "int8"}}, r"other tensors: here .*'int8'.*there .*'layers\.1'"),
        ({"mask": None}, "other tensors"),
        ({"key": "id"}, r"other key: here \['id'\], there 'content'"),
        ({"seed": 1}, "other seed: here 1, there 0"),
    ],
)
def test_a_build_that_does_not_go_on_with_the_one_before(folder, samples, changed, says):
    teacher = seeded(Reader, seed=changed.pop("teacher", 0))
    addresses = changed.pop("addresses", ADDRESSES)
    loader = [{**batch, "id": torch.arange(len(batch["input_ids"]))} for batch in batches(samples)]
    tokenizer = {"tokenizer": Tokenizer(["a", "b"])}
    with pytest.raises(StoreError, match=f"(?s){says}.*in another folder"):
        TeacherStore.build(folder, teacher, addresses, loader, transforms=tokenizer, progress=False, **changed)
    assert verify(folder).samples == 12


def test_a_manifest_that_cannot_be_read(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "samples": 13}))
    with pytest.raises(StoreError, match=r"manifest\.json is damaged, or was edited"):
        TeacherStore.open(folder)
    path.write_text(json.dumps({**content, "format": 9}))
    with pytest.raises(StoreError, match="has the format 9; this version of hookdistill reads 1"):
        TeacherStore.open(folder)
    path.write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        TeacherStore.open(folder)
    del content["shards"], content["sha256"]
    path.write_text(json.dumps({**content, "sha256": settings_hash(content)}))
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: KeyError: 'shards'"):
        TeacherStore.open(folder)


def test_a_shard_of_another_build_is_not_taken_in(folder, tmp_path, samples):
    TeacherStore.build(tmp_path / "other", seeded(Reader), ["layers.0"], batches(samples), progress=False)
    shards(tmp_path / "other")[0].rename(folder / "shards" / "shard-00007-0000000.safetensors")
    with pytest.raises(StoreError, match=r"shard-00007-0000000\.safetensors is a shard of another build"):
        TeacherStore.build(
            folder,
            seeded(Reader),
            ADDRESSES,
            batches(samples),
            transforms={"tokenizer": Tokenizer(["a", "b"])},
            progress=False,
        )
    (folder / "building.json").unlink()
    with pytest.raises(StoreError, match="holds shards, but nothing says what they are of"):
        TeacherStore.build(folder, seeded(Reader), ADDRESSES, batches(samples), progress=False)


def test_what_cannot_be_built(tmp_path, samples):
    teacher, batch = seeded(Reader), padded(samples)

    def refused(says, *addresses, error=StoreError, loader=(batch,), **options):
        with pytest.raises(error, match=says):
            TeacherStore.build(
                tmp_path / str(len(list(tmp_path.iterdir()))), teacher, addresses, loader, progress=False, **options
            )

    refused("nothing to store")
    refused(r"no module 'layer\.0'\. Did you mean", "layer.0", error=AddressError)
    refused("the loader gave no batch", "layers.0", loader=())
    refused(
        "needs 'input_ids'|no item of the batch is a parameter",
        "layers.0",
        loader=[{"ids": torch.ones(1, 1)}],
        error=BatchError,
    )
    refused(r"'layers\.0@\*' is a list of tensors", "layers.0@*")
    refused(r"names none of the tensors that are stored.*'layers\.0'", "layers.0", keep={"embed": "int8"})
    refused(r"no module 'layer\.0'\. Did you mean", "layers.0", keep={"layer.0": "int8"})
    refused("Did you mean 'float16'", "layers.0", keep="flaot16")
    refused("mask='valid' is no item of the batch", "layers.0", mask="valid")
    refused("must be 1 where a token is valid", "layers.0", loader=[{**batch, "attention_mask": batch["input_ids"]}])
    refused("key= is 'content'", "layers.0", key=3.5)
    refused("recognised by 'id', which the batch does not have", "layers.0", key="id")
    refused("needs one value for each of the 12 samples", "layers.0", key="id", loader=[{**batch, "id": [1, 2]}])
    refused("tokens= needs one dimension of tokens", ":pooled", keep=Keep(tokens=0))
    refused("does not fit a last dimension of 8", "layers.0", keep=Keep(features="20:30"))
    refused("shard_bytes= is a number of bytes", "layers.0", shard_bytes=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"no store can be built at .*file"):
        TeacherStore.build(tmp_path / "file", teacher, ["layers.0"], [batch])
    with pytest.raises(StoreError, match=r"must be a torch\.nn\.Module, got str"):
        TeacherStore.build(tmp_path / "text", "bert", ["layers.0"], [batch])


def test_a_teacher_that_changes_its_ways(tmp_path, samples):
    class Fickle(Reader):
        """Gives another dtype from its fourth forward on: the survey takes two."""

        calls = 0

        def forward(self, input_ids, attention_mask=None):
            self.calls += 1
            self.embed.to(torch.float64 if self.calls > 3 else torch.float32)
            return self.embed(input_ids)

    with pytest.raises(StoreError, match=r"'embed': the teacher gave torch\.float64, and torch\.float32 in its first batch"):
        TeacherStore.build(tmp_path, seeded(Fickle), ["embed"], batches(samples), progress=False)


def test_the_teacher_is_left_as_it_was(tmp_path, samples):
    from pairs import flags, hooks, same, state

    teacher = seeded(Reader).train()
    before, modes, seed = state(teacher), flags(teacher), torch.random.get_rng_state()
    TeacherStore.build(tmp_path, teacher, ADDRESSES, batches(samples), keep={":logits": Keep(samples=3)}, progress=False)
    assert same(state(teacher), before)
    assert flags(teacher) == modes
    assert hooks(teacher) == 0
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_a_full_disk_leaves_what_is_whole(tmp_path, samples, monkeypatch):
    from hookdistill.store import shards as module

    real, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 9:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StoreError, match=r"cannot write to .*No space left on device.*run the same build again"):
        TeacherStore.build(tmp_path, seeded(Reader), ADDRESSES, batches(samples), shard_bytes=600, progress=False)
    monkeypatch.undo()
    there = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    assert there and all(path.suffix == ".safetensors" for path in there)
    TeacherStore.build(tmp_path, seeded(Reader), ADDRESSES, batches(samples), shard_bytes=600, progress=False)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert verify(tmp_path).samples == 12


def test_a_distiller_says_that_the_sample_is_unknown(folder, samples):
    _, student = readers()
    matches = [Match("layers.0", "layers.0", mask="attention_mask")]
    distiller = Distiller(TeacherStore.open(folder), student, matches)
    distiller(padded(samples))
    with pytest.raises(StoreError, match="sample 0 of the batch"):
        distiller(padded([torch.tensor([1, 1, 1, 1, 1])]))


def test_info_says_what_is_there(folder):
    shown = info(folder)
    assert (shown.samples, shown.shards, shown.teacher, shown.mask) == (
        12,
        len(shards(folder)),
        "pairs.Reader",
        "attention_mask",
    )
    assert shown.bytes == sum(path.stat().st_size for path in [*shards(folder), *folder.glob("index-*")])
    assert shown.tokens == sum(map(len, sentences(12)))
    assert [each.address for each in shown.tensors] == ADDRESSES
    assert json.loads(json.dumps(shown.as_dict()))["tensors"][0]["shape"] == "[tokens, 8]"
    text = str(shown)
    assert f"{shown.bytes / 12:,.0f} bytes a sample" in text and "transform tokenizer: Tokenizer" in text
    assert shown.tensors[0].bytes >= shown.tokens * 8 * 4


def test_progress_of_verify(folder):
    seen = []
    verify(folder, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
