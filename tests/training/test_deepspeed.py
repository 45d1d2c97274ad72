"""DeepSpeed in two processes: `Trainer` through accelerate, and the engine around a distiller in a loop of one's own."""

import json
import os
import re
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from hookdistill import Distiller, Match, Trainer, TrainerError, load_student
from padded import MATCHES, examples, interrupted_run, reading, steps
from pairs import readers, same, state
from ranks import in_processes
from runs import close, sgd

pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

each_stage = pytest.mark.parametrize("stage", [0, 1, 2])


def by_deepspeed(function, config, *args):
    """Call it in a process that is as `accelerate launch` starts one for DeepSpeed, but on the CPU."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", **config}, file)
        file.flush()
        os.environ |= {
            "DS_ACCELERATOR": "cpu",
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": file.name,
        }
        del os.environ["ACCELERATE_USE_CPU"]  # with which accelerate passes over DeepSpeed
        for shared in (AcceleratorState, GradientState, PartialState):
            shared._reset_state()
        return function(*args)


def in_deepspeed(function, config, *args):
    return in_processes(by_deepspeed, function, config, *args)


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage}, **more}


# Whole trainings


def adam(parameters):
    return AdamW(parameters, lr=0.01, weight_decay=0.0, eps=1e-3)  # a smaller eps makes steps of rounding errors


def clipped(batch_size, accumulate):
    return steps(batch_size, accumulate=accumulate, optimizer=adam, clip_norm=0.05)


def unclipped(batch_size, accumulate):
    return steps(batch_size, accumulate=accumulate)


@each_stage
@pytest.mark.parametrize("training", [clipped, unclipped])
def test_two_processes_end_where_one_does(training, stage):
    alone = training(2, 4)  # 6 batches of unequal padding: 4, 2
    for found in in_deepspeed(training, zero(stage), 2, 2):
        assert found["steps"] == alone["steps"] == 4
        assert close(found["state"], alone["state"])
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def with_settings(settings):
    return steps(2, **settings)


@pytest.mark.parametrize("settings", [{"balance": "gradnorm"}, {"ema": 0.9}, {"compile": "student"}], ids=repr)
def test_what_else_a_training_has_is_as_in_ddp(settings):
    for found, ddp in zip(in_deepspeed(with_settings, zero(2), settings), in_processes(with_settings, settings), strict=True):
        assert close(found["state"], ddp["state"])


@each_stage
def test_resumes_to_the_bit(stage, tmp_path):
    for found in in_deepspeed(interrupted_run, zero(stage), str(tmp_path), False, 4):
        assert found["whole"]["steps"] == found["resumed"]["steps"] == 6
        assert same(found["whole"]["state"], found["resumed"]["state"])
        assert found["whole"]["history"] == found["resumed"]["history"]


def other_stage(folder):
    made = reading()
    loader = DataLoader(examples(11), 2)
    Trainer(made, loader, epochs=2, output_dir=folder, progress=False, report=False).train(resume=Path(folder).is_dir())


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    in_deepspeed(other_stage, zero(1), str(tmp_path / "run"))
    with pytest.raises(AssertionError, match=r"of another run.*DeepSpeed, ZeRO stage 1 then, DeepSpeed, ZeRO stage 2 now"):
        in_deepspeed(other_stage, zero(2), str(tmp_path / "run"))


def left_behind(folder):
    made = reading()
    before = [set(vars(parameter)) for parameter in made.parameters()]
    Trainer(made, DataLoader(examples(), 3), max_steps=2, progress=False).train()
    Trainer(made, DataLoader(examples(), 3), max_steps=2, progress=False).train()  # with an engine of its own
    if os.environ["RANK"] == "0":
        made.export(folder)
    return {
        "attributes": [sorted(set(vars(each)) - names) for each, names in zip(made.parameters(), before, strict=True)],
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in made.modules()],
        "gradients": [each.grad is None for each in made.parameters()],
        "memory": [each.untyped_storage().nbytes() == each.numel() * each.element_size() for each in made.parameters()],
        "student": state(made.student),
    }


@each_stage
def test_the_student_is_left_as_any_other(stage, tmp_path):
    for found in in_deepspeed(left_behind, zero(stage), str(tmp_path / "student")):
        assert not any(found["attributes"])
        assert not any(found["hooks"])
        assert all(found["gradients"])
        assert all(found["memory"])
        assert same(state(load_student(readers(12, 8)[1], tmp_path / "student")), found["student"])


def a_tail_that_no_match_reaches(decay):
    made = reading([Match("layers.0", "layers.0", name="hidden")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(made, DataLoader(examples(), 3), max_steps=1, weight_decay=decay, lr=1e-3, progress=False).train()
    return [str(each.message) for each in caught if "no match reaches" in str(each.message)]


def test_weight_decay_of_what_no_match_reaches_is_told_of():
    (message,), _ = in_deepspeed(a_tail_that_no_match_reaches, zero(1), 0.1)
    assert re.search(r"student\.layers\.1.*gradient of 0, and weight_decay shrinks them. Freeze", message)
    assert in_deepspeed(a_tail_that_no_match_reaches, zero(1), 0.0) == [[], []]


# What accelerate, the Trainer and DeepSpeed's config say


def one_step(settings):
    """How far a step of SGD at rate 1 goes, and the norm of the gradient in the log."""
    made = reading()
    before, first = state(made.student, made.adapters), os.environ["RANK"] == "0"
    with tempfile.TemporaryDirectory() as folder:
        files = {"output_dir": folder, "save_every": None, "report": False}
        settings = {"optimizer": lambda parameters: SGD(parameters, lr=1.0), "max_steps": 1, "log_every": 1, **settings}
        Trainer(made, DataLoader(examples(), 3), progress=False, **files, **settings).train()
        lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()] if first else []
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, state(made.student, made.adapters), strict=True)])
    logged = [line["gradient_norm"] for line in lines if "gradient_norm" in line]
    return {"moved": float(moved.norm()), "logged": logged, "dtype": str(made.student.embed.weight.dtype)}


@each_stage
def test_the_gradient_is_clipped_where_it_is_asked_for(stage):
    whole = one_step_alone()
    free, _ = in_deepspeed(one_step, zero(stage), {})
    assert [free["moved"], *free["logged"]] == pytest.approx([whole, whole], rel=1e-4)
    for config, settings in (
        ({}, {"clip_norm": 0.1}),
        ({"gradient_clipping": 0.1}, {}),
        ({"gradient_clipping": "auto"}, {"clip_norm": 0.1}),
    ):
        found, _ = in_deepspeed(one_step, zero(stage, **config), settings)
        assert [found["moved"], *found["logged"]] == pytest.approx([0.1, whole], rel=1e-4)


def one_step_alone():
    made = reading()
    made(next(iter(DataLoader(examples(), 6)))).total.backward()
    return float(torch.cat([each.grad.flatten() for each in made.parameters() if each.grad is not None]).norm())


def with_an_accelerator_of_ones_own():
    """Two trainings with one, clipped otherwise; and what it has of them afterwards."""
    plugin = DeepSpeedPlugin()
    accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    config = str(plugin.deepspeed_config)
    moved = [one_step({"accelerator": accelerator, "clip_norm": clip})["moved"] for clip in (0.1, 0.2)]
    left = [*accelerator._models, *accelerator._optimizers]
    free, same_config = accelerator.deepspeed_engine_wrapped is None, str(plugin.deepspeed_config) == config
    return {"moved": moved, "left": len(left), "engine": free, "config": same_config}


def test_an_accelerator_of_ones_own_is_left_as_it_was():
    for found in in_deepspeed(with_an_accelerator_of_ones_own, zero(2)):
        assert found.pop("moved") == pytest.approx([0.1, 0.2], rel=1e-4)
        assert found == {"left": 0, "engine": True, "config": True}


def accumulated(settings):
    made = reading()
    return {"steps": Trainer(made, DataLoader(examples(), 2), epochs=1, progress=False, **settings).train().steps}


def test_batches_of_a_step_come_from_either_setting():
    for config, settings, expected in (({}, {"accumulate": 3}, 1), ({"gradient_accumulation_steps": 3}, {}, 1), ({}, {}, 3)):
        assert in_deepspeed(accumulated, zero(2, **config), settings)[0]["steps"] == expected


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (zero(3), {}, r"ZeRO stage 3.*stage 2, or fully_shard"),
        (zero(2, fp16={"enabled": True}), {}, r"mixed_precision='fp16'.*Take 'bf16'"),
        (zero(2, train_micro_batch_size_per_gpu=-1), {}, r"DeepSpeed refuses this training: "),
    ],
)
def test_what_cannot_be_is_refused(config, settings, message):
    with pytest.raises(AssertionError, match=f"TrainerError.*{message}"):
        in_deepspeed(one_step, config, settings)


def in_half():
    teacher, student = readers(12, 8)
    made = Distiller(teacher, student.bfloat16(), MATCHES)
    Trainer(made, DataLoader(examples(), 3), max_steps=1, progress=False).train()


def test_a_student_in_half_precision_is_refused():
    with pytest.raises(
        AssertionError, match=r"TrainerError.*trained parameters are float32, and .*student.*call student.float\(\)"
    ):
        in_deepspeed(in_half, zero(1))


@each_stage
def test_mixed_precision_is_autocast_over_float32_weights(stage):
    whole, half = (in_deepspeed(one_step, zero(stage), {"mixed_precision": each})[0] for each in ("no", "bf16"))
    assert half["dtype"] == "torch.float32"
    assert half["logged"] != whole["logged"]
    assert half["logged"] == pytest.approx(whole["logged"], rel=0.05)


def with_state_on_the_cpu():
    return steps(2, optimizer=adam)


def test_the_optimizers_state_can_be_offloaded():
    alone = steps(2, accumulate=2, optimizer=adam)
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    for found in in_deepspeed(with_state_on_the_cpu, config):
        assert close(found["state"], alone["state"])


# Faults


class Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def not_finite(where):
    """A loss or a gradient that is infinite at the third step, in one process."""
    made, calls = reading(), []
    forward = made.student.forward

    def broken(*args, **kwargs):
        out = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 5 and torch.distributed.get_rank():
            out.logits = Explodes.apply(out.logits) if where == "gradient" else out.logits * torch.nan
        return out

    made.student.forward = broken

    try:
        Trainer(made, DataLoader(examples(), 2), epochs=3, optimizer=sgd(), log_every=1, progress=False).train()
    except TrainerError as error:
        return {
            "error": str(error),
            "finite": all(bool(each.isfinite().all()) for each in made.parameters()),
        }


@each_stage
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_made(stage, where):
    for found in in_deepspeed(not_finite, zero(stage), where):
        assert "no longer finite" in found["error"]
        assert "The student is as it was before that step" in found["error"]
        assert found["finite"]


# An engine in a loop of one's own


BATCHES = torch.linspace(-1, 1, 8 * 8 * 8).sin().view(8, 8, 8)


def net(seed, width):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))


def distiller():
    matches = [Match("2", "2"), Match("4", "4", loss="kl")]  # different widths: with an adapter
    return Distiller(net(0, 32), net(1, 16), matches, example_batch=BATCHES[0])


def optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def own_loop(stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    model = distiller()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    rank = torch.distributed.get_rank()
    for batch in BATCHES:
        losses = engine(batch[4 * rank : 4 * rank + 4])
        engine.backward(losses.total)
        engine.step()
    if stage == 3:
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return [p.detach().clone() for p in model.parameters()]
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_loop_of_ones_own_ends_where_one_process_does(stage):
    model = distiller()
    stepping = optimizer(model)
    for batch in BATCHES:
        stepping.zero_grad()
        model(batch).total.backward()
        stepping.step()
    for found in in_processes(own_loop, stage):
        for one, other in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-5)
