"""Pairs of rows and columns with the largest total weight."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..errors import MatchError

Order = Literal["monotone", "any"]


def matching(weights: Tensor, *, order: Order) -> list[tuple[int, int]]:
    """The pairs (row, column) of largest total weight, each row and column at most once, as many as the shorter side has.

    NaN counts as less than any similarity. Pairs come in the order of the columns.

    Raises:
        MatchError: an unknown order, or scipy is missing for ``"any"``.
    """
    weights = weights.double().nan_to_num(nan=-2.0)
    if order == "monotone":
        return _monotone(weights.tolist()) if weights.shape[0] >= weights.shape[1] else _transposed(weights)
    if order != "any":
        raise MatchError(f"order={order!r} is not known; it is 'monotone' or 'any'")
    try:
        # Shortest augmenting paths are done right there; the monotone matching, which most want, is the short loop below.
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MatchError("order='any' needs scipy: pip install 'hookdistill[similarity]'") from error
    rows, columns = linear_sum_assignment(weights.numpy(), maximize=True)
    return sorted(zip(rows.tolist(), columns.tolist(), strict=True), key=lambda pair: pair[1])


def _transposed(weights: Tensor) -> list[tuple[int, int]]:
    return [(row, column) for column, row in _monotone(weights.T.tolist())]


def _monotone(weights: list[list[float]]) -> list[tuple[int, int]]:
    """By dynamic programming: ``best[j][i]`` is the most that columns up to j can earn from rows up to i."""
    rows, columns = len(weights), len(weights[0])
    best = [[0.0] * (rows + 1)] + [[float("-inf")] * (rows + 1) for _ in range(columns)]
    for j in range(1, columns + 1):
        for i in range(j, rows + 1):
            best[j][i] = max(best[j][i - 1], best[j - 1][i - 1] + weights[i - 1][j - 1])
    pairs = []
    i = rows
    for j in range(columns, 0, -1):
        while best[j][i] == best[j][i - 1]:
            i -= 1
        pairs.append((i - 1, j - 1))
        i -= 1
    return pairs[::-1]
