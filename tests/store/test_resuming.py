"""A build that was interrupted goes on where it ended, and ends as if nothing had happened."""

import threading
import time

import pytest
import torch

from hookdistill import Keep, TeacherStore
from hookdistill.store import build as building
from hookdistill.store import verify
from hookdistill.store import writer as writing
from pairs import Reader, seeded
from store_zoo import Interrupted, batches, contents, files, live, padded, sentences, until

ADDRESSES = ["layers.*", "embed", ":logits", ":pooled"]
KEEP = {":logits": Keep(samples=9), "layers.1": "int8", "embed": Keep(tokens=[0, -1])}


def build(folder, loader, teacher=None, **options):
    options = {"keep": KEEP, "shard_bytes": 1100, "progress": False, **options}
    return TeacherStore.build(folder, teacher or seeded(Reader), ADDRESSES, loader, **options)


class Counted(Reader):
    """Notes which samples it is run on."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.seen += [tuple(ids.tolist()) for ids in input_ids]
        return super().forward(input_ids, attention_mask, labels)


@pytest.mark.parametrize("shard_bytes", [1, 1100, 10**6])
def test_interrupted_after_any_batch(tmp_path, shard_bytes):
    samples = sentences(14)
    loader = batches(samples, 3)
    build(tmp_path / "whole", loader, shard_bytes=shard_bytes)
    expected = files(tmp_path / "whole")
    for count in range(len(loader)):
        folder = tmp_path / str(count)
        with pytest.raises(Interrupted):
            build(folder, until(loader, count), shard_bytes=shard_bytes)
        if count % 2:  # and again
            with pytest.raises(Interrupted):
                build(folder, until(loader, count + 1), shard_bytes=shard_bytes)
        build(folder, loader, shard_bytes=shard_bytes)
        assert files(folder) == expected
    assert verify(folder).samples == 14


def test_finished_shards_are_not_done_again(tmp_path):
    samples, first, second = sentences(12), seeded(Counted), seeded(Counted)
    loader = batches(samples, 2)
    with pytest.raises(Interrupted):
        build(tmp_path, until(loader, 4), first)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert written
    build(tmp_path, loader, second)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    # The survey looks at the first batch; after it only batches run of which something is missing.
    assert len(second.seen[3:]) < len(samples)
    third = seeded(Counted)
    build(tmp_path, loader, third)
    assert len(third.seen) == 3


def test_in_another_order_the_samples_are_the_same(tmp_path):
    samples = sentences(12)
    build(tmp_path / "whole", batches(samples, 3))
    with pytest.raises(Interrupted):
        build(tmp_path / "again", until(batches(samples, 3), 2))
    build(tmp_path / "again", batches(samples[::-1], 5))
    assert verify(tmp_path / "again").samples == 12
    whole, again = contents(tmp_path / "whole"), contents(tmp_path / "again")
    assert whole.keys() == again.keys()
    for key, sample in whole.items():
        assert {name: len(data) for name, data in sample.items()} == {name: len(data) for name, data in again[key].items()}
        assert sample[":logits#ids"] == again[key][":logits#ids"]


def test_interrupted_while_it_is_being_finished(tmp_path, monkeypatch):
    loader = batches(sentences(12), 3)
    build(tmp_path / "whole", loader)
    real = building.Manifest.write

    def fails(manifest, folder):
        raise Interrupted

    monkeypatch.setattr(building.Manifest, "write", fails)
    with pytest.raises(Interrupted):
        build(tmp_path / "again", loader)
    monkeypatch.setattr(building.Manifest, "write", real)
    build(tmp_path / "again", loader)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_new_samples_are_added_and_the_store_is_whole_at_any_time(tmp_path):
    samples, teacher = sentences(20), seeded(Reader)
    store = build(tmp_path, batches(samples[:8]), teacher)
    with pytest.raises(Interrupted):
        build(tmp_path, until(batches(samples, 2), 8), teacher)
    assert len(TeacherStore.open(tmp_path, verify=True)) == 8
    assert len(build(tmp_path, batches(samples), teacher)) == 20
    assert verify(tmp_path).samples == 20
    assert len(list(tmp_path.glob("index-*"))) == 1
    for opened in (store, TeacherStore.open(tmp_path)):
        batch = padded(samples[:8] if opened is store else samples)
        valid = batch["attention_mask"].bool()
        read = opened.captures(batch, ["layers.0"])["layers.0"]["output"]
        torch.testing.assert_close(read[valid], live(teacher, batch, ["layers.0"])["layers.0", "output"][valid])


def test_a_shard_that_was_lost_is_written_anew(tmp_path):
    loader = batches(sentences(12), 3)
    build(tmp_path, loader)
    before = contents(tmp_path)
    (tmp_path / "shards" / "shard-00000-0000001.safetensors").unlink()
    build(tmp_path, loader)
    assert verify(tmp_path).samples == 12
    assert contents(tmp_path) == before


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    loader = batches(sentences(12), 3)
    build(tmp_path / "whole", loader)
    with pytest.raises(Interrupted):
        build(tmp_path / "again", until(loader, 3))
    (tmp_path / "again" / "shards" / ".partial-shard-00000-0000001.safetensors").write_bytes(b"half")
    (tmp_path / "again" / ".partial-manifest.json").write_text("{")
    (tmp_path / "again" / "index-new.safetensors").write_bytes(b"half")
    build(tmp_path / "again", loader)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_the_teacher_runs_on_while_a_shard_is_written(tmp_path, monkeypatch):
    """The first shard is not written before two batches more have been asked for."""
    begun, asked, further = threading.Event(), [], threading.Event()
    real = writing.Filling.write

    def held(filling, path, metadata):
        begun.set()
        assert further.wait(30), "the teacher waits for the writer"
        real(filling, path, metadata)

    def loader():
        for batch in batches(sentences(40), 1):
            if begun.is_set():
                asked.append(batch)
            if len(asked) == 2:
                further.set()
            yield batch

    monkeypatch.setattr(writing.Filling, "write", held)
    build(tmp_path, loader(), shard_bytes=3000)
    assert verify(tmp_path).shards > 2


def test_what_waits_for_the_writer_is_bounded(tmp_path, monkeypatch):
    most, real = [], writing.Writer._take

    def slow(writer, work):
        time.sleep(0.005)  # the builder gets as far ahead as it may
        most.append(writer._backlog)
        return real(writer, work)

    monkeypatch.setattr(writing.Writer, "_take", slow)
    build(tmp_path, batches(sentences(60), 1), shard_bytes=2000)
    assert 0 < max(most) <= 2000
