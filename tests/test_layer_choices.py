"""Layer maps by the data: in each step, or once with the plan; against the same tensors spelled out."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

from hookdistill import Distiller, Match, MatchError, losses, similarity
from hookdistill.engine.layers import LayerWeights
from hookdistill.layer_maps import Attention, Cka, Emd, MinLoss, cost_attention, matching, mix, transport
from nets import ResNet, images
from pairs import assert_same_gradients, gradients, hooks, readers, seeded, tokens, train


def entry(layer_map, **options):
    return Match("layers.*", "layers.*", mask="attention_mask", layer_map=layer_map, **options)


def hidden(model, batch):
    seen = model.spelled_out(batch["input_ids"])
    return [tensor for name, tensor in seen.items() if name.startswith("layers.")]


def costs(teacher, student, batch, loss=losses.mse):
    """``[teacher, student]``, attached to the student's graph."""
    theirs, ours = [each.detach() for each in hidden(teacher, batch)], hidden(student, batch)
    return torch.stack([torch.stack([loss(s, t, mask=batch["attention_mask"]) for s in ours]) for t in theirs])


# In each step


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_min_loss_takes_the_least_for_each_student_layer(impl):
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("min_loss", weight=2.0)], impl=impl)
    found = distiller(tokens())
    expected = costs(teacher, student, tokens()).amin(0)
    assert list(found.parts) == ["layers.0 <- layers.*: mse", "layers.1 <- layers.*: mse"]
    torch.testing.assert_close(torch.stack(list(found.parts.values())), expected.detach())
    torch.testing.assert_close(found.total, 2 * expected.sum())
    assert_same_gradients(gradients(student, found.total), gradients(student, 2 * expected.sum()))


def test_min_loss_chooses_anew_in_each_step():
    teacher, student = readers(depths=(3, 1))
    distiller = Distiller(teacher, student, [Match("layers.*", "layers.0", layer_map=MinLoss())])
    chosen = set()
    for closest in (0, 2):
        student.load_state_dict({**student.state_dict(), **copied(teacher, f"layers.{closest}")})
        student.embed.load_state_dict(teacher.embed.state_dict())
        found = costs(teacher, student, tokens()).detach()[:, 0]
        unmasked = torch.stack([losses.mse(hidden(student, tokens())[0], each) for each in hidden(teacher, tokens())]).min()
        torch.testing.assert_close(distiller(tokens()).total, unmasked)
        chosen.add(int(found.argmin()))
    assert len(chosen) == 2


def copied(teacher, source):
    return {f"layers.0.{name}": value for name, value in teacher.get_submodule(source).state_dict().items()}


def test_emd_moves_every_layer_at_the_least_cost():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("emd", weight=3.0)])
    found = distiller(tokens())
    expected = costs(teacher, student, tokens())
    flow = transport(expected.detach(), torch.full((4,), 0.25), torch.full((2,), 0.5))
    assert list(found.parts) == ["layers.* <- layers.*: mse"]
    torch.testing.assert_close(found.total, 3 * (flow * expected).sum())
    assert_same_gradients(gradients(student, found.total), gradients(student, 3 * (flow * expected).sum()))


def test_the_weights_of_emd_move_in_training_alone():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("emd")])
    (weights,) = [module for module in distiller.modules() if isinstance(module, LayerWeights)]
    distiller.plan(tokens())
    with torch.no_grad():
        distiller(tokens())
    distiller.eval()
    distiller(tokens())
    assert weights.teacher.tolist() == [0.25] * 4
    distiller.train()
    first = costs(teacher, student, tokens()).detach()
    flow = transport(first, weights.teacher, weights.student)
    expected = [cost_attention(flow, first, weights.teacher, temperature=1.0)]
    expected.append(cost_attention(flow.T, first.T, weights.student, temperature=1.0))
    distiller(tokens())
    torch.testing.assert_close(weights.teacher, expected[0].float())
    torch.testing.assert_close(weights.student, expected[1].float())
    flow = transport(first, weights.teacher, weights.student)
    torch.testing.assert_close(distiller(tokens()).total, (flow * costs(teacher, student, tokens())).sum())


