"""Acceleration: counts of sweeps against plain alternation, and the ways a step can go wrong."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unlearn_spark.core.acceleration import (
    MAX_WEIGHT,
    Accelerator,
    curvature_weights,
    history_products,
    mix,
    mixing_weights,
)

Map = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], float, float]]


def iterate(
    sweep: Map, start: NDArray[np.float32], memory: int, tolerance: float, cap: int
) -> tuple[NDArray[np.float32], list[float], list[float], Accelerator]:
    """Run `sweep` (y -> g, objective, residual) as training does; y, objectives, residuals."""
    accelerator = Accelerator(memory)
    y = start
    gs: list[NDArray[np.float32]] = []
    fs: list[NDArray[np.float32]] = []
    objectives, residuals = [], []
    for _ in range(cap):
        g, objective, residual = sweep(y)
        objectives.append(objective)
        residuals.append(residual)
        if residual <= tolerance:
            break
        gs, fs = [g, *gs], [g - y, *fs]
        step = accelerator.step(objective, residual, history_products(fs))
        assert len(step.weights) == len(gs)
        assert sum(step.weights) == pytest.approx(1.0, abs=1e-9)
        y = mix(gs, step.weights)
        first = int(step.drop_newest)
        assert 0 <= step.keep <= min(memory, len(gs) - first)
        gs, fs = gs[first : first + step.keep], fs[first : first + step.keep]
    return y, objectives, residuals, accelerator


def contraction(rates: NDArray[np.float64]) -> Map:
    """y -> rates * (y - 1) + 1, with the energy that such a map never raises."""

    def sweep(y: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
        error = y.astype(np.float64) - 1.0
        g = (1.0 + rates * error).astype(np.float32)
        return g, float(((1.0 - rates) * error**2).sum()), float(np.abs(error).max())

    return sweep


def small_als() -> tuple[Map, NDArray[np.float32]]:
    """Explicit ALS of a sparse rank 4 matrix with noise, anchor side first; and a start."""
    rng = np.random.default_rng(7)
    users, items, rank, reg = 120, 60, 4, 0.05
    signal = rng.normal(size=(users, rank)) @ rng.normal(size=(rank, items))
    seen = (rng.random((users, items)) < 0.2).astype(np.float64)
    ratings = seen * (signal + 0.5 * rng.normal(size=signal.shape) + 1.0)

    def systems(
        other: NDArray[np.float64], mask: NDArray[np.float64], values: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        matrix = np.einsum("ri,ia,ib->rab", mask, other, other)
        matrix += reg * mask.sum(axis=1)[:, None, None] * np.eye(rank)
        return matrix, values @ other

    def sweep(y: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
        wide = y.astype(np.float64)
        matrix, right = systems(wide, seen, ratings)
        x = np.linalg.solve(matrix, right[..., None])[..., 0].astype(np.float64)
        matrix, right = systems(x, seen.T, ratings.T)
        g = np.linalg.solve(matrix, right[..., None])[..., 0].astype(np.float32)
        gradient = np.einsum("nab,nb->na", matrix, wide) - right
        residual = np.linalg.norm(gradient, axis=1) / np.linalg.norm(right, axis=1)
        objective = ((seen * (ratings - x @ wide.T)) ** 2).sum()
        objective += reg * (seen.sum(axis=1) @ (x**2).sum(axis=1))
        objective += reg * (seen.sum(axis=0) @ (wide**2).sum(axis=1))
        return g, float(objective), float(residual.max())

    return sweep, rng.normal(size=(items, rank)).astype(np.float32)


def test_linear_contraction_takes_a_quarter_of_the_plain_sweeps() -> None:
    rates = np.linspace(0.0, 0.97, 40).reshape(10, 4)
    start = np.zeros((10, 4), np.float32)
    _, _, plain, _ = iterate(contraction(rates), start, 0, 1e-4, 2000)
    y, _, fast, _ = iterate(contraction(rates), start, 3, 1e-4, 2000)
    assert plain[-1] <= 1e-4
    assert fast[-1] <= 1e-4
    assert len(fast) * 4 <= len(plain)
    np.testing.assert_allclose(y, 1.0, atol=1e-4)


def test_curvature_weights_recover_scaled_identities() -> None:
    f = np.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]], np.float32)
    weights = curvature_weights(np.array([5.0 * 7.0, 2.0 * 0.5, 0.0]), f)
    np.testing.assert_allclose(weights, [7.0, 0.5, 0.0])
    # Then the product is the energy f' A f of the rows.
    assert history_products([f], weights)[0, 0] == pytest.approx(7.0 * 25.0 + 0.5 * 4.0)


def test_one_slow_mode_is_solved_at_once() -> None:
    # Two sweeps of a single mode of rate r determine its fixed point: weights (1, -r) / (1 - r).
    products = history_products([np.full((1, 1), 0.9, np.float32), np.ones((1, 1), np.float32)])
    np.testing.assert_allclose(mixing_weights(products), [10.0, -9.0], rtol=1e-4)


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_small_als_takes_half_of_the_plain_sweeps(memory: int) -> None:
    sweep, start = small_als()
    _, plain_objectives, plain, _ = iterate(sweep, start, 0, 2.5e-4, 3000)
    _, objectives, fast, _ = iterate(sweep, start, memory, 2.5e-4, 3000)
    assert plain[-1] <= 2.5e-4
    assert fast[-1] <= 2.5e-4
    assert len(fast) * 2 <= len(plain)
    # A stationary point as good as the plain one's, not merely any.
    assert objectives[-1] <= 1.02 * plain_objectives[-1]


def test_memory_zero_is_plain_alternation() -> None:
    sweep, start = small_als()
    y, objectives, _, accelerator = iterate(sweep, start, 0, 0.0, 5)
    plain = start
    for _ in range(5):
        plain = sweep(plain)[0]
    np.testing.assert_array_equal(y, plain)
    assert accelerator.rejected == 0
    assert objectives == sorted(objectives, reverse=True)


def mixed_once(memory: int = 3) -> Accelerator:
    """An accelerator whose second step was a mixture, with objectives 10 and 9 accepted."""
    accelerator = Accelerator(memory)
    accelerator.step(10.0, 1.0, np.array([[1.0]]))
    step = accelerator.step(9.0, 0.9, np.array([[0.64, 0.8], [0.8, 1.0]]))
    assert step.weights[1] != 0.0
    return accelerator


@pytest.mark.parametrize("objective", [10.5, np.inf, np.nan])
def test_bad_mixture_gives_way_to_the_plain_sweep_before_it(objective: float) -> None:
    accelerator = mixed_once()
    step = accelerator.step(objective, 0.5, np.eye(3))
    assert step.weights == (0.0, 1.0, 0.0)
    assert step.drop_newest
    assert step.keep == 2
    assert accelerator.rejected == 1
    # What follows is a plain sweep's iterate: accepted whatever it is, so there is no cycle.
    after = accelerator.step(10.6, 0.5, np.diag([0.5, 1.0, 1.0]))
    assert not after.drop_newest
    assert accelerator.rejected == 1


def test_small_rise_below_an_earlier_accepted_objective_is_let_pass() -> None:
    accelerator = mixed_once()
    assert not accelerator.step(9.5, 0.5, np.diag([0.5, 1.0, 1.0])).drop_newest
    assert accelerator.rejected == 0


def test_rejected_g_is_never_read() -> None:
    good = np.array([[1.0, 2.0]], np.float32)
    np.testing.assert_array_equal(mix([good * np.nan, good], (0.0, 1.0)), good)


def test_non_finite_plain_iterate_empties_the_history() -> None:
    step = Accelerator(3).step(np.nan, np.nan, np.array([[np.nan]]))
    assert step.weights == (1.0,)
    assert step.keep == 0


def test_non_finite_older_products_are_forgotten() -> None:
    accelerator = Accelerator(3)
    step = accelerator.step(1.0, 1.0, np.array([[1.0, np.inf], [np.inf, np.inf]]))
    assert step.weights == (1.0, 0.0)
    assert step.keep == 1


def test_infinite_residual_of_a_row_without_right_hand_side_is_no_fault() -> None:
    step = Accelerator(3).step(1.0, np.inf, np.array([[1.0]]))
    assert step.keep == 1


@pytest.mark.parametrize(
    "products", [np.zeros((4, 4)), np.ones((4, 4)), np.outer([1, 2, 3, 4], [1.0, 2, 3, 4])]
)
def test_singular_products_give_finite_weights(products: NDArray[np.float64]) -> None:
    weights = mixing_weights(products)
    assert np.isfinite(weights).all()
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ products @ weights <= products[0, 0] + 1e-12


def test_slow_sweeps_get_momentum_along_the_last_two() -> None:
    accelerator = Accelerator(2)
    accelerator.step(10.0, 1.0, np.array([[1.0]]))
    step = accelerator.step(9.0, 1.0, np.array([[1.2, 1.0], [1.0, 1.0]]))
    assert step.weights[0] > 1.0
    assert step.weights[0] + step.weights[1] == pytest.approx(1.0)


def test_negative_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Accelerator(-1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(1e-6, 1e6))
def test_weights_shorten_f_and_products_add_over_parts(
    size: int, rows: int, seed: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    fs = [(scale * rng.normal(size=(2 * rows, 3))).astype(np.float32) for _ in range(size)]
    n_ratings = rng.integers(1, 100, 2 * rows)
    products = history_products(fs, n_ratings)
    parts = [
        history_products([f[part] for f in fs], n_ratings[part])
        for part in (slice(0, rows), slice(rows, None))
    ]
    np.testing.assert_allclose(parts[0] + parts[1], products, rtol=1e-9, atol=1e-9 * scale**2)
    weights = mixing_weights(products)
    assert weights.sum() == pytest.approx(1.0)
    assert np.abs(weights[1:]).sum() <= MAX_WEIGHT
    assert weights @ products @ weights <= products[0, 0] * (1 + 1e-6)
