"""One module with student, adapters and losses; the teacher beside it, never changed."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hookdistill import Distiller, Match, MatchError
from pairs import (
    Mlp,
    assert_same_gradients,
    flags,
    gradients,
    hooks,
    mlps,
    pictures,
    points,
    readers,
    same,
    seeded,
    state,
    tokens,
    train,
    twin,
)


def hidden(**kwargs):
    return [Match("second", "second", name="hidden", **kwargs)]


# Every kind of model, from the plan to a falling loss


def bert(width, layers):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * width}
    return seeded(BertForTokenClassification, BertConfig(**sizes, vocab_size=20, num_labels=5), seed=layers)


def llama(width, layers):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2}
    return seeded(LlamaForCausalLM, LlamaConfig(**sizes, intermediate_size=2 * width, vocab_size=20), seed=layers)


def vit(width, layers):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * width}
    return seeded(ViTForImageClassification, ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3), seed=layers)


def resnet(width, layers):
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width], "depths": [layers, layers], "layer_type": "basic"}
    return seeded(ResNetForImageClassification, ResNetConfig(**sizes, num_labels=3), seed=layers)


def images(batch=3, size=8):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, size, size, generator=draw)
    return {"pixel_values": pixels, "labels": torch.randint(3, (batch,), generator=draw)}


SOFT = Match(":logits", ":logits", loss="kl", temperature=2.0, name="soft")
HARD = Match(None, ":logits", loss="cross_entropy", target="labels", name="hard")
PAIRS = {
    "mlp": (lambda: mlps(12, 8), points, [Match("second", "second"), Match("", "", loss="kl")]),
    "tokens": (lambda: readers(12, 8), tokens, [Match("layers.*", "layers.*", mask="attention_mask"), SOFT, HARD]),
    "bert": (
        lambda: (bert(16, 4), bert(8, 2)),
        tokens,
        [
            Match("bert.encoder.layer.*", "bert.encoder.layer.*", mask="attention_mask"),
            Match("bert.encoder.layer.-1.attention", "bert.encoder.layer.-1.attention", selector="attention", loss="kl"),
            Match("bert.embeddings", "bert.embeddings", loss="cosine", mask="attention_mask"),
            SOFT,
            HARD,
        ],
    ),
    "llama": (
        lambda: (llama(32, 4), llama(16, 2)),
        lambda: {"input_ids": tokens()["input_ids"], "attention_mask": tokens()["attention_mask"]},
        [
            Match("model.layers.*", "model.layers.*", mask="attention_mask", layer_map="last"),
            Match(
                "model.layers.-1.self_attn", "model.layers.-1.self_attn", selector="attention", loss="kl", mask="attention_mask"
            ),
            Match("model.layers.0.self_attn:input.hidden_states", "model.layers.0.self_attn:input.hidden_states"),
            SOFT,
            Match(None, ":logits", loss="cross_entropy", target="input_ids", causal_shift=True, mask="attention_mask"),
        ],
    ),
    "vit": (
        lambda: (vit(16, 4), vit(8, 2)),
        images,
        [Match("vit.layernorm", "vit.layernorm"), Match("vit.embeddings", "vit.embeddings", loss="cosine"), SOFT, HARD],
    ),
    "resnet": (
        lambda: (resnet(12, 2), resnet(8, 1)),
        lambda: images(size=32),
        [Match("resnet.encoder.stages.*", "resnet.encoder.stages.*"), SOFT, HARD],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_plan_and_a_few_steps_bring_the_loss_down(name):
    build, make_batch, matches = PAIRS[name]
    teacher, student = build()
    batch = make_batch()
    torch.manual_seed(0)
    distiller = Distiller(teacher, student, matches)
    plan = distiller.plan(batch)
    assert len(plan) >= len(matches)
    before = state(teacher)
    student.eval()  # no dropout, so that each step must help
    losses = distiller(batch)
    assert list(losses.parts) == [row.name for row in plan]
    assert all(torch.isfinite(part) for part in losses.parts.values())
    totals = [*train(distiller, batch, steps=4, lr=0.02), float(distiller(batch).total.detach())]
    assert totals == sorted(totals, reverse=True)
    assert same(state(teacher), before)


def test_a_bert_distilled_by_the_library_equals_one_distilled_by_hand():
    teacher, student = bert(16, 4), bert(16, 2)
    batch = tokens()
    matches = [
        Match("bert.encoder.layer.3", "bert.encoder.layer.1", mask="attention_mask"),
        Match("bert.encoder.layer.3.attention", "bert.encoder.layer.1.attention", selector="attention", mask="attention_mask"),
        SOFT,
    ]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    distiller = Distiller(teacher, student.eval(), matches)
    losses = distiller(batch)
    by_hand = {}
    for side, model in (("t", teacher.eval()), ("s", student)):
        eager = twin(model)
        eager.set_attn_implementation("eager")
        eager.load_state_dict(model.state_dict())
        out = eager(**inputs, output_hidden_states=True, output_attentions=True)
        by_hand[side] = out.hidden_states[-1], out.attentions[-1], out.logits
        if side == "s":
            reference = eager
    t, s = (tuple(each.detach() for each in by_hand["t"])), by_hand["s"]
    valid = batch["attention_mask"].bool()
    entries = (valid[:, None, :, None] & valid[:, None, None, :]).expand(s[1].shape)
    kl = F.kl_div((s[2] / 2).log_softmax(-1), (t[2] / 2).softmax(-1), reduction="none").sum(-1).mean()
    total = F.mse_loss(s[0][valid], t[0][valid]) + F.mse_loss(s[1][entries], t[1][entries]) + 4 * kl
    torch.testing.assert_close(losses.total, total)
    losses.total.backward()
    total.backward()
    for (name, ours), expected in zip(student.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, msg=name)


def test_labels_are_not_passed_to_a_hugging_face_model_that_would_compute_a_loss_of_its_own():
    teacher, student = bert(16, 4), bert(8, 2)
    seen = []
    student.register_forward_hook(lambda module, args, output: seen.append(output.loss))
    Distiller(teacher, student, [SOFT, HARD])(tokens())
    assert seen == [None, None]


# The bare loop


def test_the_bare_loop_of_five_lines():
    teacher, student = mlps(12, 8)
    loader = [points(seed=seed) for seed in range(4)]
    distiller = Distiller(teacher, student, hidden(), example_batch=loader[0])
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=0.05)

    for batch in loader:
        losses = distiller(batch)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()

    assert (
        distiller(loader[0]).parts["hidden"]
        < Distiller(*mlps(12, 8), hidden(), example_batch=loader[0]).plan(loader[0]).rows[0].value
    )


# The teacher is beside, not inside


def test_the_teacher_is_in_neither_parameters_nor_state_nor_modules():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    theirs = {id(parameter) for parameter in teacher.parameters()}
    assert theirs.isdisjoint(id(parameter) for parameter in distiller.parameters())
    assert all(module is not teacher for module in distiller.modules())
    assert set(distiller.state_dict()) == {f"student.{key}" for key in student.state_dict()}
    assert len(list(distiller.buffers())) == len(list(student.buffers()))
    assert distiller.teacher is teacher
    assert distiller.student is student


def test_the_teacher_runs_in_eval_mode_without_gradients_whatever_its_flags():
    teacher, student = mlps()
    seen = []
    teacher.second.register_forward_hook(
        lambda module, args, output: seen.append((module.training, teacher.norm.training, output.requires_grad))
    )
    distiller = Distiller(teacher.train(), student, hidden())
    distiller.plan(points())
    distiller.train()
    distiller(points())
    with torch.no_grad():
        distiller(points())
    assert seen == [(False, False, False)] * 3


@pytest.mark.parametrize("mode", [True, False])
def test_the_teachers_own_modes_and_flags_are_left_as_they_are_module_by_module(mode):
    teacher, student = mlps()
    teacher.train(mode)
    teacher.norm.train(not mode)
    teacher.head.requires_grad_(False)
    was, before = flags(teacher), state(teacher)
    distiller = Distiller(teacher, student, hidden())
    for act in (
        lambda: distiller.plan(points()),
        lambda: distiller(points()),
        distiller.train,
        distiller.eval,
        distiller.close,
    ):
        act()
        assert flags(teacher) == was
    distiller.requires_grad_(False)
    distiller.zero_grad()
    assert flags(teacher) == was
    assert same(state(teacher), before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_teachers_modes_are_put_back_after_an_exception(error):
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    teacher.norm.eval()
    was = flags(teacher, student)

    def fail(*_):
        raise error("in the middle of the teacher")

    handle = teacher.drop.register_forward_hook(fail)
    with pytest.raises(error, match="in the middle"):
        distiller(points())
    assert flags(teacher, student) == was
    assert torch.is_grad_enabled()
    handle.remove()
    assert torch.isfinite(distiller(points()).total)


def test_an_exception_in_a_step_leaves_a_distiller_that_works():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    student.eval()
    expected = distiller(points()).total

    def fail(*_):
        raise RuntimeError("in the middle of the student")

    handle = student.drop.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        distiller(points())
    handle.remove()
    assert torch.equal(distiller(points()).total, expected)
    with pytest.raises(RuntimeError):
        distiller(torch.randn(2, 99))
    assert torch.equal(distiller(points()).total, expected)


def test_the_dtype_and_device_of_the_distiller_are_those_of_the_teacher_too():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, hidden(), example_batch=points()).double()
    assert {p.dtype for p in (*teacher.parameters(), *distiller.parameters())} == {torch.float64}
    assert distiller({"x": points()["x"].double()}).total.dtype is torch.float64


def test_the_students_training_mode_is_the_users():
    teacher, student = mlps()
    seen = []
    student.norm.register_forward_hook(lambda module, args, output: seen.append(module.training))
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    seen.clear()
    for mode in (True, False):
        distiller.train(mode)
        distiller(points())
    distiller.train()
    student.norm.eval()
    distiller(points())
    assert seen == [True, False, False]


# Evaluation


def test_under_no_grad_the_losses_are_the_same_without_a_graph():
    teacher, student = mlps()
    distiller = Distiller(teacher, student.eval(), hidden())
    student.eval()
    attached = distiller(points())
    with torch.no_grad():
        plain = distiller(points())
    with torch.inference_mode():
        inference = distiller(points())
    assert not plain.total.requires_grad
    assert torch.equal(attached.total, plain.total)
    assert torch.equal(attached.total, inference.total)
    assert attached.total.requires_grad
    assert distiller(points()).total.requires_grad


def test_the_first_batch_may_come_under_no_grad():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden())
    with torch.no_grad():
        assert not distiller(points()).total.requires_grad
    distiller(points()).total.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


def test_adapters_made_under_inference_mode_can_be_trained():
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, hidden())
    with torch.inference_mode():
        distiller.plan(points())
    distiller(points()).total.backward()
    assert all(parameter.grad is not None for parameter in distiller.adapters.parameters())


# Several teachers, one teacher for many, the student as its own teacher


def test_several_teachers_by_name():
    (a, student), (b, _) = mlps(), mlps()
    b = seeded(Mlp, 12, seed=9)
    before = state(a, b)
    matches = [
        Match("first", "first", teacher_model="a", name="from a"),
        Match("", "", loss="kl", teacher_model="b", name="from b", weight=0.5),
    ]
    distiller = Distiller({"a": a, "b": b}, student.eval(), matches)
    assert distiller.teacher == {"a": a, "b": b}
    plan = distiller.plan(points())
    assert [row.teacher for row in plan] == ["a/first", "b/:output"]
    student.eval()
    losses = distiller(points())
    x = points()["x"]
    s, t = student.spelled_out(x), a.eval().spelled_out(x)["first"].detach()
    kl = F.kl_div(s["head"].log_softmax(-1), b.eval()(x).detach().softmax(-1), reduction="batchmean")
    total = F.mse_loss(s["first"], t) + 0.5 * kl
    torch.testing.assert_close(losses.total, total)
    assert_same_gradients(gradients(student, losses.total), gradients(student, total))
    assert same(state(a, b), before)


def test_a_single_teacher_with_a_name_need_not_be_named():
    teacher, student = mlps()
    distiller = Distiller({"big": teacher}, student, hidden())
    assert torch.isfinite(distiller(points()).total)
    assert distiller.teacher == {"big": teacher}


def test_one_module_under_two_names_of_teachers():
    teacher, student = mlps()
    matches = [Match("first", "first", teacher_model="a"), Match("second", "second", teacher_model="b")]
    losses = Distiller({"a": teacher, "b": teacher}, student.eval(), matches)(points())
    one = Distiller(teacher, student.eval(), [Match("first", "first"), Match("second", "second")])(points())
    assert torch.equal(losses.total, one.total)


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_student_may_be_its_own_teacher(planned, autocast):
    student = seeded(Mlp, dropout=0.5, seed=1)
    reference, frozen = twin(student), twin(student).requires_grad_(False)
    matches = [Match("second", "first", name="hidden"), Match("", "", loss="kl")]
    own, other = Distiller(student, student, matches), Distiller(frozen, reference, matches)
    if planned:
        own.plan(points()), other.plan(points())
    totals = []
    for distiller in (own, other):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            totals.append(distiller(points()).total)
    assert torch.equal(*totals)
    ours, expected = (gradients(model, total) for model, total in zip((student, reference), totals, strict=True))
    assert_same_gradients(ours, expected)
    assert sum(gradient is not None for gradient in ours) == len(list(student.parameters()))
    assert student.training


@pytest.mark.parametrize("planned", [True, False, "inside"])
def test_autocast_loses_no_gradient_of_the_student(planned):
    teacher, student = mlps()
    distiller = Distiller(teacher, student, [*hidden(), Match("", "", loss="kl")])
    if planned is True:
        distiller.plan(points())
    with torch.autocast("cpu", torch.bfloat16):
        if planned == "inside":
            distiller.plan(points())
        total = distiller(points()).total
    reference = twin(student)
    with torch.autocast("cpu", torch.bfloat16):
        expected = Distiller(teacher, reference, [*hidden(), Match("", "", loss="kl")], example_batch=points())(points()).total
    ours = gradients(student, total)
    assert all(gradient is not None for gradient in ours)
    assert_same_gradients(ours, gradients(reference, expected))


@pytest.mark.parametrize("planned", [False, "inside"])
def test_autocast_loses_no_gradient_where_no_teacher_runs(planned):
    teacher, student = mlps()
    distiller = Distiller(teacher, student, [Match(None, "", loss="cross_entropy", target="labels")])
    with torch.autocast("cpu", torch.bfloat16):
        if planned:
            distiller.plan(points())
        total = distiller(points()).total
    assert all(gradient is not None for gradient in gradients(student, total))


def test_a_plan_inside_autocast_takes_no_gradient_from_the_users_own_forward():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden())
    with torch.autocast("cpu", torch.bfloat16):
        distiller.plan(points())
        total = student(points()["x"]).sum()
    assert all(gradient is not None for gradient in gradients(student, total.float()))


def test_a_layer_shared_by_teacher_and_student_is_trained_by_the_students_use_of_it():
    teacher, student = mlps()
    student.first = teacher.first
    was = flags(teacher)
    distiller = Distiller(teacher, student, hidden())
    distiller(points()).total.backward()
    assert student.first.weight.grad is not None
    assert teacher.second.weight.grad is None
    assert flags(teacher) == was


def test_two_distillers_on_one_student_do_not_hear_each_other():
    (first_teacher, student), second_teacher = mlps(), seeded(Mlp, seed=7)
    student.eval()
    one = Distiller(first_teacher, student, hidden(), example_batch=points())
    two = Distiller(second_teacher, student, hidden(), example_batch=points())
    one.eval()
    alone = []
    for teacher in (first_teacher, second_teacher):
        x = points()["x"]
        alone.append(F.mse_loss(student.spelled_out(x)["second"], teacher.eval().spelled_out(x)["second"].detach()))
    for _ in range(2):
        torch.testing.assert_close(one(points()).total, alone[0])
        torch.testing.assert_close(two(points()).total, alone[1])
    one.close()
    torch.testing.assert_close(two(points()).total, alone[1])
    (one(points()).total + two(points()).total).backward()
    ours = [parameter.grad for parameter in student.parameters()]
    assert_same_gradients(ours, gradients(student, alone[0] + alone[1]))


def test_two_distillers_share_a_teacher():
    teacher, student = mlps()
    other = seeded(Mlp, seed=8)
    ran = []
    handle = teacher.head.register_forward_pre_hook(lambda *_: ran.append(1))
    one = Distiller(teacher, student, hidden(), example_batch=points())
    two = Distiller(teacher, other, [Match("", "", loss="kl")], example_batch=points())
    ran.clear()
    assert torch.isfinite(one(points()).total + two(points()).total)
    assert torch.isfinite(two(points()).total + one(points()).total)
    assert len(ran) == 2  # the first needs no head, the second does, each time
    two.close()
    assert torch.isfinite(one(points()).total)
    one.close()
    handle.remove()
    assert hooks(teacher, student, other) == 0
    assert teacher(points()["x"]).shape == (5, 4)


def test_the_teacher_is_whole_again_between_steps():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    distiller(points())
    assert teacher(points()["x"]).shape == (5, 4)
    copied = twin(teacher)
    assert copied(points()["x"]).shape == (5, 4)
    assert pickle.loads(pickle.dumps(teacher))(points()["x"]).shape == (5, 4)


# Copies


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda distiller: pickle.loads(pickle.dumps(distiller))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_a_distiller_works_and_stands_alone(clone, opened):
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    if not opened:
        distiller.close()
    copied = clone(distiller)
    assert copied.student is not student
    assert copied.teacher is not teacher
    distiller.eval(), copied.eval()
    assert torch.equal(copied(points()).total, distiller(points()).total)
    before = state(student, distiller.adapters)
    totals = list(train(copied, points(), steps=3))
    assert totals[-1] < totals[0]
    assert same(state(student, distiller.adapters), before)
    distiller.close(), copied.close()
    assert hooks(copied.teacher, copied.student) == hooks(twin(copied.teacher), twin(copied.student))


def test_a_state_dict_resumes_training_bit_for_bit():
    def made():
        torch.manual_seed(0)
        return Distiller(*mlps(12, 8), hidden(), example_batch=points())

    straight, first = made(), made()
    list(train(straight, points(), steps=4))
    list(train(first, points(), steps=2))
    second = made()
    second.load_state_dict(first.state_dict())
    list(train(second, points(), steps=2))
    assert same(state(second), state(straight))


def test_torch_save_of_the_student_holds_nothing_of_the_distiller(tmp_path):
    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    distiller(points())
    torch.save(student, tmp_path / "student.pt")
    loaded = torch.load(tmp_path / "student.pt", weights_only=False)
    assert same(state(loaded), state(student))
    assert torch.equal(loaded.eval()(points()["x"]), student.eval()(points()["x"]))


# Export


def test_a_plain_module_is_exported_as_safetensors_and_loads_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, load_model

    teacher, student = mlps(12, 8)
    distiller = Distiller(teacher, student, hidden(), example_batch=points())
    list(train(distiller, points(), steps=2))
    distiller.export(tmp_path / "deep" / "folder")
    assert sorted(path.name for path in (tmp_path / "deep" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    weights = load_file(tmp_path / "deep" / "folder" / "model.safetensors")
    assert weights.keys() == student.state_dict().keys()
    fresh = seeded(Mlp, seed=5)
    load_model(fresh, tmp_path / "deep" / "folder" / "model.safetensors")
    assert same(state(fresh), state(student))
    assert torch.equal(fresh.eval()(points()["x"]), student.eval()(points()["x"]))


def test_a_hugging_face_student_is_exported_for_from_pretrained(tmp_path):
    sizes = {"num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    teacher = seeded(BertModel, BertConfig(hidden_size=16, num_hidden_layers=2, **sizes), seed=1)
    student = seeded(BertModel, BertConfig(hidden_size=8, num_hidden_layers=1, **sizes), seed=2)
    batch = tokens()
    matches = [Match("encoder.layer.-1", "encoder.layer.-1", mask="attention_mask")]
    distiller = Distiller(teacher, student, matches, example_batch=batch)
    list(train(distiller, batch, steps=2))
    distiller.export(str(tmp_path))
    loaded = BertModel.from_pretrained(tmp_path)
    assert loaded.config.hidden_size == 8
    assert loaded.state_dict().keys() == student.state_dict().keys()
    assert same(state(loaded), state(student))
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    ours, theirs = student.eval()(**inputs).last_hidden_state, loaded.eval()(**inputs).last_hidden_state
    assert torch.equal(ours, theirs)


def test_tied_weights_are_exported_once_and_load_tied(tmp_path):
    from safetensors.torch import load_model

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    teacher, student = seeded(Tied, seed=1), seeded(Tied, seed=2)
    distiller = Distiller(teacher, student, [Match("", "", loss="kl")], example_batch=torch.tensor([[1, 2]]))
    distiller.export(tmp_path)
    fresh = seeded(Tied, seed=3)
    load_model(fresh, tmp_path / "model.safetensors")
    assert same(state(fresh), state(student))
    assert fresh.head.weight is fresh.embed.weight


def test_an_export_that_fails_leaves_the_last_one_whole(tmp_path, monkeypatch):
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden())
    distiller.export(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def half(folder):
        (folder / "config.json").write_text("{")
        raise OSError("no space left on device")

    student.save_pretrained = half
    with pytest.raises(OSError, match="no space"):
        distiller.export(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "config.json").read_text() != "{"
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_compiled_student_is_exported_without_the_wrapper(tmp_path):
    from safetensors.torch import load_file

    teacher, student = mlps()
    wrapped = torch.compile(student, backend="eager")
    Distiller(teacher, wrapped, hidden()).export(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == student.state_dict().keys()


# Batches change, models change


def test_batches_of_other_sizes_follow():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask")])
    for batch, length in ((3, 5), (1, 2), (4, 9)):
        assert torch.isfinite(distiller(tokens(batch, length)).total)


def test_a_user_hook_that_changes_the_output_counts():
    teacher, student = mlps()
    distiller = Distiller(teacher, student.eval(), hidden())
    student.eval()
    plain = distiller(points()).total
    handle = student.second.register_forward_hook(lambda module, args, output: output * 2)
    x = points()["x"]
    found = distiller(points()).total
    handle.remove()
    theirs = teacher.eval().spelled_out(x)["second"].detach()
    torch.testing.assert_close(found, F.mse_loss(2 * student.spelled_out(x)["second"], theirs))
    assert not torch.equal(found, plain)


def test_repr_and_children_are_student_and_loss():
    teacher, student = mlps()
    distiller = Distiller(teacher, student, hidden())
    assert {name for name, _ in distiller.named_children()} == {"student", "loss"}
    assert "Mlp" in repr(distiller)


def test_pictures_and_vectors_in_one_distiller():
    from pairs import ConvNet

    teacher, student = seeded(ConvNet, 6, seed=1), seeded(ConvNet, 4, stride=2, seed=2)
    matches = [Match("stem", "stem"), Match("relu", "relu", loss="cosine"), Match("", "", loss="kl")]
    distiller = Distiller(teacher, student, matches, example_batch=pictures())
    totals = list(train(distiller, pictures(), steps=4))
    assert totals[-1] < totals[0]


def test_gradient_accumulation_is_the_users_as_with_any_module():
    teacher, student = mlps()
    student.eval()
    distiller = Distiller(teacher, student, hidden())
    distiller(points(seed=1)).total.backward()
    distiller(points(seed=2)).total.backward()
    ours = [None if p.grad is None else p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    total = distiller(points(seed=1)).total + distiller(points(seed=2)).total
    assert_same_gradients(ours, gradients(student, total))


def test_a_match_error_in_a_later_batch_names_its_entry():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [Match("layers.3", "layers.1", mask="attention_mask", name="hidden")])
    distiller(tokens())
    with pytest.raises(MatchError, match="hidden"):
        distiller({"input_ids": tokens()["input_ids"]})
    assert torch.isfinite(distiller(tokens()).total)


# Early exit


def llama_for_language(layers):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes))


@pytest.mark.parametrize(
    ("match", "runs"),
    [
        (Match("model.layers.2", "model.layers.1"), {"model.layers.3": False, "lm_head": False}),
        (Match("model.layers.2:attention", "model.layers.1:attention", loss="kl"), {"model.layers.3": False, "lm_head": False}),
        (Match("model.norm", "model.norm"), {"model.layers.3": True, "lm_head": False}),
        (Match(":logits", ":logits", loss="kl"), {"model.layers.3": True, "lm_head": True}),
    ],
    ids=["layer", "attention", "norm", "logits"],
)
def test_the_teacher_computes_nothing_that_no_loss_needs(match, runs):
    teacher, student = llama_for_language(4), llama_for_language(2)
    ids = torch.arange(1, 13).reshape(2, 6)
    distiller = Distiller(teacher, student, [match], example_batch={"input_ids": ids})
    ran = dict.fromkeys(runs, False)
    for path in runs:
        teacher.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: ran.__setitem__(path, True))
    distiller({"input_ids": ids}).total.backward()
    assert ran == runs


def test_a_compiled_teacher_runs_to_its_end_and_gives_the_same():
    teacher, student = mlps()
    batch = points()
    expected = Distiller(teacher, student, [Match("first", "first")])(batch).total
    compiled = torch.compile(teacher, backend="eager")
    torch.testing.assert_close(Distiller(compiled, student, [Match("first", "first")])(batch).total, expected)
