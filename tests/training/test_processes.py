"""Two processes train what one would on the joined batches: gradients, denominators, data, checkpoints, evaluations."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

from hookdistill import Distiller, ExampleMetric, Fidelity, HeldOutLosses, Match, StudentMetric, Trainer, TrainerError
from hookdistill.loading import Passes
from padded import MATCHES, examples, interrupted_run, reading, steps
from pairs import same, state
from ranks import in_processes
from runs import DATA, HIDDEN, LOGITS, close, constant, distiller

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    # a linear layer on [batch, tokens, width] gives a view, of which nothing here changes anything in place
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning"),
]

HIDDEN_ONLY = [Match("layers.1", "layers.0", name="hidden", mask="attention_mask")]


def gradients_of(make, batches, **settings):
    """The gradient that the optimizer gets at its first step, for student and adapters, and what is logged."""
    made, found = make(), {}

    def optimizer(parameters):
        optimizer = SGD(parameters, lr=0.0)
        names = {id(parameter): name for name, parameter in made.named_parameters()}

        def keep(*_):
            for parameter in parameters:
                if not found.get("done") and parameter.grad is not None:
                    gradient = parameter.grad
                    found[names[id(parameter)]] = (
                        gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
                    )
            found["done"] = True

        optimizer.register_step_pre_hook(keep)
        return optimizer

    settings = {"optimizer": optimizer, "scheduler": constant, "max_steps": 1, "progress": False, "seed": 0, **settings}
    result = Trainer(made, batches(), **settings).train()
    del found["done"]
    return {"gradients": found, "loss": result.loss, "losses": dict(result.losses)}


def assert_equal(ours, theirs):
    assert ours["gradients"].keys() == theirs["gradients"].keys()
    for name, gradient in theirs["gradients"].items():
        torch.testing.assert_close(
            ours["gradients"][name], gradient, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-6)


def in_parts():
    return DataLoader(examples(), batch_size=3)


def as_one():
    return DataLoader(examples(), batch_size=12)


def ddp(matches):
    return gradients_of(lambda: reading(matches), in_parts, accumulate=2)


@pytest.mark.parametrize("matches", [MATCHES, HIDDEN_ONLY], ids=["with a head", "the tail unused"])
def test_gradients_are_those_of_one_process_on_the_joined_batch(matches):
    whole = gradients_of(lambda: reading(matches), as_one)
    for found in in_processes(ddp, matches):
        assert_equal(found, whole)


def test_accumulated_gradients_are_those_of_the_joined_batch():
    whole = gradients_of(lambda: reading(MATCHES), as_one)
    assert_equal(gradients_of(lambda: reading(MATCHES), in_parts, accumulate=4), whole)


def sharded(matches, teacher_too):
    def make():
        made = reading(matches)
        for network in (made.student, made.teacher) if teacher_too else (made.student,):
            for layer in network.layers:
                fully_shard(layer)
            fully_shard(network)
        return made

    return gradients_of(make, in_parts, accumulate=2)


@pytest.mark.parametrize("teacher_too", [False, True], ids=["a whole teacher", "a sharded teacher"])
def test_sharded_models_get_the_same_gradients(teacher_too):
    whole = gradients_of(lambda: reading(MATCHES), as_one)
    for found in in_processes(sharded, MATCHES, teacher_too):
        assert_equal(found, whole)


INSIDE = [Match("layers.1.a", "layers.1.a", name="inside"), Match("layers.0.b:input", "layers.0.b:input", name="input")]


class Block(nn.Module):
    """Something with an inside."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) + x


def blocks(seed):
    torch.manual_seed(seed)
    layers = nn.ModuleDict({"first": nn.Linear(6, 8), "layers": nn.Sequential(Block(8), Block(8)), "head": nn.Linear(8, 3)})

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layers, self.head = layers.values()

        def forward(self, x):
            return self.head(self.layers(self.first(x)))

    return Net()


