"""Recipes as a whole: what they build, that they say what is wrong, and that a saved one gives the same run again."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hookdistill import HookDistillError, Match, RecipeError
from hookdistill.layer_maps import LAYER_MAPS
from hookdistill.recipe_file import Recipe, load
from hookdistill.recipe_file.editors import json_schema
from hookdistill.recipe_file.schema import Evaluator, MatchItem

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 8, depth: int = 2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), *(nn.Linear(width, width) for _ in range(depth - 1)))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layers(x))

def rows(count: int = 24):
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=draw), "labels": torch.randint(4, (), generator=draw)} for _ in range(count)]

def half(student, teacher, mask=None):
    return (student - teacher).abs().mean() / 2

def always(value: float):
    return lambda evaluation: {"always": value}

def wrong():
    raise OSError("no disk")

number = 3
"""

RECIPE = {
    "teacher": {"factory": "nets:Net", "arguments": {"width": 16, "depth": 3}},
    "student": {"factory": "nets:Net"},
    "data": {"train": {"factory": "nets:rows"}, "hold_out": 8, "batch_size": 4},
    "matches": [
        {"teacher": "layers.-1", "student": "layers.-1", "name": "hidden"},
        {"student": "head", "loss": "cross_entropy", "target": "labels", "name": "labels"},
    ],
    "trainer": {"epochs": 2, "progress": False},
}


def recipe(**sections):
    """The recipe with some keys set: ``data__batch_size=2``."""
    data = copy.deepcopy(RECIPE)
    for path, value in sections.items():
        *above, last = path.split("__")
        place = data
        for key in above:
            place = place.setdefault(key, {})
        place[last] = value
    return data


@pytest.fixture
def run(write):
    """A recipe as a run, in a folder with a module for it."""

    def runs(data, **options):
        write(MODULE, "nets.py")
        return load(write(data, "recipe.json"), **{"environment": {}, **options})

    return runs


def test_what_it_builds(run):
    made = run(recipe())
    assert [type(each).__name__ for each in (made.teacher, made.student)] == ["Net", "Net"]
    assert len(made.teacher.layers) == 3
    train, held_out = made.loaders
    assert [len(train), len(held_out)] == [4, 2]
    plan = made.plan()
    assert [row.adapter for row in plan] == ["linear 8→16", ""] or "8" in plan.rows[0].adapter
    result = made.trainer.train()
    assert result.steps == 8
    assert {"hidden", "labels"} == {*result.losses}
    assert "eval/loss/hidden" in result.history[-1].metrics


def test_teacher_and_student_differ_although_both_are_random(run):
    made = run(recipe(teacher__arguments={}))
    assert not torch.equal(made.teacher.head.weight, made.student.head.weight)


