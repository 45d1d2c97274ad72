"""Files appear under their names only when they are whole, and what an earlier save left does not mix with a later one."""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertModel

import hookdistill
from hookdistill import Distiller, ExportError, Match, load_student
from hookdistill.export import save_student
from hookdistill.files import write_into
from pairs import ConvNet, hooks, mlps, pictures, points, same, seeded, state
from ranks import in_processes


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


# Reading back


def test_a_plain_student_loads_with_the_same_outputs_to_the_bit(tmp_path):
    teacher, student = seeded(ConvNet, 6, seed=1), seeded(ConvNet, 4, stride=2, seed=2)
    made = Distiller(teacher, student, [Match("stem", "stem")], example_batch=pictures())
    for _ in range(3):
        made(pictures()).total.backward()
    made.export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["class"].endswith("ConvNet")
    assert config["parameters"] == sum(parameter.numel() for parameter in student.parameters())
    assert config["hookdistill_version"] == hookdistill.__version__
    fresh = load_student(seeded(ConvNet, 4, stride=2, seed=3), tmp_path)
    assert hooks(fresh) == 0
    assert same(state(fresh), state(student))
    pixels = pictures()["pixels"]
    assert torch.equal(fresh.eval()(pixels), student.eval()(pixels))


def test_a_student_of_transformers_loads_with_the_same_outputs_to_the_bit(tmp_path):
    teacher, student = bert(2), bert(1)
    ids = {"input_ids": torch.randint(50, (2, 5))}
    made = Distiller(teacher, student, [Match("encoder.layer.1", "encoder.layer.0", adapter="linear")], example_batch=ids)
    made(ids).total.backward()
    made.export(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**ids)[0], student.eval()(**ids)[0])
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "adapter" in name]


def test_a_config_of_the_students_own_is_kept(tmp_path):
    @dataclass
    class Sizes:
        width: int = 3

    student = nn.Sequential(nn.Linear(3, 3))
    student.config = Sizes()
    save_student(student, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"width": 3}


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    def tied():
        network = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        network[2].weight = network[0].weight
        return network

    student, fresh = tied(), tied()
    save_student(student, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"0.weight", "0.bias", "2.bias"}
    load_student(fresh, tmp_path)
    assert same(state(fresh), state(student))
    assert fresh[2].weight is fresh[0].weight
    untied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    with pytest.raises(ExportError, match=r"lacks '2\.weight', unlike Sequential\. Did you mean '0\.weight'"):
        load_student(untied, tmp_path)


def test_weights_that_are_not_there_or_anothers_are_an_error(tmp_path):
    student = mlps()[1]
    with pytest.raises(ExportError, match="no weights can be read from"):
        load_student(student, tmp_path)
    save_student(student, tmp_path)
    with pytest.raises(ExportError, match=r"lacks '0\.weight', '0\.bias', unlike Sequential"):
        load_student(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(ExportError, match=r"has the shape \[8, 6\], not \[5, 6\]"):
        load_student(mlps(student_width=5)[1], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "more": torch.zeros(1)}, tmp_path / "model.safetensors")
    before = state(student)
    with pytest.raises(ExportError, match=r"has 'more', unlike Mlp"):
        load_student(student, tmp_path)
    assert same(before, state(student))
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="no weights can be read from"):
        load_student(student, tmp_path)


def test_a_state_that_is_no_tensor_is_an_error(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"mine": 1}

    with pytest.raises(ExportError, match=r"'_extra_state' in the state dict is no tensor"):
        save_student(Odd(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_that_is_an_oserror_too(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match=r"writing to .*file.* failed: .*distiller\.export\(path\) elsewhere") as caught:
        Distiller(*mlps(), [Match("head", "head")], example_batch=points()).export(tmp_path / "file")
    assert isinstance(caught.value, OSError)


def sharded_export(folder):
    torch.manual_seed(3)
    made = Distiller(bert(2), bert(1), [Match("encoder.layer.1", "encoder.layer.0")])
    fully_shard(made.student.encoder.layer[0])
    fully_shard(made.student)
    made.plan({"input_ids": torch.randint(50, (2, 5))})
    made.export(folder)
    return [parameter.full_tensor() for parameter in made.student.parameters()]


def test_a_sharded_student_is_exported_whole(tmp_path):
    for found in in_processes(sharded_export, str(tmp_path)):
        loaded = BertModel.from_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
        assert same(found, [parameter.detach() for parameter in loaded.parameters()])
