"""Finds the best candidates of many queries by scalar product."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SCORE_BYTES = 8 << 20
"""Size of the scores that are held at a time, so that they stay in the cache."""

GROUPS_PER_PLACE = 16
"""Groups of candidates per place to fill. More of them find a sharper threshold, at more cost."""

LEAST_GROUPS = 256


def best(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    n: int,
    excluded: tuple[NDArray[np.integer], NDArray[np.integer]] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Find the n best candidates of every query by scalar product.

    Parameters
    ----------
    queries : float32 (m, rank)
    candidates : float32 (c, rank)
    n
        At least 1.
    excluded
        Row numbers in `queries` and in `candidates`: pairs that must not be chosen.

    Returns
    -------
    counts : int64 (m,)
        Candidates found for each query: n, or all that are left if these are fewer.
    chosen : int64 (counts.sum(),)
        Row numbers in `candidates`, query by query, by falling score and then rising row.
    scores : float32 (counts.sum(),)
    """
    m, c = len(queries), len(candidates)
    counts = np.zeros(m, np.int64)
    if m == 0 or c == 0:
        return counts, np.zeros(0, np.int64), np.zeros(0, np.float32)
    step = max(1, SCORE_BYTES // (4 * c))
    chosen, kept = [], []
    if excluded is not None:
        order = np.argsort(excluded[0], kind="stable")
        excluded_rows, excluded_columns = excluded[0][order], excluded[1][order]
    for first in range(0, m, step):
        scores = queries[first : first + step] @ candidates.T
        if excluded is not None:
            low, high = np.searchsorted(excluded_rows, [first, first + len(scores)])
            scores[excluded_rows[low:high] - first, excluded_columns[low:high]] = -np.inf
        rows, columns, values = _best_entries(scores, n)
        counts[first : first + step] = np.bincount(rows, minlength=len(scores))
        chosen.append(columns)
        kept.append(values)
    return counts, np.concatenate(chosen), np.concatenate(kept)


def _best_entries(
    scores: NDArray[np.float32], n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Row, column and value of the n largest finite scores of each row, best first; between equal
    scores the lower column comes first."""
    c = scores.shape[1]
    flat = np.flatnonzero(scores >= _thresholds(scores, n)[:, None])
    values = scores.ravel()[flat]
    finite = np.isfinite(values)
    flat, values = flat[finite], values[finite]
    rows, columns = np.divmod(flat, c)
    # Stable, and columns rise: equal scores keep their order.
    order = np.lexsort((-values, rows))
    rows = rows[order]
    starts = np.searchsorted(rows, np.arange(len(scores)))
    first = np.arange(len(rows)) - starts[rows] < n
    order = order[first]
    return rows[first], columns[order], values[order]


def _thresholds(scores: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """For each row a number that at least n of its scores reach, and not many more."""
    c = scores.shape[1]
    if c <= n:
        return np.full(len(scores), -np.inf, np.float32)
    groups = max(LEAST_GROUPS, GROUPS_PER_PLACE * n)
    # The n-th largest maximum of a group will do: n groups have a score that reaches it.
    maxima = scores[:, :groups].copy()
    for first in range(groups, c, groups):
        part = scores[:, first : first + groups]
        into = maxima[:, : part.shape[1]]
        np.fmax(into, part, out=into)
    place = maxima.shape[1] - n
    return np.partition(maxima, place, axis=1)[:, place]