def test_emd_without_cost_attention_keeps_no_state():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry(Emd(cost_attention=False))])
    assert [module for module in distiller.modules() if isinstance(module, LayerWeights)] == []
    assert torch.equal(distiller(tokens()).total, distiller(tokens()).total)


def test_attention_mixes_the_teachers_layers():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("attention")])
    found = distiller(tokens())
    mask = tokens()["attention_mask"]
    theirs = [each.detach() for each in hidden(teacher, tokens())]
    expected = sum(losses.mse(each, mix(each, theirs, mask)[0], mask=mask) for each in hidden(student, tokens()))
    torch.testing.assert_close(found.total, expected)
    assert_same_gradients(gradients(student, found.total), gradients(student, expected))
    detached = sum(losses.mse(each, mix(each, theirs, mask)[0].detach(), mask=mask) for each in hidden(student, tokens()))
    assert not torch.allclose(gradients(student, detached)[0], gradients(student, distiller(tokens()).total)[0])


def test_attention_over_channels_of_conv_maps():
    teacher, student = seeded(ResNet, 8, 8, 8, depth=1, seed=1), seeded(ResNet, 8, 8, 8, depth=1, seed=2)
    for model in (teacher, student):
        model.layer2[0].conv1.stride = model.layer3[0].conv1.stride = (1, 1)
        model.layer2[0].downsample = model.layer3[0].downsample = None
    match = Match("layer{1,2}", "layer3", layer_map=Attention())
    found = Distiller(teacher.eval(), student.eval(), [match])(images()).total
    seen = {}
    for name, model in (("t1", teacher.layer1), ("t2", teacher.layer2), ("s", student.layer3)):
        model.register_forward_hook(lambda module, args, output, name=name: seen.__setitem__(name, output.movedim(1, -1)))
    teacher(images()["x"]), student(images()["x"])
    mixed, _ = mix(seen["s"], [seen["t1"], seen["t2"]])
    torch.testing.assert_close(found, functional.mse_loss(seen["s"], mixed))


@pytest.mark.parametrize("layer_map", ["min_loss", "emd", "attention"])
def test_widths_that_differ_get_one_adapter_for_each_student_layer(layer_map):
    teacher, student = readers(12, 8)
    distiller = Distiller(teacher, student, [entry(layer_map)])
    with pytest.raises(MatchError, match="the adapter between them does not exist yet"):
        distiller(tokens())
    plan = distiller.plan(tokens())
    assert len(distiller.adapters) == 2
    assert all("8→12" in row.adapter for row in plan) or layer_map == "emd"
    first, *_, last = train(distiller, tokens(), steps=30)
    assert last < first
    assert all(parameter.grad is not None for parameter in distiller.adapters.parameters())


def test_the_plan_says_who_chooses():
    teacher, student = readers()
    plan = Distiller(teacher, student, [entry("min_loss"), entry("emd", loss="cosine"), entry("cka", loss="l1")]).plan(tokens())
    assert [row.teacher for row in plan][:3] == ["layers.* (min_loss)", "layers.* (min_loss)", "layers.* (emd)"]
    assert [row.student for row in plan] == ["layers.0", "layers.1", "layers.*", "layers.0", "layers.1"]
    assert plan.rows[3].teacher.startswith("layers.")
    assert plan.rows[3].teacher.endswith(" (cka)")
    assert "eager (layer_map='min_loss')" in plan.rows[0].implementation
    assert "layer_map" not in plan.rows[3].implementation


