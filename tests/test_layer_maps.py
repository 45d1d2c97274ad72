"""Which teacher layer each student layer learns from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hookdistill import MatchError
from hookdistill.layer_maps import STATIC, chosen, cost_attention, explicit, mix, transport

SCALES = st.sampled_from([1e-6, 1.0, 1e6])
DEPTHS = st.integers(1, 40).flatmap(lambda teacher: st.tuples(st.just(teacher), st.integers(1, teacher)))


@pytest.mark.parametrize(
    ("name", "depths", "positions"),
    [
        ("uniform", (12, 3), [3, 7, 11]),
        ("uniform", (12, 6), [1, 3, 5, 7, 9, 11]),
        ("uniform", (12, 5), [2, 4, 7, 9, 11]),
        ("skip", (12, 6), [1, 3, 5, 7, 9, 11]),
        ("skip", (11, 5), [1, 3, 5, 7, 9]),  # PKD-Skip: layers 2, 4, 6, 8, 10 of BERT-base for a student of six
        ("skip", (12, 5), [1, 3, 5, 7, 9]),
        ("last", (11, 5), [6, 7, 8, 9, 10]),  # PKD-Last: layers 7 to 11
        ("first", (12, 3), [0, 1, 2]),
        ("spread", (12, 6), [0, 2, 4, 7, 9, 11]),
        ("spread", (12, 3), [0, 6, 11]),
        ("spread", (12, 1), [0]),
        ("spread", (12, 2), [0, 11]),
    ],
)
def test_positions(name, depths, positions):
    assert chosen(name, *depths) == positions


@given(depths=DEPTHS, name=st.sampled_from(sorted(STATIC)))
def test_every_map_goes_up_and_stays_inside(depths, name):
    teacher, student = depths
    positions = chosen(name, teacher, student)
    assert len(positions) == student
    assert positions == sorted(set(positions))
    assert positions[0] >= 0
    assert positions[-1] < teacher


@given(depth=st.integers(1, 40), name=st.sampled_from(sorted(STATIC)))
def test_equal_depths_are_paired_one_to_one(depth, name):
    assert chosen(name, depth, depth) == list(range(depth))


def test_pairs_written_out():
    assert explicit([(3, 0), (-1, -1), (7, 1)], 12, 3) == [(3, 0), (11, 2), (7, 1)]
    with pytest.raises(MatchError, match="there is no teacher layer 12: there are 12, 0 to 11"):
        explicit([(12, 0)], 12, 3)
    with pytest.raises(MatchError, match="there is no student layer True"):
        explicit([(1, True)], 12, 3)
    with pytest.raises(MatchError, match=r"the pair \(11, 2\) twice"):
        explicit([(11, 2), (-1, -1)], 12, 3)


# Earth mover's distance


def marginals(teacher, student, seed):
    draw = torch.Generator().manual_seed(seed)
    sums = [torch.rand(count, generator=draw, dtype=torch.float64) ** 2 + 1e-3 for count in (teacher, student)]
    return torch.rand(teacher, student, generator=draw, dtype=torch.float64), *[each / each.sum() for each in sums]


@settings(deadline=None, max_examples=40)
@given(depths=st.tuples(st.integers(1, 14), st.integers(1, 9)), seed=st.integers(0, 2**16), scale=SCALES)
def test_the_flow_keeps_to_the_weights_and_costs_the_least(depths, seed, scale):
    optimize = pytest.importorskip("scipy.optimize")
    cost, supply, demand = marginals(*depths, seed)
    flow = transport(scale * cost + 3, supply, demand)
    assert float(flow.min()) >= -1e-15
    torch.testing.assert_close(flow.sum(1), supply, atol=1e-12, rtol=0)
    torch.testing.assert_close(flow.sum(0), demand, atol=1e-12, rtol=0)
    teacher, student = depths
    sums = torch.zeros(teacher + student, teacher, student)
    for i in range(teacher):
        sums[i, i] = 1
    for j in range(student):
        sums[teacher + j, :, j] = 1
    problem = (cost.flatten(), None, None, sums.flatten(1), torch.cat([supply, demand]))
    least = optimize.linprog(*(None if each is None else each.numpy() for each in problem)).fun
    assert least - 1e-6 <= float((flow * cost).sum()) <= least + 0.02 * float(cost.max() - cost.min())


def test_equal_depths_and_a_clear_diagonal_flow_one_to_one():
    cost = 1 - torch.eye(4)
    flow = transport(cost, torch.full((4,), 0.25), torch.full((4,), 0.25))
    torch.testing.assert_close(flow, 0.25 * torch.eye(4))
    assert flow.dtype == torch.float32


def test_costs_that_are_all_alike_flow_everywhere():
    flow = transport(torch.ones(2, 3), torch.tensor([0.25, 0.75]), torch.full((3,), 1 / 3))
    torch.testing.assert_close(flow, torch.tensor([[1 / 12] * 3, [1 / 4] * 3]))


def test_cost_attention_prefers_what_is_cheap_to_move():
    flow, cost = torch.tensor([[0.5, 0.0], [0.0, 0.5]]), torch.tensor([[1.0, 9.0], [9.0, 3.0]])
    half = torch.full((2,), 0.5)
    weights = cost_attention(flow, cost, half, temperature=1.0)
    # a unit of weight costs 1 and 3, so that the ratios are 4 and 4/3
    torch.testing.assert_close(weights, torch.tensor([4.0, 4 / 3]).softmax(0).double(), check_dtype=False)
    warm = cost_attention(flow, cost, half, temperature=100.0)
    torch.testing.assert_close(warm, half.double(), atol=0.01, rtol=0)
    assert cost_attention(flow, torch.zeros(2, 2), half, temperature=1.0).tolist() == [0.5, 0.5]
    extreme = cost_attention(flow, torch.tensor([[1e-9, 1.0], [1.0, 1.0]]), half, temperature=1.0)
    assert extreme.isfinite().all()
    assert float(extreme.min()) > 9e-7


# Mixtures


def test_the_mixture_is_that_of_the_paper_for_a_single_position():
    """ALP-KD, section 3: softmax of the dot products, here over √width, then the weighted sum."""
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    teachers = [torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(5)]
    mixed, weights = mix(student, teachers)
    for row in range(3):
        scores = torch.stack([student[row] @ teacher[row] for teacher in teachers]) / 2
        torch.testing.assert_close(weights[row], scores.softmax(0))
        expected = sum(share * teacher[row] for share, teacher in zip(scores.softmax(0), teachers, strict=True))
        torch.testing.assert_close(mixed[row], expected)


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3, 4, 4), (2, 4)])
def test_like_layers_are_mixed_to_themselves_and_gradients_are_right(shape):
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, generator=draw, dtype=torch.float64)
    mixed, weights = mix(student, [teacher, teacher])
    torch.testing.assert_close(mixed, teacher)
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5, dtype=torch.float64))
    other = torch.randn(shape, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: mix(s, [teacher, other])[0], [student])


def test_masked_positions_do_not_decide():
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 5, 4, generator=draw)
    teachers = [torch.randn(2, 5, 4, generator=draw) for _ in range(3)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    _, weights = mix(student, teachers, mask)
    cut = [tensor[:1, :3] for tensor in (student, *teachers)]
    torch.testing.assert_close(weights[:1], mix(cut[0], cut[1:])[1])
    nan = student.clone()
    nan[0, 3:] = float("nan")
    torch.testing.assert_close(mix(nan, teachers, mask)[1], weights)
    _, per_row = mix(student, teachers, torch.tensor([1, 0]))
    torch.testing.assert_close(per_row[0], mix(student, teachers)[1][0])


def test_a_mask_that_does_not_fit():
    with pytest.raises(MatchError, match=r"the mask \[2, 5\] does not fit the positions \[2, 3\]"):
        mix(torch.ones(2, 3, 4), [torch.ones(2, 3, 4)], torch.ones(2, 5))
