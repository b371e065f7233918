"""Anderson acceleration of alternating least squares.

One sweep is a fixed-point map of the anchor's factors, y -> g(y): solve the other side for y, then
the anchor for the other side. Anderson acceleration mixes the last sweeps instead of taking the
newest:

    minimise |sum_j w_j f_j| over sum_j w_j = 1,   f_j = g(y_j) - y_j,      next y = sum_j w_j g_j

(Walker and Ni 2011, "Anderson acceleration for fixed-point iterations", SIAM J. Numer. Anal. 49(4),
algorithm AA). The f and g stay where the rows are; the minimisation needs only the inner products
of the f, one small matrix that the parts add up.

The problem is not convex, so two rules are added. A mixture is a guess: one sweep later it is
judged by the objective, which a plain sweep never raises. If it is rejected, the plain sweep from
the last accepted iterate takes its place. Near a saddle point f does not shrink, and making it
small would lead to the saddle. There the step is momentum along the last two sweeps, as in
Mitchell, Ye and De Sterck 2020, "Nesterov acceleration of alternating least squares for canonical
tensor decomposition: momentum step size and restart mechanisms", Numer. Linear Algebra Appl. 27(4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RIDGE = 1e-6
"""Added to the unit diagonal of the scaled normal equations of the weights."""

SAME = 1e-14
"""A difference of two f whose squared length, relative to f, is below this is rounding."""

MAX_WEIGHT = 20.0
"""Largest sum of absolute weights on older sweeps; beyond it the oldest sweep is left out."""

SLOW = 0.98
"""The step is momentum if the newest squared |f| exceeds this share of the one before."""

MOMENTUM = 0.9
"""Share of the difference of the last two sweeps that a momentum step adds."""

PATIENCE = 2
"""A mixture is accepted if its objective is at most the largest of this many accepted ones."""


@dataclass(frozen=True)
class Step:
    """How every part makes the next iterate from its history.

    Attributes
    ----------
    weights
        Weights of the stored g, newest first; they add up to 1.
    keep
        How many pairs (g, f) stay, newest first, counted after `drop_newest`.
    drop_newest
        Drop the newest pair first, because its iterate was rejected.
    """

    weights: tuple[float, ...]
    keep: int
    drop_newest: bool = False


def history_products(
    fs: Sequence[NDArray[np.float32]], weights: NDArray[np.floating | np.integer] | None = None
) -> NDArray[np.float64]:
    """Inner products of the stored differences.

    Parameters
    ----------
    fs
        float32 (n, k) each, newest first.
    weights
        One non-negative weight for each row, from `curvature_weights`; None is 1.

    Returns
    -------
    float64 (len(fs), len(fs))
        Symmetric. The matrices of several parts add up to that of all their rows.
    """
    stacked = np.stack(fs).astype(np.float64)
    if weights is not None:
        stacked *= np.sqrt(np.asarray(weights, np.float64))[None, :, None]
    flat = stacked.reshape(len(fs), -1)
    return np.asarray(flat @ flat.T)


def curvature_weights(
    gradient_norm: NDArray[np.floating], f: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Row weights for `history_products`: |A_i f_i| / |f_i| of the newest f.

    Exact sweeps are preconditioned descent in the inner product f_i' A_i f_i, in which the map is
    symmetric. The length of A_i along f_i stands in for A_i, because it comes at no cost: the
    gradient of row i at y is -A_i f_i. Unweighted, rows of a few ratings dominate.

    Parameters
    ----------
    gradient_norm : (n,)
        |A_i y_i - b_i|.
    f : float32 (n, k)
        The newest g(y) - y.

    Returns
    -------
    float64 (n,)
        0 for a row that did not move.
    """
    lengths = np.linalg.norm(f.astype(np.float64), axis=1)
    gradient = np.asarray(gradient_norm, np.float64)
    return np.divide(gradient, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def mix(gs: Sequence[NDArray[np.float32]], weights: Sequence[float]) -> NDArray[np.float32]:
    """Weighted sum, accumulated in float64 because weights of either sign cancel.

    A g of weight 0 is not read, so a rejected one may hold non-finite numbers.
    """
    total = np.zeros(gs[0].shape, np.float64)
    for g, weight in zip(gs, weights, strict=True):
        if weight != 0.0:
            total += float(weight) * g
    return total.astype(np.float32)


def mixing_weights(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights that make |sum_j w_j f_j| least, kept within `MAX_WEIGHT`.

    Solved for the differences to the newest f (Walker and Ni 2011, section 2), scaled to unit
    diagonal, with a ridge: nearly dependent differences get small weights instead of huge ones.

    Parameters
    ----------
    products : float64 (h, h)
        Finite, newest first.

    Returns
    -------
    float64 (h,)
    """
    size = len(products)
    weights = np.zeros(size)
    weights[0] = 1.0
    for used in range(size, 1, -1):
        older = products[1:used, 1:used]
        cross = products[0, 1:used]
        normal = older - cross[:, None] - cross[None, :] + products[0, 0]
        diagonal = np.diag(normal)
        real = np.flatnonzero(diagonal > SAME * products[0, 0])
        if not len(real):
            continue
        scale = np.sqrt(diagonal[real])
        values, vectors = np.linalg.eigh(normal[np.ix_(real, real)] / np.outer(scale, scale))
        right = (products[0, 0] - cross[real]) / scale
        # Cancellation may leave eigenvalues slightly negative.
        solution = vectors @ ((vectors.T @ right) / (np.maximum(values, 0.0) + RIDGE)) / scale
        if np.isfinite(solution).all() and np.abs(solution).sum() <= MAX_WEIGHT:
            weights[1 + real] = solution
            weights[0] = 1.0 - solution.sum()
            break
    return weights


class Accelerator:
    """Chooses the mixture after every sweep; sees scalars and one small matrix.

    Parameters
    ----------
    memory
        How many older sweeps are stored; 0 is plain alternation.
    """

    def __init__(self, memory: int) -> None:
        if memory < 0:
            raise ValueError(f"memory is {memory}; it is at least 0")
        self.memory = memory
        self.rejected = 0
        self._accepted: list[float] = []
        self._mixed = False

    def step(self, objective: float, max_residual: float, products: NDArray[np.float64]) -> Step:
        """Judge the newest iterate, then say how to make the next.

        Parameters
        ----------
        objective, max_residual
            Of the newest iterate. A row without right-hand side may make the residual infinite.
        products : float64 (h, h)
            Inner products of the stored f, newest first; h is at most memory + 1.
        """
        size = len(products)
        finite = (
            math.isfinite(objective)
            and not math.isnan(max_residual)
            and bool(np.isfinite(products[0, 0]))
        )
        if self._mixed and size > 1 and not (finite and objective <= max(self._accepted)):
            self._mixed = False
            self.rejected += 1
            weights = (0.0, 1.0, *[0.0] * (size - 2))
            return Step(weights, min(size - 1, self.memory), drop_newest=True)
        self._mixed = False
        plain = (1.0, *[0.0] * (size - 1))
        if not finite:
            return Step(plain, 0)
        self._accepted = [*self._accepted, objective][-PATIENCE:]
        if self.memory == 0 or size == 1:
            return Step(plain, min(size, self.memory))
        if not np.isfinite(products).all():
            return Step(plain, 1)
        if products[0, 0] > SLOW * products[1, 1]:
            weights = (1.0 + MOMENTUM, -MOMENTUM, *[0.0] * (size - 2))
        else:
            weights = tuple(float(weight) for weight in mixing_weights(products))
        self._mixed = any(weight != 0.0 for weight in weights[1:])
        return Step(weights, min(size, self.memory))