def test_names_weights_and_temperatures_are_those_of_the_entry():
    teacher, student = readers(depths=(3, 2))
    entries = [
        Match(
            "layers.*", "layers.*", loss="kl", temperature=2.0, weight=lambda step: 1.0 + step, layer_map="min_loss", name="a"
        ),
        Match("layers.*", "layers.*", layer_map="emd", name="b"),
        Match("layers.2", "layers.1", name="c"),
    ]
    distiller = Distiller({"big": teacher}, student, entries)
    found = distiller(tokens(), step=4)
    assert list(found.parts) == ["a.0", "a.1", "b", "c"]
    theirs, ours = [each.detach() for each in hidden(teacher, tokens())], hidden(student, tokens())
    expected = sum(min(losses.kl(s, t, temperature=2.0) for t in theirs) for s in ours)
    torch.testing.assert_close(found.parts["a.0"] + found.parts["a.1"], expected.detach())
    torch.testing.assert_close(found.total, 5 * expected + found.parts["b"] + found.parts["c"])


def test_a_share_scales_an_entry_that_chooses():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("min_loss", name="a")])
    whole, half = distiller(tokens()), distiller(tokens(), shares={"a.0": 0.5})
    torch.testing.assert_close(half.total, whole.total - 0.5 * whole.parts["a.0"])
    assert set(distiller.counts(tokens())) == {"a.0", "a.1"}


def test_a_frozen_student_layer_is_an_error_here_too():
    teacher, student = readers()
    student.requires_grad_(False)
    student.head.requires_grad_(True)
    distiller = Distiller(teacher, student, [entry("min_loss"), Match("head", "head")])
    with pytest.raises(MatchError, match=r"layers\.0 <- layers\.\*: mse: .*carries no gradient"):
        distiller(tokens())


# Once, with the plan


def test_min_loss_fixed_keeps_the_choice_of_the_plan():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("min_loss_fixed")])
    rows = list(distiller.plan(tokens()))
    first = costs(teacher, student, tokens()).detach()
    best = first.argmin(0).tolist()
    assert [row.teacher for row in rows] == [f"layers.{i} (min_loss_fixed)" for i in best]
    assert list(distiller(tokens()).parts) == ["layers.0 <- layers.*: mse", "layers.1 <- layers.*: mse"]
    torch.nn.init.zeros_(teacher.layers[(best[0] + 1) % 4].weight)
    student.layers[0].weight.data.zero_()  # now the other layer would be the closer one
    now = costs(teacher, student, tokens()).detach()
    torch.testing.assert_close(distiller(tokens()).total.detach(), sum(now[i, j] for j, i in enumerate(best)))
    assert distiller.plan(tokens(seed=9)).rows[0].teacher == rows[0].teacher


def test_cka_is_the_matching_of_the_similarity_on_that_batch():
    teacher, student = readers(12, 8)
    batch = tokens(batch=4, length=7)
    distiller = Distiller(teacher, student, [entry("cka")])
    plan = distiller.plan(batch)
    found = similarity(teacher, student, [batch])
    pairs = [(theirs, ours) for theirs, ours in found.pairs()]
    assert [(row.teacher.removesuffix(" (cka)"), row.student) for row in plan] == pairs
    assert [row.adapter for row in plan] == ["Linear(8→12)"] * 2
    assert matching(found.matrix, order="monotone") == [(int(t[-1]), int(s[-1])) for t, s in pairs]


def test_a_choice_made_once_needs_no_other_layer_afterwards():
    teacher, student = readers()
    calls = []
    teacher.head.register_forward_hook(lambda *_: calls.append("head"))
    distiller = Distiller(teacher, student, [entry("min_loss_fixed")], example_batch=tokens())
    calls.clear()
    distiller(tokens())
    assert calls == []
    best = max(costs(teacher, student, tokens()).argmin(0).tolist())
    calls.clear()
    handles = [layer.register_forward_hook(lambda module, *_: calls.append(module)) for layer in teacher.layers]
    distiller(tokens())
    assert len(calls) == best + 1  # the forward ends after the last layer that was chosen
    for handle in handles:
        handle.remove()


def test_without_a_plan_the_first_batch_decides():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("min_loss_fixed")])
    found = distiller(tokens())
    torch.testing.assert_close(found.total, costs(teacher, student, tokens()).amin(0).sum())
    assert not distiller.loss.undecided


