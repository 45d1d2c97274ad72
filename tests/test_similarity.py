"""CKA between layers: the estimator against its definition, its laws, and what is made of the matrix."""

import builtins
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hookdistill import BatchError, CaptureError, Distiller, Match, MatchError, Similarity, StructureError, similarity
from hookdistill.hsic import MinibatchCKA, centred_gram
from hookdistill.layer_maps import matching
from nets import ResNet, TimmVit, images
from pairs import Mlp, flags, hooks, mlps, points, readers, same, seeded, state, tokens


def hsic_by_definition(x, y):
    """HSIC as a U-statistic, summed over all quadruples: Song et al. 2012, eq. 4. O(n⁴)."""
    k, m, n = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    total = 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i][j] * (m[i][j] + m[q][r] - 2 * m[i][q])
    return total / math.perm(n, 4)


def features(n, width, *, seed):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The estimator


@settings(deadline=None, max_examples=15)
@given(n=st.integers(4, 7), widths=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 2**16))
def test_hsic_is_the_u_statistic(n, widths, seed):
    x, y = features(n, widths[0], seed=seed), features(n, widths[1], seed=seed + 1)
    estimate = (centred_gram(x) * centred_gram(y)).sum() / (n * (n - 3))
    assert float(estimate) == pytest.approx(hsic_by_definition(x, y), abs=1e-9)


def test_hsic_is_the_matrix_formula_of_nguyen():
    """Eq. 3 of arXiv 2010.15327, written out."""
    n = 9
    x, y = features(n, 4, seed=0), features(n, 3, seed=1)
    k, m = ((each @ each.T).fill_diagonal_(0) for each in (x, y))
    one = torch.ones(n, dtype=torch.float64)
    middle = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
    expected = (torch.trace(k @ m) + middle - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))
    estimate = (centred_gram(x) * centred_gram(y)).sum() / (n * (n - 3))
    torch.testing.assert_close(estimate, expected)


def cka(x, y, size):
    sums = MinibatchCKA()
    for a, b in zip(x.split(size), y.split(size), strict=True):
        sums.add([a], [b])
    return float(sums.result())


def test_cka_does_not_see_rotation_shift_and_scale():
    x = features(40, 6, seed=0)
    rotation = torch.linalg.qr(features(6, 6, seed=1)).Q
    assert cka(x, 3.0 * x @ rotation + 100.0, 10) == pytest.approx(1.0, abs=1e-9)


def test_a_large_common_shift_costs_no_digits():
    x = features(32, 8, seed=0)
    y = x + 0.5 * features(32, 8, seed=1)
    shifted = cka((x + 1e5).float(), (y - 1e5).float(), 32)
    assert shifted == pytest.approx(cka(x, y, 32), abs=0.02)  # what float32 inputs of that size can hold


def test_the_expectation_does_not_depend_on_the_size_of_the_minibatch():
    x = features(4096, 5, seed=0)
    y = torch.cat([x[:, :2], features(4096, 3, seed=1)], 1)
    whole = cka(x, y, 4096)
    assert cka(x, y, 8) == pytest.approx(whole, abs=0.03)
    assert cka(x, y, 64) == pytest.approx(whole, abs=0.02)


def test_independent_features_have_about_none():
    assert abs(cka(features(4096, 20, seed=0), features(4096, 20, seed=1), 16)) < 0.03


def test_a_minibatch_counts_by_its_examples():
    x, y = features(24, 3, seed=0), features(24, 3, seed=1)
    sums = MinibatchCKA()
    for a, b in zip(x.split([16, 8]), y.split([16, 8]), strict=True):
        sums.add([a], [b])
    hsic = [
        sum(n * float((centred_gram(a) * centred_gram(b)).sum()) / (n * (n - 3)) for n, a, b in parts)
        for parts in ([(16, p[:16], q[:16]), (8, p[16:], q[16:])] for p, q in ((x, y), (x, x), (y, y)))
    ]
    assert float(sums.result()) == pytest.approx(hsic[0] / math.sqrt(hsic[1] * hsic[2]))


def test_a_layer_that_does_not_vary_has_no_similarity():
    sums = MinibatchCKA()
    sums.add([torch.ones(8, 3), features(8, 3, seed=0)], [features(8, 3, seed=0)])
    assert sums.result().isnan().tolist() == [[True], [False]]


# Models


