"""The older library's classes: its losses, its evaluator, what its adaptors are handed, and what is new beside it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5Model

from hookdistill import CaptureError, MatchError, TrainerError
from hookdistill.compat import (
    KnowledgeDistiller,
    MultiLayerBasedDistillationEvaluator,
    MultiLayerBasedDistillationLoss,
)
from hookdistill.compat.outputs import run
from pairs import hooks, mlps, points, readers, seeded, tokens

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(layers, kind=BertModel, seed=0, **more):
    config = BertConfig(num_hidden_layers=layers, output_hidden_states=True, output_attentions=True, **SIZES, **STILL, **more)
    return seeded(kind, config, seed=seed)


def item(teacher, student, output="output", loss="mse", **more):
    return {
        "type": "ts_distill",
        "teacher_layer_name": teacher,
        "teacher_layer_output_name": output,
        "student_layer_name": student,
        "student_layer_output_name": output,
        "loss": {"loss_function": loss, "args": {}},
        "weight": 1.0,
        **more,
    }


def hard(student, output="output", loss="cross_entropy", **more):
    return {
        "type": "hard_distill",
        "student_layer_name": student,
        "student_layer_output_name": output,
        "loss": {"loss_function": loss, "args": {}},
        "weight": 1.0,
        **more,
    }


def ids_and_mask(device, batch):
    inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
    return inputs, inputs


def x_alone(device, batch):
    return {"x": batch["x"]}, {"x": batch["x"]}


class Losses:
    """An evaluator that keeps the losses."""

    def __init__(self):
        self.seen = []

    def evaluate(self, teacher_model, student_model, dev_data, dev_data_adaptor, epoch, step, loss_value):
        self.seen.append(float(loss_value))
        student_model.eval()  # and forgets to put it back


def distil(teacher, student, loss_model, batches, adaptor=ids_and_mask, *, evaluator=None, epochs=1, optimizer=None, lr=0.0):
    """The losses of each step; with ``lr=0`` the student stays as it is."""
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=lr)
    evaluator = evaluator or Losses()
    KnowledgeDistiller(
        teacher_model=teacher,
        student_model=student,
        train_dataloader=batches,
        dev_dataloader=None,
        train_data_adaptor=adaptor,
        dev_data_adaptor=None,
        device=torch.device("cpu"),
        loss_model=loss_model,
        optimizer=optimizer,
        evaluator=evaluator,
        num_epoch=epochs,
    ).distillate()
    return getattr(evaluator, "seen", None)


def layers_of(model_output):
    last, pooled, hidden_states, attentions = model_output
    layers = {"layer 0": {"hidden": hidden_states[0]}, "top": {"pooled": pooled, "last": last}}
    for number, attention in enumerate(attentions, 1):
        layers[f"layer {number}"] = {"hidden": hidden_states[number], "attention": attention}
    return layers


def eager(model, **batch):
    was = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model.eval()(**batch)
    finally:
        model.set_attn_implementation(was)


def test_an_adaptor_is_handed_the_plain_tuple_of_earlier_releases():
    handed = []

    def adaptor(model_output):
        handed.append(model_output)
        return layers_of(model_output)

    teacher, student = bert(4, seed=1), bert(2)
    batch = tokens()
    distil(teacher, student, MultiLayerBasedDistillationLoss([item("layer 4", "layer 2", "hidden")], adaptor, adaptor), [batch])
    for output, model in zip(handed[:2], (teacher, student), strict=True):
        expected = eager(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert type(output) is tuple
        assert len(output) == 4
        torch.testing.assert_close(output[0], expected.last_hidden_state)
        assert len(output[3]) == model.config.num_hidden_layers
        for ours, theirs in zip(output[3], expected.attentions, strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_a_classifier_hands_its_logits_first():
    teacher, student = (bert(2, BertForSequenceClassification, seed=seed) for seed in (1, 2))

    def adaptor(model_output):
        logits, _hidden, _attentions = model_output
        return {"head": {"logits": logits}}

    batch = tokens()
    (found,) = distil(
        teacher, student, MultiLayerBasedDistillationLoss([item("head", "head", "logits")], adaptor, adaptor), [batch]
    )
    logits = [model(batch["input_ids"], batch["attention_mask"]).logits for model in (teacher.eval(), student.eval())]
    assert found == pytest.approx(F.mse_loss(*logits).item(), rel=1e-5)


MASK = tokens()["attention_mask"]
BOTH = (MASK[:, None, :, None] * MASK[:, None, None, :]).expand(-1, 2, -1, -1).bool()

FIVE_LOSSES = {
    "mse": ("hidden", lambda s, t: F.mse_loss(s, t)),
    "mse_with_mask": ("hidden", lambda s, t: F.mse_loss(s[MASK.bool()], t[MASK.bool()])),
    "attention_mse_with_mask": ("attention", lambda s, t: F.mse_loss(s[BOTH], t[BOTH])),
    "cross_entropy": ("hidden", lambda s, t: F.cross_entropy(s.flatten(0, 1), t.flatten(0, 1).softmax(-1))),
    "cos": ("hidden", lambda s, t: (1 - F.cosine_similarity(s, t, dim=-1)).mean()),
}
PATHS = {"hidden": "hidden_states", "attention": "attention"}


@pytest.mark.parametrize("adapted", [True, False], ids=["adaptors", "module paths"])
@pytest.mark.parametrize("loss", FIVE_LOSSES)
def test_each_of_its_five_losses(loss, adapted):
    output, expected = FIVE_LOSSES[loss]
    teacher, student = bert(4, seed=1), bert(2)
    if adapted:
        loss_model = MultiLayerBasedDistillationLoss([item("layer 4", "layer 2", output, loss)], layers_of, layers_of)
    else:
        config = [item("encoder.layer.3", "encoder.layer.1", PATHS[output], loss)]
        loss_model = MultiLayerBasedDistillationLoss(config)
    batch = tokens()
    (found,) = distil(teacher, student, loss_model, [batch])
    outputs = [eager(each, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]) for each in (student, teacher)]
    tensors = [each.hidden_states[-1] if output == "hidden" else each.attentions[-1] for each in outputs]
    assert found == pytest.approx(expected(*tensors).item(), rel=1e-4)


def test_mse_on_maps_with_a_mask_counts_query_and_key():
    teacher, student = bert(4, seed=1), bert(2)
    config = [item("layer 4", "layer 2", "attention", mask="attention_mask")]
    batch = tokens()
    (found,) = distil(teacher, student, MultiLayerBasedDistillationLoss(config, layers_of, layers_of), [batch])
    outputs = [eager(each, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]) for each in (student, teacher)]
    ours, theirs = (each.attentions[-1][BOTH] for each in outputs)
    assert found == pytest.approx(F.mse_loss(ours, theirs).item(), rel=1e-4)


@pytest.mark.parametrize(
    "target",
    [{}, {"target": "labels"}, {"target": 1}, {"batch_data_to_label": lambda batch: batch["labels"]}],
    ids=["labels", "key", "index", "batch_data_to_label"],
)
def test_hard_distill(target):
    teacher, student = mlps()
    batch = points()
    (found,) = distil(teacher, student, MultiLayerBasedDistillationLoss([hard("head", **target)]), [batch], x_alone)
    assert found == pytest.approx(F.cross_entropy(seeded_like(student, batch), batch["labels"]).item(), rel=1e-5)


def seeded_like(student, batch):
    """The student's logits in training mode, as its one step saw them."""
    return student.train()(batch["x"])