def test_a_saved_recipe_gives_the_same_run_again(run, tmp_path):
    first = run(recipe(trainer__output_dir=str(tmp_path / "first"), evaluators=[{"metric": "accuracy", "logits": "head"}]))
    ours = first.trainer.train()
    saved = first.save()
    text = saved.read_text(encoding="utf-8")
    assert "weight_decay: 0.01" in text
    again = load(saved, overrides=[f"trainer.output_dir={tmp_path / 'second'}"], environment={})
    torch.rand(3)  # what was drawn before makes no difference
    theirs = again.trainer.train()
    assert (ours.losses, ours.history) == (theirs.losses, theirs.history)
    weights = [load_file(tmp_path / name / "last" / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert again.recipe.model_dump(exclude={"trainer": {"output_dir"}, "import_from": True}) == load(
        saved, environment={}
    ).recipe.model_dump(exclude={"trainer": {"output_dir"}, "import_from": True})
    third = run(recipe(trainer__seed=1)).trainer.train()
    assert third.losses != ours.losses


def test_modules_of_one_name_beside_two_recipes(run, tmp_path):
    assert len(run(recipe()).student.layers) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "nets.py").write_text(MODULE.replace("depth: int = 2", "depth: int = 1"), encoding="utf-8")
    (other / "recipe.json").write_text(json.dumps(recipe()), encoding="utf-8")
    assert len(load(other / "recipe.json", environment={}).student.layers) == 1
    assert len(run(recipe()).student.layers) == 2


def test_overrides_and_environment(run):
    made = run(recipe(), overrides=["trainer.lr=1e-4"], environment={"HOOKDISTILL__DATA__BATCH_SIZE": "2"})
    assert (made.recipe.trainer.lr, made.recipe.data.batch_size) == (1e-4, 2)
    with pytest.raises(RecipeError, match=r"^environment variable HOOKDISTILL__DATA__BATCHSIZE: .*Did you mean 'batch_size'"):
        run(recipe(), environment={"HOOKDISTILL__DATA__BATCHSIZE": "2"})
    with pytest.raises(
        RecipeError, match=r"^--set trainer.lr=fast: trainer.lr is 'fast' \(a string\); it must be a number above 0"
    ):
        run(recipe(), overrides=["trainer.lr=fast"])


def test_items_of_the_older_library(run):
    item = {"type": "ts_distill", "loss": {"loss_function": "cos", "args": {}}, "weight": 0.5}
    item |= {
        f"{side}_layer_{part}": value
        for side in ("teacher", "student")
        for part, value in (("name", "layers.-1"), ("output_name", "output"))
    }
    (match,) = run(recipe(matches=[item])).matches
    assert (match.spec.name, match.weight, str(match.student_address)) == ("cosine", 0.5, "layers.-1")
    with pytest.raises(RecipeError, match="needs the key teacher_layer_name"):
        run(recipe(matches=[{key: value for key, value in item.items() if not key.startswith("teacher")}]))


def test_several_teachers(run):
    matches = [{"teacher": "head", "student": "head", "loss": "kl", "teacher_model": name, "name": name} for name in ("a", "b")]
    teachers = {"a": {"factory": "nets:Net"}, "b": {"factory": "nets:Net", "arguments": {"width": 4}}}
    data = recipe(teachers=teachers, matches=matches)
    del data["teacher"]
    made = run(data)
    assert {*made.teacher} == {"a", "b"}
    assert not torch.equal(made.teacher["a"].head.bias, made.student.head.bias)
    assert {row.name for row in made.plan()} == {"a", "b"}


def test_schedules_of_weights_and_temperatures(run):
    weight = {"start": 1.0, "end": 0.0, "steps": 10}
    temperature = {"start": 8.0, "end": 2.0, "steps": 4, "shape": "cosine"}
    item = {"teacher": "head", "student": "head", "loss": "kl", "weight": weight, "temperature": temperature}
    (match,) = run(recipe(matches=[item])).matches
    assert [match.weight(step) for step in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    assert [round(match.temperature(step), 6) for step in (0, 2, 4)] == [8.0, 5.0, 2.0]


def test_a_loss_and_an_evaluator_of_ones_own(run):
    data = recipe(
        matches=[{"teacher": "head", "student": "head", "loss": "nets:half", "name": "mine"}],
        evaluators=[{"factory": "nets:always", "arguments": {"value": 2.0}}, {"metric": "losses"}],
    )
    result = run(data).trainer.train()
    assert result.history[-1].metrics["always"] == 2.0
    assert "eval/loss/mine" in result.history[-1].metrics


def test_accuracy_is_counted_over_the_held_out_rows(run):
    made = run(recipe(evaluators=[{"metric": "accuracy", "logits": "head"}]))
    result = made.trainer.train()
    rows = [row for batch in made.loaders[1] for row in zip(batch["x"], batch["labels"], strict=True)]
    right = [int(made.student(x[None]).argmax() == label) for x, label in rows]
    assert result.history[-1].metrics["accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adagrad", "RMSprop", "Adafactor"])
def test_every_optimizer_trains(run, name):
    made = run(recipe(trainer__optimizer={"name": name}, trainer__max_steps=2, trainer__epochs=None))
    before = made.student.head.weight.detach().clone()
    made.trainer.train()
    assert not torch.equal(before, made.student.head.weight)


def test_schedulers_rise_and_fall():
    from hookdistill.recipe_file.optimizing import scheduler
    from hookdistill.recipe_file.schema import Scheduler

    def rates(**options):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        made = scheduler(Scheduler(**options))(optimizer, 8)
        found = []
        for _ in range(8):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            made.step()
        return found

    assert rates(name="constant") == [1.0] * 8
    assert rates(name="linear", warmup_steps=0) == [1 - step / 8 for step in range(8)]
    cosine = rates(name="cosine", warmup_steps=2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine[3:] == sorted(cosine[3:], reverse=True)
    assert max(rates(name="one_cycle")) == pytest.approx(1.0, abs=0.1)


def test_models_of_transformers(run, tiny_bert, tmp_path):
    data = recipe(
        teacher={"pretrained": str(tiny_bert)},
        student={"pretrained": str(tiny_bert), "keep_layers": {"encoder.layer": [0, 2, 5]}, "freeze": ["embeddings"]},
    )
    made = run(data)
    assert (len(made.student.encoder.layer), made.student.config.num_hidden_layers) == (3, 3)
    for ours, theirs in zip(made.student.encoder.layer, (0, 2, 5), strict=True):
        assert torch.equal(ours.output.dense.weight, made.teacher.encoder.layer[theirs].output.dense.weight)
    assert not any(each.requires_grad for each in made.student.embeddings.parameters())
    ids = torch.tensor([[2, 5, 6, 3]])
    assert made.student(ids).last_hidden_state.shape == (1, 4, 16)

    save_file({name: value + 1 for name, value in made.student.state_dict().items()}, tmp_path / "w.safetensors")
    data["student"] |= {"weights": "w.safetensors", "dtype": "bfloat16", "attention": "eager"}
    again = run(data).student
    assert again.config._attn_implementation == "eager"
    assert again.pooler.dense.bias.dtype == torch.bfloat16
    torch.testing.assert_close(again.pooler.dense.bias, (made.student.pooler.dense.bias + 1).bfloat16())

    classes = {"config": str(tiny_bert), "architecture": "BertForSequenceClassification", "arguments": {"num_labels": 3}}
    assert run(recipe(student=classes)).student.classifier.out_features == 3


def text_recipe(tiny_bert, files, **data):
    layer = "encoder.layer.-1"
    return recipe(
        teacher={"pretrained": str(tiny_bert)},
        student={"config": str(tiny_bert), "arguments": {"num_hidden_layers": 1}},
        data={"train": {"files": files}, "text": {}, "batch_size": 4, "shuffle": False, **data},
        matches=[{"teacher": layer, "student": layer, "mask": "attention_mask"}],
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", "the cat sat\n\nthe dog ran then sat\n"),
        ("t.jsonl", '{"text": "the cat sat"}\n{"text": "the dog ran then sat"}\n'),
        ("t.json", '[{"text": "the cat sat"}, {"text": "the dog ran then sat"}]'),
        ("t.csv", 'text,note\nthe cat sat,"a, b"\nthe dog ran then sat,c\n'),
        ("t.tsv", "text\tnote\nthe cat sat\ta\nthe dog ran then sat\tc\n"),
    ],
)
def test_text_files(run, write, tiny_bert, name, content):
    write(content, name)
    (batch,) = run(text_recipe(tiny_bert, [name])).loaders[0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [1] * 7]
    assert batch["input_ids"][0].tolist()[:2] == [2, 4]
    assert {*batch} <= {"input_ids", "attention_mask", "token_type_ids"}


def test_pairs_of_texts_labels_and_wildcards(run, write, tiny_bert):
    write("one,two,kind,score\nthe cat,sat,good,1\nthe dog,ran,bad,2.5\n", "a.csv")
    write("one,two,kind,score\na cat,sat,good,1\n", "b.csv")
    data = text_recipe(
        tiny_bert,
        ["?.csv"],
        text={"columns": ["one", "two"], "max_length": 6, "padding": "max_length"},
        labels={"column": "kind", "names": ["bad", "good"]},
    )
    data["data"]["train"] |= {"rename": {"score": "points"}, "rows": 3}
    (batch,) = run(data).loaders[0]
    assert batch["labels"].tolist() == [1, 0, 1]
    assert batch["points"].tolist() == [1.0, 2.5, 1.0]
    assert batch["input_ids"].shape == (3, 6)
    assert "kind" not in batch


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
def test_arrays(run, tmp_path, name):
    x, labels = np.arange(48.0).reshape(8, 6), np.arange(8)
    if name.endswith("npz"):
        np.savez(tmp_path / name, x=x, labels=labels)
    else:
        save_file({"x": torch.tensor(x, dtype=torch.float32), "labels": torch.tensor(labels)}, tmp_path / name)
    made = run(recipe(data={"train": {"arrays": name}, "batch_size": 4, "shuffle": False}))
    batch = next(iter(made.loaders[0]))
    assert (batch["x"].dtype, batch["labels"].tolist()) == (torch.float32, [0, 1, 2, 3])
    made.plan()


def test_images_are_prepared_by_the_models_processor(run, tmp_path):
    from PIL import Image
    from transformers import AutoImageProcessor, ViTConfig

    if "torchvision" in getattr(AutoImageProcessor, "_backends", ()):
        pytest.importorskip("torchvision", reason="this release of transformers prepares images with torchvision only")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTConfig(image_size=8, patch_size=4, **sizes).save_pretrained(tmp_path / "vit")
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}, "do_resize": True}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    for number in range(2):
        Image.new("L", (12, 10), color=60 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "pictures.csv").write_text("image,label\n0.png,0\n1.png,1\n")
    layer = {"teacher": "layers.0", "student": "layers.0"}
    data = recipe(
        teacher={"config": "vit"},
        student={"config": "vit"},
        data={"train": {"files": "pictures.csv"}, "image": {}, "labels": {}, "batch_size": 2, "shuffle": False},
        matches=[layer],
    )
    made = run(data)
    (batch,) = made.loaders[0]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert batch["labels"].tolist() == [0, 1]
    torch.testing.assert_close(batch["pixel_values"][1].mean(), torch.tensor((60 / 255 - 0.5) / 0.5))
    made.plan()


