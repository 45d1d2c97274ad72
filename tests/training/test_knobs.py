"""Switches for speed and memory: what they change for the training only, and that the result is the same."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hookdistill import Distiller, Match, Trainer, TrainerError
from hookdistill.training.setup import place
from pairs import hooks, same, seeded, state
from runs import DATA, HIDDEN, LOGITS, close, constant, distiller, loader, sgd, trained, trainer

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def bert(layers, seed):
    return seeded(lambda: BertModel(BertConfig(num_hidden_layers=layers, **SIZES), add_pooling_layer=False), seed=seed)


def sentences():
    ids = torch.randint(50, (8, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 6, 2, 5, 6, 1])[:, None]).long()
    return [{"input_ids": ids[start : start + 4], "attention_mask": mask[start : start + 4]} for start in (0, 4)]


def bert_run(*, matches=None, **settings):
    matches = matches or [
        Match("encoder.layer.{1,3}", "encoder.layer.*", mask="attention_mask", name="hidden"),
        Match("encoder.layer.3.attention", "encoder.layer.1.attention", selector="attention", loss="kl", mask="attention_mask"),
    ]
    made = Distiller(bert(4, 1), bert(2, 2), matches)
    return made, trained(made, sentences(), epochs=2, seed=0, **settings)


# Gradient checkpointing


def test_gradient_checkpointing_trains_the_same_and_is_off_again():
    plain = bert_run()[1]
    made, checkpointed = bert_run(gradient_checkpointing=True)
    assert close(plain, checkpointed)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in made.student.modules())
    assert hooks(made.student) == 0


def test_gradient_checkpointing_runs_the_layers_again():
    made, calls = Distiller(bert(4, 1), bert(2, 2), [Match("encoder.layer.3", "encoder.layer.1")]), []
    made.student.encoder.layer[0].attention.register_forward_pre_hook(lambda module, _: calls.append(torch.is_grad_enabled()))
    trained(made, sentences(), gradient_checkpointing=True)
    assert len(calls) == 1 + 2 * 2  # the plan; then forward and backward of two steps


def test_gradient_checkpointing_of_a_model_that_has_none_is_an_error():
    class Small(BertForSequenceClassification):
        supports_gradient_checkpointing = False

    student = seeded(lambda: Small(BertConfig(num_hidden_layers=1, **SIZES)), seed=0)
    made = Distiller(bert(2, 1), student, [Match("encoder.layer.1", "bert.encoder.layer.0")])
    with pytest.raises(TrainerError, match=r"gradient_checkpointing=True: Small"):
        trained(made, sentences(), gradient_checkpointing=True)


# Compilation


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("which", [True, "teacher"])
def test_compiled_models_train_the_same_and_are_as_before_afterwards(which):
    plain = trained(distiller(LOGITS, HIDDEN), seed=0)
    made = distiller(LOGITS, HIDDEN)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = trained(made, seed=0, compile=which, compile_options={"backend": backend})
    assert close(plain, compiled)
    assert graphs
    assert all(module._compiled_call_impl is None for module in [*made.student.modules(), *made.teacher.modules()])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_what_the_user_has_compiled_stays_compiled():
    made = distiller()
    made.student.compile(backend="eager")
    mine = made.student._compiled_call_impl
    trained(made, compile=True, compile_options={"backend": "eager"})
    assert made.student._compiled_call_impl is mine


# Determinism


def test_deterministic_algorithms_are_for_the_training_only():
    seen = []

    def look(evaluation):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return {}

    trained(distiller(), deterministic=True, evaluators=[look])
    assert seen == [True, True]
    assert not torch.are_deterministic_algorithms_enabled()
    trained(distiller(), evaluators=[look])
    assert seen[2:] == [False, False]


# Devices and data


def test_a_teacher_can_be_elsewhere_or_kept_where_it_is():
    made = distiller()
    made.teacher.to("meta")
    place(made, torch.device("cpu"), "keep")
    assert next(made.teacher.parameters()).is_meta
    made = distiller()
    place(made, torch.device("cpu"), "meta")
    assert next(made.teacher.parameters()).is_meta
    assert not next(made.student.parameters()).is_meta


def test_a_quantised_teacher_is_not_moved():
    made = distiller()
    made.teacher.hf_device_map = {"": 0}
    made.teacher.to("meta")
    place(made, torch.device("cpu"), None)
    assert next(made.teacher.parameters()).is_meta


def test_a_teacher_in_half_precision_teaches():
    made = distiller(LOGITS, HIDDEN)
    made.teacher.bfloat16()

    def adaptor(device, batch):
        return {"input": batch[0].bfloat16()}, {"input": batch[0]}

    made = Distiller(made.teacher, made.student, [LOGITS, HIDDEN], batch_adaptor=adaptor)
    half = trained(made, seed=0)
    assert {tensor.dtype for tensor in half} == {torch.float32}
    assert next(made.teacher.parameters()).dtype is torch.bfloat16
    assert all(torch.allclose(a, b, atol=0.02) for a, b in zip(half, trained(distiller(LOGITS, HIDDEN), seed=0), strict=True))


def test_worker_processes_change_nothing():
    with_workers = DataLoader(TensorDataset(DATA), 4, num_workers=2, persistent_workers=True)
    assert same(trained(distiller(), with_workers, epochs=2), trained(distiller(), epochs=2))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "fp16"},
        {"mixed_precision": "bf16"},
        {"teacher_device": "cpu"},
        {"on_nonfinite": "skip"},
        {"save_every": 1, "clip_norm": 1.0, "ema": 0.9},
    ],
    ids=str,
)
def test_on_a_gpu_with_pinned_memory(settings, tmp_path):
    made = distiller(LOGITS, HIDDEN)
    batches = loader(pin_memory=True)
    if "save_every" in settings:
        settings = {**settings, "output_dir": tmp_path}
    result = Trainer(made, batches, epochs=20, optimizer=sgd(), scheduler=constant, progress=False, seed=0, **settings).train()
    on_cpu = trained(distiller(LOGITS, HIDDEN), epochs=20, seed=0)
    assert next(made.student.parameters()).is_cuda
    assert result.steps == 120
    if "ema" not in settings:
        assert all(torch.allclose(a.cpu(), b, atol=0.05) for a, b in zip(state(made.student), on_cpu, strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resuming_on_a_gpu_is_exact_with_deterministic_algorithms(tmp_path):
    def run(folder, resume, cut):
        def cuts(evaluation):
            if evaluation.step == cut:
                raise KeyError("cut")
            return {"score": 0.0}

        made = distiller(LOGITS, HIDDEN)
        made.student[1] = nn.Dropout(0.5)
        settings = {"output_dir": folder, "save_every": 1, "evaluate_every": 1, "evaluators": [cuts], "seed": 0}
        trainer(made, deterministic=True, mixed_precision="fp16", **settings).train(resume=resume)
        return state(made.student)

    whole = run(tmp_path / "whole", False, None)
    with pytest.raises(KeyError):
        run(tmp_path / "cut", False, 3)
    assert same(whole, run(tmp_path / "cut", True, None))


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate's FSDP2 plugin needs two GPUs")
def test_fsdp2_by_the_plugin_of_accelerate():
    from ranks import in_processes

    def run():
        from accelerate import Accelerator, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10)
        made = distiller(LOGITS, HIDDEN)
        trainer(made, loader(2), accelerator=Accelerator(fsdp_plugin=plugin), seed=0).train()
        return [each.full_tensor().cpu() for each in made.student.parameters()]

    for found in in_processes(run):
        assert close(found, trained(distiller(LOGITS, HIDDEN), seed=0))
