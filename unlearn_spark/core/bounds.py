"""The ledger's arithmetic: how much one row's equations change when a neighbour does.

A row y with ratings from neighbours x solves A y = b. Its gradient g = A y - b is a sum with one
term for every rating (and, in implicit mode, one global term), so a change of one rating or of one
neighbour changes g by the difference of a few terms, known without reading the others. By the
triangle inequality, an upper bound of |g| plus the norm of that difference is an upper bound again.
A lower bound of |b| minus the norm of the change of b is a lower bound again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy import sparse

from unlearn_spark.core.objective import Objective
from unlearn_spark.core.threads import shared_out

SLICE = 200_000
"""Ratings whose products are formed at a time, which bounds the memory that they take."""

ROUNDING = 1e-9
"""Relative slack on every norm: far above float64's rounding, far below any tolerance."""


@dataclass(frozen=True)
class Terms:
    """Sums of rating terms for some rows.

    Attributes
    ----------
    gradient : float64 (n_rows, rank)
        Their part of A y - b, without the global term of implicit mode.
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
    """Sum, row by row, the terms of some ratings in their rows' equations.

    Explicit: (x.y - r) x + lambda y, and r x in b. Implicit, with c = alpha |r| and p = [r > 0]:
    c (x.y) x - p (1 + c) x + lambda p y, and p (1 + c) x in b.

    Parameters
    ----------
    rows, others : int (n,)
        For each rating, the index of its row in `y` and of its neighbour in `x`.
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


def moved_norms(
    indptr: NDArray[np.int64],
    others: NDArray[np.int32],
    values: NDArray[np.float32],
    y: NDArray[np.float32],
    after: NDArray[np.float32],
    before: NDArray[np.float32],
    objective: Objective,
    threads: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far the equations of the neighbours change when rows move from `before` to `after`.

    These are the `Terms.norms` of the difference of two `rating_terms` of the transposed ratings,
    computed while holding the sums of only one neighbour.

    Parameters
    ----------
    indptr, others, values
        Ratings of the rows that moved, compressed by row: int64 (n + 1,), int32 and float32 (nnz,).
    y : float32 (n_others, rank)
        The neighbours, which do not move.
    after, before : float32 (n, rank)
        The rows that moved.
    threads
        Threads that share the neighbours; results do not depend on it.

    Returns
    -------
    gradient, b : float64 (n_others,)
        Norms, rounded up.
    """
    # By neighbour, because row by row each rating would touch sums that are not in the cache.
    by_row = sparse.csr_array((values, others, indptr), (len(after), len(y)))
    by_neighbour = by_row.tocsc()
    gradient, b = np.zeros(len(y)), np.zeros(len(y))
    shares = np.linspace(0, len(values), max(1, len(values) // SLICE) + 1)
    cuts = np.searchsorted(by_neighbour.indptr, shares).tolist()
    cuts[-1] = len(y)

    def fill(run: tuple[int, int]) -> None:
        _norms_of_moves(
            *run,
            by_neighbour.indptr,
            by_neighbour.indices,
            by_neighbour.data,
            objective.implicit_prefs,
            objective.alpha,
            np.ascontiguousarray(y, np.float32),
            np.ascontiguousarray(after, np.float32),
            np.ascontiguousarray(before, np.float32),
            gradient,
            b,
        )

    shared_out(fill, list(pairwise(cuts)), threads)
    slack = 1 + ROUNDING
    return gradient * slack, b * slack


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"}, error_model="numpy")
def _norms_of_moves(  # type: ignore[no-untyped-def]
    first, last, starts, rows, values, implicit, alpha, y, after, before, gradient, b
):
    rank = y.shape[1]
    mine, in_gradient, in_side = np.empty(rank), np.empty(rank), np.empty(rank)
    for other in range(first, last):
        if starts[other] == starts[other + 1]:
            continue
        for k in range(rank):
            mine[k] = y[other, k]
            in_gradient[k] = in_side[k] = 0.0
        for at in range(starts[other], starts[other + 1]):
            row, value = rows[at], np.float64(values[at])
            c, d = 1.0, value
            if implicit:  # `Objective.confidences`
                c = alpha * abs(value)
                d = 1 + c if value > 0 else 0.0
            new = old = 0.0
            for k in range(rank):
                new += mine[k] * np.float64(after[row, k])
                old += mine[k] * np.float64(before[row, k])
            new = c * new - d
            old = c * old - d
            for k in range(rank):
                x, x_before = np.float64(after[row, k]), np.float64(before[row, k])
                in_gradient[k] += new * x - old * x_before
                in_side[k] += d * (x - x_before)
        squares = b_squares = 0.0
        for k in range(rank):
            squares += in_gradient[k] * in_gradient[k]
            b_squares += in_side[k] * in_side[k]
        gradient[other], b[other] = np.sqrt(squares), np.sqrt(b_squares)


def gram(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """X'X in float64."""
    wide = rows.astype(np.float64)
    return wide.T @ wide


def drift(change: NDArray[np.float64]) -> float:
    """An upper bound of |dG y| / |y| for a change dG of the Gram matrix: its spectral norm."""
    if not change.size:
        return 0.0
    return float(np.abs(np.linalg.eigvalsh((change + change.T) / 2)).max()) * (1 + ROUNDING)
