"""Other trainers with a distiller inside: the same steps as ours, what they log, save and resume."""

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

import hookdistill
from hookdistill import Distiller, Match, Trainer, TrainerError
from hookdistill.integrations import DistillationTrainer
from pairs import hooks, mlps, readers, same, seeded, state, tokens
from ranks import in_processes
from runs import close

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50, "num_labels": 3}
MATCHES = [
    Match(":logits", ":logits", loss="kl", temperature=2.0, name="logits", weight=0.5),
    Match("bert.encoder.layer.1", "bert.encoder.layer.0", name="hidden", mask="attention_mask"),
    Match(None, ":logits", loss="cross_entropy", target="labels", name="labels"),
]


def bert(layers, seed):
    config = BertConfig(num_hidden_layers=layers, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0, **SIZES)
    return seeded(lambda: BertForSequenceClassification(config), seed=seed)


def distiller(*, dropout=True):
    made = Distiller(bert(2, 1), bert(1, 2), MATCHES)
    for module in made.student.modules() if not dropout else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return made


class Sentences(Dataset):
    """Rows with padding of different lengths, and a column that nobody takes."""

    def __len__(self):
        return 20

    def __getitem__(self, row):
        draw = torch.Generator().manual_seed(row)
        mask = (torch.arange(6) < 1 + (row * row + 2) % 6).long()
        ids = torch.randint(50, (6,), generator=draw)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(row % 3), "unused": row}


def arguments(folder, **settings):
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 3,
        "optim": "adamw_torch",
        **settings,
    }
    return TrainingArguments(str(folder), **options)