WRONG = [
    ({"student__factory": "nets:Nett"}, "'nets' has no 'Nett'. Did you mean 'Net'"),
    ({"student__factory": "net:Net"}, "there is no module 'net'.*Did you mean 'nets'"),
    ({"student__factory": "nets"}, "is no import path"),
    ({"student__factory": "nets:number"}, "is no function"),
    ({"student__factory": "nets:wrong"}, "raised OSError: no disk"),
    ({"student__factory": "nets:rows"}, "not a torch.nn.Module"),
    ({"student__arguments": {"widht": 8}}, "no argument 'widht'. Did you mean 'width'"),
    ({"student__arguments": {"width": "wide"}}, "width is 'wide', but it must be int"),
    ({"student": {"config": "brt"}}, "Did you mean .*'bert'"),
    ({"student": {"config": "bert", "arguments": {"hidden_sise": 3}}}, "no setting 'hidden_sise'. Did you mean 'hidden_size'"),
    ({"student": {"config": "bert", "architecture": "BertForMaskdLM"}}, "Did you mean 'BertForMaskedLM'"),
    ({"student": {"config": "bert", "factory": "nets:Net"}}, "give one of pretrained, config and factory; config and factory"),
    ({"student": {"pretrained": "./nowhere"}}, "there is no file or folder './nowhere'"),
    ({"student": {}}, "give one of pretrained, config and factory; none is given"),
    ({"student__keep_layers": {"layer": [0]}}, "Did you mean 'layers'"),
    ({"student__keep_layers": {"head": [0]}}, "is a Linear, not a list of layers"),
    ({"student__keep_layers": {"layers": [0, 2]}}, "has the layers 0 to 1"),
    ({"student__weights": "none.safetensors"}, "there is no file"),
    ({"student__freeze": ["haed"]}, "head"),
    ({"data__train": {"files": "nets.txt"}}, "Did you mean 'nets.py'"),
    ({"data__train": {"files": "nets.py"}}, "rows are read from"),
    ({"data__train": {"arrays": "a.npz"}}, "no file"),
    ({"data__train": {"factory": "nets:number"}}, "is no function"),
    ({"data__train": {"factory": "nets:Net"}}, "must be a list of dicts"),
    ({"data__train": {"factory": "nets:rows", "rename": {"label": "y"}}}, "no column 'label'. Did you mean 'labels'"),
    ({"data__train": {"factory": "nets:rows", "arguments": {"count": 0}}}, "there are no rows"),
    ({"data__hold_out": 24}, "none would be left to train on"),
    ({"data__text": {"columns": ["x"]}}, "no model of this recipe has one"),
    ({"data__labels": {"column": "lables"}}, "Did you mean 'labels'"),
    ({"matches": []}, "matches"),
    ({"matches": [{"teacher": "layer.-1", "student": "layers.-1"}]}, "matches.0.*layers"),
    ({"matches": [{"teacher": "head", "student": "head", "loss": "mze"}]}, "Did you mean 'mse'"),
    ({"matches": [{"teacher": "head", "student": "head", "temprature": 2}]}, "matches.0.temprature: neither.*'temperature'"),
    ({"matches": [{"teacher": "head", "student": "head", "loss": "kl", "mask": "valid"}]}, "neither an item of the batch"),
    ({"trainer__max_steps": 3}, "both is given"),
    ({"trainer__epochs": None}, "neither is given"),
    ({"trainer__best": "eval/los"}, "Did you mean 'eval/loss'"),
    ({"trainer__optimizer": {"arguments": {"beta": 1}}}, "no argument 'beta'. Did you mean 'betas'"),
    ({"trainer__optimizer": {"arguments": {"betas": [2, 3]}}}, "refuses"),
    ({"trainer__scheduler": {"name": "one_cycle", "warmup_steps": 2}}, "a warm-up of its own"),
    ({"evaluators": [{}]}, "give metric or factory"),
    ({"evaluators": [{"metric": "accuracy", "logits": "haed"}]}, "head"),
    ({"teachers": {"a": {"factory": "nets:Net"}}}, "teacher and teachers are both given"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[says[:30] for _, says in WRONG])
def test_what_is_wrong_is_said_with_its_place(run, change, says):
    with pytest.raises(HookDistillError, match=rf"(?s){says}") as caught:
        run(recipe(**change)).trainer.train()
    if not says.startswith(("Did you mean 'eval", "head")):  # these are found in the training
        assert "recipe.json, line " in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.jsonl", '{"text": "a"}\n{"text": \n', r"t\.jsonl, line 2: no JSON"),
        ("t.jsonl", '{"text": "a"}\n[1]\n', "line 2: a row is an object"),
        ("t.csv", "text,note\na\n", "line 2: this row has not the 2 fields"),
        ("t.csv", "txt\na\n", "no column 'text'. Did you mean 'txt'"),
        ("t.txt", "\n", "there are no rows"),
    ],
)
def test_files_that_cannot_be_read(run, write, tiny_bert, name, content, says):
    write(content, name)
    with pytest.raises(RecipeError, match=says):
        run(text_recipe(tiny_bert, name)).plan()


