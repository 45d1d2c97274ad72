"""What may stand in a recipe file: every key with its default, unit and help."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Arguments = dict[str, Any]


class Section(BaseModel):
    """A mapping of which every key is known; values are taken as they are, ``"3"`` is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """A model: one of ``pretrained``, ``config`` and ``factory`` says where it comes from."""

    pretrained: str | None = Field(
        None,
        description="A folder, or the id of a model on the Hugging Face hub; its weights are read from safetensors.",
        examples=["sentence-transformers/all-MiniLM-L6-v2", "./my-bert"],
    )
    config: str | None = Field(
        None,
        description="A transformers model with random weights: a model type, a folder, a config.json, or an id on the hub.",
        examples=["bert", "llama", "./my-bert"],
    )
    factory: str | None = Field(
        None,
        description="A function or class that returns the module, as package.module:name. It is imported, so it may run any "
        "code. The folder of the recipe is looked in too.",
        examples=["my_models:build"],
    )
    arguments: Arguments = Field(
        {},
        description="With pretrained or config: changes to its configuration. With factory: its keyword arguments.",
        examples=[{"num_hidden_layers": 3}],
    )
    architecture: str | None = Field(
        None,
        description="The transformers class, with pretrained or config. Default: what the configuration names, else AutoModel.",
        examples=["AutoModelForCausalLM", "BertForSequenceClassification"],
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    weights: str | None = Field(
        None, description="A .safetensors file with the whole state of the model, or a folder with model.safetensors."
    )
    keep_layers: dict[str, list[Annotated[int, Field(ge=0)]]] = Field(
        {},
        description="Drop layers: for each list of modules the positions that stay, counted from 0.",
        examples=[{"encoder.layer": [0, 2, 4]}],
    )
    freeze: list[str] = Field(
        [], description="Modules that are not trained, by address; the teacher never is.", examples=[["embeddings"]]
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the parameters. Default: float32 for transformers models, and what a factory makes."
    )
    attention: Literal["sdpa", "eager", "flex_attention"] | None = Field(
        None, description="transformers' attention implementation. Default: its own choice, sdpa where there is one."
    )
    trust_remote_code: bool = Field(False, description="Let the hub's repository run its own Python code.")

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [name for name in ("pretrained", "config", "factory") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of pretrained, config and factory; {' and '.join(given) or 'none'} is given")
        own = ("architecture", "revision", "attention", "trust_remote_code")
        if given == ["factory"] and (misplaced := [name for name in own if getattr(self, name)]):
            raise ValueError(f"{misplaced[0]} is for transformers models, with pretrained or config; give it to the factory")
        return self


class Source(Section):
    """Where rows come from: one of ``files``, ``dataset``, ``arrays`` and ``factory``."""

    files: str | list[str] | None = Field(
        None,
        description="Files with rows, also by wildcards: .jsonl (an object a line), .csv and .tsv (with a header), .txt (a "
        "line is a row with the column text).",
        examples=["train.jsonl", ["a.csv", "b.csv"]],
    )
    dataset: str | None = Field(
        None,
        description="An id on the Hugging Face hub, or a folder: for the datasets library (hookdistill[datasets]).",
        examples=["stanfordnlp/imdb"],
    )
    arrays: str | None = Field(
        None,
        description="An .npz or .safetensors file; its arrays are columns, their first dimension is the rows.",
        examples=["train.npz"],
    )
    factory: str | None = Field(
        None,
        description="A function that returns a sequence of rows (dicts), a torch Dataset of them or a DataLoader, as "
        "package.module:name. It is imported, so it may run any code.",
        examples=["my_data:train"],
    )
    arguments: Arguments = Field({}, description="Keyword arguments of the factory.")
    subset: str | None = Field(None, description="Configuration of the dataset.", examples=["sst2"])
    split: str | None = Field(None, description="Part of the dataset.", examples=["train"])
    rows: Count | None = Field(None, description="Use the first so many rows. Default: all.")
    rename: dict[str, str] = Field(
        {}, description="New names of columns: a model gets the columns that its forward names.", examples=[{"label": "labels"}]
    )

    @model_validator(mode="after")
    def _one_source(self) -> Source:
        given = [name for name in ("files", "dataset", "arrays", "factory") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of files, dataset, arrays and factory; {' and '.join(given) or 'none'} is given")
        if self.arguments and given != ["factory"]:
            raise ValueError("arguments are those of a factory, and none is given")
        if given != ["dataset"] and (misplaced := [name for name in ("subset", "split") if getattr(self, name)]):
            raise ValueError(f"{misplaced[0]} is that of a dataset, and none is given")
        return self


class Text(Section):
    """Columns of text become ``input_ids``, ``attention_mask`` and what else the tokenizer makes."""

    columns: list[str] = Field(
        ["text"], min_length=1, max_length=2, description="One column, or two for pairs of texts.", examples=[["text"]]
    )
    max_length: Count = Field(128, description="Tokens; what is longer is cut.")
    padding: Literal["longest", "max_length"] = Field(
        "longest", description="To the longest of a batch, or always to max_length."
    )
    tokenizer: str | None = Field(
        None, description="A folder or an id on the hub. Default: that of the student, else that of the teacher."
    )


class Image(Section):
    """A column of images becomes ``pixel_values``."""

    column: str = Field("image", description="Paths of image files, images of a dataset, or arrays of pixels.")
    processor: str | None = Field(
        None, description="A folder or an id on the hub. Default: that of the student, else that of the teacher."
    )


class Labels(Section):
    """A column of class names or numbers becomes ``labels``."""

    column: str = Field("label", description="The column.")
    names: list[str] | None = Field(
        None, min_length=2, description="The classes in order, where the column has their names.", examples=[["bad", "good"]]
    )


class Data(Section):
    """What is trained on and measured on. Columns of numbers become tensors under their own names."""

    train: Source = Field(description="Rows to train on.")
    eval: Source | None = Field(None, description="Rows to measure on.")
    hold_out: Count | None = Field(
        None, description="Instead of eval: so many rows of train, drawn by the seed, are kept apart."
    )
    text: Text | None = Field(None, description="Tokenize columns of text.")
    image: Image | None = Field(None, description="Prepare a column of images.")
    labels: Labels | None = Field(None, description="Make labels of a column.")
    batch_size: Count = Field(32, description="Rows in a batch, for each process.")
    eval_batch_size: Count | None = Field(None, description="Default: batch_size.")
    shuffle: bool = Field(True, description="Another order of the training rows in each epoch.")
    drop_last: bool = Field(False, description="Leave out the last batch of an epoch when it is not full.")
    workers: Annotated[int, Field(ge=0)] = Field(0, description="Processes that load data; 0: the training's own.")

    @model_validator(mode="after")
    def _one_way_to_measure(self) -> Data:
        if self.eval is not None and self.hold_out is not None:
            raise ValueError("eval and hold_out are two ways to say what is measured on; give one")
        return self


class Schedule(Section):
    """A number that changes from step to step."""

    start: Finite = Field(description="At step 0.")
    end: Finite = Field(description="From step `steps` on.")
    steps: Count = Field(description="Optimizer steps from start to end.")
    shape: Literal["linear", "cosine"] = Field("linear", description="Of the way between.")


def _number_or_schedule(value: Any) -> str:
    return "schedule" if isinstance(value, (dict, Schedule)) else "number"


Weight = Annotated[Annotated[Finite, Tag("number")] | Annotated[Schedule, Tag("schedule")], Discriminator(_number_or_schedule)]
Temperature = Annotated[
    Annotated[Positive, Tag("number")] | Annotated[Schedule, Tag("schedule")], Discriminator(_number_or_schedule)
]


class MatchItem(BaseModel):
    """What is compared with what. Keys that are not listed here are arguments of the loss."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    teacher: str | None = Field(
        None,
        description="Address of the teacher's tensor; null: the student is compared with target.",
        examples=["encoder.layer.3"],
    )
    student: str = Field(description="Address of the student's tensor.", examples=["encoder.layer.0", ":logits"])
    loss: str = Field(
        "mse", description="Name of a loss, or package.module:function for one's own.", examples=["mse", "cosine", "kl"]
    )
    weight: Weight = Field(1.0, description="Factor in the total.")
    mask: str | int | None = Field(
        None, description="Valid positions: item of the batch, or address in the student.", examples=["attention_mask"]
    )
    target: str | int | None = Field(
        None, description="What the student is compared with, beside or instead of the teacher.", examples=["labels"]
    )
    selector: str | None = Field(None, description="Selector of both addresses, where they have none.", examples=["attention"])
    adapter: Literal["auto", "none", "linear", "conv", "resize"] = Field(
        "auto", description="Map from the student's shape to the teacher's. auto: where one is needed."
    )
    temperature: Temperature = Field(1.0, description="Divides logits before softmax.")
    teacher_model: str | None = Field(None, description="Which of several teachers.")
    layer_map: str = Field("uniform", description="How layers are paired where both addresses have wildcards.")
    inputs: dict[str, str | int] | None = Field(
        None,
        description="Further tensors for keywords of the loss: item of the batch, or address; what begins with teacher is an "
        "address in the teacher.",
        examples=[{"teacher_value": "encoder.layer.11.attention:value"}],
    )
    name: str | None = Field(None, description="Of the value in results. Default: student <- teacher: loss.")


class OldMatch(BaseModel):
    """An item of the older KnowledgeDistillation library's config."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["ts_distill", "hard_distill"] = Field(description="Compare with the teacher, or with labels.")
    teacher_layer_name: str | None = Field(None, description="Module path in the teacher.")
    teacher_layer_output_name: str | None = Field(None, description="Selector, such as output or attention.")
    student_layer_name: str = Field(description="Module path in the student.")
    student_layer_output_name: str = Field(description="Selector, such as output or attention.")
    loss: OldLoss = Field(description="Name and arguments of the loss.")
    weight: Weight = Field(1.0, description="Factor in the total.")
    mask: str | int | None = Field(None, description="Valid positions.")
    target: str | int | None = Field(None, description="What a hard_distill item compares with. Default: labels.")
    name: str | None = Field(None, description="Of the value in results.")
    adapter: Literal["auto", "none", "linear", "conv", "resize"] = Field("auto", description="Map between shapes.")
    temperature: Temperature = Field(1.0, description="Divides logits before softmax.")
    teacher_model: str | None = Field(None, description="Which of several teachers.")
    layer_map: str = Field("uniform", description="How layers are paired where both names have wildcards.")
    inputs: dict[str, str | int] | None = Field(None, description="Further tensors for keywords of the loss.")

    @model_validator(mode="after")
    def _teacher_is_named(self) -> OldMatch:
        parts = ("teacher_layer_name", "teacher_layer_output_name")
        missing = [name for name in parts if getattr(self, name) is None]
        if self.type == "ts_distill" and missing:
            raise ValueError(f"a ts_distill item needs the key {missing[0]}")
        return self


class OldLoss(Section):
    """A loss in the older library's config."""

    loss_function: str = Field(description="Its name.", examples=["mse", "cos", "mse_with_mask"])
    args: Arguments = Field({}, description="Its keyword arguments.")


_OLD_KEYS = {
    "type",
    "loss_function",
    *(f"{side}_layer_{part}" for side in ("teacher", "student") for part in ("name", "output_name")),
}


def kind_of_match(value: Any) -> str:
    """Whether an entry is in the older library's words."""
    old = isinstance(value, OldMatch) or (isinstance(value, dict) and not _OLD_KEYS.isdisjoint(value))
    return "old" if old else "match"


AnyMatch = Annotated[Annotated[OldMatch, Tag("old")] | Annotated[MatchItem, Tag("match")], Discriminator(kind_of_match)]


class Optimizer(Section):
    """An optimizer of torch.optim."""

    name: Literal["AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adagrad", "RMSprop", "Adafactor"] = Field(
        "AdamW", description="Its class."
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.01, description="For parameters of two and more dimensions; biases and norms have none."
    )
    arguments: Arguments = Field({}, description="Further keyword arguments of the class.", examples=[{"betas": [0.9, 0.98]}])


class Scheduler(Section):
    """The learning rate over the training: up from 0 in the warm-up, then this."""

    name: Literal["cosine", "linear", "constant", "one_cycle"] = Field("cosine", description="Down to 0; constant: not at all.")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Optimizer steps.")

    @model_validator(mode="after")
    def _warm_up_of_its_own(self) -> Scheduler:
        if self.name == "one_cycle" and self.warmup_steps:
            raise ValueError("one_cycle has a warm-up of its own; leave warmup_steps out")
        return self


class NamedMatches(Section):
    """A ready list of matches; `hookdistill recipes` prints their names and options."""

    recipe: str = Field(description="Its name.", examples=["minilm", "tinybert", "dkd"])
    arguments: Arguments = Field({}, description="Its options.")


class KeepItem(Section):
    """How one of the teacher's tensors is kept in the store."""

    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16", "int8", "float8"] = Field(
        "auto", description="auto: as the teacher makes it, which loses nothing; int8 and float8 with a scale for each token."
    )
    tokens: int | list[int] | str | None = Field(
        None, description="Only some tokens: positions, or an item of the batch that is nonzero where one is kept."
    )
    features: str | list[int] | None = Field(None, description="Only some of the last dimension.", examples=["0:256"])
    top_k: Count | None = Field(None, description="Of logits, the most likely classes and the mass of the others.")
    samples: Count | None = Field(None, description="Of logits, classes drawn at random: an unbiased estimate.")
    temperature: Positive = Field(1.0, description="Of the distribution that top_k and samples keep; that of the loss.")


class Store(Section):
    """The teacher's tensors on disk: `hookdistill cache` writes them once, `hookdistill train` reads them."""

    path: str = Field(description="A folder.", examples=["stores/mine"])
    keep: dict[str, KeepItem] = Field(
        {},
        description="How tensors are kept, by address. Default: whole, in their own dtype.",
        examples=[{":logits": {"top_k": 64}}],
    )
    key: str | list[str] | None = Field(
        None, description="Items of the batch that tell samples apart. Default: a hash of the teacher's inputs."
    )
    shard_bytes: Count = Field(256 * 2**20, description="Size of the files.")


class Start(Section):
    """The student starts as layers of the teacher, of the same widths."""

    layers: Literal["spread", "first", "last"] | list[Annotated[int, Field(ge=0)]] = Field(
        "spread", description="Which of the teacher's layers: evenly spread, the first or last ones, or positions from 0."
    )
    embeddings: bool = Field(True, description="Copy the embeddings as well.")
    head: bool = Field(True, description="Copy the head as well.")


class Training(Section):
    """How long, how fast, and where the student goes."""

    epochs: Count | None = Field(None, description="Passes over the training rows; this or max_steps.")
    max_steps: Count | None = Field(None, description="Optimizer steps; this or epochs.")
    lr: Positive = Field(1e-3, description="The optimizer's learning rate, at its highest.")
    optimizer: Optimizer = Field(default_factory=lambda: Optimizer.model_validate({}), description="Default: AdamW.")
    scheduler: Scheduler = Field(default_factory=lambda: Scheduler.model_validate({}), description="Default: cosine.")
    accumulate: Count | None = Field(None, description="Batches for one optimizer step. Default: accelerate's setting, 1.")
    clip_norm: Positive | None = Field(None, description="Largest norm of the gradient. Default: no limit.")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        None, description="Default: what accelerate launch says, else no."
    )
    evaluate_every: Literal["epoch"] | Count | None = Field("epoch", description="epoch, or a number of optimizer steps.")
    best: str | None = Field(None, description="The metric by whose value the best student is kept.", examples=["eval/loss"])
    higher_is_better: bool | None = Field(None, description="Of best. Default: unless it is a loss.")
    output_dir: str | None = Field(
        None, description="A folder that gets the students last and best, and recipe.yaml with every setting of the run."
    )
    patience: Count | None = Field(None, description="Evaluations without a better best after which the training ends.")
    load_best_at_end: bool = Field(False, description="Let the last student be the best one.")
    save_every: Literal["epoch"] | Count | None = Field(
        "epoch", description="Checkpoints to resume from: epoch, or a number of optimizer steps; null for none."
    )
    keep_last: Count | None = Field(2, description="How many checkpoints stay; null: all.")
    quick_resume: bool = Field(
        False,
        description="Skip to the place in the data without loading it again, where rows have no random numbers of their own.",
    )
    gradient_checkpointing: bool = Field(False, description="Of a transformers student: less memory, more time.")
    compile: bool | Literal["student", "teacher"] = Field(False, description="torch.compile of both models, or of one.")
    teacher_device: str | None = Field(None, description="Where the teacher runs. Default: where the student does.")
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Decay of an average of the student's weights that is measured and saved."
    )
    balance: Literal["magnitude", "gradnorm"] | None = Field(None, description="Factors on the weights of the matches.")
    on_nonfinite: Literal["error", "skip"] = Field(
        "error", description="When a loss is NaN or infinite: stop, or skip the step."
    )
    progress: bool = Field(True, description="A bar on stderr.")
    log_every: Count = Field(10, description="Optimizer steps between two lines of log.jsonl.")
    trackers: list[str] = Field([], description="accelerate's trackers.", examples=[["tensorboard"]])
    project: str = Field("hookdistill", description="Name of the run for the trackers.")
    report: bool | Literal["auto"] = Field(
        "auto", description="Write report.html at the end; auto: if there is an output_dir and matplotlib is installed."
    )
    deterministic: bool = Field(False, description="Only algorithms that give the same bits every time.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of initial weights, order of rows, dropout.")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.epochs is None) == (self.max_steps is None):
            given = "neither" if self.epochs is None else "both"
            raise ValueError(f"give epochs or max_steps, one of them, to say how long to train; {given} is given")
        return self


