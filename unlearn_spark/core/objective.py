"""The objective, the arrays that the kernels share, and the residual with its floor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCRATCH_BYTES = 16 << 20
"""Largest scratch array, so that memory does not grow with the longest row."""

DUAL_ERROR = 2e-6
"""Largest tolerated rounding error of a dual system, relative to its right-hand side."""


@dataclass(frozen=True)
class Objective:
    """The objective of ALS; names and meanings are MLlib's.

    Attributes
    ----------
    reg_param
        lambda, multiplied by the row's number of ratings (explicit) or positive ratings (implicit).
    implicit_prefs
        Ratings are confidences in a preference instead of values to reproduce.
    alpha
        Confidence for each unit of an implicit rating.
    nonnegative
        Constrain every factor to be >= 0.
    """

    reg_param: float
    implicit_prefs: bool = False
    alpha: float = 1.0
    nonnegative: bool = False

    def confidences(self, values: NDArray[Any]) -> tuple[NDArray[Any] | None, NDArray[Any]]:
        """Confidences c (None in explicit mode: all 1) and targets d of ratings, in their dtype."""
        if not self.implicit_prefs:
            return None, values
        c = values.dtype.type(self.alpha) * np.abs(values)
        return c, np.where(values > 0, 1 + c, 0)

    def ridge(self, values: NDArray[Any]) -> float:
        """lambda times the number of a row's ratings (implicit: of its positive ratings)."""
        n = np.count_nonzero(values > 0) if self.implicit_prefs else len(values)
        return self.reg_param * n


@dataclass(frozen=True)
class _Problem:
    """The arguments of `solve_rows`, checked once and passed on together."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    values: NDArray[np.float32]
    other: NDArray[np.float32]
    objective: Objective
    gram: NDArray[np.float64] | None
    warm: NDArray[np.float32] | None

    @property
    def rank(self) -> int:
        return self.other.shape[1]

    def ratings(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Positions on the other side and values of one row."""
        at = slice(self.indptr[row], self.indptr[row + 1])
        return self.indices[at], self.values[at]


@dataclass
class _Found:
    """The answer, which an engine fills in row by row."""

    factors: NDArray[np.float32]
    gradient_norm: NDArray[np.float64]
    b_norm: NDArray[np.float64]
    quadratic: NDArray[np.float64]

    @classmethod
    def empty(cls, n: int, rank: int) -> _Found:
        return cls(np.zeros((n, rank), np.float32), np.zeros(n), np.zeros(n), np.zeros(n))


def relative_residual(
    gradient_norm: NDArray[np.float64], b_norm: NDArray[np.float64], floor: float = 0.0
) -> NDArray[np.float64]:
    """``||A x - b|| / max(||b||, floor)`` by row: 0 where the numerator is 0, inf where only the
    denominator is.

    The factors of some rows vanish, sweep by sweep. Both norms then fall together and their ratio
    does not, so below the `floor` (`floor_of`) the residual is relative to the floor.
    """
    g = np.asarray(gradient_norm, np.float64)
    denominator = np.maximum(np.asarray(b_norm, np.float64), floor)
    answer = np.where(g > 0, np.inf, 0.0)
    return np.divide(g, denominator, out=answer, where=denominator > 0)


def safe_range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Least and largest magnitude of A's diagonal and of b that `dtype` is trusted with."""
    return (1e-30, 1e30) if dtype == np.float32 else (1e-280, 1e280)


FLOOR_SHARE = 1e-3
"""The floor of a side, as a share of its typical right-hand side."""


def target_magnitudes(
    indptr: NDArray[np.int64], values: NDArray[np.float32], objective: Objective
) -> Counter[int]:
    """Histogram of the magnitudes of right-hand sides, estimated without any factors.

    A row with targets ``d`` has ``b = M' d``, about as long as ``||d||`` times a neighbour. A
    neighbour is about the root of what products of factors approximate: the row's root mean square
    target in explicit mode, and a preference of 1 in implicit mode.

    Parameters
    ----------
    indptr, values
        Ratings, compressed by row, as for `solve_rows`.

    Returns
    -------
    Counter
        Number of rows by the binary exponent e of their magnitude, which is in [2^e, 2^(e + 1)).
        Rows with no target but 0 are left out. Counts of a side's parts add up to the side's.
    """
    counts = np.diff(indptr)
    squares = np.zeros(len(counts))
    for first, last in _row_chunks(indptr, SCRATCH_BYTES // 128):
        filled = first + np.flatnonzero(counts[first:last])
        if len(filled):
            part = values[indptr[first] : indptr[last]].astype(np.float64)
            d = objective.confidences(part)[1]
            squares[filled] = np.add.reduceat(d * d, indptr[filled] - indptr[first])
    magnitudes = np.sqrt(squares)
    if not objective.implicit_prefs:
        magnitudes *= np.sqrt(np.sqrt(squares / np.maximum(counts, 1)))
    _, exponents = np.frexp(magnitudes[magnitudes > 0])
    found, rows = np.unique(exponents - 1, return_counts=True)
    return Counter(dict(zip(found.tolist(), rows.tolist(), strict=True)))


def floor_of(magnitudes: Counter[int]) -> float:
    """The least denominator of a side's residuals: `FLOOR_SHARE` of the median magnitude
    (`target_magnitudes`), rounded down to a power of two; 0 if there is no row.

    It depends only on counts, so neither partitions nor the order of a sum change it.
    """
    rows = np.array([magnitudes[exponent] for exponent in sorted(magnitudes)])
    if not rows.sum():
        return 0.0
    median = sorted(magnitudes)[int(np.searchsorted(rows.cumsum(), rows.sum() / 2))]
    return FLOOR_SHARE * 2.0**median


def _row_chunks(indptr: NDArray[np.int64], step: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows with about `step` ratings; a longer row is its own range."""
    first, n = 0, len(indptr) - 1
    while first < n:
        last = int(np.searchsorted(indptr, indptr[first] + step, side="right")) - 1
        last = min(max(last, first + 1), first + step, n)
        yield first, last
        first = last
