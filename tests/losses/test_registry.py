"""Losses by name, and what is found out about a callable."""

import functools
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from hookdistill import losses
from hookdistill.errors import LossError
from hookdistill.losses import LossSpec, loss_spec, register_loss, registered_losses, registry

COMPARES = {
    "features": "mse l1 smooth_l1 huber cosine normalized_mse activation_boundary ofd ickd cwd embed_distill queue_kl",
    "logits": "kl reverse_kl js skew_kl tvd soft_cross_entropy dkd dist logit_standardization uld top_k_kl",
    "labels": "cross_entropy",
    "attention": "attention_mse attention_kl relation_kl",
    "relations": "attention_transfer similarity_preserving fsp nst pkt rkd_distance rkd_angle correlation_congruence cka "
    "vid factor_transfer mgd reviewkd crd margin_mse",
}
OF_LOGITS = ("target", "ignore_index", "causal_shift", "vocabulary", "dim")
STATEFUL = {"vid", "mgd", "factor_transfer", "reviewkd", "crd", "queue_kl"}


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))


def nothing(student, teacher, mask=None, *, scale=1.0):
    return (student - teacher).sum() * scale


@pytest.mark.parametrize(("name", "compares"), [(name, kind) for kind, names in COMPARES.items() for name in names.split()])
def test_built_in_losses_are_known_by_name(name, compares):
    spec = loss_spec(name)
    assert spec.name == name
    assert spec.function is getattr(losses, name)
    assert spec.compares == compares
    assert spec.accepts_mask
    assert not spec.accepts_any
    assert spec.accepts_temperature == (compares == "logits" or name == "cwd")
    assert (spec.state is not None) == (name in STATEFUL)
    assert name in losses.__all__
    assert registered_losses()[name] == spec


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mse", ("dim",)),
        ("huber", ("delta", "dim")),
        ("js", ("beta", "temperature", "target", "ignore_index", "causal_shift", "vocabulary", "dim")),
        ("cross_entropy", ("label_smoothing", "ignore_index", "causal_shift", "dim")),
    ],
)
def test_parameters_are_the_keywords_beside_tensors_mask_and_reduction(name, parameters):
    assert loss_spec(name).parameters == parameters


def test_a_registered_loss_is_returned_unchanged_and_found():
    assert register_loss("mine", compares="features")(nothing) is nothing
    assert loss_spec("mine") == LossSpec(
        name="mine",
        function=nothing,
        compares="features",
        parameters=("scale",),
        accepts_mask=True,
        accepts_reduction=False,
        accepts_temperature=False,
        accepts_any=False,
    )
    assert loss_spec(nothing) == loss_spec("mine")


def test_what_is_registered_is_a_copy():
    registered_losses().clear()
    assert registered_losses()


def test_a_spec_is_frozen():
    with pytest.raises(FrozenInstanceError):
        loss_spec("mse").name = "other"


def test_a_definition_that_runs_again_replaces_itself():
    def define(scale):
        @register_loss("of_a_notebook")
        def of_a_notebook(student, teacher, mask=None):
            return scale * (student - teacher).square().mean()

        return of_a_notebook

    define(1)
    second = define(2)
    assert loss_spec("of_a_notebook").function is second


def test_a_name_cannot_be_taken_twice():
    register_loss("mine")(nothing)
    register_loss("mine")(nothing)
    with pytest.raises(LossError, match=r"'mine' already stands for the loss .*nothing; register .*<lambda> under"):
        register_loss("mine")(lambda student, teacher: nothing(student, teacher))
    with pytest.raises(LossError, match=r"'kl' already stands for the loss hookdistill\.losses\.logits\.kl"):
        register_loss("kl")(nothing)
    assert loss_spec("mine").function is nothing


def test_an_unknown_name_lists_the_nearest_and_all():
    with pytest.raises(LossError) as error:
        loss_spec("cross_entrpy")
    assert "No loss is called 'cross_entrpy'. Did you mean 'cross_entropy'" in str(error.value)
    assert all(f"'{name}'" in str(error.value) for name in registered_losses())


def test_the_decorator_wants_a_name():
    with pytest.raises(LossError, match=r'@register_loss\("my_loss"\)'):
        register_loss(nothing)
    with pytest.raises(LossError, match="got ''"):
        register_loss("")


def test_what_is_compared_is_one_of_six():
    known = "'features', 'logits', 'labels', 'attention', 'relations', 'any'"
    with pytest.raises(LossError, match=f"'mine' cannot compare 'hidden'.*{known}"):
        register_loss("mine", compares="hidden")


def test_a_class_is_refused():
    with pytest.raises(LossError, match=r"MSELoss is a class; .* MSELoss\(\)"):
        loss_spec(nn.MSELoss)
    with pytest.raises(LossError, match="is a class"):
        register_loss("mine")(nn.MSELoss)


@pytest.mark.parametrize("loss", [3, None, torch.zeros(2)], ids=["int", "None", "Tensor"])
def test_what_cannot_be_called_is_refused(loss):
    with pytest.raises(LossError, match=f"a registered name or a callable.*a {type(loss).__name__}"):
        loss_spec(loss)


