"""What a training takes with DeepSpeed, and what its engine is told; without DeepSpeed itself."""

from types import SimpleNamespace

import pytest
import torch

from hookdistill import TrainerError
from hookdistill.training.deepspeed_strategy import DeepSpeedStrategy, _filled, settle
from runs import distiller, sgd, trainer


def chosen(config, *, stage=2, precision="no", accumulate=1):
    """What accelerate is like when it is set to DeepSpeed."""
    config = {"zero_optimization": {"stage": stage}, **config}
    hf_config = SimpleNamespace(config=config)
    plugin = SimpleNamespace(deepspeed_config=config, hf_ds_config=hf_config)
    return SimpleNamespace(deepspeed_plugin=plugin, mixed_precision=precision, gradient_accumulation_steps=accumulate)


@pytest.mark.parametrize(
    ("accelerator", "settings", "message"),
    [
        (chosen({}, stage=3), {}, r"ZeRO stage 3.*stage 2, or fully_shard"),
        (chosen({}, precision="fp16"), {}, r"mixed_precision='fp16'.*Take 'bf16'"),
        (chosen({}), {"on_nonfinite": "skip"}, r"on_nonfinite='skip'.*Take 'error'"),
        (chosen({"optimizer": {"type": "AdamW"}}), {}, r"an optimizer of its config.*pass optimizer="),
        (chosen({"scheduler": {"type": "WarmupLR"}}), {}, r"a scheduler of its config.*pass scheduler="),
        (chosen({"zero_force_ds_cpu_optimizer": True}), {}, r"DeepSpeedCPUAdam in place.*zero_force_ds_cpu_optimizer to false"),
        (chosen({"gradient_clipping": 1.0}), {"clip_norm": 0.5}, r"clip_norm=0.5 is given, .* has gradient_clipping: 1.0"),
        (chosen({"gradient_accumulation_steps": 2}), {"accumulate": 3}, r"accumulate=3 is given, .*_steps: 2; leave one"),
    ],
)
def test_what_cannot_be_is_refused(accelerator, settings, message):
    with pytest.raises(TrainerError, match=message):
        settle(trainer(distiller(), **settings), accelerator)


@pytest.mark.parametrize(
    ("config", "given", "taken"),
    [({}, None, 1), ({"gradient_accumulation_steps": "auto"}, 3, 3), ({"gradient_accumulation_steps": 3}, None, 3)],
)
def test_the_number_of_batches_comes_from_either(config, given, taken):
    accelerator = chosen(config, accumulate=given or 1)
    settle(trainer(distiller(), accumulate=given), accelerator)
    assert accelerator.gradient_accumulation_steps == taken


def test_the_engine_is_told_what_the_training_decides():
    theirs = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "bf16": {"enabled": True}}
    found = _filled(theirs, chosen({}, accumulate=3), clip=0.5, rows=8)
    assert found["gradient_clipping"] == 0.5
    assert found["gradient_accumulation_steps"] == 3
    assert found["train_micro_batch_size_per_gpu"] == 8
    assert found["bf16"] == {"enabled": False}
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert theirs == {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto", "bf16": {"enabled": True}}


def test_nothing_is_clipped_unless_it_is_asked_for():
    assert _filled({}, chosen({}), clip=None, rows=8)["gradient_clipping"] == 0.0  # accelerate's own default is 1.0
    assert _filled({"gradient_clipping": 2.0}, chosen({}), clip=None, rows=8)["gradient_clipping"] == 2.0


def test_only_float32_is_trained():
    made = distiller()
    made.student.double()
    with pytest.raises(TrainerError, match=r"parameters are float32, and .*student\.0\.weight.* are not; call student.float"):
        DeepSpeedStrategy(made, sgd()(list(made.parameters())), chosen({}), torch.zeros(1), clip=None)
