"""A training whose teacher is no module: a function that hands over captures, or a store."""

import pytest
import torch

import hookdistill
from hookdistill import Capture, Distiller, ExampleMetric, Fidelity, HeldOutLosses, StudentMetric
from pairs import same, state
from runs import DATA, HIDDEN, LOGITS, close, distiller, loader, model, trainer

pytest.importorskip("hookdistill.sources", reason="teachers that are no modules are not there yet")


class Remote:
    """What stands for a teacher behind an interface: it is asked for tensors by address."""

    layers = ("0", "2")

    def __init__(self):
        self.teacher, self.calls = model(8, seed=1), 0

    def captures(self, batch, addresses):
        self.calls += 1
        with torch.no_grad(), Capture(self.teacher, [str(address) for address in addresses]) as captured:
            self.teacher(batch[0])
        return {layer: dict(outputs) for layer, outputs in captured.items()}


def test_a_source_of_captures_teaches_as_the_model_behind_it(tmp_path):
    source = Remote()
    evaluators = [HeldOutLosses(), Fidelity(), StudentMetric("one", lambda *_: 1.0), ExampleMetric("sum", lambda out, _: out)]
    settings = {"epochs": 2, "seed": 0, "eval_loader": loader(), "evaluators": evaluators}
    made, plain = Distiller(source, model(5, seed=2), [LOGITS, HIDDEN]), distiller(LOGITS, HIDDEN)
    result = trainer(made, output_dir=tmp_path, save_every=1, report=False, **settings).train()
    expected = trainer(plain, **settings).train()
    assert close(state(made.student), state(plain.student))
    assert result.history[-1].metrics == pytest.approx(expected.history[-1].metrics, rel=1e-4)
    assert result.teacher == {}  # nothing but its tensors is known of it
    assert source.calls > 12


def test_a_store_teaches_as_the_model_that_filled_it(tmp_path):
    batches = [{"input": rows} for rows in DATA.split(4)]
    matches = [LOGITS, HIDDEN]
    hookdistill.TeacherStore.build(tmp_path / "store", model(8, seed=1), matches, batches)
    store = hookdistill.TeacherStore.open(tmp_path / "store")

    def run(teacher, folder):
        made = Distiller(teacher, model(5, seed=2), matches)
        trainer(made, batches, epochs=2, seed=0, output_dir=folder, save_every=3, report=False).train(resume=True)
        return state(made.student)

    stored = run(store, tmp_path / "a")
    assert close(stored, run(model(8, seed=1), tmp_path / "b"))
    assert same(stored, run(store, tmp_path / "a"))