def inside(shard):
    def make():
        made = Distiller(blocks(1), blocks(2), INSIDE)
        for layer in made.student.layers if shard else ():
            fully_shard(layer)
        if shard:
            fully_shard(made.student)
        return made

    return gradients_of(make, lambda: DataLoader(DATA[:12], 3 if shard else 12), accumulate=2 if shard else 1)


def test_a_tensor_from_inside_a_sharded_unit_brings_its_gradient():
    whole = inside(False)
    for found in in_processes(inside, True):
        assert_equal(found, whole)


# Whole trainings


@pytest.mark.parametrize("matches", [MATCHES, HIDDEN_ONLY], ids=["with a head", "the tail unused"])
def test_no_batch_is_dropped_or_doubled(matches):
    alone = steps(2, accumulate=2, matches=matches)  # 6 batches: 2, 2, 2
    for found in in_processes(divided_steps, 2, matches):
        assert found["steps"] == alone["steps"] == 6
        assert close(found["state"], alone["state"])
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    alone = steps(4, accumulate=2, matches=matches)  # 3 batches: 2, 1
    for found in in_processes(divided_steps, 4, matches):
        assert found["steps"] == alone["steps"] == 4
        assert close(found["state"], alone["state"])


def divided_steps(batch_size, matches):
    return steps(batch_size, matches=matches)


def orders(kind):
    """The rows that this process sees in two passes."""
    torch.manual_seed(torch.distributed.get_rank())
    if kind == "stream":
        loader = DataLoader(Numbers(), batch_size=3)
    elif kind == "without batches":
        loader = DataLoader(list(range(20)), batch_size=None, shuffle=True)
    else:
        loader = DataLoader(list(range(20)), batch_size=3, shuffle=True, num_workers=2 if kind == "workers" else 0)
    passes = Passes(loader, Accelerator())
    seen = []
    for _ in range(2):
        passes.begin()
        while batch := passes.take(1):
            seen.append(batch[0].reshape(-1).tolist() if isinstance(batch[0], torch.Tensor) else [batch[0]])
    return {"seen": seen, "length": passes.length}


class Numbers(IterableDataset):
    def __iter__(self):
        yield from range(18)


@pytest.mark.parametrize("kind", ["shuffled", "workers", "without batches"])
def test_processes_share_one_order(kind):
    first, second = in_processes(orders, kind)
    both = [row for seen in (first["seen"], second["seen"]) for batch in seen for row in batch]
    assert sorted(both) == sorted([*range(20)] * 2)
    assert first["seen"][0] != [0, 1, 2]
    assert first["length"] == second["length"] == (10 if kind == "without batches" else 4)


def test_processes_share_a_stream():
    first, second = in_processes(orders, "stream")
    both = [row for seen in (first["seen"], second["seen"]) for batch in seen for row in batch]
    assert sorted(both) == sorted([*range(18)] * 2)


