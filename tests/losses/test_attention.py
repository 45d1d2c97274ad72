"""Losses between attention maps: the laws of all losses, with a mask that holds for queries and keys."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from hookdistill.errors import LossError
from hookdistill.losses import attention_kl, attention_mse, relation_kl

LOSSES = [attention_mse, attention_kl]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)


def maps(batch=2, heads=3, queries=5, keys=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(batch, heads, queries, keys, generator=generator, dtype=dtype).softmax(-1) for _ in range(2)
    )
    return student.requires_grad_(), teacher


def token_mask():
    return torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@each_loss
def test_gradcheck(loss):
    student, teacher = maps()
    assert gradcheck(lambda s: loss(s, teacher), student)
    assert gradcheck(lambda s: loss(s, teacher, mask=token_mask()), student)


@each_loss
def test_identical_maps_cost_nothing(loss):
    student, _ = maps()
    assert loss(student, student.detach()).abs() < 1e-15


@each_loss
def test_masked_entries_get_no_gradient_even_where_they_are_nan(loss):
    student, teacher = maps()
    valid = (token_mask()[:, None, :, None] * token_mask()[:, None, None, :]).bool().expand(student.shape)
    spoilt = student.detach().masked_fill(~valid, float("nan")).requires_grad_()
    value = loss(spoilt, teacher.masked_fill(~valid, float("nan")), mask=token_mask())
    (gradient,) = torch.autograd.grad(value, spoilt)
    assert value.isfinite()
    assert (gradient[~valid] == 0).all()
    assert (gradient[valid] != 0).any()
    torch.testing.assert_close(value, loss(student, teacher, mask=token_mask()))


def test_mse_is_the_mean_over_valid_pairs():
    student, teacher = maps()
    whole, short = student[0], student[1, :, :3, :3]
    squares = [(whole - teacher[0]).square().flatten(), (short - teacher[1, :, :3, :3]).square().flatten()]
    torch.testing.assert_close(attention_mse(student, teacher, mask=token_mask()), torch.cat(squares).mean())


def test_kl_is_the_mean_over_heads_and_valid_queries():
    student, teacher = maps()
    expected = torch.nn.functional.kl_div(student.log(), teacher, reduction="sum") / (2 * 3 * 5)
    torch.testing.assert_close(attention_kl(student, teacher), expected)


@each_loss
def test_two_half_batches_equal_one_whole(loss):
    student, teacher = maps(batch=4)
    halves = [loss(s, t) for s, t in zip(student.chunk(2), teacher.chunk(2), strict=True)]
    torch.testing.assert_close(loss(student, teacher), torch.stack(halves).mean())


@each_loss
def test_nothing_valid_is_zero_and_attached(loss):
    student, teacher = maps()
    value = loss(student, teacher, mask=torch.zeros(2, 5))
    (gradient,) = torch.autograd.grad(value, student)
    assert value == 0
    assert (gradient == 0).all()


@each_loss
def test_rows_without_a_key_cost_nothing(loss):
    student, teacher = maps()
    empty = torch.zeros(2, 3, 5, 1, dtype=torch.bool)
    empty[:, :, -1] = True
    left = student.detach().masked_fill(empty, 0).requires_grad_()
    value = loss(left, teacher.masked_fill(empty, 0))
    (gradient,) = torch.autograd.grad(value, left)
    assert value.isfinite()
    assert (gradient[:, :, -1] == 0).all()


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min])
def test_scores_hidden_on_both_sides_do_not_count(hidden):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(1, 2, 4, 4, generator=generator).requires_grad_()
    teacher = torch.randn(1, 2, 4, 4, generator=generator)
    future = torch.ones(4, 4, dtype=torch.bool).triu(1)
    value = attention_mse(student.masked_fill(future, hidden), teacher.masked_fill(future, hidden))
    expected = (student - teacher).square()[..., ~future].mean()
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()


@each_loss
def test_masks_of_pairs(loss):
    student, teacher = maps(queries=4, keys=5)
    pairs = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    expanded = pairs[:, None].expand(student.shape)
    torch.testing.assert_close(loss(student, teacher, mask=pairs), loss(student, teacher, mask=expanded))


@each_loss
def test_half_precision_is_computed_in_float32(loss):
    student, teacher = maps(dtype=torch.float32)
    assert loss(student.bfloat16(), teacher.bfloat16()).dtype is torch.float32


@each_loss
def test_reductions(loss):
    student, teacher = maps()
    values = loss(student, teacher, mask=token_mask(), reduction="none")
    torch.testing.assert_close(loss(student, teacher, mask=token_mask(), reduction="sum"), values.sum())


@each_loss
def test_no_host_synchronisation(loss):
    student, teacher = (tensor.detach().to("meta") for tensor in maps())
    assert loss(student, teacher, mask=token_mask().to("meta")).shape == ()


@each_loss
def test_different_numbers_of_heads_are_refused(loss):
    with pytest.raises(LossError, match=r"numbers of heads differ, 3 and 4"):
        loss(maps()[0], maps(heads=4)[1])


@each_loss
def test_a_token_mask_of_another_length_is_refused(loss):
    with pytest.raises(LossError, match=r"mask \[2, 4\] does not fit the attention map \[2, 3, 5, 5\]; \[2, 5\] for tokens"):
        loss(*maps(), mask=torch.ones(2, 4))


# Relations of queries, keys or values


def heads(number, width, tokens=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, number, tokens, width, generator=generator, dtype=dtype)


def relation(side, number, tokens):
    """Row by row, as the paper writes it."""
    joined = side.transpose(1, 2).flatten(2)[:, :tokens]
    parts = joined.chunk(number, -1)
    return torch.stack([(part @ part.mT / part.shape[-1] ** 0.5).softmax(-1) for part in parts], 1)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_relations_of_regrouped_heads(number):
    student, teacher = heads(3, 4), heads(6, 8, seed=1)
    ours, theirs = relation(student, number, 5), relation(teacher, number, 5)
    expected = torch.nn.functional.kl_div(ours.log(), theirs, reduction="sum") / (2 * number * 5)
    torch.testing.assert_close(relation_kl(student, teacher, heads=number), expected)


def test_relations_of_the_heads_as_they_are():
    student, teacher = heads(3, 4), heads(3, 7, seed=1)
    torch.testing.assert_close(relation_kl(student, teacher), relation_kl(student, teacher, heads=3))
    by_head = [(side @ side.mT / side.shape[-1] ** 0.5).log_softmax(-1) for side in (student, teacher)]
    expected = torch.nn.functional.kl_div(*by_head, log_target=True, reduction="sum") / (2 * 3 * 5)
    torch.testing.assert_close(relation_kl(student, teacher), expected)


def test_a_token_mask_holds_for_queries_and_keys_of_relations():
    student, teacher = heads(3, 4), heads(6, 8, seed=1)
    values = relation_kl(student, teacher, heads=3, mask=token_mask(), reduction="none")
    assert values.shape == (2, 3, 5)
    whole = relation_kl(student[:1], teacher[:1], heads=3, reduction="none")
    short = relation_kl(student[1:, :, :3], teacher[1:, :, :3], heads=3, reduction="none")
    torch.testing.assert_close(values[0], whole[0])
    torch.testing.assert_close(values[1, :, :3], short[0])
    assert (values[1, :, 3:] == 0).all()
    mean = torch.cat([whole.flatten(), short.flatten()]).mean()
    torch.testing.assert_close(relation_kl(student, teacher, heads=3, mask=token_mask()), mean)


def test_relations_have_the_gradient_of_finite_differences():
    student, teacher = heads(2, 3, tokens=4).requires_grad_(), heads(3, 4, tokens=4, seed=1).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])
    assert gradcheck(lambda s, t: relation_kl(s, t, heads=6), (student, teacher))
    assert gradcheck(lambda s: relation_kl(s, teacher.detach(), heads=6, mask=mask), student)
    assert gradgradcheck(lambda s: relation_kl(s, teacher.detach(), heads=6, mask=mask), student)


def test_identical_relations_cost_nothing_and_rotations_of_a_head_neither():
    student = heads(3, 4).requires_grad_()
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    for teacher in (student.detach(), student.detach() @ rotation):
        value = relation_kl(student, teacher)
        assert value.abs() < 1e-14
        assert torch.autograd.grad(value, student)[0].abs().max() < 1e-14


def test_masked_tokens_of_relations_get_no_gradient_even_where_they_are_nan():
    student, teacher = heads(3, 4).requires_grad_(), heads(6, 8, seed=1)
    hidden = (token_mask() == 0)[:, None, :, None]
    spoilt = student.detach().masked_fill(hidden, float("nan")).requires_grad_()
    value = relation_kl(spoilt, teacher.masked_fill(hidden, float("inf")), heads=3, mask=token_mask())
    (gradient,) = torch.autograd.grad(value, spoilt)
    torch.testing.assert_close(value, relation_kl(student, teacher, heads=3, mask=token_mask()))
    assert (gradient[hidden.expand_as(gradient)] == 0).all()
    assert (gradient[~hidden.expand_as(gradient)] != 0).any()
    nothing = relation_kl(student, teacher, heads=3, mask=torch.zeros(2, 5))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, student)[0] == 0).all()


def test_two_half_batches_of_relations_equal_one_whole():
    student, teacher = heads(3, 4).requires_grad_(), heads(6, 8, seed=1)
    halves = [relation_kl(student[h], teacher[h], heads=3) for h in (slice(1), slice(1, 2))]
    torch.testing.assert_close(relation_kl(student, teacher, heads=3), (halves[0] + halves[1]) / 2)


def test_relations_in_half_precision_and_without_a_look_at_the_host():
    student, teacher = heads(3, 4, dtype=torch.float32), heads(6, 8, seed=1, dtype=torch.float32)
    assert relation_kl(student.bfloat16(), teacher.bfloat16(), heads=3).dtype is torch.float32
    meta = [side.to("meta") for side in (student, teacher)]
    assert relation_kl(*meta, heads=3, mask=token_mask().to("meta")).shape == ()


def test_other_numbers_of_heads_ask_for_relation_heads():
    with pytest.raises(LossError, match=r"3 heads of the student and 6 of the teacher.*heads= one of 1, 2, 3, 4, 6, 12\."):
        relation_kl(heads(3, 4), heads(6, 8))
    for wrong in (5, 0, True, 2.0):
        with pytest.raises(LossError, match=r"must divide .*12 of the student and 48 of the teacher"):
            relation_kl(heads(3, 4), heads(6, 8), heads=wrong)


def test_relations_are_of_the_same_tokens():
    with pytest.raises(LossError, match=r"same tokens.*query, key and value.*\[2, 3, 5, 4\] and teacher \[2, 3, 4, 4\]"):
        relation_kl(heads(3, 4), heads(3, 4, tokens=4))
    with pytest.raises(LossError, match="same tokens"):
        relation_kl(heads(3, 4)[0], heads(3, 4))
    with pytest.raises(LossError, match="floating-point student"):
        relation_kl(heads(3, 4).long(), heads(3, 4))
    with pytest.raises(LossError, match=r"mask \[2, 4\] does not fit"):
        relation_kl(heads(3, 4), heads(3, 4), mask=torch.ones(2, 4))