def test_hard_distill_through_an_adaptor_and_on_tuples():
    teacher, student = mlps()
    batch = points()
    loss_model = MultiLayerBasedDistillationLoss(
        [hard("any", "name", target=1)], lambda out: {}, lambda out: {"any": {"name": out}}
    )

    def adaptor(device, batch):
        return (batch[0],), (batch[0],)

    (found,) = distil(teacher, student, loss_model, [(batch["x"], batch["labels"])], adaptor)
    assert found == pytest.approx(F.cross_entropy(student.train()(batch["x"]), batch["labels"]).item(), rel=1e-5)


def test_type_may_be_left_out_as_in_its_last_version():
    teacher, student = mlps()
    config = item("second", "second")
    del config["type"]
    (found,) = distil(teacher, student, MultiLayerBasedDistillationLoss([config]), [points()], x_alone)
    assert found > 0


def test_a_loss_of_ones_own_is_called_as_it_was():
    teacher, student = bert(4, seed=1), bert(2)
    calls = []

    def mine(teacher_output, student_output, teacher_input, student_input, power=1):
        calls.append((teacher_input["input_ids"].shape, student_input["attention_mask"].shape))
        return (teacher_output - student_output).abs().pow(power).mean()

    config = item("layer 4", "layer 2", "hidden", "mine")
    config["loss"]["args"] = {"power": 2}
    loss_model = MultiLayerBasedDistillationLoss([config], layers_of, layers_of)
    loss_model.loss_functions["mine"] = mine
    reference = MultiLayerBasedDistillationLoss([item("layer 4", "layer 2", "hidden")], layers_of, layers_of)
    assert distil(teacher, student, loss_model, [tokens()]) == pytest.approx(distil(teacher, student, reference, [tokens()]))
    assert set(calls) == {((3, 5), (3, 5))}


def test_a_callable_in_the_config_is_called_as_in_a_match():
    teacher, student = mlps()
    config = item("second", "second", loss=lambda s, t, mask=None: (s - t).abs().sum())
    (found,) = distil(teacher, student, MultiLayerBasedDistillationLoss([config]), [points()], x_alone)
    batch = points()
    theirs = teacher.eval().spelled_out(batch["x"])["second"]
    assert found == pytest.approx((student.train().spelled_out(batch["x"])["second"] - theirs).abs().sum().item(), rel=1e-5)