class Evaluator(Section):
    """What is measured on the held-out rows: a metric of the student, or a function of one's own."""

    metric: Literal["losses", "fidelity", "accuracy"] | None = Field(
        None,
        description="losses: those of the matches. fidelity: how near the student's tensors are to the teacher's. accuracy: "
        "how often the student's largest logit is the label.",
    )
    factory: str | None = Field(
        None,
        description="package.module:name of something that, called with the arguments, gives an Evaluator.",
        examples=["my_metrics:spearman"],
    )
    arguments: Arguments = Field({}, description="Keyword arguments of the factory.")
    logits: str = Field(":logits", description="For accuracy: address of the logits in the student.")
    labels: str = Field("labels", description="For accuracy: item of the batch; -100 is passed over.")

    @model_validator(mode="after")
    def _one_kind(self) -> Evaluator:
        if (self.metric is None) == (self.factory is None):
            raise ValueError("give metric or factory, one of them")
        return self


class Recipe(Section):
    """A whole distillation: who teaches whom, on what data, what is compared, and how it is trained."""

    teacher: Model | None = Field(
        None, description="The model that is imitated. Without one, the student learns from targets alone."
    )
    teachers: dict[str, Model] = Field({}, description="Several teachers by name, for teacher_model in the matches.")
    student: Model = Field(description="The model that is trained.")
    data: Data = Field(description="What is trained on.")
    initialize: Start | None = Field(None, description="Let the student start as layers of the teacher.")
    matches: Annotated[list[AnyMatch], Field(min_length=1)] | NamedMatches = Field(
        description="What is compared with what, by which loss: a list, or the name of a ready one."
    )
    store: Store | None = Field(None, description="The teacher's tensors on disk, so that it need not run again.")
    trainer: Training = Field(description="How it is trained.")
    import_from: list[str] = Field(
        [], description="Folders in which the modules of factories are looked for, beside the folder of the recipe."
    )
    evaluators: list[Evaluator] = Field([], description="Default: losses, where there are rows to measure on.")

    @model_validator(mode="after")
    def _teacher_or_teachers(self) -> Recipe:
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers are both given; give one")
        if self.store is not None and self.teacher is None:
            raise ValueError("store keeps the tensors of teacher, and there is none")
        if self.initialize is not None and self.teacher is None:
            raise ValueError("initialize copies layers of teacher, and there is none")
        measured = self.data.eval is not None or self.data.hold_out is not None
        if not measured and self.evaluators:
            raise ValueError("evaluators measure on data.eval or data.hold_out; give one of them")
        if self.trainer.best is not None and not measured:
            raise ValueError("trainer.best is measured on data.eval or data.hold_out; give one of them")
        return self


OldMatch.model_rebuild()
Recipe.model_rebuild()
