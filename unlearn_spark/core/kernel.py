"""The arithmetic of a half-sweep: every row's normal equations, solved exactly.

Every objective is brought to one form. A row with gathered factors ``M`` (n, k), confidences ``c``,
targets ``d``, ridge and, in implicit mode, ``G = Y'Y`` has the normal equations ``A x = b`` with

    A = G + M' diag(c) M + ridge I          b = M' d

* explicit, weighted-lambda (Zhou et al. 2008, section 3.1): ``c = 1``, ``d = r``,
  ``ridge = lambda n``, no ``G``;
* implicit (Hu, Koren and Volinsky 2008, eq. 4, with MLlib's use of negative ratings):
  ``c = alpha |r|``, ``d = 1 + c`` where r > 0 and 0 elsewhere, ``ridge = lambda #(r > 0)``.

A row with fewer ratings than the rank has, without ``G``, a smaller dual:
``x = M' (M M' + ridge I)^-1 d``, an n x n system.

Two engines share this module's checks and its careful path. ``numpy`` calls LAPACK row by row;
``numba`` (`unlearn_spark.core.simd`) factorises many rows at once in SIMD lanes. Rows that they
cannot solve well in their own precision (overflow, underflow, a system that is singular to working
accuracy) are solved again, one at a time, in float64 with a minimum-norm answer as last resort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from unlearn_spark.core import simd
from unlearn_spark.core.objective import (
    DUAL_ERROR,
    SCRATCH_BYTES,
    Objective,
    _Found,
    _Problem,
    _row_chunks,
    safe_range,
)
from unlearn_spark.errors import SettingsError


@dataclass(frozen=True)
class RowSolution:
    """What `solve_rows` found.

    Attributes
    ----------
    factors : float32 (n, k)
        The minimisers.
    gradient_norm : float64 (n,)
        ``||A w - b||`` of the warm rows w (projected gradient where the objective is nonnegative);
        zeros without warm rows.
    b_norm : float64 (n,)
        ``||b||``; zeros without warm rows.
    quadratic
        Sum over rows of ``w'Aw - 2 w'b``: the objective of the warm rows up to a constant and to
        the other side's penalty. 0 without warm rows.
    """

    factors: NDArray[np.float32]
    gradient_norm: NDArray[np.float64]
    b_norm: NDArray[np.float64]
    quadratic: float


@dataclass
class _Equations:
    """One row's normal equations (``A`` only if asked for), and the gradient and objective of its
    warm row (0 without one)."""

    A: NDArray[Any] | None
    b: NDArray[np.float64]
    gradient: NDArray[np.float64]
    quadratic: float


def solve_rows(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    other: NDArray[np.float32],
    objective: Objective,
    *,
    gram: NDArray[np.float64] | None = None,
    warm: NDArray[np.float32] | None = None,
    active: NDArray[np.bool_] | None = None,
    dtype: Any = np.float32,
    engine: Literal["numba", "numpy"] = "numba",
) -> RowSolution:
    """Solve each row's normal equations exactly, the other side held fixed.

    Parameters
    ----------
    indptr, indices, values : int64 (n + 1,), int32 (nnz,), float32 (nnz,)
        Ratings, compressed by row; `indices` are rows of `other`. A row may name one twice.
    other : float32 (m, k)
        The other side's factors.
    gram : float64 (k, k), optional
        ``other' other`` over the whole other side; implicit mode needs it.
    warm : float32 (n, k), optional
        Rows whose gradient and objective are reported. They do not influence the minimisers.
    active : bool (n,), optional
        Rows to solve; the rest keep their warm row (or 0) and report zeros. All by default.
    dtype
        float32 or float64: precision of the systems. Answers are float32 either way.
    engine
        "numba", or its twin "numpy", which calls LAPACK row by row: slower, and easier to read.

    Returns
    -------
    RowSolution
        A row without ratings, or in implicit mode without a positive one, is solved by 0. If
        lambda = 0 leaves a system singular, the answer is its minimum-norm solution.

    Raises
    ------
    SettingsError
        `dtype` is neither precision, or implicit mode came without `gram`.
    """
    dtype = np.dtype(dtype)
    if dtype not in (np.float32, np.float64):
        raise SettingsError(
            f"dtype: {dtype} is not a precision to solve in: use float32 or float64"
        )
    problem = _problem(indptr, indices, values, other, objective, gram, warm)
    n = len(problem.indptr) - 1
    rows = np.arange(n) if active is None else np.flatnonzero(active)
    found = _Found.empty(n, problem.rank)
    if active is not None and warm is not None:
        found.factors[~active] = warm[~active]

    if objective.nonnegative:
        unsolved = rows
    elif engine == "numba":
        unsolved = simd.solve(problem, found, rows, dtype)
    else:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
            unsolved = _solve_by_lapack(problem, found, rows, dtype)
    for row in unsolved:
        _solve_carefully(problem, found, int(row))
    quadratic = float(found.quadratic.sum())
    return RowSolution(found.factors, found.gradient_norm, found.b_norm, quadratic)


def row_residuals(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    values: NDArray[np.float32],
    other: NDArray[np.float32],
    factors: NDArray[np.float32],
    objective: Objective,
    *,
    gram: NDArray[np.float64] | None = None,
    engine: Literal["numba", "numpy"] = "numba",
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``||A x - b||`` and ``||b||`` of given rows, in float64.

    Shares no arithmetic with the solvers: no system is formed. ``A x - b`` is summed as
    ``G x + sum (c (y'x) - d) y + ridge x`` in O(nnz k), in float64 and in bounded memory.

    Parameters
    ----------
    indptr, indices, values, other, objective, gram, engine
        As for `solve_rows`.
    factors : float32 (n, k)
        The rows x to judge.

    Returns
    -------
    gradient_norm, b_norm : float64 (n,)
        With a nonnegative objective the first is the norm of the projected gradient: where the
        factor is 0, only its negative part counts.
    """
    problem = _problem(indptr, indices, values, other, objective, gram, factors)
    n, rank = len(problem.indptr) - 1, problem.rank
    gradient_norm, b_norm = np.zeros(n), np.zeros(n)
    step = max(1, SCRATCH_BYTES // (16 * max(rank, 1)))
    for first, last in _row_chunks(problem.indptr, step):
        x = factors[first:last].astype(np.float64)
        gradient, b = np.zeros_like(x), np.zeros_like(x)
        if engine == "numba":
            simd.residuals(problem, first, gradient, b)
        else:
            _add_residuals(problem, first, last, step, x, gradient, b)
        if problem.gram is not None:
            gradient += x @ problem.gram
        gradient_norm[first:last] = _gradient_norms(gradient, x, objective)
        b_norm[first:last] = np.linalg.norm(b, axis=1)
    return gradient_norm, b_norm


def _problem(
    indptr: NDArray[Any],
    indices: NDArray[Any],
    values: NDArray[Any],
    other: NDArray[Any],
    objective: Objective,
    gram: NDArray[Any] | None,
    warm: NDArray[Any] | None,
) -> _Problem:
    if objective.implicit_prefs and gram is None:
        raise SettingsError("gram: implicit_prefs needs the other side's Gram matrix Y'Y")
    return _Problem(
        np.ascontiguousarray(indptr, np.int64),
        np.ascontiguousarray(indices, np.int32),
        np.ascontiguousarray(values, np.float32),
        np.ascontiguousarray(other, np.float32),
        objective,
        np.ascontiguousarray(gram, np.float64) if objective.implicit_prefs else None,
        None if warm is None else np.ascontiguousarray(warm, np.float32),
    )


# --- the numpy engine -----------------------------------------------------------------------------


def _solve_by_lapack(
    problem: _Problem, found: _Found, rows: NDArray[np.int64], dtype: np.dtype[Any]
) -> NDArray[np.int64]:
    """Solve what `dtype` can solve; return the rows that need care."""
    counts = np.diff(problem.indptr)[rows]
    dual = np.zeros(len(rows), bool)
    if problem.gram is None and problem.objective.reg_param > 0:
        dual = (counts > 0) & (counts < problem.rank)
    unsolved = [row for row in rows[~dual] if not _solve_primal(problem, found, row, dtype)]
    for n in np.unique(counts[dual]):
        same = rows[dual & (counts == n)]
        step = max(1, SCRATCH_BYTES // int(dtype.itemsize * n * max(problem.rank, n)))
        for low in range(0, len(same), step):
            unsolved.extend(_solve_dual(problem, found, same[low : low + step], int(n), dtype))
    return np.array(unsolved, np.int64)


def _solve_primal(problem: _Problem, found: _Found, row: int, dtype: np.dtype[Any]) -> bool:
    equations = _equations(problem, row, dtype, with_matrix=True)
    _, values = problem.ratings(row)
    has_target = (values > 0).any() if problem.objective.implicit_prefs else values.any()
    if has_target:
        x = _cholesky_solve(equations.A, equations.b.astype(dtype))
        if x is None:
            return False
        found.factors[row] = x
    return _report(problem, found, row, equations)


def _solve_dual(
    problem: _Problem, found: _Found, rows: NDArray[np.int64], n: int, dtype: np.dtype[Any]
) -> list[int]:
    """Solve rows of `n` < k ratings each, all at once; return those that need care."""
    entries = problem.indptr[rows][:, None] + np.arange(n)
    d = problem.values[entries].astype(dtype)
    M = problem.other[problem.indices[entries]].astype(dtype, copy=False)
    ridge = problem.objective.reg_param * n
    K = M @ M.transpose(0, 2, 1)
    diagonal = K.reshape(len(rows), -1)[:, :: n + 1]
    diagonal += dtype.type(ridge)
    largest = diagonal.max(axis=1)
    eps = np.finfo(dtype).eps
    # K's eigenvalues are at least the ridge: this bounds its condition.
    sound = (ridge > 4 * n * eps * largest) & _in_range(largest, dtype)
    K[~sound] = np.eye(n, dtype=dtype)
    a = np.linalg.solve(K, d[:, :, None])
    # An answer this large carries its own rounding into the row's residual.
    sound &= eps * largest * _norms(a[:, :, 0]) <= DUAL_ERROR * _norms(d)
    x = (a * M).sum(axis=1)
    b = (d[:, :, None] * M).sum(axis=1)
    sound &= np.isfinite(x).all(axis=1) & (_in_range(np.abs(b).max(axis=1), dtype) | ~d.any(axis=1))
    found.factors[rows[sound]] = x[sound]
    if problem.warm is not None:
        w = problem.warm[rows].astype(dtype, copy=False)
        fitted = (M @ w[:, :, None])[:, :, 0]
        wide = w.astype(np.float64)
        gradient = ((fitted - d)[:, None, :] @ M)[:, 0, :] + ridge * wide
        found.gradient_norm[rows] = _gradient_norms(gradient, wide, problem.objective)
        found.b_norm[rows] = np.linalg.norm(b.astype(np.float64), axis=1)
        found.quadratic[rows] = np.einsum("ij,ij->i", fitted - 2 * d, fitted, dtype=np.float64)
        found.quadratic[rows] += ridge * np.einsum("ij,ij->i", wide, wide)
        sound &= np.isfinite(found.gradient_norm[rows]) & np.isfinite(found.quadratic[rows])
    return [int(row) for row in rows[~sound]]


def _equations(
    problem: _Problem, row: int, dtype: np.dtype[Any], *, with_matrix: bool
) -> _Equations:
    """A row's normal equations: products in `dtype`, sums over long rows in float64."""
    indices, values = problem.ratings(row)
    k, objective = problem.rank, problem.objective
    w = None if problem.warm is None else problem.warm[row].astype(dtype, copy=False)
    ridge = objective.ridge(values)
    step = max(1, SCRATCH_BYTES // (2 * dtype.itemsize * max(k, 1)))
    A: NDArray[Any] | None = None
    b, gradient, quadratic = np.zeros(k), np.zeros(k), 0.0
    for low in range(0, max(len(indices), 1), step):
        M = problem.other.take(indices[low : low + step], axis=0).astype(dtype, copy=False)
        c, d = objective.confidences(values[low : low + step].astype(dtype, copy=False))
        b += d @ M
        if w is not None:
            fitted = M @ w
            weighted = fitted if c is None else c * fitted
            gradient += (weighted - d) @ M
            quadratic += float((weighted - 2 * d).astype(np.float64) @ fitted.astype(np.float64))
        if with_matrix:
            if c is not None:
                M *= np.sqrt(c)[:, None]
            share = M.T @ M
            A = share if A is None else np.add(A, share, dtype=np.float64)
    if A is not None:
        if problem.gram is not None:
            A = A + problem.gram
        A = A.astype(dtype, copy=False)
        A.flat[:: k + 1] += dtype.type(ridge)
    if w is not None:
        wide = w.astype(np.float64)
        pull = ridge * wide if problem.gram is None else ridge * wide + problem.gram @ wide
        gradient += pull
        quadratic += float(pull @ wide)
    return _Equations(A, b, gradient, quadratic)


def _cholesky_solve(A: NDArray[Any] | None, b: NDArray[Any]) -> NDArray[Any] | None:
    """The solution of ``A x = b``, or None if A's precision does not give a good one."""
    assert A is not None
    k, dtype = len(b), A.dtype
    largest = A.flat[:: k + 1].max(initial=0)
    if not (_in_range(largest, dtype) and _in_range(np.abs(b).max(initial=0), dtype)):
        return None
    posv = lapack.sposv if dtype == np.float32 else lapack.dposv
    factor, x, info = posv(A, b)
    if info != 0 or not np.isfinite(x).all():
        return None
    pivot = factor.flat[:: k + 1].min()
    return x if pivot * pivot > 2 * k * np.finfo(dtype).eps * largest else None


def _in_range(magnitude: Any, dtype: np.dtype[Any]) -> Any:
    low, high = safe_range(dtype)
    return (magnitude > low) & (magnitude < high)


def _report(problem: _Problem, found: _Found, row: int, equations: _Equations) -> bool:
    """Record the norms and the objective of the warm row; False if they overflowed."""
    if problem.warm is None:
        return True
    w = problem.warm[row : row + 1].astype(np.float64)
    found.gradient_norm[row] = _gradient_norms(equations.gradient[None], w, problem.objective)[0]
    found.b_norm[row] = np.linalg.norm(equations.b)
    found.quadratic[row] = equations.quadratic
    return bool(np.isfinite(found.gradient_norm[row]) and np.isfinite(equations.quadratic))


# --- the careful path: one row at a time in float64 -----------------------------------------------


def _solve_carefully(problem: _Problem, found: _Found, row: int) -> None:
    """Solve a row of any condition and magnitude; every nonnegative row is solved here."""
    equations = _equations(problem, row, np.dtype(np.float64), with_matrix=True)
    A, b = equations.A, equations.b
    assert A is not None
    x: NDArray[Any] | None = np.zeros_like(b)
    if b.any():
        if problem.objective.nonnegative:
            x = solve_nonnegative(A, b)
        else:
            x = _cholesky_solve(A, b)
            if x is None:
                x = _minimum_norm(A, b)
        limit = np.finfo(np.float32).max
        x = np.clip(x, -limit, limit)
    found.factors[row] = x
    _report(problem, found, row, equations)


def _scaled_spectrum(A: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues of a positive semidefinite A that are not rounding noise, and their vectors."""
    eigenvalues, vectors = np.linalg.eigh(A)
    kept = eigenvalues > len(A) * np.finfo(np.float64).eps * max(eigenvalues[-1], 0.0)
    return eigenvalues[kept], vectors[:, kept]


def _minimum_norm(A: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    eigenvalues, vectors = _scaled_spectrum(A)
    return vectors @ ((vectors.T @ b) / eigenvalues)


def solve_nonnegative(A: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimise ``x'Ax - 2 b'x`` over x >= 0 for a positive semidefinite A (k, k).

    Block principal pivoting (Kim and Park 2011, algorithm 2): guess the positive entries, solve for
    them, exchange all that violate the optimality conditions, and fall back to exchanging one
    at a time when that does not help. Lawson and Hanson's active-set method (scipy) takes over
    for singular systems, where pivoting may cycle.
    """
    k = len(b)
    eps = np.finfo(np.float64).eps
    scale = np.sqrt(np.maximum(A.flat[:: k + 1], 0))
    x, positive = np.zeros(k), np.ones(k, bool)
    fewest, patience = k + 1, 3
    for _ in range(5 * k + 10):
        x = np.zeros(k)
        if positive.any():
            factor, inside, info = lapack.dposv(A[np.ix_(positive, positive)], b[positive])
            pivots = np.diagonal(factor)
            if info != 0 or pivots.min() ** 2 <= 2 * k * eps * scale.max() ** 2:
                return _active_set(A, b)
            x[positive] = inside
        slope = A @ x - b
        noise = 10 * k * eps * (np.abs(A) @ np.abs(x) + np.abs(b))
        wrong = np.where(positive, x < 0, slope < -noise)
        n_wrong = int(wrong.sum())
        if n_wrong == 0:
            return x
        if n_wrong < fewest:
            fewest, patience = n_wrong, 3
        elif patience:
            patience -= 1
        else:
            wrong[: np.flatnonzero(wrong)[-1]] = False
        positive = positive ^ wrong
    return _active_set(A, b)


def _active_set(A: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.optimize import nnls  # seldom needed, and large in every worker

    eigenvalues, vectors = _scaled_spectrum(A)
    root = np.sqrt(eigenvalues)
    x, _ = nnls(root[:, None] * vectors.T, (vectors.T @ b) / root, maxiter=30 * len(b))
    return x


# --- residuals ------------------------------------------------------------------------------------


def _add_residuals(
    problem: _Problem,
    first: int,
    last: int,
    step: int,
    x: NDArray[np.float64],
    gradient: NDArray[np.float64],
    b: NDArray[np.float64],
) -> None:
    """Fill ``A x - b`` (without ``Y'Y x``) and ``b``, `step` ratings at a time."""
    objective = problem.objective
    bounds = problem.indptr[first : last + 1]
    counted = np.zeros(last - first)
    # More than one turn only if a single row is longer than a step.
    for low in range(int(bounds[0]), int(bounds[-1]), step):
        high = min(low + step, int(bounds[-1]))
        starts = np.clip(bounds[:-1], low, high) - low
        sizes = np.clip(bounds[1:], low, high) - low - starts
        filled = np.flatnonzero(sizes)  # reduceat cannot express an empty group
        owner = np.repeat(np.arange(len(sizes)), sizes)
        values = problem.values[low:high].astype(np.float64)
        M = problem.other[problem.indices[low:high]].astype(np.float64)
        c, d = objective.confidences(values)
        fitted = np.einsum("ij,ij->i", M, x[owner])
        error = (fitted if c is None else c * fitted) - d
        gradient[filled] += np.add.reduceat(error[:, None] * M, starts[filled], axis=0)
        counts = (values > 0) if objective.implicit_prefs else np.ones(len(values))
        counted += np.bincount(owner, counts, len(sizes))
        M *= d[:, None]
        b[filled] += np.add.reduceat(M, starts[filled], axis=0)
    gradient += objective.reg_param * counted[:, None] * x


def _norms(rows: NDArray[Any]) -> NDArray[np.float64]:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))


def _gradient_norms(
    gradient: NDArray[np.float64], x: NDArray[np.float64], objective: Objective
) -> NDArray[np.float64]:
    if objective.nonnegative:
        gradient = np.where(x > 0, gradient, np.minimum(gradient, 0))
    return np.linalg.norm(gradient, axis=1)