def test_several_teachers_by_name_one_of_them_through_an_adaptor():
    (first, student), (second, _) = mlps(), mlps(teacher_width=12)
    config = [
        item("head", "head", teacher_model="a"),
        {**item("made", "head", teacher_model="b"), "teacher_layer_output_name": "up", "weight": 0.5},
    ]
    loss_model = MultiLayerBasedDistillationLoss(config, {"b": lambda output: {"made": {"up": output}}})
    batch = points()
    (found,) = distil({"a": first, "b": second}, student, loss_model, [batch], x_alone)
    ours = student.train()(batch["x"])
    expected = F.mse_loss(ours, first.eval()(batch["x"])) + 0.5 * F.mse_loss(ours, second.eval()(batch["x"]))
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_an_adapter_that_widths_need_is_trained_by_the_optimizer_that_was_given():
    teacher, student = mlps(teacher_width=12)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = len(optimizer.param_groups)
    losses = distil(
        teacher,
        student,
        MultiLayerBasedDistillationLoss([item("second", "second")]),
        [points()] * 8,
        x_alone,
        optimizer=optimizer,
    )
    assert len(optimizer.param_groups) == before + 1
    assert [list(each.shape) for each in optimizer.param_groups[-1]["params"]] == [[12, 8]]
    assert losses[-1] < losses[0]


def test_training_goes_on_in_training_mode_whatever_the_evaluator_does():
    teacher, student = mlps(dropout=0.5)
    modes = []
    student.drop.register_forward_hook(lambda module, *_: modes.append(module.training))
    distil(teacher, student, MultiLayerBasedDistillationLoss([item("second", "second")]), [points()] * 3, x_alone)
    assert modes[-3:] == [True, True, True]


def test_the_evaluator_saves_and_prints(tmp_path):
    teacher, student = mlps()
    evaluator = MultiLayerBasedDistillationEvaluator(save_dir=str(tmp_path / "saved"), save_step=2, print_loss_step=1)
    loss_model = MultiLayerBasedDistillationLoss([item("second", "second")])
    distil(teacher, student, loss_model, [points()] * 3, x_alone, evaluator=evaluator, epochs=2, lr=0.1)
    lines = (tmp_path / "saved" / "LossValue.txt").read_text().splitlines()
    assert [line.rpartition(",")[0] for line in lines] == [f"epoch:{e},\tstep:{s}" for e in (0, 1) for s in (1, 2)]
    assert all(float(line.rpartition(":")[2]) > 0 for line in lines)
    assert sorted(each.name for each in (tmp_path / "saved").iterdir()) == ["0-2", "1-2", "LossValue.txt"]
    assert (tmp_path / "saved" / "1-2" / "model.safetensors").stat().st_size > 0


def test_the_evaluator_writes_nothing_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluator = MultiLayerBasedDistillationEvaluator(save_dir=None, save_step=1, print_loss_step=1)
    evaluator.evaluate(None, mlps()[1], None, None, 0, 1, torch.tensor(1.0))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_model_of_ones_own_gets_outputs_and_inputs():
    teacher, student = bert(4, seed=1), bert(2)
    handed = []

    class Pooled(nn.Module):
        def forward(self, teacher_output, student_output, teacher_inputs, student_inputs):
            handed.append((len(teacher_output), len(student_output), teacher_output[0].requires_grad, [*student_inputs]))
            return F.mse_loss(student_output[1], teacher_output[1])

    assert distil(teacher, student, Pooled(), [tokens()])[0] > 0
    assert handed == [(4, 4, False, ["input_ids", "attention_mask"])]


def test_the_loss_model_alone_on_outputs_that_are_there():
    teacher, student = bert(4, seed=1), bert(2)
    batch = {key: value for key, value in tokens().items() if key != "labels"}
    config = [item("layer 4", "layer 2", "hidden", "mse_with_mask"), hard("top", "pooled", target="labels")]
    loss_model = MultiLayerBasedDistillationLoss(config, layers_of, layers_of)
    theirs, ours = eager(teacher, **batch), eager(student, **batch)
    labels = torch.tensor([0, 3, 15])
    found = loss_model(theirs, ours, batch, {**batch, "labels": labels})
    expected = F.mse_loss(ours.hidden_states[-1][MASK.bool()], theirs.hidden_states[-1][MASK.bool()])
    torch.testing.assert_close(found, expected + F.cross_entropy(ours.pooler_output, labels))
    assert found.requires_grad


