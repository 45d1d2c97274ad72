"""The older library's README example, with its import lines changed and its numbers made small."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pairs import hooks

SCRIPT = next(
    (file for folder in Path(__file__).parents if (file := folder / "shared" / "seed" / "README-example.py").exists()), None
)
pytestmark = pytest.mark.skipif(SCRIPT is None, reason="the older library's README example is not beside this checkout")

SMALLER = {
    "from knowledge_distillation import": "from hookdistill.compat import",
    "BertConfig(num": "BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=32, vocab_size=1000, num",
    "100000": "48",
    "num_epoch = 10": "num_epoch = 2",
    "learning_rate = 2e-5": "learning_rate = 2e-3",
    "print_loss_step=20": "print_loss_step=1",
}


def script(*, without_adaptors: bool = False) -> str:
    text = SCRIPT.read_text(encoding="utf-8")
    for old, new in SMALLER.items():
        assert old in text
        text = text.replace(old, new)
    if without_adaptors:
        text = re.sub(r",\s*\w+_output_adaptor=output_adaptor", "", text)
        text = re.sub(r'"bert_layer(\d+)"', lambda found: f'"encoder.layer.{int(found[1]) - 1}"', text)
        text = text.replace('"embedding_layer"', '"embeddings"')
        assert "_output_adaptor=output_adaptor" not in text
        assert "bert_layer1" not in text
    return text


def losses_spelled_out(names: dict[str, Any], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The example's loss from the models' own outputs, under eager attention, where they hold attention maps."""
    outputs = []
    for model in (names["teacher_model"], names["student_model"]):
        was = model.config._attn_implementation
        model.set_attn_implementation("eager")
        outputs.append(model.eval()(**batch))
        model.set_attn_implementation(was)
    theirs, ours = outputs
    total = F.mse_loss(ours.hidden_states[0], theirs.hidden_states[0])
    for student, teacher in ((1, 4), (2, 8), (3, 12)):
        total = total + F.mse_loss(ours.hidden_states[student], theirs.hidden_states[teacher])
        total = total + F.mse_loss(ours.attentions[student - 1], theirs.attentions[teacher - 1])
    return total.detach()


@pytest.mark.parametrize("without_adaptors", [False, True], ids=["its own adaptors", "module paths"])
def test_the_example_runs_and_computes_what_it_says(without_adaptors, caplog):
    torch.manual_seed(0)
    before, _, distillate = script(without_adaptors=without_adaptors).rpartition("distiller.distillate()")
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(before, str(SCRIPT), "exec"), names)
    assert names["teacher_model"].config._attn_implementation == "sdpa"
    student = names["student_model"]
    for module in (student, names["teacher_model"]):
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # so that the loss can be computed a second time
            if hasattr(part, "dropout_prob"):
                part.dropout_prob = 0.0
    first = {
        name: value[:16]
        for name, value in zip(("input_ids", "attention_mask", "token_type_ids"), names["train_data"].tensors, strict=True)
    }
    expected = losses_spelled_out(names, first)
    start = [parameter.detach().clone() for parameter in student.parameters()]
    of_transformers = hooks(student, names["teacher_model"])  # with which it collects hidden states
    seen = []
    names["evaluator"].evaluate = lambda *args: seen.append(args)
    names["distiller"].train_dataloader = [names["train_data"][:16], *names["train_dataloader"]]
    with caplog.at_level(logging.INFO):
        exec(compile(distillate + "distiller.distillate()", str(SCRIPT), "exec"), names)
    *models, dev_data, dev_data_adaptor, epoch, step, loss = seen[0]
    assert models == [names["teacher_model"], student]
    assert (dev_data, dev_data_adaptor, epoch, step) == (None, None, 0, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert [args[4:6] for args in seen] == [(epoch, step) for epoch in range(2) for step in range(4)]
    assert float(seen[-1][-1]) < float(loss)
    moved = [not torch.equal(new, old) for new, old in zip(student.parameters(), start, strict=True)]
    names_of_moved = [name for (name, _), each in zip(student.named_parameters(), moved, strict=True) if each]
    assert any(name.startswith("encoder.layer.2.attention.self.query") for name in names_of_moved)
    assert hooks(*models) == of_transformers


def test_the_example_runs_as_it_is(caplog):
    with caplog.at_level(logging.INFO, logger="hookdistill.compat"):
        exec(compile(script(), str(SCRIPT), "exec"), {"__name__": "example"})
    assert [re.sub(r"value:.*", "", each.getMessage()) for each in caplog.records if "loss value" in each.getMessage()] == [
        f"epoch:{epoch},\tstep:{step},\tloss " for epoch in range(2) for step in (1, 2)
    ]
