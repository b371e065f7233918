"""The ledger's arithmetic against equations written out in full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.core.bounds import drift, gram, moved_norms, rating_terms
from unlearn_spark.core.objective import Objective

RANK = 3


def dense_gradient(y, x, table, objective, gram_x):
    """A y - b and b of every row of y for a dense table with NaN where nothing is rated."""
    y, x = y.astype(np.float64), x.astype(np.float64)
    gradients, bs = [], []
    for row, ratings in zip(y, table, strict=True):
        rated = ~np.isnan(ratings)
        m, r = x[rated], ratings[rated]
        if objective.implicit_prefs:
            c, p = objective.alpha * np.abs(r), r > 0
            a = gram_x + (m.T * c) @ m + objective.reg_param * p.sum() * np.eye(RANK)
            b = m.T @ ((1 + c) * p)
        else:
            a = m.T @ m + objective.reg_param * len(r) * np.eye(RANK)
            b = m.T @ r
        gradients.append(a @ row - b)
        bs.append(b)
    return np.array(gradients), np.array(bs)


def terms(table, y, x, objective):
    rows, others = np.nonzero(~np.isnan(table))
    values = table[rows, others].astype(np.float32)
    return rating_terms(rows, others, values, y, x, objective)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.floats(0.1, 1.0))
def test_a_change_of_ratings_and_neighbours_is_pushed_exactly(seed, implicit, share):
    random = np.random.default_rng(seed)
    objective = Objective(0.1, implicit, 2.0)
    y = random.normal(size=(7, RANK)).astype(np.float32)
    x = random.normal(size=(9, RANK)).astype(np.float32)
    moved = np.where(random.random((9, 1)) < 0.5, x, x + random.normal(size=x.shape)).astype(
        np.float32
    )
    table = np.where(random.random((7, 9)) < share, random.integers(-4, 10, (7, 9)) / 2.0, np.nan)
    after = np.where(random.random((7, 9)) < 0.3, np.nan, table)
    old, old_b = dense_gradient(y, x, table, objective, gram(x))
    new, new_b = dense_gradient(y, moved, after, objective, gram(moved))
    push = terms(after, y, moved, objective) - terms(table, y, x, objective)
    global_part = (gram(moved) - gram(x)) if implicit else np.zeros((RANK, RANK))
    np.testing.assert_allclose(
        push.gradient + y.astype(np.float64) @ global_part, new - old, atol=1e-6
    )
    np.testing.assert_allclose(push.b, new_b - old_b, atol=1e-6)
    # What the ledger does with it: norms only, and still a bound.
    by, b_by = push.norms()
    bound = np.linalg.norm(old, axis=1) + by + drift(global_part) * np.linalg.norm(y, axis=1)
    assert (bound >= np.linalg.norm(new, axis=1) - 1e-6).all()
    lower = np.linalg.norm(old_b, axis=1) - b_by
    assert (lower <= np.linalg.norm(new_b, axis=1) + 1e-6).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.floats(0.1, 1.0))
def test_moved_rows_change_their_neighbours_by_the_difference_of_the_terms(seed, implicit, share):
    random = np.random.default_rng(seed)
    objective = Objective(0.1, implicit, 2.0)
    y = random.normal(size=(7, RANK)).astype(np.float32)
    before = random.normal(size=(9, RANK)).astype(np.float32)
    moved = (before + random.normal(size=before.shape)).astype(np.float32)
    table = np.where(random.random((7, 9)) < share, random.integers(-4, 10, (7, 9)) / 2.0, np.nan)
    others, rows = np.nonzero(~np.isnan(table.T))
    indptr = np.searchsorted(others, np.arange(len(before) + 1))
    values = table[rows, others].astype(np.float32)
    found = moved_norms(indptr, rows.astype(np.int32), values, y, moved, before, objective)
    difference = terms(table, y, moved, objective) - terms(table, y, before, objective)
    for norms, true in zip(found, difference.norms(), strict=True):
        np.testing.assert_allclose(norms, true, rtol=1e-12, atol=1e-12)


def test_a_skipped_push_is_not_a_bound():
    """The guard can fail: without the push the old gradient says nothing about the new one."""
    objective = Objective(0.1)
    x = np.eye(RANK, dtype=np.float32)
    table = np.full((1, RANK), 2.0)
    y = np.linalg.solve(np.eye(RANK) * 1.3, np.full(RANK, 2.0))[None].astype(np.float32)
    old, _ = dense_gradient(y, x, table, objective, None)
    after = table.copy()
    after[0, 0] = np.nan
    new, _ = dense_gradient(y, x, after, objective, None)
    assert np.linalg.norm(old) < 1e-6 < np.linalg.norm(new)


def test_drift_bounds_every_direction():
    random = np.random.default_rng(0)
    change = random.normal(size=(RANK, RANK))
    change += change.T
    vectors = random.normal(size=(500, RANK))
    moved = np.linalg.norm(vectors @ change, axis=1)
    assert (moved <= drift(change) * np.linalg.norm(vectors, axis=1)).all()
    assert drift(np.zeros((0, 0))) == 0.0
    assert drift(-np.eye(2)) == pytest.approx(1.0)
