"""Files appear under their names only when they are whole, and what an earlier save left does not mix with a later one."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

from hookdistill.export import save_student
from hookdistill.files import write_into


def bert(layers):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes))


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def half(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "model.safetensors").write_bytes(b"whole")
    with pytest.raises(OSError, match="No space left"):
        write_into(tmp_path, half)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("model.safetensors", b"whole")]


def test_shards_of_a_larger_student_do_not_stay_beside_a_smaller_one(tmp_path):
    large = bert(4)
    write_into(tmp_path, lambda folder: large.save_pretrained(folder, max_shard_size="20KB"))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    small = bert(1)
    save_student(small, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    loaded = BertModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_a_compiled_student_is_saved_without_its_wrapper(tmp_path):
    student = nn.Sequential(nn.Linear(3, 2))
    save_student(torch.compile(student, backend="eager"), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in saved.items()} == {"0.weight": (2, 3), "0.bias": (2,)}