def test_a_choice_leaves_no_trace_on_the_models():
    teacher, student = readers()
    student.train(), teacher.train()
    random = torch.random.get_rng_state()
    distiller = Distiller(teacher, student, [entry("cka")], example_batch=tokens(batch=4))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert teacher.training
    distiller.close()
    assert hooks(teacher, student) == 0


@pytest.mark.parametrize("planned", [True, False])
def test_the_state_dict_holds_the_choice(planned):
    teacher, student = readers(12, 8)
    saved = Distiller(teacher, student, [entry("cka")], example_batch=tokens(batch=4))
    # copies of the first layer only: the choice of this batch would be another
    other = copy.deepcopy(student)
    fresh = Distiller(teacher, other, [entry("cka")])
    if planned:
        with torch.no_grad():
            other.layers[0].weight.zero_()
            other.layers[1].weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(5)))
        fresh.plan(tokens(batch=4, seed=11))
    else:
        fresh.loss.adapters.update(copy.deepcopy(saved.adapters))
    fresh.load_state_dict(saved.state_dict())
    torch.testing.assert_close(fresh(tokens()).total, saved(tokens()).total)
    again = [row.teacher for row in fresh.plan(tokens(batch=4, seed=11))]
    assert again == [row.teacher for row in saved.plan(tokens(batch=4))]


def test_a_choice_that_another_process_made_is_taken_over_in_the_first_step():
    """DDP writes the buffers of the first process into those of the others when it wraps the model."""
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("min_loss_fixed")], example_batch=tokens())
    best = costs(teacher, student, tokens()).argmin(0).tolist()
    other = [(i + 1) % 4 for i in best]
    for position, module in zip(other, distiller.loss.choices.values(), strict=True):
        module.position.fill_(position)
    first = costs(teacher, student, tokens())
    torch.testing.assert_close(distiller(tokens()).total, sum(first[i, j] for j, i in enumerate(other)))


def test_the_weights_of_emd_are_saved_too():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("emd")])
    for _ in range(3):
        distiller(tokens())
    fresh = Distiller(teacher, student, [entry("emd")])
    fresh.load_state_dict(distiller.state_dict())
    assert torch.equal(fresh(tokens()).total, distiller(tokens()).total)


# What cannot be


class Uneven(nn.Module):
    """Layers of several widths."""

    widths: ClassVar = (6, 8, 8, 5)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(self.widths, self.widths[1:], strict=False))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_teacher_layers_of_several_widths():
    batch = {"x": torch.randn(6, 6)}
    teacher, student = seeded(Uneven, seed=1), seeded(Uneven, seed=2)
    distiller = Distiller(teacher, student, [Match("layers.{0,1}", "layers.{0,1}", layer_map="min_loss")])
    distiller(batch).total.backward()
    with pytest.raises(MatchError, match=r"layer_map='attention' compares .*there are \[6, 8\], \[6, 5\]\. Name layers"):
        Distiller(teacher, student, [Match("layers.*", "layers.0", layer_map="attention")])(batch)
    with pytest.raises(MatchError, match=r"min_loss_fixed.*\[6, 8\] and teacher \[6, 5\].*Take 'cka'"):
        Distiller(teacher, student, [Match("layers.*", "layers.0", layer_map="min_loss_fixed")]).plan(batch)
    Distiller(teacher, student, [Match("layers.*", "layers.*", layer_map="cka")], example_batch=batch)


@pytest.mark.parametrize(
    ("layer_map", "message"),
    [
        ("emb", "unknown layer_map 'emb'. Did you mean 'emd'"),
        (3, "layer_map=3 is none of 'uniform'"),
        ([], "pairs are written"),
        ([(0,)], "pairs are written"),
        (Emd, "nor a record of hookdistill.layer_maps"),
    ],
)
def test_what_is_no_layer_map(layer_map, message):
    with pytest.raises(MatchError, match=message):
        entry(layer_map)