class InOrder(DistillationTrainer):
    """Does not shuffle, for which transformers 4 has no argument."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def huggingface(folder, made=None, *, trainer=DistillationTrainer, evaluated=False, callbacks=None, **settings):
    made = made or distiller()
    data = {"train_dataset": Sentences(), **({"eval_dataset": Sentences()} if evaluated else {})}
    return trainer(made, arguments(folder, **settings), callbacks=callbacks, **data)


# Four loops, one trajectory


def plain_pair():
    torch.manual_seed(4)
    matches = [
        Match("layers.3", "layers.1", name="hidden", mask="attention_mask"),
        Match(":logits", ":logits", loss="kl", temperature=2.0, name="logits", mask="attention_mask"),
    ]
    return Distiller(*readers(12, 8), matches, example_batch=tokens())


def rows():
    batch = tokens(12, 12)
    return [{key: value[row] for key, value in batch.items() if key != "labels"} for row in range(12)]


def adamw(parameters):
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def halving(optimizer, total_steps):
    return LambdaLR(optimizer, lambda step: 0.8**step)


def by_hand():
    made = plain_pair().train()
    optimizer = adamw(list(made.parameters()))
    scheduler = halving(optimizer, 12)
    for _ in range(2):
        for batch in DataLoader(rows(), 2):
            made(batch).total.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return state(made.student, made.adapters)


def by_ours():
    made = plain_pair()
    Trainer(made, DataLoader(rows(), 2), epochs=2, optimizer=adamw, scheduler=halving, progress=False).train()
    return state(made.student, made.adapters)


def by_transformers(folder):
    made = plain_pair()
    optimizer = adamw(list(made.parameters()))
    optimizers = (optimizer, halving(optimizer, 12))
    trainer = InOrder(made, arguments(folder), train_dataset=rows(), optimizers=optimizers)
    trainer.train()
    return state(made.student, made.adapters)


def by_lightning(folder):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from hookdistill.integrations import DistillationModule

    made = plain_pair()
    module = DistillationModule(made, optimizer=adamw, scheduler=halving)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=2, accelerator="cpu", default_root_dir=str(folder), **quiet).fit(module, DataLoader(rows(), 2))
    return state(made.student, made.adapters)


@pytest.fixture(scope="module")
def bare_loop():
    return by_hand()


def test_our_trainer_takes_the_steps_of_a_bare_loop(bare_loop):
    assert same(by_ours(), bare_loop)


def test_the_trainer_of_transformers_takes_them(bare_loop, tmp_path):
    assert close(by_transformers(tmp_path), bare_loop)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_takes_them(bare_loop, tmp_path):
    assert close(by_lightning(tmp_path), bare_loop)


# transformers


# Adam makes large steps of gradients that are nothing but rounding, as those of the bias of BERT's keys are.
IN_ORDER = {"trainer": InOrder, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 0.1}


def test_accumulated_batches_count_by_their_valid_positions(tmp_path):
    def run(**settings):
        made = distiller(dropout=False)
        huggingface(tmp_path, made, **IN_ORDER, **settings).train()
        return state(made.student)

    whole = run(per_device_train_batch_size=10)
    assert close(whole, run(per_device_train_batch_size=5, gradient_accumulation_steps=2))
    assert not close(whole, run(per_device_train_batch_size=5))


def test_parts_are_logged_and_add_up(tmp_path):
    trainer = huggingface(tmp_path, gradient_accumulation_steps=2)
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 10 // 3
    for line in logged:
        total = 0.5 * line["loss/logits"] + line["loss/hidden"] + line["loss/labels"]
        assert line["loss"] == pytest.approx(total, rel=1e-3)
    assert trainer.label_names == ["labels"]
    assert hooks(trainer.distiller.student, trainer.distiller.teacher) == 0


def test_what_is_saved_is_the_student_with_adapters_beside_it(tmp_path):
    made = Distiller(bert(2, 1), seeded(lambda: BertForSequenceClassification(narrow()), seed=2), MATCHES)
    trainer = huggingface(tmp_path, made)
    before = None

    def keep(parameters):
        return [parameter.detach().clone() for parameter in parameters]

    trainer.train()
    before = keep(made.adapters.parameters())
    trainer.save_model(tmp_path / "student")
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == [
        "adapters.safetensors",
        "config.json",
        "model.safetensors",
    ]
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "student")
    assert same(state(loaded), state(made.student))
    adapters = load_file(tmp_path / "student" / "adapters.safetensors")
    assert same(list(adapters.values()), before)


def narrow():
    return BertConfig(num_hidden_layers=1, **{**SIZES, "hidden_size": 8})


class Stops(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.at
        return control


@pytest.mark.filterwarnings("ignore:.*torch.load.*weights_only.*")
def test_a_run_is_taken_up_where_it_stopped(tmp_path):
    def make():
        return Distiller(bert(2, 1), seeded(lambda: BertForSequenceClassification(narrow()), seed=2), MATCHES)

    settings = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    whole = make()
    huggingface(tmp_path / "whole", whole, **settings).train()
    huggingface(tmp_path / "cut", make(), callbacks=[Stops(6)], **settings).train()
    resumed = make()
    trainer = huggingface(tmp_path / "cut", resumed, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 10
    assert same(state(whole.student, whole.adapters), state(resumed.student, resumed.adapters))
    logged = [line["loss/hidden"] for line in trainer.state.log_history if "loss/hidden" in line]
    assert all(0 < value < 10 for value in logged)


def test_the_best_student_is_loaded_at_the_end(tmp_path):
    made = distiller()
    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "num_train_epochs": 3,
    }
    trainer = huggingface(tmp_path, made, evaluated=True, **settings)
    trainer.train()
    best = tmp_path / "checkpoint-10"
    assert trainer.state.best_model_checkpoint == str(best)
    assert same(list(load_file(best / "model.safetensors").values()), sorted_state(made.student))
    again = trainer.evaluate()["eval_loss"]
    assert again == pytest.approx(max(line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line))


def sorted_state(network):
    return [network.state_dict()[name] for name in sorted(network.state_dict())]


def test_metrics_are_of_the_students_outputs(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    made = distiller()
    trainer = DistillationTrainer(made, arguments(tmp_path), eval_dataset=Sentences(), compute_metrics=metrics)
    found = trainer.evaluate()
    made.student.eval()
    batch = [Sentences()[row] for row in range(20)]
    stacked = {key: torch.stack([each[key] for each in batch]) for key in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        right = made.student(stacked["input_ids"], stacked["attention_mask"]).logits.argmax(-1) == stacked["labels"]
    assert seen == [(20, 3)]
    assert found["eval_accuracy"] == pytest.approx(float(right.double().mean()))


def test_columns_that_nobody_takes_are_removed_where_that_can_be_known(tmp_path):
    trainer = huggingface(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    made = Distiller(*mlps(), [Match("head", "head", mask=lambda batch: batch["valid"])])
    with pytest.raises(TrainerError, match=r"remove_unused_columns=False"):
        DistillationTrainer(made, arguments(tmp_path), train_dataset=rows()).train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, r"model= makes no sense"),
        ({"compute_loss_func": print}, r"compute_loss_func= makes no sense"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message, tmp_path):
    with pytest.raises(TrainerError, match=message):
        DistillationTrainer(distiller(), arguments(tmp_path), **options)
    with pytest.raises(TrainerError, match=r"hookdistill\.Distiller, got Linear"):
        DistillationTrainer(torch.nn.Linear(1, 1), arguments(tmp_path))
    with pytest.raises(TrainerError, match="gives no batch"):
        DistillationTrainer(distiller(), arguments(tmp_path), eval_dataset=[]).evaluate()


def two_processes(folder):
    made = distiller(dropout=False)
    huggingface(folder, made, gradient_accumulation_steps=2, **IN_ORDER).train()
    return state(made.student)


def test_two_processes_take_the_steps_of_one_on_the_joined_batch(tmp_path):
    alone = distiller(dropout=False)
    huggingface(tmp_path, alone, per_device_train_batch_size=8, **IN_ORDER).train()
    for found in in_processes(two_processes, str(tmp_path)):
        assert close(found, state(alone.student))


# Lightning


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_logs_parts_and_held_out_ones_and_restores_its_checkpoint(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch.loggers import CSVLogger

    from hookdistill.integrations import DistillationModule

    made = plain_pair()
    logger = CSVLogger(str(tmp_path))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, logger=logger, default_root_dir=str(tmp_path), **quiet)
    trainer.fit(DistillationModule(made, lr=0.01, warmup=2), DataLoader(rows(), 2), DataLoader(rows(), 4))
    named = {"train/loss", "train/loss/hidden", "train/loss/logits", "eval/loss", "eval/loss/hidden", "eval/loss/logits"}
    assert named <= set(trainer.callback_metrics)
    assert hooks(made.student, made.teacher) == 0
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    again = plain_pair()
    saved = torch.load(checkpoint, weights_only=False)["state_dict"]
    DistillationModule(again).load_state_dict(saved)
    assert same(state(again.student, again.adapters), state(made.student, made.adapters))


def test_without_lightning_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "hookdistill.integrations.lightning_module", raising=False)
    with pytest.raises(TrainerError, match="pip install lightning"):
        _ = hookdistill.integrations.DistillationModule
    with pytest.raises(AttributeError, match=r"DistilationTrainer.*Did you mean 'DistillationTrainer'"):
        _ = hookdistill.integrations.DistilationTrainer
    assert "DistillationModule" in dir(hookdistill.integrations)
