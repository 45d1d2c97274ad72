"""What holds for every loss: the same laws for all of them, and torch's own functions where there are any."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from hookdistill import losses
from hookdistill.errors import LossError
from loss_cases import COUPLED, LEARNED, MAPS

INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One loss with its extra arguments, and the kind of thing the student is compared with."""

    loss: str
    other: str = "tensor"
    args: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.loss, *(["probabilities"] if self.other == "probabilities" else []), *self.args])

    @property
    def function(self) -> Callable[..., Tensor]:
        function = partial(getattr(losses, self.loss), **self.args)
        return partial(with_likeliest_class, function) if self.loss == "dkd" else function

    def inputs(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Student, which wants a gradient, and what it is compared with; features or classes are the last dimension."""
        generator = torch.Generator().manual_seed(seed)
        student = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        other = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if self.other == "classes":
            return student, torch.randint(shape[-1], shape[:-1], generator=generator)
        return student, other.softmax(-1) if self.other == "probabilities" else other


def with_likeliest_class(loss: Callable[..., Tensor], student: Any, teacher: Any, **keywords: Any) -> Tensor:
    """A loss that needs labels too gets the teacher's likeliest class, so that its laws are those of two tensors."""
    real = isinstance(teacher, Tensor) and not teacher.is_complex() and -teacher.ndim <= keywords.get("dim", -1) < teacher.ndim
    target = teacher.argmax(keywords.get("dim", -1)) if real else torch.zeros(2, dtype=torch.long)
    return loss(student, teacher, target=target, **keywords)


FEATURES = [
    Case("mse"),
    Case("l1"),
    Case("smooth_l1"),
    Case("smooth_l1", args={"beta": 0.3}),
    Case("huber"),
    Case("huber", args={"delta": 0.3}),
    Case("cosine"),
    Case("normalized_mse"),
    Case("ofd", args={"margin": -0.5}),
    Case("margin_mse"),
    Case("embed_distill"),
    Case("embed_distill", args={"metric": "mse"}),
    Case("embed_distill", args={"metric": "cosine"}),
]
BOUNDARY = [Case("activation_boundary"), Case("activation_boundary", args={"margin": 0.2})]  # looks at the teacher's signs only
SMOOTH_DIVERGENCES = [
    Case("kl"),
    Case("kl", args={"temperature": 3.0}),
    Case("reverse_kl"),
    Case("js"),
    Case("js", args={"beta": 0.2}),
    Case("skew_kl"),
    Case("skew_kl", args={"alpha": 0.6}),
]
OF_METHODS = [
    Case("dkd", args={"beta": 2.0}),
    Case("dkd", args={"alpha": 0.5, "temperature": 3.0}),
    Case("logit_standardization"),
    Case("logit_standardization", args={"temperature": 2.0}),
    Case("top_k_kl", args={"k": 2}),
    Case("top_k_kl", args={"k": 3, "tail": False}),
]
DIVERGENCES = [*SMOOTH_DIVERGENCES, Case("tvd"), *OF_METHODS]
DISTRIBUTIONS = [*DIVERGENCES, Case("soft_cross_entropy")]
LABELS = [
    Case("cross_entropy", "classes"),
    Case("cross_entropy", "classes", {"label_smoothing": 0.2}),
    Case("cross_entropy", "probabilities"),
    Case("cross_entropy", "probabilities", {"label_smoothing": 0.2}),
]
PAIRS = [*FEATURES, *BOUNDARY, *DISTRIBUTIONS]
ALL = [*PAIRS, *LABELS]


TEXTBOOK = {"mse", "l1", "smooth_l1", "huber", "cosine", "normalized_mse", "kl", "soft_cross_entropy", "cross_entropy"}


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def gradient(value: Tensor, student: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, student)
    return found


def same(found: Tensor, expected: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(found, expected, **tolerance)


def test_every_registered_loss_is_tested():
    elsewhere = {
        *("attention_mse", "attention_kl", "relation_kl"),  # test_attention.py
        *(case.loss for case in (*MAPS, *LEARNED)),  # test_map_laws.py
        *(case.loss for case in COUPLED),  # test_sample_laws.py
        *("dist", "uld"),  # test_logit_methods.py
        *("reviewkd", "crd", "queue_kl"),  # test_states.py
    }
    ours = {name for name, spec in losses.registered_losses().items() if spec.function.__module__.startswith("hookdistill.")}
    assert {case.loss for case in ALL} | elsewhere == ours


# Shape of the functions


@pytest.mark.parametrize("name", sorted({case.loss for case in ALL}))
def test_signature_is_explicit(name):
    function = getattr(losses, name)
    parameters = list(inspect.signature(function).parameters.values())
    assert [p.kind for p in parameters[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert {p.kind for p in parameters[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {p.name: p.default for p in parameters}
    assert defaults["mask"] is None
    assert defaults["reduction"] == "mean"
    assert defaults["dim"] == -1
    assert "arXiv" in function.__doc__ or name in TEXTBOOK
    assert function.__doc__


@each(ALL)
def test_unreduced_loss_has_one_value_per_position(case):
    student, other = case.inputs(2, 3, 5)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    values = case.function(student, other, reduction="none", mask=mask)
    assert values.shape == (2, 3)
    assert (values[mask == 0] == 0).all()
    assert (values[mask == 1] != 0).all()
    same(case.function(student, other, reduction="sum", mask=mask), values.sum())
    same(case.function(student, other, reduction="mean", mask=mask), values.sum() / 4)


# Laws


@each(ALL)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradient_is_that_of_finite_differences(case, masked):
    student, other = case.inputs(2, 3, 4, seed=1)
    other.requires_grad_(case.other != "classes")
    mask = torch.tensor([[True, False, True], [False, True, True]]) if masked else None
    function = partial(case.function, mask=mask)
    assert gradcheck(function, (student, other))
    assert gradgradcheck(function, (student, other))


@each([*FEATURES, *DIVERGENCES])
def test_identical_inputs_cost_nothing(case):
    student, _ = case.inputs(4, 3, 7)
    value = case.function(student, student.detach())
    same(value, torch.zeros_like(value), atol=1e-14, rtol=0)
    same(gradient(value, student), torch.zeros_like(student), atol=1e-14, rtol=0)


@each([*FEATURES, *DIVERGENCES])
def test_different_inputs_cost_something(case):
    student, other = case.inputs(4, 3, 7)
    assert (case.function(student, other, reduction="none") > 1e-3).all()


@each([Case("tvd"), Case("tvd", args={"temperature": 2.0}), Case("l1")])
def test_a_tie_has_no_gradient_at_all(case):
    student, _ = case.inputs(4, 3, 7, dtype=torch.float32)
    assert (gradient(case.function(student, student.detach()), student) == 0).all()


@each(ALL)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    positions=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(2, 5),
    rank=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_mask_is_indexing_by_the_mask(case, positions, width, rank, seed):
    student, other = case.inputs(*positions, width, seed=seed)
    mask = torch.rand(positions[:rank], generator=torch.Generator().manual_seed(seed)) < 0.6
    for reduction in ("mean", "sum"):
        masked = case.function(student, other, mask=mask, reduction=reduction)
        indexed = case.function(student[mask], other[mask], reduction=reduction)
        same(masked, indexed)
        same(gradient(masked, student), gradient(indexed, student))


@each(ALL)
@pytest.mark.parametrize("poison", [float("nan"), INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_positions_get_no_gradient_whatever_they_hold(case, poison, reduction):
    student, other = case.inputs(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = gradient(case.function(student, other, mask=mask, reduction=reduction).sum(), student)
    poisoned = student.detach().masked_fill(~mask.unsqueeze(-1), poison).requires_grad_()
    if other.is_floating_point():
        other = other.masked_fill(~mask.unsqueeze(-1), poison).requires_grad_(case not in BOUNDARY)
    else:
        other = other.masked_fill(~mask, 10**6)  # no class has this index
    value = case.function(poisoned, other, mask=mask, reduction=reduction)
    value.sum().backward()
    assert value.isfinite().all()
    assert (poisoned.grad[~mask] == 0).all()
    same(poisoned.grad, expected)
    if other.requires_grad:
        assert (other.grad[~mask] == 0).all()
        assert other.grad.isfinite().all()


@each(ALL)
def test_two_half_batches_give_the_gradient_of_one_whole(case):
    student, other = case.inputs(4, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]])
    halves = [slice(0, 2), slice(2, 4)]
    whole = case.function(student, other, mask=mask)
    parts = [(case.function(student[h], other[h], mask=mask[h]), mask[h].sum() / mask.sum()) for h in halves]
    total = sum(value * share for value, share in parts)
    same(whole, total)
    same(gradient(whole, student), gradient(total, student))


@each(ALL)
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_dim_is_moving_the_axis(case, dim):
    student, other = case.inputs(2, 3, 4, 5)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    expected = case.function(student, other, mask=mask, reduction="none")
    moved = other if case.other == "classes" else other.movedim(-1, dim)
    same(case.function(student.movedim(-1, dim), moved, mask=mask, reduction="none", dim=dim), expected)


@each(ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_valid_is_zero_and_attached(case, reduction):
    student, other = case.inputs(2, 3, 5)
    value = case.function(student, other, mask=torch.zeros(2, 3), reduction=reduction)
    assert value.requires_grad
    assert (value == 0).all()
    assert (gradient(value.sum(), student) == 0).all()


@each(ALL)
def test_no_positions_are_zero_and_attached(case):
    student, other = case.inputs(0, 3, 5)
    value = case.function(student, other)
    assert value.requires_grad
    assert value == 0


@each([case for case in PAIRS if case not in BOUNDARY])
def test_both_sides_get_a_gradient(case):
    student, teacher = case.inputs(2, 3, 5)
    teacher.requires_grad_()
    case.function(student, teacher).backward()
    assert (student.grad != 0).any()
    assert (teacher.grad != 0).any()


# dtypes and devices


@each(ALL)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case, half):
    student, other = case.inputs(2, 3, 5, dtype=half)
    upcast = other.float() if other.is_floating_point() else other
    for reduction in ("mean", "sum", "none"):
        value = case.function(student, other, reduction=reduction)
        assert value.dtype is torch.float32
        same(value, case.function(student.float(), upcast, reduction=reduction), rtol=0, atol=0)
    assert gradient(case.function(student, other), student).dtype is half


@each(PAIRS)
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float32, torch.int64, torch.float32),
    ],
)
def test_mixed_dtypes_promote(case, student_dtype, teacher_dtype, expected):
    student, teacher = case.inputs(2, 3, 5)
    assert case.function(student.to(student_dtype), teacher.to(teacher_dtype)).dtype is expected


@each(ALL)
def test_nothing_is_read_on_the_host(case):
    """A tensor on the meta device has no values: whatever reads one raises."""
    student, other = case.inputs(2, 3, 5)
    student, other = student.detach().to("meta").requires_grad_(), other.to("meta")
    mask = torch.ones(2, 3, device="meta", dtype=torch.int64)
    heat = {}
    if losses.loss_spec(case.loss).accepts_temperature:
        heat = {"temperature": torch.ones((), device="meta")}
    value = case.function(student, other, mask=mask, **heat)
    value.backward()
    assert value.shape == ()
    assert student.grad.is_meta


@each(ALL)
def test_inputs_are_left_alone(case):
    student, other = case.inputs(2, 3, 5)
    before = student.detach().clone(), other.clone()
    case.function(student, other, mask=torch.tensor([[1, 0, 1], [1, 1, 0]])).backward()
    same(student.detach(), before[0], rtol=0, atol=0)
    same(other, before[1], rtol=0, atol=0)


# Features against torch

TORCH_FEATURES = [
    (Case("mse"), functional.mse_loss),
    (Case("l1"), functional.l1_loss),
    (Case("smooth_l1", args={"beta": 0.3}), partial(functional.smooth_l1_loss, beta=0.3)),
    (Case("smooth_l1", args={"beta": 0.0}), functional.l1_loss),
    (Case("huber", args={"delta": 0.3}), partial(functional.huber_loss, delta=0.3)),
]


@pytest.mark.parametrize(("case", "reference"), TORCH_FEATURES, ids=[str(case) for case, _ in TORCH_FEATURES])
def test_elementwise_losses_are_torchs(case, reference):
    student, teacher = case.inputs(3, 4, 6)
    same(case.function(student, teacher), reference(student, teacher))
    same(case.function(student, teacher, reduction="none"), reference(student, teacher, reduction="none").mean(-1))


def test_masked_mse_is_the_mean_over_valid_elements():
    student, teacher = Case("mse").inputs(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    same(losses.mse(student, teacher, mask=mask), functional.mse_loss(student[mask == 1], teacher[mask == 1]))


@pytest.mark.parametrize("factor", [1.0, 0.0, 1e-10], ids=["long", "zero", "short"])
@pytest.mark.parametrize("side", [0, 1])
def test_cosine_is_torchs(factor, side):
    inputs = [tensor.detach() for tensor in Case("cosine").inputs(4, 6)]
    inputs[side][0] *= factor
    student, teacher = inputs[0].requires_grad_(), inputs[1]
    found = losses.cosine(student, teacher)
    expected = 1 - functional.cosine_similarity(student, teacher, dim=-1).mean()
    same(found, expected)
    if factor != 1e-10:  # below its epsilon, torch's gradient is not the derivative of its value
        same(gradient(found, student), gradient(expected, student))


def test_cosine_of_short_vectors_has_the_derivative_of_its_value():
    student, teacher = Case("cosine").inputs(4, 6)
    student = (student.detach() * 1e-10).requires_grad_()
    found = gradient(losses.cosine(student, teacher, reduction="sum"), student)
    same(found, -functional.normalize(teacher, dim=-1) / 1e-8)


@pytest.mark.parametrize("loss", [losses.cosine, losses.normalized_mse])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_vectors_have_finite_first_and_second_derivatives(loss, dtype):
    student, teacher = torch.zeros(3, 4, dtype=dtype, requires_grad=True), torch.ones(3, 4, dtype=dtype)
    teacher[1] = 0
    first = torch.autograd.grad(loss(student, teacher), student, create_graph=True)[0]
    assert first.isfinite().all()
    assert gradient(first.float().sum(), student).isfinite().all()


def test_normalized_mse_is_twice_cosine():
    student, teacher = Case("cosine").inputs(3, 4, 6)
    same(losses.normalized_mse(student, teacher, reduction="none"), 2 * losses.cosine(student, teacher, reduction="none"))
    same(
        losses.normalized_mse(student, teacher),
        (functional.normalize(student, dim=-1) - functional.normalize(teacher, dim=-1)).square().sum(-1).mean(),
    )


def test_activation_boundary_pulls_each_neuron_to_the_teachers_side_of_zero():
    student = torch.tensor([2.0, 0.5, -0.5, -2.0, 0.5, -0.5])
    teacher = torch.tensor([3.0, 0.1, 0.1, -0.1, -3.0, 0.0])
    values = losses.activation_boundary(student.unsqueeze(-1), teacher.unsqueeze(-1), reduction="none")
    same(values, torch.tensor([0.0, 0.25, 2.25, 0.0, 2.25, 0.25]))


def test_activation_boundary_of_a_network_that_is_sure_costs_nothing():
    student, _ = Case("activation_boundary").inputs(4, 3, 7)
    sure = student.detach().sign() * (1 + student.detach().abs())
    assert losses.activation_boundary(sure, sure) == 0


def test_ofd_spares_what_is_below_a_target_that_is_not_positive():
    student = torch.tensor([-3.0, -0.5, 1.0, 2.0])
    teacher = torch.tensor([-2.0, -2.0, -2.0, 3.0])
    values = losses.ofd(student.unsqueeze(-1), teacher.unsqueeze(-1), margin=-1.0, reduction="none")
    same(values, torch.tensor([0.0, 0.25, 4.0, 1.0]))
    by_channel = losses.ofd(student, teacher, margin=torch.tensor([-1.0, -1.0, -2.0, -1.0]))
    same(by_channel, torch.tensor([0.0, 0.25, 9.0, 1.0]).mean())


def test_the_margin_of_ofd_is_the_mean_of_the_channels_negative_values():
    teacher = torch.tensor([[-1.0, 1.0], [-3.0, 2.0], [5.0, 3.0], [-100.0, -100.0]])
    student, mask = torch.randn(4, 2), torch.tensor([1, 1, 1, 0])
    same(losses.ofd(student, teacher, mask=mask), losses.ofd(student, teacher, mask=mask, margin=torch.tensor([-2.0, 0.0])))


def test_the_margin_of_a_batch_normalisation_is_its_expected_negative_value():
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 0.1]), torch.tensor([0.0, 1.0, -1.0, 5.0])
    draws = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * weight + bias
    negative = draws.clamp_max(0)
    expected = negative.sum(0) / (negative < 0).sum(0).clamp_min(1)
    found = losses.ofd_margin(weight, bias)
    same(found[:3].double(), expected[:3], rtol=0.02, atol=0)
    same(found[3], torch.tensor(-0.3))  # hardly ever negative: three deviations


def test_margin_mse_compares_the_margins_to_the_first_candidate():
    student, teacher = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[9.0, 8.0, 5.0]])
    same(losses.margin_mse(student, teacher), torch.tensor(((2.0 - 1) ** 2 + (3.0 - 4) ** 2) / 2))
    same(losses.margin_mse(student + 7, teacher - 3), losses.margin_mse(student, teacher))
    with pytest.raises(LossError, match=r"\[1, 1\] has just one"):
        losses.margin_mse(student[:, :1], teacher[:, :1])


def test_embed_distill_is_the_distance_of_its_metric():
    student, teacher = Case("embed_distill").inputs(4, 6)
    same(losses.embed_distill(student, teacher), (student - teacher).norm(dim=-1).mean())
    same(losses.embed_distill(student, teacher, metric="mse"), losses.mse(student, teacher))
    same(losses.embed_distill(student, teacher, metric="cosine"), losses.cosine(student, teacher))
    with pytest.raises(LossError, match="metric='l1'; it is 'l2', 'mse' or 'cosine'"):
        losses.embed_distill(student, teacher, metric="l1")


@pytest.mark.parametrize(
    ("loss", "margin"), [("activation_boundary", -1.0), ("activation_boundary", float("nan")), ("ofd", torch.zeros(3))]
)
def test_a_margin_out_of_range_is_refused(loss, margin):
    with pytest.raises(LossError, match=f"{loss} got a? ?margin"):
        getattr(losses, loss)(torch.zeros(2, 5), torch.zeros(2, 5), margin=margin)


# Distributions against torch and each other


def log_softmaxes(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_torchs_of_teacher_and_student(temperature):
    student, teacher = Case("kl").inputs(6, 7)
    log_s, log_t = log_softmaxes(student, teacher, temperature)
    forward = functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean") * temperature**2
    backward = functional.kl_div(log_t, log_s, log_target=True, reduction="batchmean") * temperature**2
    same(losses.kl(student, teacher, temperature=temperature), forward)
    same(losses.reverse_kl(student, teacher, temperature=temperature), backward)
    assert (forward - backward).abs() > 1e-3


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_js_is_the_mean_divergence_from_the_mixture(beta):
    student, teacher = Case("js").inputs(6, 7)
    log_s, log_t = log_softmaxes(student, teacher)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    divergence = partial(functional.kl_div, log_m, log_target=True, reduction="batchmean")
    same(losses.js(student, teacher, beta=beta), beta * divergence(log_t) + (1 - beta) * divergence(log_s))


def test_js_of_equal_shares_is_symmetric_and_bounded():
    student, teacher = Case("js").inputs(6, 7)
    same(losses.js(student, teacher), losses.js(teacher, student))
    far = losses.js(student * 1000, -student * 1000, reduction="none")
    assert (far <= torch.tensor(2.0).log() + 1e-12).all()
    assert (far > 0.69).all()


@pytest.mark.parametrize("alpha", [0.1, 0.6])
def test_skew_kl_is_the_divergence_from_the_mixture(alpha):
    student, teacher = Case("skew_kl").inputs(6, 7)
    log_s, log_t = log_softmaxes(student, teacher)
    log_m = (alpha * log_t.exp() + (1 - alpha) * log_s.exp()).log()
    expected = functional.kl_div(log_m, log_t, log_target=True, reduction="batchmean")
    same(losses.skew_kl(student, teacher, alpha=alpha), expected)


def test_tvd_is_half_the_l1_distance_of_the_probabilities():
    student, teacher = Case("tvd").inputs(6, 7)
    expected = 0.5 * functional.l1_loss(student.softmax(-1), teacher.softmax(-1), reduction="sum") / 6
    same(losses.tvd(student, teacher), expected)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_soft_cross_entropy_minus_the_teachers_entropy(temperature):
    student, teacher = Case("kl").inputs(6, 7)
    entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy().mean()
    soft = losses.soft_cross_entropy(student, teacher, temperature=temperature)
    divergence = losses.kl(student, teacher, temperature=temperature)
    same(divergence, soft - temperature**2 * entropy)
    same(gradient(divergence, student), gradient(soft, student))


def test_soft_cross_entropy_is_torchs():
    student, teacher = Case("kl").inputs(6, 7)
    same(losses.soft_cross_entropy(student, teacher), functional.cross_entropy(student, teacher.softmax(-1)))


@each([case for case in DISTRIBUTIONS if case.loss != "logit_standardization"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_temperature_divides_the_logits_and_multiplies_by_its_square(case, as_tensor):
    function = replace(case, args={key: value for key, value in case.args.items() if key != "temperature"}).function
    student, teacher = case.inputs(6, 7)
    temperature = torch.tensor(2.5) if as_tensor else 2.5
    same(function(student, teacher, temperature=temperature), 6.25 * function(student / 2.5, teacher / 2.5))


@each([Case(name) for name in ("kl", "reverse_kl", "js", "skew_kl", "soft_cross_entropy")])
def test_temperature_leaves_the_gradient_its_size(case):
    student, teacher = case.inputs(6, 7)
    student, teacher = (student.detach() * 0.01).requires_grad_(), teacher * 0.01
    cold = gradient(case.function(student, teacher), student).norm()
    hot = gradient(case.function(student, teacher, temperature=10.0), student).norm()
    same(hot / cold, torch.ones_like(cold), rtol=0.02, atol=0)


def test_temperature_may_be_learned():
    student, teacher = Case("kl").inputs(6, 7)
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda heat: losses.kl(student.detach(), teacher, temperature=heat), (temperature,))


def test_a_temperature_of_higher_precision_does_not_change_the_dtype():
    student, teacher = torch.randn(5), torch.randn(5)
    heat = torch.tensor(2.0, dtype=torch.float64)
    assert losses.kl(student, teacher, temperature=heat).dtype is torch.float32


@each([*DISTRIBUTIONS, Case("cross_entropy", "classes"), Case("cross_entropy", "probabilities")])
def test_a_class_that_neither_side_allows_might_as_well_not_be_there(case):
    student, other = case.inputs(6, 7)
    padding = torch.full((6, 2), -INF, dtype=student.dtype)
    padded = torch.cat([student, padding], -1).detach().requires_grad_()
    padded_other = other
    if case.other != "classes":
        padded_other = torch.cat([other, padding.exp() if case.other == "probabilities" else padding], -1)
        padded_other.requires_grad_()
    expected, found = case.function(student, other), case.function(padded, padded_other)
    same(found, expected)
    found.backward()
    same(padded.grad[:, :7], gradient(expected, student))
    assert (padded.grad[:, 7:] == 0).all()
    if case.other == "tensor":
        assert padded_other.grad.isfinite().all()


def excluded_and_nearly(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Two copies whose third class is impossible, and so unlikely that its probability is zero."""
    excluded, nearly = tensor.detach().clone(), tensor.detach().clone()
    excluded[:, 2], nearly[:, 2] = -INF, -1e4
    return excluded.requires_grad_(), nearly.requires_grad_()


@each([case for case in DISTRIBUTIONS if case.loss not in ("reverse_kl", "logit_standardization") and "tail" not in case.args])
def test_a_class_that_only_the_teacher_excludes(case):
    student, teacher = case.inputs(6, 7)
    excluded, nearly = excluded_and_nearly(teacher)
    found, expected = case.function(student, excluded), case.function(student, nearly)
    same(found, expected)
    same(gradient(found, student), gradient(expected, student))
    assert (gradient(case.function(student, excluded), student)[:, 2] != 0).all()
    assert gradient(case.function(student, excluded), excluded).isfinite().all()


@each([case for case in DISTRIBUTIONS if case.loss in ("reverse_kl", "js", "skew_kl", "tvd")])
def test_a_class_that_only_the_student_excludes(case):
    student, teacher = case.inputs(6, 7)
    excluded, nearly = excluded_and_nearly(student)
    found, expected = case.function(excluded, teacher), case.function(nearly, teacher)
    same(found, expected)
    same(gradient(found, excluded), gradient(expected, nearly))


def test_the_divergences_that_are_infinite_say_so():
    student, teacher = Case("kl").inputs(6, 7)
    assert losses.kl(excluded_and_nearly(student)[0], teacher) == INF
    assert losses.soft_cross_entropy(excluded_and_nearly(student)[0], teacher) == INF
    assert losses.reverse_kl(student, excluded_and_nearly(teacher)[0]) == INF


@each(DISTRIBUTIONS)
def test_probabilities_that_underflow_stay_finite(case):
    student = torch.tensor([[0.0, 500.0, -INF], [300.0, 0.0, -300.0]], requires_grad=True)
    teacher = torch.tensor([[500.0, 0.0, -INF], [0.0, -300.0, 300.0]], requires_grad=True)
    value = case.function(student, teacher, reduction="none")
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad.isfinite().all()
    assert teacher.grad.isfinite().all()


@each([Case("kl"), Case("reverse_kl"), Case("js"), Case("soft_cross_entropy")])
def test_a_probability_that_underflows_may_meet_an_excluded_class(case):
    underflows, excludes = torch.tensor([0.0, -200.0, 1.0]), torch.tensor([1.0, -INF, 0.0])
    student, teacher = (underflows, excludes) if case.loss == "reverse_kl" else (excludes, underflows)
    student.requires_grad_()
    value = case.function(student, teacher)
    same(value, case.function(student[::2], teacher[::2]))
    assert gradient(value, student).isfinite().all()


# Labels


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torchs(smoothing):
    student, target = Case("cross_entropy", "classes").inputs(4, 3, 7)
    target[0, 1] = target[2] = -100
    expected = functional.cross_entropy(student.flatten(0, 1), target.flatten(), label_smoothing=smoothing)
    found = losses.cross_entropy(student, target, label_smoothing=smoothing)
    same(found, expected)
    same(gradient(found, student), gradient(expected, student))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_probabilities_is_torchs(smoothing):
    student, target = Case("cross_entropy", "probabilities").inputs(6, 7)
    expected = functional.cross_entropy(student, target, label_smoothing=smoothing)
    same(losses.cross_entropy(student, target, label_smoothing=smoothing), expected)


@pytest.mark.parametrize("other", ["classes", "probabilities"])
def test_cross_entropy_along_dim_1_is_torchs_of_a_segmentation(other):
    student, target = Case("cross_entropy", other).inputs(2, 4, 3, 5)
    student = student.movedim(-1, 1)
    target = target if other == "classes" else target.movedim(-1, 1)
    same(losses.cross_entropy(student, target, dim=1), functional.cross_entropy(student, target))


def test_ignored_labels_are_masked_positions():
    student, target = Case("cross_entropy", "classes").inputs(4, 3, 7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 0, 1]])
    ignored = target.masked_fill(mask == 0, 3)
    also = torch.tensor([1, 1, 0, 1])
    kept = (mask * also.unsqueeze(-1)).bool() & (target != 3)
    same(
        losses.cross_entropy(student, ignored, ignore_index=3, mask=also),
        losses.cross_entropy(student[kept], target[kept]),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_class_indices_may_be_any_integers(dtype):
    student, target = Case("cross_entropy", "classes").inputs(4, 7)
    same(losses.cross_entropy(student, target.to(dtype)), losses.cross_entropy(student, target))


@pytest.mark.parametrize("other", ["classes", "probabilities"])
@pytest.mark.parametrize("mask", [None, [[1, 1, 0, 0], [1, 1, 1, 0]], [1, 0]], ids=["whole", "tokens", "batch"])
def test_causal_shift_predicts_the_next_token(other, mask):
    student, target = Case("cross_entropy", other).inputs(2, 4, 7)
    mask = None if mask is None else torch.tensor(mask)
    shifted_mask = mask if mask is None or mask.ndim == 1 else mask[:, 1:]
    found = losses.cross_entropy(student, target, mask=mask, causal_shift=True)
    same(found, losses.cross_entropy(student[:, :-1], target[:, 1:], mask=shifted_mask))
    assert (gradient(found, student)[:, -1] == 0).all()


def test_causal_shift_of_labels_with_ignored_ones_is_transformers_loss():
    student, target = Case("cross_entropy", "classes").inputs(2, 4, 7)
    target[0, :2] = -100
    expected = functional.cross_entropy(student[:, :-1].flatten(0, 1), target[:, 1:].flatten())
    same(losses.cross_entropy(student, target, causal_shift=True), expected)


def test_causal_shift_of_a_single_token_is_zero():
    student, target = Case("cross_entropy", "classes").inputs(2, 1, 7)
    value = losses.cross_entropy(student, target, causal_shift=True)
    assert value == 0
    assert value.requires_grad


# Errors


@each(PAIRS)
def test_different_shapes_are_refused_with_both(case):
    with pytest.raises(LossError, match=r"student \[2, 5\] and teacher \[2, 6\]"):
        case.function(torch.zeros(2, 5), torch.zeros(2, 6))


def test_different_widths_point_to_adapters():
    with pytest.raises(LossError, match=r"mse .*widths 5 and 6 along dim -1.*adapter="):
        losses.mse(torch.zeros(2, 5), torch.zeros(2, 6))


def test_different_ranks_are_refused():
    with pytest.raises(LossError, match=r"student \[2, 5\] and teacher \[2, 1, 5\]"):
        losses.mse(torch.zeros(2, 5), torch.zeros(2, 1, 5))


def test_different_vocabularies_are_named():
    with pytest.raises(LossError, match=r"vocabularies differ, 5 and 6 classes along dim -1"):
        losses.kl(torch.zeros(2, 5), torch.zeros(2, 6))


def test_different_positions_are_not_blamed_on_the_vocabulary():
    with pytest.raises(LossError, match="differ in their positions"):
        losses.kl(torch.zeros(2, 5), torch.zeros(3, 5))


@each(ALL)
def test_an_integer_student_is_refused(case):
    student, other = case.inputs(2, 5)
    with pytest.raises(LossError, match=r"floating-point student.*torch\.int64"):
        case.function(student.long(), other)


@each(ALL)
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_no_tensor_is_refused(case, side):
    inputs = list(case.inputs(2, 5))
    inputs[side] = [1.0]
    with pytest.raises(LossError, match=r"compares tensors, but the (student|teacher|target) is a list"):
        case.function(*inputs)


@each(PAIRS)
def test_a_complex_teacher_is_refused(case):
    with pytest.raises(LossError, match=r"real numbers.*torch\.complex64"):
        case.function(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.complex64))


@each(ALL)
def test_an_unknown_reduction_is_refused(case):
    with pytest.raises(LossError, match="No reduction is called 'batchmean'; there are 'mean', 'sum', 'none'"):
        case.function(*case.inputs(2, 5), reduction="batchmean")


@each(ALL)
def test_a_mask_that_does_not_fit_is_refused(case):
    with pytest.raises(LossError, match=r"mask \[3\] does not fit the positions \[2, 3\].*\[2\] or \[2, 3\] would fit"):
        case.function(*case.inputs(2, 3, 5), mask=torch.ones(3))


@each(ALL)
def test_a_dim_that_is_not_there_is_refused(case):
    with pytest.raises(LossError, match=r"dim=2.*\[2, 5\] has 2 dimensions"):
        case.function(*case.inputs(2, 5), dim=2)


@each(DISTRIBUTIONS)
@pytest.mark.parametrize("temperature", [0.0, -1.0, INF, float("nan"), "2", None])
def test_a_temperature_that_is_not_positive_is_refused(case, temperature):
    with pytest.raises(LossError, match=f"{case.loss} got temperature=.* greater than zero"):
        case.function(*case.inputs(2, 5), temperature=temperature)


def test_several_temperatures_are_refused():
    with pytest.raises(LossError, match=r"one temperature.*\[2\]"):
        losses.kl(torch.zeros(2, 5), torch.zeros(2, 5), temperature=torch.ones(2))


@pytest.mark.parametrize(("loss", "argument"), [(losses.js, "beta"), (losses.skew_kl, "alpha")])
@pytest.mark.parametrize("share", [0, 1, -0.1, 1.1, float("nan"), None])
def test_a_share_outside_0_to_1_is_refused(loss, argument, share):
    with pytest.raises(LossError, match=f"got {argument}={share}; .* both excluded.*'kl'"):
        loss(torch.zeros(2, 5), torch.zeros(2, 5), **{argument: share})


def test_a_negative_beta_is_refused():
    with pytest.raises(LossError, match=r"smooth_l1 got beta=-1"):
        losses.smooth_l1(torch.zeros(2, 5), torch.zeros(2, 5), beta=-1)


def test_a_delta_of_zero_is_refused():
    with pytest.raises(LossError, match=r"huber got delta=0"):
        losses.huber(torch.zeros(2, 5), torch.zeros(2, 5), delta=0)


def test_a_label_smoothing_above_one_is_refused():
    with pytest.raises(LossError, match=r"label_smoothing=1\.5"):
        losses.cross_entropy(torch.zeros(2, 5), torch.zeros(2).long(), label_smoothing=1.5)


@pytest.mark.parametrize("target", [torch.zeros(3).long(), torch.zeros(2, 5).long(), torch.zeros(2)])
def test_a_target_of_another_shape_is_refused(target):
    with pytest.raises(LossError, match=r"logits \[2, 5\].*integers of shape \[2\].*floating-point of shape \[2, 5\]"):
        losses.cross_entropy(torch.zeros(2, 5), target)


def test_a_segmentation_target_points_to_dim():
    with pytest.raises(LossError, match="pass dim=1"):
        losses.cross_entropy(torch.zeros(2, 5, 3, 4), torch.zeros(2, 3, 4).long())


def test_a_causal_shift_without_tokens_is_refused():
    with pytest.raises(LossError, match=r"dimension of tokens; the student is \[5\]"):
        losses.cross_entropy(torch.zeros(5), torch.tensor(1), causal_shift=True)