def test_labels_without_names_must_be_numbers(run, write, tiny_bert):
    write("text,label\nthe cat,good\n", "t.csv")
    with pytest.raises(RecipeError, match=r"give data\.labels\.names"):
        run(text_recipe(tiny_bert, "t.csv", labels={})).plan()
    with pytest.raises(RecipeError, match=r"none of data\.labels\.names\. Did you mean 'goods'"):
        run(text_recipe(tiny_bert, "t.csv", labels={"names": ["bads", "goods"]})).plan()


def test_arrays_must_be_of_one_length_and_no_pickles(run, tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 6)), labels=np.zeros(3))
    with pytest.raises(RecipeError, match="all must have one length"):
        run(recipe(data__train={"arrays": "a.npz"})).plan()
    np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RecipeError, match="cannot be read"):
        run(recipe(data__train={"arrays": "a.npz"})).plan()


def test_a_data_set_needs_its_library(run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RecipeError, match=r"pip install 'hookdistill\[datasets\]'"):
        run(recipe(data__train={"dataset": "imdb", "split": "train"})).plan()


def test_data_sets(run, tmp_path, tiny_bert):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["the cat", "the dog"], "label": [0, 1]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "saved")
    data = text_recipe(tiny_bert, "none")
    data["data"]["train"] = {"dataset": "saved", "split": "train", "rename": {"label": "labels"}}
    (batch,) = run(data).loaders[0]
    assert batch["labels"].tolist() == [0, 1]
    data["data"]["train"]["split"] = "trian"
    with pytest.raises(RecipeError, match=r"no part 'trian'\. Did you mean 'train'"):
        run(data).plan()


