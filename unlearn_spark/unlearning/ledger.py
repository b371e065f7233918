"""The ledger's arithmetic: how much one row's equations change when a neighbour does.

A row y with ratings from neighbours x solves A y = b. Its gradient g = A y - b is a sum with one
term for every rating (and, in implicit mode, one global term), so a change of one rating or of one
neighbour changes g by the difference of a few terms, known without reading the others. The norm of
that difference, added to what the ledger has, keeps an upper bound of |g| (triangle inequality);
taken from |b| it keeps a lower bound of that.

NumPy, SciPy and compiled loops; nothing here knows Spark.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse

from unlearn_spark.als.kernel import Objective

SLICE = 200_000
"""Ratings whose products are formed at a time: 100 MB at rank 64."""

ROUNDING = 1e-9
"""Relative slack on every norm: far above float64's rounding, far below any tolerance."""


@dataclass(frozen=True)
class Terms:
    """Sums of rating terms for some rows.

    Attributes
    ----------
    gradient : float64 (n_rows, rank)
        Their part of A y - b, without the global term of the implicit mode.
    b : float64 (n_rows, rank)
        Their part of b.
    """

    gradient: NDArray[np.float64]
    b: NDArray[np.float64]

    def __sub__(self, other: Terms) -> Terms:
        return Terms(self.gradient - other.gradient, self.b - other.b)

    def norms(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """|gradient| and |b| of each row, rounded up."""
        slack = 1 + ROUNDING
        return (
            np.linalg.norm(self.gradient, axis=1) * slack,
            np.linalg.norm(self.b, axis=1) * slack,
        )


def rating_terms(
    rows: NDArray[np.integer],
    others: NDArray[np.integer],
    values: NDArray[np.float32],
    y: NDArray[np.float32],
    x: NDArray[np.float32],
    objective: Objective,
) -> Terms:
    """The terms of some ratings in the equations of the rows that they belong to.

    Explicit: (x.y - r) x + lambda y, and r x in b. Implicit, with c = alpha |r| and p = [r > 0]:
    c (x.y) x - p (1 + c) x + lambda p y, and p (1 + c) x in b.

    Parameters
    ----------
    rows, others : int (n,)
        For each rating the index of its row in `y` and of the neighbour in `x`.
    values : float32 (n,)
    y : float32 (n_rows, rank)
    x : float32 (n_others, rank)
    """
    n_rows = len(y)
    ratings = np.asarray(values, np.float64)
    scores = np.empty(len(ratings))
    for first in range(0, len(ratings), SLICE):
        part = slice(first, first + SLICE)
        scores[part] = np.einsum(
            "ij,ij->i", y[rows[part]].astype(np.float64), x[others[part]].astype(np.float64)
        )
    confidence, in_b = objective.confidences(ratings)
    weight = (scores if confidence is None else confidence * scores) - in_b
    positive = ratings > 0 if objective.implicit_prefs else np.ones(len(ratings))
    shape = (n_rows, len(x))
    wide = x.astype(np.float64)
    gradient = np.asarray(sparse.csr_matrix((weight, (rows, others)), shape=shape) @ wide)
    b = np.asarray(sparse.csr_matrix((in_b, (rows, others)), shape=shape) @ wide)
    counts = np.bincount(rows, weights=positive, minlength=n_rows)
    gradient += objective.reg_param * counts[:, None] * y.astype(np.float64)
    return Terms(gradient, b)


def moved_terms(
    indptr: NDArray[np.int64],
    others: NDArray[np.int32],
    values: NDArray[np.float32],
    y: NDArray[np.float32],
    after: NDArray[np.float32],
    before: NDArray[np.float32],
    objective: Objective,
) -> Terms:
    """How the equations of the neighbours change when rows move from `before` to `after`.

    The same as the difference of two `rating_terms` of the transposed ratings, in one pass.

    Parameters
    ----------
    indptr, others, values
        Ratings of the rows that moved, compressed by row: int64 (n + 1,), int32 and float32 (nnz,).
    y : float32 (n_others, rank)
        The neighbours, which stay as they are.
    after, before : float32 (n, rank)

    Returns
    -------
    Terms
        float64 (n_others, rank) each.
    """
    ratings = np.asarray(values, np.float64)
    confidence, in_b = objective.confidences(ratings)
    if confidence is None:
        confidence = np.ones(len(ratings))
    gradient, b = np.zeros(y.shape), np.zeros(y.shape)
    _add_moved(
        np.ascontiguousarray(indptr, np.int64),
        np.ascontiguousarray(others, np.int32),
        confidence,
        in_b,
        np.ascontiguousarray(y, np.float32),
        after.astype(np.float64),
        before.astype(np.float64),
        gradient,
        b,
    )
    return Terms(gradient, b)


@njit(cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _add_moved(indptr, others, confidence, in_b, y, after, before, gradient, b):  # type: ignore[no-untyped-def]
    rank = y.shape[1]
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            other = others[entry]
            new = old = 0.0
            for k in range(rank):
                new += y[other, k] * after[row, k]
                old += y[other, k] * before[row, k]
            d = in_b[entry]
            new = confidence[entry] * new - d
            old = confidence[entry] * old - d
            for k in range(rank):
                gradient[other, k] += new * after[row, k] - old * before[row, k]
                b[other, k] += d * (after[row, k] - before[row, k])


def gram(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """X'X in float64."""
    wide = rows.astype(np.float64)
    return wide.T @ wide


def drift(change: NDArray[np.float64]) -> float:
    """An upper bound of |dG y| / |y| for a change dG of the Gram matrix: its spectral norm."""
    if not change.size:
        return 0.0
    return float(np.abs(np.linalg.eigvalsh((change + change.T) / 2)).max()) * (1 + ROUNDING)