def uneven():
    """Own shares of different lengths, adapters that each process makes for itself, a sum beside means."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    made = distiller(LOGITS, HIDDEN, Match("2", "2", name="sum", reduction="sum"))
    batches = list(DATA.split(4))[: 4 if rank else 2]
    result = Trainer(made, batches, max_steps=4, optimizer=lambda p: SGD(p, lr=0.05), progress=False).train()
    return {"state": state(made.student, made.adapters), "steps": result.steps, "epochs": result.epochs}


def test_a_process_with_less_data_waits_for_the_others():
    first, second = in_processes(uneven)
    assert same(first["state"], second["state"])
    assert (first["steps"], first["epochs"]) == (second["steps"], second["epochs"]) == (4, 1)


def sums(world):
    made = distiller(Match("2", "2", name="sum", reduction="sum"))
    batches = DataLoader(DATA, 6 if world == 1 else 3)
    Trainer(made, batches, epochs=1, optimizer=lambda p: SGD(p, lr=0.01), scheduler=constant, progress=False).train()
    return state(made.student)


def too_few():
    with (
        pytest.raises(TrainerError, match="fewer batches than the 2 processes")
        if torch.distributed.get_rank()
        else nullcontext()
    ):
        return Passes(DataLoader(DATA, 24), Accelerator()).peek().shape[0]


def test_fewer_batches_than_processes_is_an_error_that_says_so():
    assert in_processes(too_few) == [24, None]


def test_sums_are_sums_over_processes():
    alone = sums(1)
    for found in in_processes(sums, 2):
        assert close(found, alone)


# Evaluation


def measured(evaluate_sharded=False):
    made = reading(MATCHES)
    if evaluate_sharded:
        for layer in made.student.layers:
            fully_shard(layer)
        fully_shard(made.student)
    held_out = DataLoader(examples(10), batch_size=4)

    def agreement(student, loader):
        return sum(float((student(batch["input_ids"]).logits.argmax(-1) == batch["labels"]).sum()) for batch in loader)

    def right(output, batch):
        return (output.logits.argmax(-1) == batch["labels"])[batch["labels"] >= 0]

    evaluators = [
        HeldOutLosses(),
        Fidelity(),
        StudentMetric("hits", agreement, teacher=False),
        ExampleMetric("accuracy", right),
    ]
    trainer = Trainer(
        made, DataLoader(examples(), 3), eval_loader=held_out, evaluators=evaluators, max_steps=1, progress=False, seed=0
    )
    result = trainer.train()
    return {"first": dict(result.history[0].metrics), "last": dict(result.history[-1].metrics), "teacher": dict(result.teacher)}


@pytest.mark.parametrize("evaluate_sharded", [False, True], ids=["ddp", "sharded"])
def test_evaluation_counts_every_example_once(evaluate_sharded):
    alone = measured()
    assert len(alone["first"]) == 5 + 4 + 2
    for found in in_processes(measured, evaluate_sharded):
        assert found["first"] == pytest.approx(alone["first"], abs=1e-6)
        assert found["teacher"] == pytest.approx(alone["teacher"], abs=1e-6)
        assert not any(math.isnan(value) for value in found["last"].values())


# Resuming


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "sharded"])
def test_two_processes_resume_to_the_bit(shard, tmp_path):
    first, second = in_processes(interrupted_run, str(tmp_path), shard, 4)
    for found in (first, second):
        assert found["whole"]["steps"] == found["resumed"]["steps"] == 6
        assert same(found["whole"]["state"], found["resumed"]["state"])
        assert found["whole"]["history"] == found["resumed"]["history"]
    assert same(first["whole"]["state"], second["whole"]["state"])
    assert (tmp_path / "cut" / "best" / "model.safetensors").exists()


def resumed_alone(folder):
    made = reading(MATCHES)
    Trainer(made, DataLoader(examples(11), 2), epochs=2, output_dir=folder, progress=False, report=False).train(resume=True)


def test_a_checkpoint_of_two_processes_is_not_for_one(tmp_path):
    in_processes(steps_saved, str(tmp_path))
    with pytest.raises(TrainerError, match=r"saved by 2 processes and this run has 1.*Start as many"):
        resumed_alone(str(tmp_path))


def steps_saved(folder):
    steps(2, output_dir=folder, report=False)


def told_to_stop(folder):
    """One process gets SIGTERM, both leave with a checkpoint of the same step."""
    import os
    import signal

    class Kills:
        def __call__(self, evaluation):
            if evaluation.step == 2 and torch.distributed.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return {}

    try:
        steps(2, output_dir=folder, report=False, evaluators=[Kills()], evaluate_every=1)
    except SystemExit as stop:
        return stop.code
    return None


def test_a_signal_to_one_process_ends_all_with_one_checkpoint(tmp_path):
    assert in_processes(told_to_stop, str(tmp_path)) == [1, 143]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["kind"] == "interrupted"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{lines[-1]['step']:09d}"]
