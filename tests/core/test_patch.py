"""Patches: rows of both sides settled together, and the truth about everything around them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.core import bounds as ledger
from unlearn_spark.core.blocks import SIDES, RatingBlock, other_side
from unlearn_spark.core.kernel import row_residuals
from unlearn_spark.core.objective import Objective, relative_residual
from unlearn_spark.core.patch import PatchSide, places_among, solve_patch
from unlearn_spark.core.solver import Solver

SIZES = {"user": 12, "item": 8}
RANK = 3
TAU, MARK = 4e-4, 1e-4


def ratings_of(dense, side, keep):
    """The ratings (0: none) of some rows of a side."""
    matrix = dense if side == "user" else dense.T
    rows, others = np.nonzero(matrix * np.asarray(keep)[:, None])
    values = matrix[rows, others].astype(np.float32)
    return RatingBlock.from_entries(rows.astype(np.int32), others.astype(np.int32), values)


def problem(seed, share=0.5):
    random = np.random.default_rng(seed)
    dense = np.round(random.normal(3, 1, (SIZES["user"], SIZES["item"])), 1)
    dense *= random.random(dense.shape) < share
    factors = {s: random.normal(size=(SIZES[s], RANK)).astype(np.float32) for s in SIDES}
    return dense, factors


def patch_of(dense, factors, chosen, known=None):
    sides = {}
    for side in SIDES:
        block = ratings_of(dense, side, chosen[side])
        slots = np.arange(SIZES[side], dtype=np.int32) if known is None else known[side]
        forced = np.zeros(block.n_rows, np.bool_)
        sides[side] = PatchSide(slots, factors[side][slots], block, forced, floor=0.0)
    return sides


def scan(dense, factors, objective, side):
    """(slots, |A x - b|, |b|) of all rows with ratings."""
    block = ratings_of(dense, side, np.ones(SIZES[side]))
    other = factors[other_side(side)]
    gram = ledger.gram(other) if objective.implicit_prefs else None
    norms = row_residuals(
        block.indptr, block.others, block.values, other, factors[side][block.slots], objective,
        gram=gram,
    )  # fmt: skip
    return block.slots, *norms


def after(factors, settled):
    moved = {side: rows.copy() for side, rows in factors.items()}
    for side in SIDES:
        moved[side][settled[side].slots] = settled[side].factors
    return moved


@pytest.mark.parametrize("implicit", [False, True])
@given(
    seed=st.integers(0, 10_000),
    users=st.sets(st.integers(0, SIZES["user"] - 1)),
    items=st.sets(st.integers(0, SIZES["item"] - 1)),
    turns=st.sampled_from([0, 1, 2, 3, 2000]),
    spare=st.sampled_from([0, 20, np.inf]),
)
@settings(max_examples=60, deadline=None)
def test_what_a_patch_says_of_every_row_is_true(implicit, seed, users, items, turns, spare):
    dense, factors = problem(seed)
    objective = Objective(0.4, implicit, 2.0)
    chosen = {
        side: np.isin(np.arange(SIZES[side]), list(rows))
        for side, rows in (("user", users), ("item", items))
    }
    grams = {side: ledger.gram(factors[side]) for side in SIDES} if implicit else {}
    before = {side: scan(dense, factors, objective, side) for side in SIDES}
    sides = patch_of(dense, factors, chosen)
    settled = solve_patch(Solver(objective, RANK, "float32"), sides, TAU, MARK, grams, spare, turns)
    moved = after(factors, settled)
    for side in SIDES:
        mine = settled[side]
        slots, gradient, b = scan(dense, moved, objective, side)
        at = np.isin(slots, mine.slots)
        # Inside: the residuals themselves, and below tau unless the turns ran out.
        np.testing.assert_allclose(mine.gradient_norm, gradient[at], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(mine.b_norm, b[at], rtol=1e-9)
        if turns == 2000 and spare == np.inf:
            assert relative_residual(gradient[at], b[at]).max(initial=0) <= TAU
        # Outside: nothing moved, and the pushes bound what the moves have changed.
        still = ~np.isin(np.arange(SIZES[side]), mine.slots)
        np.testing.assert_array_equal(moved[side][still], factors[side][still])
        assert not np.isin(mine.push_slots, mine.slots).any()
        pushed = np.zeros((2, SIZES[side]))
        pushed[:, mine.push_slots] = mine.push_gradient, mine.push_b
        if implicit:
            drift = ledger.drift(settled[other_side(side)].gram_change)
            pushed[0] += drift * np.linalg.norm(factors[side].astype(np.float64), axis=1)
        bound = before[side][1] + pushed[0][slots]
        assert (gradient[~at] <= bound[~at] * (1 + 1e-9) + 1e-9).all()
        assert (b[~at] >= (before[side][2] - pushed[1][slots])[~at] * (1 - 1e-9) - 1e-9).all()


def test_rows_that_only_have_each_other_settle_in_one_patch():
    """A user and an item with one strong common rating pull at each other for hundreds of turns."""
    dense, factors = problem(3)
    dense[0], dense[:, 0] = 0, 0
    dense[0, 0] = 5.0
    chosen = {side: np.arange(SIZES[side]) == 0 for side in SIDES}
    objective = Objective(0.05)
    settled = solve_patch(
        Solver(objective, RANK, "float32"), patch_of(dense, factors, chosen), TAU, MARK, {}
    )
    assert sum(settled[side].solved_rows for side in SIDES) > 50
    for side in SIDES:
        assert settled[side].slots.tolist() == [0]
        assert relative_residual(settled[side].gradient_norm, settled[side].b_norm).max() <= TAU
        assert not len(settled[side].push_slots)


def test_rows_under_the_mark_are_left_alone_unless_forced():
    dense, factors = problem(5)
    chosen = {"user": np.ones(SIZES["user"], np.bool_), "item": np.zeros(SIZES["item"], np.bool_)}
    solver = Solver(Objective(0.4), RANK, "float32")
    once = solve_patch(solver, patch_of(dense, factors, chosen), TAU, MARK, {})
    sides = patch_of(dense, after(factors, once), chosen)
    assert not solve_patch(solver, sides, TAU, MARK, {})["user"].solved.any()
    sides["user"].forced[2] = True
    assert solve_patch(solver, sides, TAU, MARK, {})["user"].solved.nonzero()[0].tolist() == [2]


def test_a_rating_without_the_factors_of_its_row_is_refused():
    dense, factors = problem(7, share=1.0)
    chosen = {side: np.ones(SIZES[side], np.bool_) for side in SIDES}
    known = {"user": np.arange(12, dtype=np.int32), "item": np.arange(7, dtype=np.int32)}
    chosen["item"][7] = False
    sides = patch_of(dense, factors, chosen, known)
    with pytest.raises(ValueError, match="rating blocks are damaged"):
        solve_patch(Solver(Objective(0.4), RANK, "float32"), sides, TAU, MARK, {})


@given(
    st.sets(st.integers(0, 2**31 - 1) | st.integers(0, 50), min_size=1).map(sorted),
    st.lists(st.integers(0, 10_000)),
    st.integers(0, 2**31 - 1) | st.integers(0, 60),
)
def test_places_are_found_and_strangers_refused(known, picks, other):
    known = np.array(known, np.int32)
    places = np.array(picks, np.int64) % len(known)
    found = places_among(known[places], known)
    np.testing.assert_array_equal(found, places)
    if other not in known:
        with pytest.raises(ValueError, match="without factors"):
            places_among(np.append(known[places], np.int32(other)), known)