def test_an_old_loader_of_tuples_and_the_models_without_a_trace():
    teacher, student = readers()
    batches = DataLoader([tokens(1)] * 4, collate_fn=lambda rows: rows[0])
    distil(teacher, student, MultiLayerBasedDistillationLoss([item("layers.3", "layers.1")]), batches)
    assert hooks(teacher, student) == 0
    assert all(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("config", "adaptors", "error", "says"),
    [
        (None, True, MatchError, "distill_config= is missing"),
        ({}, True, MatchError, "list"),
        ([item("layer 5", "layer 2", "hidden")], True, MatchError, "layer 5"),
        ([item("layer 4", "layer 2", "hiden")], True, MatchError, "hidden"),
        ([item("encoder.layer.4", "encoder.layer.1")], False, MatchError, "'0' to '3'"),
        ([item("layer 4", "layer 2", "hidden", "mze")], True, MatchError, "mse"),
        ([{**item("layer 4", "layer 2", "hidden"), "wieght": 1}], True, MatchError, "weight"),
        ([item("layer 4", "layer 2", "hidden"), 3], True, MatchError, "entry 1"),
    ],
    ids=["none", "dict", "layer", "output", "path", "loss", "key", "entry"],
)
def test_a_wrong_config_is_an_error_that_names_it(config, adaptors, error, says):
    both = (layers_of, layers_of) if adaptors else ()
    teacher, student = bert(4), bert(2)
    eager(teacher, input_ids=tokens()["input_ids"]), eager(student, input_ids=tokens()["input_ids"])
    of_transformers = hooks(teacher, student)  # with which it collects hidden states
    with pytest.raises(error, match=says):
        distil(teacher, student, MultiLayerBasedDistillationLoss(config, *both), [tokens()])
    assert hooks(teacher, student) == of_transformers


def test_an_adaptor_that_fails_says_what_it_was_given():
    def adaptor(model_output):
        _first, _second = model_output
        return {}

    with pytest.raises(MatchError, match=r"output_adaptor raised ValueError: too many values.* given \(Tensor\[3, 5, 16\]"):
        distil(bert(2), bert(2), MultiLayerBasedDistillationLoss([item("a", "a")], adaptor, adaptor), [tokens()])


def test_an_adaptor_must_return_layers_of_outputs():
    with pytest.raises(MatchError, match="must return"):
        distil(
            *mlps(),
            MultiLayerBasedDistillationLoss([item("a", "a")], lambda o: {"a": o}, lambda o: {"a": o}),
            [points()],
            x_alone,
        )


def test_maps_that_cannot_be_filled_in_are_an_error():
    ids = tokens()["input_ids"]
    model = bert(2)
    model.config.num_hidden_layers = 3
    with pytest.raises(CaptureError, match=r"2 attentions ran.*module path"):
        run(model, (), {"input_ids": ids})

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": 20, "decoder_start_token_id": 0}

    def two_stacks(implementation):
        model = T5Model(T5Config(num_layers=2, output_attentions=True, **sizes))
        for config in (model.config, model.encoder.config, model.decoder.config):  # transformers 5.17 sets the first alone
            config._attn_implementation = implementation
        return model

    with pytest.raises(CaptureError, match="'decoder_attentions' of T5Model's output holds no attention maps"):
        run(two_stacks("sdpa"), (), {"input_ids": ids, "decoder_input_ids": ids})
    output = run(two_stacks("eager"), (), {"input_ids": ids, "decoder_input_ids": ids})
    assert [len(item) for item in output if isinstance(item, tuple)] == [2, 2]


def test_the_loss_model_alone_needs_adaptors():
    with pytest.raises(MatchError, match="KnowledgeDistiller"):
        MultiLayerBasedDistillationLoss([item("second", "second")])(torch.ones(2), torch.ones(2))


def test_an_optimizer_of_another_model_is_an_error():
    teacher, student = mlps()
    with pytest.raises(TrainerError, match="nothing would be trained"):
        distil(
            teacher,
            student,
            MultiLayerBasedDistillationLoss([item("second", "second")]),
            [points()],
            x_alone,
            optimizer=torch.optim.SGD(teacher.parameters()),
        )


def test_an_empty_loader_and_a_loss_that_is_not_finite_are_errors():
    teacher, student = mlps()
    loss_model = MultiLayerBasedDistillationLoss([item("second", "second")])
    with pytest.raises(TrainerError, match="no batch in epoch 0"):
        distil(teacher, student, loss_model, [], x_alone)
    batch = points()
    batch["x"][0] = float("nan")
    with pytest.raises(TrainerError, match="no longer finite"):
        distil(teacher, student, loss_model, [batch], x_alone)


def test_a_data_adaptor_must_return_a_pair():
    with pytest.raises(MatchError, match=r"must return a pair"):
        distil(
            *mlps(), MultiLayerBasedDistillationLoss([item("second", "second")]), [points()], lambda device, batch: batch["x"]
        )
