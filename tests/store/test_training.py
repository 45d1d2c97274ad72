"""Training from a store is training with the teacher."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from hookdistill import (
    AddressError,
    CaptureSource,
    Distiller,
    Keep,
    Match,
    MatchError,
    StoreError,
    TeacherStore,
    Trainer,
    losses,
)
from pairs import Mlp, Reader, mlps, points, readers, seeded, twin
from store_zoo import batches, padded, sentences

MASKED = {"mask": "attention_mask"}


def entries():
    return [
        Match("layers.*", "layers.*", loss="mse", **MASKED),
        Match("layers.-1", "layers.-1", loss="cosine", **MASKED),
        Match(":logits", ":logits", loss="kl", temperature=2.0, **MASKED),
        Match(None, ":logits", loss="cross_entropy", target="labels", **MASKED),
    ]


def labelled(samples):
    batch = padded(samples)
    return {**batch, "labels": batch["input_ids"] % 5}


def steps(distiller, loader, count=12):
    """The parts before each step of plain training."""
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for number in range(count):
        losses = distiller(loader[number % len(loader)])
        yield {name: float(value) for name, value in losses.parts.items()}
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()


@pytest.mark.parametrize("order", ["student first", "teacher first"])
def test_a_float32_store_trains_as_the_teacher_step_by_step(tmp_path, order):
    teacher, student = readers(8, 6)
    samples = sentences(16)
    TeacherStore.build(tmp_path, teacher, entries(), DataLoader(samples, 4, collate_fn=labelled), progress=False)
    store = TeacherStore.open(tmp_path)
    loader = [labelled(samples[start::3]) for start in range(3)]  # other batches, other padding
    curves, students = [], []
    for stands in (teacher, store):
        torch.manual_seed(0)
        distiller = Distiller(stands, twin(student), entries(), example_batch=loader[0], order=order)
        curves.append(list(steps(distiller, loader)))
        students.append(distiller.student)
    assert len(curves[0]) == 12
    for live, read in zip(*curves, strict=True):
        assert live == pytest.approx(read, rel=1e-4, abs=1e-6)
    for ours, theirs in zip(*(each.parameters() for each in students), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_through_the_trainer(tmp_path):
    teacher, student = mlps()
    data = [dict(zip(points(), row, strict=True)) for row in zip(*points(24).values(), strict=True)]
    matches = [Match("second", "second", mask="valid"), Match("head", "head", loss="kl")]
    store = TeacherStore.build(tmp_path, teacher, matches, DataLoader(data, 5), progress=False)
    students = []
    for stands in (teacher, store):
        torch.manual_seed(0)
        distiller = Distiller(stands, twin(student), matches)
        loader = DataLoader(data, 8, shuffle=True)
        # Not Adam: the bias in front of the batch norm has a gradient of rounding errors, which Adam makes large.
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        Trainer(distiller, loader, optimizer=optimizer, max_steps=9, progress=False, seed=3).train()
        students.append(distiller.student)
    for ours, theirs in zip(*(each.state_dict().values() for each in students), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_plan_is_that_of_the_teacher(tmp_path):
    teacher, student = readers(8, 6)
    batch = labelled(sentences(5))
    store = TeacherStore.build(tmp_path, teacher, entries(), [batch], progress=False)
    plans = [Distiller(stands, twin(student), entries()).plan(batch) for stands in (teacher, store)]
    for live, read in zip(*plans, strict=True):
        assert live.adapter == read.adapter
        assert (live.name, live.teacher, live.teacher_shape) == (read.name, read.teacher, read.teacher_shape)
    assert "teacher is read from TeacherStore(" in str(plans[1])


def test_the_teacher_is_gone_and_copies_of_the_distiller_work(tmp_path):
    teacher, student = readers()
    batch = labelled(sentences(5))
    store = TeacherStore.build(tmp_path, teacher, entries(), [batch], progress=False)
    del teacher
    distiller = Distiller(store, student, entries())
    total = distiller(batch).total
    assert torch.equal(copy.deepcopy(distiller)(batch).total, total)
    assert distiller.teacher is store
    assert distiller.to(torch.float64).student.head.weight.dtype is torch.float64


def test_two_stores_and_a_module_as_teachers(tmp_path):
    first, student = mlps()
    second, third, batch = seeded(Mlp, seed=5), seeded(Mlp, seed=6), {"x": points()["x"]}
    matches = [Match("second", "second", teacher_model=name) for name in "abc"]
    stores = {
        name: TeacherStore.build(tmp_path / name, teacher, matches, [batch], teacher_model=name, progress=False)
        for name, teacher in (("a", first), ("b", second))
    }
    live = Distiller({"a": first, "b": second, "c": third}, student, matches)(batch)
    read = Distiller({**stores, "c": third}, student, matches)(batch)
    assert {name: float(value) for name, value in read.parts.items()} == {n: float(v) for n, v in live.parts.items()}
    with pytest.raises(StoreError, match="several teachers; say with teacher_model="):
        TeacherStore.build(tmp_path / "c", first, matches, [batch], progress=False)


def test_only_the_layers_that_a_student_needs_are_stored_if_it_is_given(tmp_path):
    teacher, student = readers(depths=(6, 2))
    matches = [Match("layers.*", "layers.*", layer_map="last", **MASKED)]
    batch = padded(sentences(4))
    whole = TeacherStore.build(tmp_path / "whole", teacher, matches, [batch], progress=False)
    some = TeacherStore.build(tmp_path / "some", teacher, matches, [batch], student=student, progress=False)
    assert whole.addresses == [f"layers.{i}" for i in range(6)]
    assert some.addresses == ["layers.4", "layers.5"]
    assert torch.equal(Distiller(whole, student, matches)(batch).total, Distiller(some, student, matches)(batch).total)
    with pytest.raises(StoreError, match=r"layers\.0 <- layers\.0: mse: the store .* holds no 'layers\.0'.*'layers\.4'"):
        Distiller(some, student, [Match("layers.*", "layers.*", layer_map="first", **MASKED)])


def test_an_entry_without_a_mask_trains_where_there_is_no_padding_and_is_refused_where_there_is(tmp_path):
    teacher, student = readers()
    samples = [ids for ids in sentences(40) if len(ids) in (4, 6)]
    matches = [Match("layers.-1", "layers.-1", loss="mse")]
    store = TeacherStore.build(tmp_path, teacher, matches, batches(samples), progress=False)
    whole = padded([ids for ids in samples if len(ids) == 4])
    torch.testing.assert_close(
        Distiller(store, student, matches)(whole).total, Distiller(teacher, student, matches)(whole).total
    )
    with pytest.raises(MatchError, match=r"the batch has padding.*mask='attention_mask'"):
        Distiller(store, student, matches)(padded(samples))

    def unmaskable(student, teacher):
        return (student - teacher).square().mean()

    with pytest.raises(StoreError, match="takes no mask"):
        Distiller(store, student, [Match("layers.-1", "layers.-1", loss=unmaskable)])


def test_kept_tokens_alone_are_trained_on(tmp_path):
    teacher, student = readers()
    batch = padded(sentences(6))
    for mask in (None, "attention_mask", lambda batch: batch["attention_mask"]):
        matches = [Match("layers.0", "layers.0", loss="mse", mask=mask)]
        store = TeacherStore.build(tmp_path, teacher, matches, [batch], keep=Keep(tokens=0), progress=False)
        losses = Distiller(store, student, matches)(batch)
        ours, theirs = (each.spelled_out(batch["input_ids"])["layers.0"][:, 0] for each in (student, teacher))
        torch.testing.assert_close(losses.total, (ours - theirs).square().mean())


def test_kept_features_are_what_an_adapter_aims_at(tmp_path):
    teacher, student = readers()
    batch = padded(sentences(6))
    matches = [Match("layers.0", "layers.0", **MASKED)]
    store = TeacherStore.build(tmp_path, teacher, matches, [batch], keep=Keep(features="0:3"), progress=False)
    distiller = Distiller(store, student, matches, example_batch=batch)
    assert distiller.plan(batch).rows[0].adapter == "Linear(8→3)"
    curve = [sum(parts.values()) for parts in steps(distiller, [batch], 20)]
    assert curve[-1] < curve[0] / 2


@pytest.mark.parametrize(
    ("keep", "loss"),
    [(Keep("fp16", top_k=3, temperature=2.0), "top_k_tail_kl"), (Keep(samples=200, temperature=2.0), "sampled_kl")],
    ids=["top-k", "sampled"],
)
def test_kl_on_kept_classes(tmp_path, keep, loss):
    teacher, student = readers()
    batch = padded(sentences(12))
    matches = [Match(":logits", ":logits", loss="kl", temperature=2.0, **MASKED)]
    store = TeacherStore.build(tmp_path, teacher, matches, [batch], keep=keep, progress=False)
    read = Distiller(store, student, matches)
    (row,) = read.plan(batch)
    assert row.loss == f"{loss}(T=2, classes=5)" and row.teacher == ":logits.kept_classes"
    live = Distiller(teacher, student, matches)
    slopes = [torch.autograd.grad(each(batch).total, student.head.weight)[0] for each in (read, live)]
    assert float((slopes[0] - slopes[1]).norm()) < 0.35 * float(slopes[1].norm())
    curve = [float(live(batch).total.detach()) for _ in steps(read, [batch], 30)]
    assert curve[-1] < curve[0] / 3  # what falls is the divergence from the teacher itself

    with pytest.raises(StoreError, match=r"kept at temperature 2.*temperature=1\.0"):
        Distiller(store, student, [Match(":logits", ":logits", loss="kl", **MASKED)])
    with pytest.raises(StoreError, match=r"serves the loss 'kl'; the loss 'js' needs them all"):
        Distiller(store, student, [Match(":logits", ":logits", loss="js", temperature=2.0, **MASKED)])
    with pytest.raises(StoreError, match=r"takes no 'dim': classes are the last dimension"):
        Distiller(store, student, [Match(":logits", ":logits", loss="kl", temperature=2.0, dim=1, **MASKED)])


def test_top_k_kl_is_that_of_whole_logits(tmp_path):
    teacher, student = readers()
    batch = padded(sentences(12))
    matches = [Match(":logits", ":logits", loss="top_k_kl", k=3, **MASKED)]
    store = TeacherStore.build(tmp_path, teacher, matches, [batch], keep={":logits": Keep(top_k=3)}, progress=False)
    live, read = (Distiller(stands, student, matches)(batch).total for stands in (teacher, store))
    torch.testing.assert_close(read, live, rtol=1e-4, atol=1e-6)
    for arguments in ({"k": 2}, {"k": 3, "tail": False}):
        with pytest.raises(StoreError, match="the store has top_k=3 and the tail, and the entry asks for k="):
            Distiller(store, student, [Match(":logits", ":logits", loss="top_k_kl", **arguments, **MASKED)])


def test_a_causal_language_model_from_kept_classes(tmp_path):
    teacher, student = readers()
    samples = sentences(12)
    matches = [Match(":logits", ":logits", loss="kl", target="labels", causal_shift=True, **MASKED)]
    loader = [labelled(samples)]
    loader[0]["labels"] = loader[0]["labels"].where(loader[0]["labels"] != 2, -100)
    keep = {":logits": Keep(top_k=5)}  # all classes there are
    store = TeacherStore.build(tmp_path, teacher, matches, loader, keep=keep, progress=False)
    live, read = (Distiller(stands, student, matches)(loader[0]).total for stands in (teacher, store))
    torch.testing.assert_close(read, live)
    with pytest.raises(MatchError, match="the student has 6 classes and the teacher 5"):
        Distiller(store, seeded(Reader, classes=6), matches).plan(loader[0])


def test_further_tensors_of_the_teacher(tmp_path):
    def between(student, teacher, mask=None, *, teacher_next):
        return losses.mse(student, (teacher + teacher_next) / 2, mask=mask)

    teacher, student = readers()
    batch = padded(sentences(5))
    matches = [Match("layers.0", "layers.0", loss=between, inputs={"teacher_next": "layers.-3"}, **MASKED)]
    store = TeacherStore.build(tmp_path / "whole", teacher, matches, [batch], progress=False)
    assert store.addresses == ["layers.0", "layers.1"]
    live, read = (Distiller(stands, student, matches)(batch).total for stands in (teacher, store))
    torch.testing.assert_close(read, live)
    keep = {"layers.1": Keep(tokens=0)}
    part = TeacherStore.build(tmp_path / "part", teacher, matches, [batch], keep=keep, progress=False)
    with pytest.raises(StoreError, match=r"of 'layers\.1' only a part is stored \(tokens=\[0\]\), and inputs= needs it whole"):
        Distiller(part, student, matches)
    other = TeacherStore.build(tmp_path / "other", teacher, ["layers.0"], [batch], progress=False)
    with pytest.raises(StoreError, match=r"holds no 'layers\.1'"):
        Distiller(other, student, matches)


def test_logits_that_a_live_teacher_would_not_make_are_read_whole(tmp_path, monkeypatch):
    from hookdistill import head_choice

    monkeypatch.setattr(head_choice, "FUSED_FROM", 0)
    teacher, student = readers()
    batch = padded(sentences(6))
    matches = [Match(":logits", ":logits", loss="kl", **MASKED)]
    store = TeacherStore.build(tmp_path, teacher, matches, [batch], progress=False)
    live, read = Distiller(teacher, student, matches), Distiller(store, student, matches)
    assert "head" in live.plan(batch).rows[0].implementation and "head" not in read.plan(batch).rows[0].implementation
    torch.testing.assert_close(read(batch).total, live(batch).total)
    with pytest.raises(MatchError, match="head='fused', but the teacher is no module"):
        Distiller(store, student, matches, head="fused").plan(batch)


class Remote:
    """A teacher that answers calls."""

    layers = ("encoder.0", "encoder.1", "encoder.2")

    def __init__(self):
        self.asked = []

    def captures(self, batch, addresses):
        self.asked.append([str(each) for each in addresses])
        return {each.path: {each.key: batch["x"][:, :4] * (1 + int(each.path[-1]))} for each in addresses}


def test_any_source_of_captures_stands_where_a_teacher_stands():
    remote, student, batch = Remote(), nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)), {"x": points()["x"]}
    assert isinstance(remote, CaptureSource)

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = student

        def forward(self, x):
            return self.layers(x)

    matches = [Match("encoder.*", "layers.*", layer_map="last"), Match("encoder.-3", "layers.1", loss="l1")]
    distiller = Distiller(remote, Student(), matches)
    losses = distiller(batch)
    losses.total.backward()
    first, second = student[0](batch["x"]), student(batch["x"])
    x = batch["x"][:, :4]
    expected = [(first - 2 * x).square().mean(), (second - 3 * x).square().mean(), (second - x).abs().mean()]
    assert [float(value) for value in losses.parts.values()] == pytest.approx([float(each.detach()) for each in expected])
    assert remote.asked[-1] == ["encoder.1", "encoder.2", "encoder.0"]
    with pytest.raises(MatchError, match=r"no module 'encoder\.3'") as caught:
        Distiller(remote, Student(), [Match("encoder.3", "layers.0")])
    assert isinstance(caught.value.__cause__, AddressError)


def test_what_is_no_teacher():
    with pytest.raises(MatchError, match=r"teacher must be a torch\.nn\.Module or a source of its tensors.*got dict_keys"):
        Distiller({}.keys(), seeded(Mlp), [Match("first", "first")])
    with pytest.raises(MatchError, match="got the class Reader"):
        Distiller({"a": Reader}, seeded(Mlp), [Match("first", "first")])