def test_a_check_looks_at_what_is_needed_later(run):
    for change, says in (
        ({"evaluators": [{"factory": "nets:number"}]}, "evaluators.0: 'nets:number' is no function"),
        ({"data__hold_out": None, "data__eval": {"factory": "nets:nowhere"}}, "data.eval: 'nets' has no 'nowhere'"),
        ({"trainer__optimizer": {"arguments": {"beta": 1}}}, "trainer.optimizer: torch.optim.AdamW takes no argument 'beta'"),
    ):
        with pytest.raises(RecipeError, match=says):
            run(recipe(**change)).check()


def test_rows_are_loaded_by_worker_processes(run):
    made = run(recipe(data__workers=1, trainer__max_steps=2, trainer__epochs=None))
    assert made.trainer.train().steps == 2
    assert len(next(iter(made.loaders[0]))["x"]) == 4


def test_the_keys_of_a_match_are_those_of_match():
    import inspect

    ours = {*inspect.signature(Match.__init__).parameters} - {"self", "loss_args"}
    assert {*MatchItem.model_fields} == ours


def test_every_key_has_help():
    def check(kind):
        for name, field in kind.model_fields.items():
            assert field.description, (kind.__name__, name)
            assert field.description[0].isupper() or field.description.startswith(("epoch", "losses", "package")), (kind, name)

    for kind in (Recipe, *Recipe.__subclasses__(), MatchItem, Evaluator):
        check(kind)


def test_the_schema_is_one_and_knows_losses_and_layer_maps():
    schema = json_schema()
    match = schema["$defs"]["MatchItem"]["properties"]
    assert "kl" in match["loss"]["anyOf"][0]["enum"]
    assert match["layer_map"]["anyOf"][0]["enum"] == sorted(LAYER_MAPS)
    assert schema["required"] == ["student", "data", "matches", "trainer"]
    assert schema["$defs"]["Training"]["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema
