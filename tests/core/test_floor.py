"""The floor of residuals: what it depends on, and that sweeps end where rows vanish."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import RatingBlock
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.kernel import row_residuals
from unlearn_spark.core.objective import (
    FLOOR_SHARE,
    Objective,
    floor_of,
    relative_residual,
    target_magnitudes,
)
from unlearn_spark.core.solver import Solver
from unlearn_spark.core.sweeps import CONVERGED, Limits, sweep_both

EXPLICIT, IMPLICIT = Objective(0.1), Objective(0.1, implicit_prefs=True, alpha=3.0)
OBJECTIVES = {"explicit": EXPLICIT, "implicit": IMPLICIT}


def magnitudes_of(rows, objective):
    """Of rows that are given as lists of ratings."""
    indptr = np.cumsum([0, *map(len, rows)])
    return target_magnitudes(indptr, np.array(list(chain(*rows)), np.float32), objective)


@pytest.mark.parametrize(
    ("rows", "objective", "median"),
    [
        ([[1.0], [1.0, 1.0, 1.0, 1.0], [9.0]], EXPLICIT, 2),  # norms 1, 2, 9 x roots 1, 1, 3
        ([[4.0], [4.0], [0.0], []], EXPLICIT, 8),  # what asks for nothing does not count
        ([[0.0, 4.0]], EXPLICIT, 4),  # 4 x the root of 2.83, rounded down
        ([[-1.0, -1.0, -1.0, -1.0]], EXPLICIT, 2),
        ([[1.0], [5.0], [-5.0], [0.0]], IMPLICIT, 4),  # 1 + 3 x 1; the smaller of two medians
        ([[1.0, -5.0]], IMPLICIT, 4),
    ],
)
def test_it_is_a_share_of_the_median_right_hand_side(rows, objective, median):
    assert floor_of(magnitudes_of(rows, objective)) == FLOOR_SHARE * median


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("rows", [[], [[]], [[0.0], [0.0, 0.0]]])
def test_without_a_target_it_is_0(rows, objective):
    assert floor_of(magnitudes_of(rows, objective)) == 0.0


ROWS = st.lists(st.lists(st.integers(-10, 10).map(lambda n: n / 2), max_size=9), max_size=30)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@given(rows=ROWS, seed=st.integers(0, 1000), n_parts=st.integers(1, 5))
@settings(deadline=None)
def test_neither_order_nor_parts_show_in_it(objective, rows, seed, n_parts):
    random = np.random.default_rng(seed)
    floor = floor_of(magnitudes_of(rows, objective))
    shuffled = [list(random.permutation(rows[at])) for at in random.permutation(len(rows))]
    parts = [magnitudes_of(shuffled[number::n_parts], objective) for number in range(n_parts)]
    assert floor_of(sum(parts[1:], parts[0])) == floor
    if not objective.implicit_prefs:
        larger = [[4 * value for value in row] for row in rows]
        assert floor_of(magnitudes_of(larger, objective)) == 8 * floor


def sparse_ratings(seed=0, users=60, items=12):
    """Most users share items; the last third have up to four each that nobody else has rated."""
    random = np.random.default_rng(seed)
    shared = range(2 * users // 3)
    pairs = {(user, int(item)) for user in shared for item in random.integers(0, items, 4)}
    for user in range(len(shared), users):
        pairs |= {(user, items + 4 * user + own) for own in range(random.integers(1, 5))}
    rows, others = np.array(sorted(pairs), np.int32).T
    return rows, others, random.integers(1, 5, len(rows)).astype(np.float32)


VANISHING = {
    "explicit, lambda 3.2": Objective(3.2),
    "implicit, alpha 1": Objective(0.05, implicit_prefs=True),
    "implicit, alpha 1, lambda 0.5": Objective(0.5, implicit_prefs=True),
    "nonnegative, lambda 3.2": Objective(3.2, nonnegative=True),
}


@pytest.mark.parametrize("objective", VANISHING.values(), ids=VANISHING)
def test_sweeps_end_where_rows_vanish(objective):
    rows, others, values = sparse_ratings()
    anchor = RatingBlock.from_entries(rows, others, values)  # the side with fewer rows
    other = RatingBlock.from_entries(others, rows, values)
    floors = [
        floor_of(target_magnitudes(block.indptr, block.values, objective))
        for block in (anchor, other)
    ]
    n_slots = (int(rows.max()) + 1, int(others.max()) + 1)
    hashes = np.random.default_rng(0).integers(-(2**62), 2**62, anchor.n_rows)
    swept = sweep_both(
        Solver(objective, 8, "float32"),
        anchor,
        other,
        n_slots,
        initial_factors(hashes, 8, 0, "user", objective.nonnegative)[None],
        Accelerator(1),
        Limits(200, 2.5e-4, floors[0]),
    )
    assert swept.state == CONVERGED
    # Every row solves its equations, those too whose own right-hand side is next to nothing.
    y, x = np.zeros((n_slots[0], 8), np.float32), np.zeros((n_slots[1], 8), np.float32)
    y[anchor.slots], x[other.slots] = swept.stack[0], swept.others
    vanished = 0
    for block, mine, theirs, floor in ((anchor, y, x, floors[0]), (other, x, y, floors[1])):
        wide = theirs.astype(np.float64)
        gradient, b = row_residuals(
            block.indptr, block.others, block.values, theirs, mine[block.slots], objective,
            gram=wide.T @ wide,
        )  # fmt: skip
        assert relative_residual(gradient, b, floor).max() <= 2.6e-4
        vanished += int((b < floor).sum())
    assert vanished
