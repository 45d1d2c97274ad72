"""Keys are found wherever they are, and only they; also those that agree in half of their bits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hookdistill.store.index import Index, write_index
from hookdistill.store.keys import KeySet


class Keys:
    """As much of a shard as an index is made of."""

    def __init__(self, keys):
        self.keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
        self.inputs = np.arange(len(keys), dtype=np.uint64) * 7

    def __len__(self):
        return len(self.keys)


def key(high, low):
    return np.array([high, low], "<u8").tobytes()


# Few values for each half, so that halves agree often.
KEYS = st.lists(st.builds(key, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


@given(st.lists(KEYS, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_find(tmp_path_factory, shards):
    path = tmp_path_factory.mktemp("index") / "index.safetensors"
    count = write_index(path, [Keys(keys) for keys in shards])
    expected = {}
    for number, keys in enumerate(shards):
        for row, each in enumerate(keys):
            expected.setdefault(each, (number, row))
    assert count == len(expected) == len(Index(path))
    asked = [key(high, low) for high in range(7) for low in range(7)]
    places = Index(path).find(asked)
    for number, each in enumerate(asked):
        shard, row = expected.get(each, (-1, -1))
        assert (places.shards[number], places.rows[number]) == (shard, row)
        assert shard < 0 or places.inputs[number] == row * 7


@given(st.lists(KEYS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_set_of_keys(runs):
    there, seen = KeySet(), set()
    for run in runs:
        fresh = list(dict.fromkeys(each for each in run if each not in seen))
        if fresh:
            there.add(fresh)
            seen.update(fresh)
    assert len(there) == len(seen)
    for high in range(7):
        for low in range(7):
            assert (key(high, low) in there) == (key(high, low) in seen)


def test_the_arrays_of_a_set_stay_few():
    there = KeySet()
    for number in range(1000):
        there.add([key(number, 1)])
    assert len(there.runs) < 12


@pytest.mark.parametrize("count", [1, 1000])
def test_an_index_is_found_in_without_being_read(tmp_path, count):
    keys = [np.random.default_rng(number).bytes(16) for number in range(count)]
    write_index(tmp_path / "index.safetensors", [Keys(keys)])
    index = Index(tmp_path / "index.safetensors")
    assert not index.high.flags.owndata and not index.high.flags.writeable  # a view of the file
    assert index.find(keys[:3]).rows.tolist() == list(range(min(3, count)))
    assert index.find([b"\xff" * 16]).rows.tolist() == [-1]