def test_the_blocks_are_found_and_a_model_is_like_itself():
    model = seeded(TimmVit)
    found = similarity(model, model, [images(seed=1), images(seed=2)])
    assert isinstance(found, Similarity)
    assert found.teacher_layers == found.student_layers == tuple(f"blocks.{i}" for i in range(4))
    assert found.matrix.dtype == torch.float64
    torch.testing.assert_close(found.matrix.diagonal(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(found.matrix, found.matrix.T)
    assert (found.examples, found.batches, found.count) == ("tokens", 2, 2 * 4 * 17)


def test_the_matrix_is_that_of_the_tensors_spelled_out():
    teacher, student = readers(12, 8)
    batches = [tokens(batch=5, length=6, seed=seed) for seed in (1, 2)]
    found = similarity(teacher, student, batches)
    sums = MinibatchCKA()
    for batch in batches:
        valid = batch["attention_mask"].bool()
        sides = [[tensor[valid] for name, tensor in model.spelled_out(batch["input_ids"]).items() if name[:2] == "la"]
                 for model in (teacher, student)]  # fmt: skip
        sums.add(*[[each.detach() for each in side] for side in sides])
    torch.testing.assert_close(found.matrix, sums.result())
    assert found.count == sum(int(batch["attention_mask"].sum()) for batch in batches)
    unmasked = similarity(teacher, student, batches, mask=None)
    assert unmasked.count == 60
    assert not torch.allclose(unmasked.matrix, found.matrix)


def test_whole_items_are_compared_where_tokens_differ_or_on_request():
    teacher, student = seeded(TimmVit, seed=1), seeded(ResNet, 8, 16, seed=2)
    batches = [images(batch=6, seed=3)]
    found = similarity(teacher, student, batches)
    assert (found.examples, found.count) == ("items", 6)
    assert found.student_layers == ("layer1", "layer2")
    with pytest.raises(CaptureError, match=r"the same tokens on both sides.*Use examples='items'"):
        similarity(teacher, student, batches, examples="tokens")
    assert similarity(teacher, teacher, batches, examples="items").count == 6


def test_padding_does_not_count_for_whole_items_either():
    teacher, student = readers(12, 8)
    batch = tokens(batch=5, length=6)
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 7)}
    first, second = (similarity(teacher, student, [each], examples="items") for each in (batch, other))
    torch.testing.assert_close(first.matrix, second.matrix)
    assert not torch.allclose(similarity(teacher, student, [batch], examples="items", mask=None).matrix, first.matrix)


def test_the_most_tokens_are_spread_over_the_batch():
    teacher, student = readers()
    found = similarity(teacher, student, [tokens(batch=5, length=8)], max_examples=10)
    assert found.count == 10
    with pytest.raises(CaptureError, match="max_examples=3 is too few"):
        similarity(teacher, student, [tokens()], max_examples=3)


def test_addresses_with_wildcards_and_selectors():
    teacher, student = seeded(TimmVit, seed=1), seeded(TimmVit, depth=2, seed=2)
    found = similarity(
        teacher, student, [images()], teacher_layers="blocks.*.attn:attention", student_layers=["blocks.-1", "head"]
    )
    assert found.teacher_layers == tuple(f"blocks.{i}.attn:attention" for i in range(4))
    assert found.student_layers == ("blocks.1", "head")