@pytest.mark.parametrize("loss", [lambda: 0, lambda student: 0, lambda student, *, teacher: 0])
def test_a_loss_takes_two_tensors(loss):
    with pytest.raises(LossError, match=r"takes [01] positional arguments; it is called with two"):
        loss_spec(loss)


def test_a_signature_that_cannot_be_read_is_refused():
    with pytest.raises(LossError, match=r"dist cannot be read; wrap it in a function"):
        loss_spec(torch.dist)


def test_a_function():
    spec = loss_spec(nothing)
    assert (spec.name, spec.function, spec.compares) == ("nothing", nothing, "any")
    assert (spec.parameters, spec.accepts_mask, spec.accepts_temperature) == (("scale",), True, False)


def test_a_lambda():
    spec = loss_spec(lambda s, t: s - t)
    assert (spec.name, spec.parameters, spec.accepts_mask, spec.accepts_any) == ("<lambda>", (), False, False)


def test_any_keywords_include_a_mask_but_ask_for_no_temperature():
    spec = loss_spec(lambda s, t, scale=1, **rest: s - t)
    assert (spec.parameters, spec.accepts_any) == (("scale",), True)
    assert (spec.accepts_mask, spec.accepts_temperature) == (True, False)


def test_any_positional_arguments_include_the_two_tensors():
    assert loss_spec(lambda *tensors, temperature=1.0: 0).accepts_temperature


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, mask=None, power=2):
        return self.scale * losses.mse(student, teacher, mask=mask)


def test_a_module_is_described_by_its_forward():
    loss = Scaled()
    spec = loss_spec(loss)
    assert (spec.name, spec.parameters, spec.accepts_mask, spec.accepts_any) == ("Scaled", ("power",), True, False)
    assert spec.function is loss
    assert not loss_spec(nn.MSELoss()).accepts_mask


def test_a_compiled_module_is_described_by_its_forward():
    spec = loss_spec(torch.compile(Scaled(), backend="eager"))
    assert (spec.name, spec.parameters) == ("Scaled", ("power",))


def test_an_object_with_call():
    class Callable:
        def __call__(self, student, teacher, temperature=1.0):
            return student - teacher

    spec = loss_spec(Callable())
    assert (spec.name, spec.parameters, spec.accepts_temperature) == ("Callable", ("temperature",), True)


def test_what_a_partial_has_bound_is_decided():
    loss = functools.partial(losses.js, temperature=4.0)
    spec = loss_spec(loss)
    assert spec.function is loss
    assert (spec.name, spec.compares) == ("js", "logits")
    assert (spec.parameters, spec.accepts_temperature, spec.accepts_mask) == (("beta", *OF_LOGITS), False, True)
    assert not loss_spec(functools.partial(losses.js, mask=torch.ones(2))).accepts_mask
    assert not loss_spec(functools.partial(lambda s, t, **rest: 0, mask=None)).accepts_mask


def test_a_partial_of_a_module():
    spec = loss_spec(functools.partial(Scaled(), power=3))
    assert (spec.name, spec.parameters, spec.accepts_mask) == ("Scaled", (), True)


class Scale(nn.Module):
    def __init__(self, student, teacher, *, start=2.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(start))


def test_a_loss_with_a_state():
    def scaled(student, teacher, *, scale, power=2, mask=None):
        return scale * losses.mse(student, teacher, mask=mask)

    register_loss("scaled", state=Scale)(scaled)
    spec = loss_spec("scaled")
    assert (spec.state, spec.state_parameters, spec.required) == (Scale, ("start",), ("scale",))
    assert loss_spec(functools.partial(scaled, power=3)).state is Scale
    assert loss_spec("vid").required == ("regressor", "scale")
    assert loss_spec("crd").state_parameters == ("samples", "width", "index")
    assert loss_spec("kl").state is None


def test_a_state_is_made_of_two_tensors():
    with pytest.raises(LossError, match=r"state= of the loss 'mine' takes 0 positional arguments.*two, the student's"):
        register_loss("mine", state=lambda: nn.Identity())
    with pytest.raises(LossError, match=r"state= of the loss 'mine' is a class or function .* got 3"):
        register_loss("mine", state=3)


def test_a_registered_partial_is_itself():
    loss = functools.partial(losses.kl, temperature=4.0)
    register_loss("warm_kl", compares="logits")(loss)
    assert loss_spec(loss) == loss_spec("warm_kl")
    assert loss_spec("warm_kl").parameters == OF_LOGITS
    assert loss_spec("kl").function is losses.kl


def test_a_wrapped_or_compiled_loss_keeps_its_meaning():
    @functools.wraps(losses.kl)
    def counted(*args, **kwargs):
        return losses.kl(*args, **kwargs)

    for loss in (counted, torch.compile(losses.kl, backend="eager")):
        spec = loss_spec(loss)
        assert (spec.name, spec.compares, spec.function) == ("kl", "logits", loss)
        assert spec.parameters == ("temperature", *OF_LOGITS)
