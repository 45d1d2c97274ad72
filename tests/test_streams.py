"""Student first: a loss is computed as soon as the teacher's tensor comes by, and the tensor goes."""

import gc
import weakref

import pytest
import torch
from torch import nn

from hookdistill import CaptureError, Distiller, Match, MatchError
from hookdistill.engine.streams import streams
from hookdistill.engine.terms import named_terms
from pairs import readers, tokens


class Deep(nn.Module):
    """A teacher of which one can ask how many of its hidden states are alive while it runs."""

    def __init__(self, depth=6, width=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.refs, self.alive = [], []

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
            self.alive.append(sum(ref() is not None for ref in self.refs))
        return x

    def watch(self):
        """From now on; the hook comes before those of a distiller."""
        for layer in self.layers:
            layer.register_forward_hook(lambda module, args, output: self.refs.append(weakref.ref(output)))


def deep_pair():
    torch.manual_seed(0)
    return Deep(), Deep(3)


MATCHES = [Match(f"layers.{2 * n + 1}", f"layers.{n}", loss=loss) for n, loss in enumerate(["mse", "cosine", "l1"])]


@pytest.mark.parametrize(("order", "most"), [("student first", 1), ("teacher first", 2)])
def test_no_more_than_one_tensor_of_the_teacher_is_held(order, most):
    teacher, student = deep_pair()
    teacher.watch()
    distiller = Distiller(teacher, student, MATCHES, order=order, example_batch=torch.randn(4, 8))
    teacher.refs.clear(), teacher.alive.clear()
    gc.disable()  # nothing may hang on a collection of cycles
    try:
        losses = distiller(torch.randn(4, 8))
        held = max(teacher.alive)
        assert held <= most if order == "student first" else held >= most
        assert sum(ref() is not None for ref in teacher.refs) == 0
    finally:
        gc.enable()
    losses.total.backward()


def test_both_orders_give_the_same_bits():
    found = {}
    for order in ("student first", "teacher first"):
        teacher, student = deep_pair()
        losses = Distiller(teacher, student, MATCHES, order=order)(torch.ones(4, 8))
        losses.total.backward()
        found[order] = losses.total.detach(), [p.grad for p in student.parameters()]
    first, second = found.values()
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))


def test_the_teacher_may_overwrite_its_tensors_at_once():
    class InPlace(Deep):
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                x = x.tanh_()
            return x

    torch.manual_seed(0)
    teacher, student = InPlace(), Deep(3)
    clean = Deep()
    clean.load_state_dict(teacher.state_dict())
    inputs = torch.ones(4, 8)
    totals = [Distiller(each, student, MATCHES)(inputs).total for each in (teacher, clean)]
    assert torch.equal(*totals)


def test_schedules_adapters_and_masks_work_in_the_middle_of_the_teacher():
    teacher, student = readers(12, 8)
    entries = [
        Match("layers.3", "layers.1", mask="attention_mask", weight=lambda step: 2.0, name="hidden"),
        Match(":logits", ":logits", loss="kl", temperature=lambda step: 3.0, mask=lambda batch: batch["attention_mask"]),
    ]
    results = []
    for impl in ("auto", "eager"):
        torch.manual_seed(0)
        distiller = Distiller(teacher, student, entries, impl=impl, example_batch=tokens())
        student.zero_grad()
        losses = distiller(tokens())
        losses.total.backward()
        (adapter,) = distiller.adapters.values()
        results.append((losses.total.detach(), adapter.project.weight.grad, student.head.weight.grad.clone()))
        distiller.close()
    torch.testing.assert_close(results[0], results[1])


def test_gradient_mode_and_autocast_are_those_outside_of_the_teacher():
    class OffCast(nn.Module):
        """A teacher that turns autocast off for itself."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.layer(x)

    torch.manual_seed(0)
    teacher, student = OffCast(), nn.Sequential(nn.Linear(8, 6))
    distiller = Distiller(teacher, student, [Match("layer", "0")], example_batch=torch.ones(2, 8))
    (adapter,) = distiller.adapters.values()
    seen = []
    adapter.project.register_forward_hook(lambda module, args, output: seen.append((output.dtype, output.requires_grad)))
    with torch.autocast("cpu", torch.bfloat16):
        distiller(torch.ones(2, 8))
    assert seen == [(torch.bfloat16, True)]


def test_an_error_in_the_middle_of_the_teacher_names_the_entry_and_the_next_step_works():
    teacher, student = readers()
    entry = Match("layers.1", "layers.0", mask=lambda batch: batch["wrong"], name="hidden")
    distiller = Distiller(teacher, student, [entry], example_batch={**tokens(), "wrong": tokens()["attention_mask"]})
    with pytest.raises(MatchError, match=r"hidden: .*wrong"):
        distiller(tokens())
    distiller({**tokens(), "wrong": tokens()["attention_mask"]}).total.backward()


def test_a_teacher_layer_that_runs_twice_is_an_error_not_its_first_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.times = 1

        def forward(self, x):
            for _ in range(self.times):
                x = self.layer(x)
            return self.last(x)

    torch.manual_seed(0)
    teacher, student = Twice(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    distiller = Distiller(teacher, student, [Match("layer", "0"), Match("last", "1")], example_batch=torch.ones(2, 8))
    distiller(torch.ones(2, 8))
    teacher.times = 2
    with pytest.raises(CaptureError, match="ran 2 times"):
        distiller(torch.ones(2, 8))


def test_what_must_wait_is_kept():
    terms = named_terms(
        [
            Match("a", "x", name="one"),
            Match("b", "x", name="two"),  # x waits for a and b
            Match("c", "y", name="three"),
            Match("c", "z", loss=lambda s, t: (s - t).square().mean(), name="own"),  # an eager loss keeps c
            Match("d", "w", name="four"),
            Match("d", "v", loss="cosine", name="five"),
            Match(None, "w", loss="cross_entropy", target="labels", name="labels"),
            Match("e", "u", adapter=nn.Linear(2, 2), name="module"),
            Match("f", "t", loss="kl", name="of a", teacher_model="a"),
        ]
    )
    found = {(teacher, str(address)): names for (teacher, address), names in streams(terms).items()}
    assert found == {(None, "d"): ["four", "five"], ("a", "f"): ["of a"]}
