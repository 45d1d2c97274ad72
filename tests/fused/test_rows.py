"""Closed forms of row-wise losses against their definitions under autograd, and what must hold of any fast form."""

import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from hookdistill import DistillationLoss, Match, MatchError, losses
from hookdistill.fused.compiler import compiled_block, compiler_available
from hookdistill.fused.forms import FORMS
from hookdistill.fused.rows import RowTask, RowTerm, block_losses, blocks, run_rows

ARGUMENTS = {"smooth_l1": {"beta": 0.3}, "huber": {"delta": 0.4}, "js": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}}
NAMES = list(FORMS)
DISTRIBUTIONS = [name for name, form in FORMS.items() if form.family == "distributions"]
MANY = 10**9


def drawn(name, *shape, dtype=torch.float64, seed=0, spread=1.0):
    """Student, and what it is compared with."""
    draw = torch.Generator().manual_seed(seed)
    student = (torch.randn(shape, generator=draw, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    other = (torch.randn(shape, generator=draw, dtype=torch.float64) * spread).to(dtype)
    if FORMS[name].family == "labels":
        other = torch.randint(shape[-1], shape[:-1], generator=draw)
    return student, other


def term(name, other, **kwargs):
    constants = {**FORMS[name].constants, **kwargs.pop("constants", ARGUMENTS.get(name, {}))}
    return RowTerm(form=FORMS[name], other=other, constants=tuple(constants.items()), **kwargs)


def defined(name, student, other, *, mask=None, coefficient=1.0, **kwargs):
    """Value and gradient by the definition, under autograd."""
    arguments = {**ARGUMENTS.get(name, {}), **kwargs}
    value = getattr(losses, name)(student, other, mask=mask, **arguments)
    (gradient,) = torch.autograd.grad(value * coefficient, student)
    return value.detach(), gradient


def computed(name, student, other, **kwargs):
    """One term in closed form, in small blocks."""
    task = RowTask(student=student, terms=[term(name, other, **kwargs)])
    return run_rows(task, block_losses, most=20, gradient=True)


def error(found, true):
    return ((found.double() - true.double()).norm() / true.double().norm().clamp_min(1e-30)).item()


def heat(name):
    return {"temperature": 2.5} if FORMS[name].family == "distributions" else {}


@pytest.mark.parametrize("most", [1, 40, MANY], ids=["row by row", "blocks", "whole"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", NAMES)
def test_a_closed_form_is_its_definition_in_float64(name, masked, most):
    student, other = drawn(name, 3, 7, 11)
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    value, gradient = defined(name, student, other, mask=mask, coefficient=0.7, **heat(name))
    task = RowTask(student=student, terms=[term(name, other, valid=mask, coefficient=0.7, **heat(name))])
    found = run_rows(task, block_losses, most=most, gradient=True)
    torch.testing.assert_close(found.values, value[None], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.total, value * 0.7, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_its_error_is_that_of_the_definition_in_the_same_dtype(name, dtype):
    student, other = drawn(name, 8, 300, dtype=dtype, spread=3.0)
    exact = student.detach().double().requires_grad_()
    _, truth = defined(name, exact, other if FORMS[name].family == "labels" else other.double(), **heat(name))
    _, eager = defined(name, student, other, **heat(name))
    task = RowTask(student=student, terms=[term(name, other, **heat(name))])
    ours = run_rows(task, block_losses, most=1000, gradient=True).gradient.to(dtype)
    assert error(ours, truth) <= 1.5 * error(eager, truth) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences_agree(name):
    student, other = drawn(name, 2, 3, 5)
    target = {"target": "y"} if FORMS[name].family == "labels" else {}
    match = Match(None if target else "", "", loss=name, **target, **ARGUMENTS.get(name, {}), **heat(name))
    loss = DistillationLoss([match])

    def total(student):
        return loss({"": {"output": other}}, {"": {"output": student}}, {"y": other}).total

    assert gradcheck(total, student)


def test_all_terms_of_one_tensor_are_one_pass_and_one_gradient():
    student, other = drawn("kl", 4, 6, 30)
    second = torch.randn(4, 6, 30, dtype=torch.float64)
    labels = torch.randint(30, (4, 6))
    mask = torch.rand(4, 6) < 0.5
    terms = [
        ("kl", other, {"temperature": 2.0, "mask": mask}, 0.5),
        ("reverse_kl", other, {"temperature": 2.0}, 2.0),
        ("tvd", second, {"temperature": 1.0}, 1.0),
        ("js", second, {"temperature": 4.0, "mask": mask}, 3.0),
        ("cross_entropy", labels, {"mask": mask, "label_smoothing": 0.1}, 0.25),
        ("mse", other, {}, 1.5),
    ]
    expected = [defined(name, student, with_, coefficient=weight, **arguments) for name, with_, arguments, weight in terms]
    rows = []
    for name, with_, arguments, weight in terms:
        constants = {**ARGUMENTS.get(name, {}), **{key: value for key, value in arguments.items() if key == "label_smoothing"}}
        options = {"valid": arguments.get("mask"), "temperature": arguments.get("temperature", 1.0), "coefficient": weight}
        rows.append(term(name, with_, constants=constants, **options))
    found = run_rows(RowTask(student=student, terms=rows), block_losses, most=200, gradient=True)
    torch.testing.assert_close(found.values, torch.stack([value for value, _ in expected]))
    torch.testing.assert_close(found.gradient, sum(gradient for _, gradient in expected))


@pytest.mark.parametrize("arrange", ["slice", "transpose", "expand", "offset", "every other"])
@pytest.mark.parametrize("name", ["mse", "cosine", "kl"])
def test_any_strides(name, arrange):
    arrangements = {
        "slice": lambda x: x[:, 1:, 2:],
        "transpose": lambda x: x.transpose(0, 1),
        "expand": lambda x: x[:1].expand(5, -1, -1),
        "offset": lambda x: x.flatten()[3 : 3 + 5 * 6 * 7].view(5, 6, 7),
        "every other": lambda x: x[..., ::2],
    }
    base, other = (tensor.detach() for tensor in drawn(name, 5, 8, 12))
    student = arrangements[arrange](base).requires_grad_()
    teacher = arrangements[arrange](other)
    value, gradient = defined(name, student, teacher)
    for most in (1, 50, MANY):
        for theirs in (teacher, teacher.contiguous()):
            found = run_rows(RowTask(student=student, terms=[term(name, theirs)]), block_losses, most=most, gradient=True)
            torch.testing.assert_close(found.values, value[None])
            torch.testing.assert_close(found.gradient, gradient)


@pytest.mark.parametrize("mask", [None, (3,), (3, 4), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", ["mse", "smooth_l1", "cosine", "kl"])
def test_channels_may_come_first(name, mask):
    student, other = drawn(name, 3, 6, 4, 5)
    valid = None if mask is None else torch.rand(mask) < 0.6
    value, gradient = defined(name, student, other, dim=1, mask=valid)
    expanded = None if valid is None else losses.reduction.fit_mask(valid, (3, 4, 5))
    for most in (1, 100, MANY):
        task = RowTask(student=student, dim=1, terms=[term(name, other, valid=expanded)])
        found = run_rows(task, block_losses, most=most, gradient=True)
        torch.testing.assert_close(found.values, value[None])
        torch.testing.assert_close(found.gradient, gradient)


@pytest.mark.parametrize("shape", [(7,), (1, 1), (1, 9), (13, 1), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("name", ["mse", "normalized_mse", "kl"])
def test_small_shapes(name, shape):
    student, other = drawn(name, *shape)
    value, gradient = defined(name, student, other)
    found = run_rows(RowTask(student=student, terms=[term(name, other)]), block_losses, most=3, gradient=True)
    torch.testing.assert_close(found.values, value[None])
    torch.testing.assert_close(found.gradient, gradient)


LOGIT_ARGUMENTS = {
    "target": {"target": torch.randint(9, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100)},
    "other ignored": {"target": torch.randint(9, (3, 5)), "ignore_index": 4},
    "shift": {"causal_shift": True},
    "shift, mask and target": {"causal_shift": True, "mask": torch.rand(3, 5) < 0.6, "target": torch.randint(9, (3, 5))},
    "sum": {"reduction": "sum"},
    "same": {"vocabulary": "shared"},
}
VOCABULARIES = [("shared", 9, 12), ("shared", 12, 9), ("padded", 9, 12), ("padded", 12, 9)]


def by_impl(match, student, other, batch=None):
    """Total and gradient by each implementation, and what computed it by ``auto``."""
    found = {}
    for impl in ("eager", "auto"):
        step = DistillationLoss([match], impl=impl).begin({"": {"output": student}}, batch)
        total = step.finish({"": {"output": other}}).total
        found[impl] = total.detach(), torch.autograd.grad(total, student)[0]
        (choice,) = step.choices.values()
    return found, choice.implementation


@pytest.mark.parametrize("arguments", LOGIT_ARGUMENTS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_what_losses_of_logits_take_besides(name, arguments):
    student, other = drawn(name, 3, 5, 9)
    given = LOGIT_ARGUMENTS[arguments]
    batch = {key: given[key] for key in ("mask", "target") if key in given}
    match = Match("", "", loss=name, temperature=1.5, **{**given, **{key: key for key in batch}}, **ARGUMENTS.get(name, {}))
    found, implementation = by_impl(match, student, other, batch)
    assert implementation == "chunked"
    torch.testing.assert_close(found["auto"], found["eager"])


@pytest.mark.parametrize(("vocabulary", "ours", "theirs"), VOCABULARIES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_vocabularies_of_different_sizes(name, vocabulary, ours, theirs):
    student, _ = drawn(name, 3, 5, ours)
    _, other = drawn(name, 3, 5, theirs)
    match = Match("", "", loss=name, temperature=1.5, vocabulary=vocabulary, **ARGUMENTS.get(name, {}))
    try:
        found, implementation = by_impl(match, student, other)
    except MatchError:  # a side that cannot cover the other: both implementations refuse it in the same words
        assert vocabulary == "padded"
        assert name in ("kl", "reverse_kl", "soft_cross_entropy")
        return
    assert implementation == "chunked"
    torch.testing.assert_close(found["auto"], found["eager"])


def test_labels_with_a_shift_and_their_own_ignored_class():
    student, other = drawn("cross_entropy", 3, 5, 9)
    match = Match(None, "", loss="cross_entropy", target=lambda batch: other, causal_shift=True, ignore_index=2)
    found, implementation = by_impl(match, student, other)
    assert implementation == "chunked"
    torch.testing.assert_close(found["auto"], found["eager"])


def test_blocks_cover_every_position_once():
    for shape in [(1, 1), (5, 3), (4, 3, 2), (2, 5, 7, 3), (1, 100, 4)]:
        for most in (1, 3, 8, 30, MANY):
            seen = torch.zeros(shape[:-1], dtype=torch.long)
            for block in blocks(shape, most):
                seen[block] += 1
                assert seen[block].numel() * shape[-1] <= max(most, shape[-1])
            assert (seen == 1).all()


# Values that go wrong in careless code


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("soft_cross_entropy", "cross_entropy")])
def test_identical_tensors_cost_nothing_and_pull_nowhere(name):
    student, _ = drawn(name, 4, 9, dtype=torch.float32)
    task = RowTask(student=student, terms=[term(name, student.detach().clone(), **heat(name))])
    found = run_rows(task, block_losses, most=20, gradient=True)
    assert abs(found.values.item()) < 1e-6
    assert found.gradient.abs().max() < 1e-6
    if name in ("mse", "l1", "smooth_l1", "huber", "kl", "tvd", "reverse_kl"):
        assert (found.gradient == 0).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_classes_that_both_exclude_cost_nothing(name):
    student, other = (tensor.detach().clone() for tensor in drawn(name, 4, 9))
    student[:, 5:7] = other[:, 5:7] = -math.inf
    value, gradient = defined(name, student.requires_grad_(), other)
    found = computed(name, student, other)
    torch.testing.assert_close(found.values, value[None])
    torch.testing.assert_close(found.gradient, gradient)
    assert (found.gradient[:, 5:7] == 0).all()


@pytest.mark.parametrize("name", ["kl", "js", "skew_kl", "tvd", "soft_cross_entropy"])
def test_what_the_teacher_alone_excludes(name):
    student, other = (tensor.detach().clone() for tensor in drawn(name, 4, 9))
    other[:, 2:4] = -math.inf
    value, gradient = defined(name, student.requires_grad_(), other)
    found = computed(name, student, other)
    torch.testing.assert_close(found.values, value[None])
    torch.testing.assert_close(found.gradient, gradient)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_huge_logits_stay_finite(name, temperature):
    student, other = drawn(name, 4, 9, dtype=torch.float32, spread=1e4)
    task = RowTask(student=student, terms=[term(name, other, temperature=temperature)])
    found = run_rows(task, block_losses, most=20, gradient=True)
    assert torch.isfinite(found.values).all()
    assert torch.isfinite(found.gradient).all()


@pytest.mark.parametrize("name", ["cosine", "normalized_mse"])
def test_rows_of_length_zero(name):
    student, other = (tensor.detach().clone() for tensor in drawn(name, 4, 9))
    student[0] = 0
    other[1] = 0
    student[2], other[2] = 0, 0
    student[3] *= 1e-10
    value, gradient = defined(name, student.requires_grad_(), other)
    found = computed(name, student, other)
    torch.testing.assert_close(found.values, value[None])
    torch.testing.assert_close(found.gradient, gradient)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_masked_row_gets_through(name, poison):
    student, other = (tensor.detach().clone() for tensor in drawn(name, 4, 9))
    mask = torch.tensor([True, False, True, False])
    clean = run_rows(
        RowTask(student=student.clone(), terms=[term(name, other.clone(), valid=mask)]), block_losses, most=20, gradient=True
    )
    student[~mask] = poison
    if other.is_floating_point():
        other[~mask] = poison
    found = computed(name, student, other, valid=mask)
    assert torch.equal(found.values, clean.values)
    assert torch.equal(found.gradient, clean.gradient)
    assert (found.gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_with_nothing_valid_is_zero(name):
    student, other = drawn(name, 4, 9)
    mask = torch.zeros(4, dtype=torch.bool)
    found = computed(name, student, other, valid=mask)
    assert found.values == 0
    assert (found.gradient == 0).all()


def test_logit_gradients_of_a_row_sum_to_zero_and_ignore_a_shift():
    for name in [*DISTRIBUTIONS, "cross_entropy"]:
        student, other = drawn(name, 4, 9)
        task = RowTask(student=student, terms=[term(name, other, **heat(name))])
        found = run_rows(task, block_losses, most=20, gradient=True)
        shifted = RowTask(student=student + 3, terms=[term(name, other, **heat(name))])
        torch.testing.assert_close(found.gradient.sum(-1), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(run_rows(shifted, block_losses, most=20, gradient=True).gradient, found.gradient)


def test_inputs_are_left_as_they_are_and_results_repeat():
    student, other = drawn("kl", 6, 50)
    before = student.detach().clone(), other.clone()
    results = [
        run_rows(RowTask(student=student, terms=[term("kl", other)]), block_losses, most=100, gradient=True) for _ in "12"
    ]
    assert torch.equal(student.detach(), before[0]) and torch.equal(other, before[1])
    assert torch.equal(results[0].values, results[1].values) and torch.equal(results[0].gradient, results[1].gradient)


# Compiled


PROGRAMS = {
    "mse": ["mse"],
    "cosine and huber": ["cosine", "huber"],
    "kl and labels": ["kl", "cross_entropy"],
    "js and tvd": ["js", "tvd"],
}


@pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", PROGRAMS.values(), ids=PROGRAMS)
def test_compiled_blocks_say_the_same_for_any_number_of_rows(names, dtype):
    draw = torch.Generator().manual_seed(0)
    for rows in (33, 2, 70):  # one compilation serves all
        student, _ = drawn(names[0], rows, 45, dtype=dtype)
        mask = torch.rand(rows, generator=draw) < 0.7
        terms = [term(name, drawn(name, rows, 45, dtype=dtype, seed=2)[1], valid=mask, **heat(name)) for name in names]
        task = RowTask(student=student, terms=terms)
        plain = run_rows(task, block_losses, most=MANY, gradient=True)
        found = run_rows(task, compiled_block, most=32 * 45, gradient=True)
        tolerance = {"rtol": 1e-4, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
        torch.testing.assert_close(found.values, plain.values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.gradient, plain.gradient, **tolerance)


@pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler")
@pytest.mark.parametrize("sliced", [False, True])
def test_unmasked_rows_and_slices_are_compiled_too(sliced, monkeypatch):
    """Their shares are one number expanded, their rows have gaps: neither is dense."""
    monkeypatch.setattr("hookdistill.fused.compiler._compiled", programs := {})
    student, other = (each[..., : 45 - 3 * sliced] for each in drawn("kl", 30, 45, dtype=torch.float32))
    results = []
    for function in (block_losses, compiled_block):
        task = RowTask(student=student, terms=[term("kl", other, **heat("kl"))])
        results.append(run_rows(task, function, most=MANY, gradient=True))
    (program,) = programs.values()
    assert program is not None
    for plain, found in zip(*((each.values, each.gradient) for each in results), strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not compiler_available(), reason="there is no C++ compiler")
def test_the_engine_compiles_what_is_asked_for():
    student, other = drawn("mse", 30, 45, dtype=torch.float32)
    values = {}
    for impl in ("eager", "compiled", "auto"):
        loss = DistillationLoss([Match("", "")], impl=impl)
        step = loss.begin({"": {"output": student}})
        values[impl] = step.finish({"": {"output": other}}).total
        (choice,) = step.choices.values()
        assert choice.implementation == {"eager": "eager", "compiled": "compiled", "auto": "chunked"}[impl]
    torch.testing.assert_close(values["compiled"], values["eager"])
    torch.testing.assert_close(values["auto"], values["eager"])


# As part of a graph


def total_of(match, student, other, **kwargs):
    return DistillationLoss([match], **kwargs)({"": {"output": other}}, {"": {"output": student}}).total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_comes_from_above_multiplies(dtype):
    student, other = drawn("mse", 5, 8, dtype=dtype)
    total = total_of(Match("", ""), student, other)
    (plain,) = torch.autograd.grad(total, student, retain_graph=True)
    (again,) = torch.autograd.grad(total, student, retain_graph=True)
    (times,) = torch.autograd.grad(total * 4, student)
    assert plain.dtype is dtype
    assert torch.equal(plain, again)
    torch.testing.assert_close(times, plain * 4)
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


def test_small_gradients_in_half_precision_survive_with_a_loss_scale():
    student = torch.ones(1000, 1000, dtype=torch.float16, requires_grad=True)
    other = torch.ones(1000, 1000, dtype=torch.float16) + 2**-7
    (total_of(Match("", ""), student, other) * 2.0**16).backward()
    assert (student.grad != 0).all()


def test_gradients_accumulate():
    student, other = drawn("mse", 5, 8)
    for _ in range(2):
        total_of(Match("", ""), student, other).backward()
    _, gradient = defined("mse", student, other)
    torch.testing.assert_close(student.grad, 2 * gradient)


def test_the_teacher_is_let_go_before_backward():
    student, other = drawn("kl", 5, 8)
    hidden = student * 1.0
    total = total_of(Match("", "", loss="kl"), hidden, other)
    gone = weakref.ref(other)
    del other
    assert gone() is None
    total.backward()
    assert student.grad.abs().sum() > 0


def test_gradients_of_gradients_that_come_too_late_say_what_to_do():
    student, other = drawn("kl", 5, 8)
    total = total_of(Match("", "", loss="kl"), student, other)
    del other
    with pytest.raises(Exception, match="impl='eager'"):
        torch.autograd.grad(total, student, create_graph=True)


def test_parameters_learn_through_it_as_through_the_definition():
    curves = {}
    for impl in ("eager", "auto"):
        torch.manual_seed(0)
        model, optimizer_steps, curve = nn.Linear(6, 9), 15, []
        inputs, other = torch.randn(20, 6), torch.randn(20, 9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        match = [Match("", "", loss="kl", temperature=2.0), Match("", "", loss="cosine", name="direction")]
        loss = DistillationLoss(match, impl=impl)
        for _ in range(optimizer_steps):
            optimizer.zero_grad()
            total = loss({"": {"output": other}}, {"": {"output": model(inputs)}}).total
            total.backward()
            optimizer.step()
            curve.append(total.item())
        curves[impl] = curve
    assert curves["auto"] == pytest.approx(curves["eager"], rel=1e-5)
    assert curves["auto"][-1] < curves["auto"][0]