def test_layers_that_cannot_be_paired():
    teacher, student = readers(depths=(2, 3))
    for layer_map in ("uniform", "cka"):
        with pytest.raises(MatchError, match=r"names 2 tensors .* address 3 \(.*which cannot be paired: "):
            Distiller(teacher, student, [entry(layer_map)])
    assert len(Distiller(teacher, student, [entry("min_loss")], example_batch=tokens()).plan(tokens())) == 3
    with pytest.raises(MatchError, match=r"cannot be paired\. Name one teacher tensor, or let the data choose"):
        Distiller(teacher, student, [Match("layers.*", "layers.0")])
    with pytest.raises(MatchError, match="needs 4 examples at least to choose by; this batch has 3"):
        Distiller(*readers(), [Match("layers.*", "layers.*", layer_map="cka", selector="output")]).plan(
            tokens(batch=1, length=3)
        )


def test_pairs_and_functions():
    teacher, student = readers(depths=(4, 3))
    pairs = Distiller(teacher, student, [entry([(3, 2), (0, 0), (-2, 0)])])
    assert list(pairs(tokens()).parts) == [f"layers.{s} <- layers.{t}: mse" for t, s in ((3, 2), (0, 0), (2, 0))]
    function = Distiller(teacher, student, [entry(lambda n, m: range(n - m, n))])
    assert list(function(tokens()).parts) == [f"layers.{s} <- layers.{s + 1}: mse" for s in range(3)]
    with pytest.raises(MatchError, match="there is no teacher layer 4"):
        Distiller(teacher, student, [entry([(4, 0)])])
    with pytest.raises(MatchError, match="there are 3 student layers, but 1 teacher layers are given"):
        Distiller(teacher, student, [entry(lambda n, m: [0])])


def test_records_are_shown_by_their_names():
    assert [str(each) for each in (MinLoss(), MinLoss(each_step=False), Emd(), Attention(), Cka())] == [
        "min_loss",
        "min_loss_fixed",
        "emd",
        "attention",
        "cka",
    ]


def test_a_distiller_that_chooses_can_be_copied():
    teacher, student = readers()
    distiller = Distiller(teacher, student, [entry("cka"), entry("emd", loss="l1")], example_batch=tokens(batch=4))
    twin = copy.deepcopy(distiller)
    torch.testing.assert_close(twin(tokens()).total, distiller(tokens()).total)


# Two processes


WORKER = """
import torch, torch.distributed as dist
from hookdistill import Distiller, Match
from pairs import readers, tokens

dist.init_process_group("gloo")
rank = dist.get_rank()
teacher, student = readers()
batch = tokens(batch=2, length=3, seed=SEEDS[rank])
entries = [Match("layers.*", "layers.*", layer_map="min_loss_fixed"), Match("layers.*", "layers.*", loss="l1", layer_map="emd")]
distiller = Distiller(teacher, student, entries, example_batch=batch)
before = [str(term.teacher_address) for term in distiller.loss.terms.values()]
wrapped = torch.nn.parallel.DistributedDataParallel(distiller, find_unused_parameters=True)
for _ in range(2):
    wrapped(batch).total.backward()
after = [str(term.teacher_address) for term in distiller.loss.terms.values()]
(weights,) = [module for module in distiller.modules() if type(module).__name__ == "LayerWeights"]
gathered = [None, None]
wrapped(batch)  # the buffers of the first process are those of both before a forward
dist.all_gather_object(gathered, (before, after, [parameter.grad.tolist() for parameter in student.layers.parameters()]))
if rank == 0:
    first, second = gathered
    print(first[0] != second[0], first[1] == second[1] == first[0], first[2] == second[2])
dist.barrier()
dist.destroy_process_group()
"""


def test_all_processes_go_by_the_choice_of_the_first(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER.replace("SEEDS", "(3, 0)"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=180) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert said[0][0].strip() == "True True True", said