def test_nothing_is_left_on_the_models():
    teacher, student = mlps(dropout=0.5)
    teacher.train(), student.eval()
    was, before, random = flags(teacher, student), state(teacher, student), torch.random.get_rng_state()
    similarity(teacher, student, [points()], teacher_layers="first", student_layers="second")
    assert flags(teacher, student) == was
    assert same(state(teacher, student), before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert hooks(teacher, student) == 0


def test_half_of_the_batches():
    teacher, student = mlps()
    batches = [points(seed=seed) for seed in range(4)]
    found = similarity(teacher, student, batches, teacher_layers="first", student_layers="second", batches=2)
    assert (found.batches, found.count) == (2, 10)


def test_a_batch_adaptor():
    teacher, student = mlps()
    raw = [(batch["x"],) for batch in (points(), points(seed=4))]
    found = similarity(
        teacher,
        student,
        [{"left": each[0], "right": each[0]} for each in raw],
        teacher_layers="first",
        student_layers="first",
        batch_adaptor=lambda device, batch: ({"x": batch["left"]}, batch["right"]),
    )
    direct = similarity(teacher, student, raw, teacher_layers="first", student_layers="first")
    torch.testing.assert_close(found.matrix, direct.matrix)


def test_what_cannot_be_compared_is_an_error():
    teacher, student = mlps()
    options = {"teacher_layers": "first", "student_layers": "first"}
    with pytest.raises(BatchError, match="at least 4 examples, and the largest had 3"):
        similarity(teacher, student, [points(batch=3), points(batch=2)], **options)
    with pytest.raises(
        StructureError, match=r"no layers were found: Mlp has .*Name the layers of the teacher: teacher_layers="
    ):
        similarity(teacher, student, [points()])
    nan = points()
    nan["x"] = nan["x"] * float("nan")
    with pytest.raises(CaptureError, match="teacher layers 'first' gave values that are not finite"):
        similarity(teacher, student, [nan], **options)
    with pytest.raises(CaptureError, match=r"'0:input' is torch\.int64"):
        looked_up = nn.Sequential(nn.Embedding(9, 4))
        similarity(looked_up, student, [(torch.arange(8),)], teacher_layers="0:input", student_layers="first")


def test_batches_too_small_are_passed_over():
    teacher, student = mlps()
    found = similarity(teacher, student, [points(), points(batch=2)], teacher_layers="first", student_layers="first")
    assert (found.batches, found.count) == (1, 5)


# What is made of it


def example(matrix, **changed):
    matrix = torch.tensor(matrix, dtype=torch.float64)
    names = {"teacher": len(matrix), "student": len(matrix.T)}
    layers = {f"{side}_layers": tuple(f"{side[0]}.{i}" for i in range(count)) for side, count in names.items()}
    return Similarity(**{"matrix": matrix, **layers, "examples": "items", "count": 64, "batches": 2, **changed})


def best_by_trying(weights, *, monotone):
    rows, columns = len(weights), len(weights[0])
    count = min(rows, columns)
    best = -math.inf
    for chosen in itertools.permutations(range(rows), count):
        for against in itertools.combinations(range(columns), count):
            if not monotone or list(chosen) == sorted(chosen):
                best = max(best, sum(weights[i][j] for i, j in zip(chosen, against, strict=True)))
    return best


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 2**16), monotone=st.booleans())
def test_the_matching_is_the_heaviest(rows, columns, seed, monotone):
    if not monotone:
        pytest.importorskip("scipy")
    weights = features(rows, columns, seed=seed)
    found = matching(weights, order="monotone" if monotone else "any")
    assert len(found) == min(rows, columns)
    assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)
    assert [j for _, j in found] == sorted(j for _, j in found)
    if monotone:
        assert [i for i, _ in found] == sorted(i for i, _ in found)
    total = sum(float(weights[i, j]) for i, j in found)
    assert total == pytest.approx(best_by_trying(weights.tolist(), monotone=monotone))


def test_matches_are_ready_for_a_distiller():
    teacher, student = readers(12, 8)
    found = similarity(teacher, student, [tokens(batch=6)])
    matches = found.matches(loss="cosine", mask="attention_mask", weight=0.5)
    assert [type(match) for match in matches] == [Match, Match]
    assert [match.student for match in matches] == ["layers.0", "layers.1"]
    assert {(match.loss, match.weight) for match in matches} == {("cosine", 0.5)}
    Distiller(teacher, student, matches, example_batch=tokens())(tokens()).total.backward()


def test_layers_in_another_order():
    crossed = example([[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]])
    assert crossed.pairs() == [("t.1", "s.0"), ("t.2", "s.1")]
    pytest.importorskip("scipy")
    assert crossed.pairs(order="any") == [("t.1", "s.0"), ("t.0", "s.1")]


def test_an_unknown_order_and_a_missing_scipy(monkeypatch):
    with pytest.raises(MatchError, match="order='up' is not known"):
        example([[1.0]]).pairs(order="up")
    forbid(monkeypatch, "scipy")
    with pytest.raises(MatchError, match=r"pip install 'hookdistill\[similarity\]'"):
        example([[1.0]]).pairs(order="any")
    assert example([[1.0]]).pairs() == [("t.0", "s.0")]


def test_a_layer_without_similarity_is_matched_last():
    nan = float("nan")
    assert example([[nan], [0.1]]).pairs() == [("t.1", "s.0")]


def test_the_table_marks_the_best_teacher_layer_of_each_student_layer():
    shown = str(example([[0.25, 0.5], [0.75, 0.125]]))
    assert "0.750*" in shown
    assert "0.500*" in shown
    assert "0.250*" not in shown
    assert "64 items in 2 batches" in shown
    assert "nan" in str(example([[float("nan")]]))


def test_as_dict_is_plain_json():
    plain = json.loads(json.dumps(example([[0.25, float("nan")]]).as_dict()))
    assert plain["cka"] == [[0.25, None]]
    assert plain["student_layers"] == ["s.0", "s.1"]


def test_the_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("cka.png", "cka.svg"):
        example([[0.25, 0.5], [0.75, 0.125], [0.1, float("nan")]]).plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    forbid(monkeypatch, "matplotlib")
    with pytest.raises(CaptureError, match=r"pip install 'hookdistill\[similarity\]'"):
        example([[1.0]]).plot(tmp_path / "other.png")


def forbid(monkeypatch, package):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_unlike_depths_and_a_shared_model():
    model = seeded(Mlp)
    found = similarity(model, model, [points()], teacher_layers=["first", "second"], student_layers="first")
    assert found.matrix.shape == (2, 1)
    assert float(found.matrix[0, 0]) == pytest.approx(1.0)
