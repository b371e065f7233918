"""Sequences of deletions and additions on small random models: the ledger stays above the truth.

The loop is the product's (`core.rounds.run_rounds`), and every number in it comes from functions
that workers run; a few arrays stand in for the tables.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unlearn_spark.core import bounds as ledger
from unlearn_spark.core.blocks import SIDES, RatingBlock, other_side
from unlearn_spark.core.kernel import row_residuals, solve_rows
from unlearn_spark.core.ledger_page import Page
from unlearn_spark.core.objective import Objective, floor_of, relative_residual, target_magnitudes
from unlearn_spark.core.patch import PatchSide, solve_patch
from unlearn_spark.core.rounds import Work, run_rounds
from unlearn_spark.core.solver import Solver

SIZES = {"user": 9, "item": 7}
RANK = 3
TAU = 1e-2
MARK = 0.25 * TAU


@dataclass
class Model:
    """Factors that solve their equations, the ratings, and the ledger of both sides."""

    objective: Objective
    ratings: dict
    factors: dict
    gradient: dict = field(default_factory=dict)
    b: dict = field(default_factory=dict)
    floors: dict = field(default_factory=dict)
    untouched: dict = field(default_factory=lambda: {side: set() for side in SIDES})

    def block(self, side, rows=None):
        """The ratings of a side's rows (all by default), compressed by row."""
        entries = [
            ((u, i) if side == "user" else (i, u), r)
            for (u, i), r in sorted(self.ratings.items())
            if rows is None or (u if side == "user" else i) in rows
        ]
        return RatingBlock.from_entries(
            np.array([e[0][0] for e in entries], np.int32),
            np.array([e[0][1] for e in entries], np.int32),
            np.array([e[1] for e in entries], np.float32),
        )

    def alive(self, side):
        return sorted({(u if side == "user" else i) for u, i in self.ratings})

    def gram(self, side):
        if not self.objective.implicit_prefs:
            return None
        return ledger.gram(self.factors[side][self.alive(side)])

    def scan(self, side, rows=None):
        """(slots, |A x - b|, |b|) by the kernel's float64 scan."""
        block = self.block(side, rows)
        gradient, b = row_residuals(
            block.indptr,
            block.others,
            block.values,
            self.factors[other_side(side)],
            self.factors[side][block.slots],
            self.objective,
            gram=self.gram(other_side(side)),
        )
        return block.slots, gradient, b

    def solve(self, side, rows):
        block = self.block(side, rows)
        solved = solve_rows(
            block.indptr,
            block.others,
            block.values,
            self.factors[other_side(side)],
            self.objective,
            gram=self.gram(other_side(side)),
        )
        return block, solved.factors

    def converge(self):
        """Sweep everything down to the lower mark, and enter what a scan finds."""
        if not self.floors:  # of the first training, and no other
            for side in SIDES:
                block = self.block(side)
                found = target_magnitudes(block.indptr, block.values, self.objective)
                self.floors[side] = floor_of(found)
        for _ in range(200):
            for _ in range(5):
                for side in SIDES:
                    block, rows = self.solve(side, None)
                    self.factors[side][block.slots] = rows
            for side in SIDES:
                slots, gradient, b = self.scan(side)
                self.gradient[side], self.b[side] = np.zeros((2, SIZES[side]))
                self.gradient[side][slots], self.b[side][slots] = gradient, b
            if max(self.bound(side).max() for side in SIDES) <= MARK:
                return
        raise AssertionError("the sweeps did not converge")

    def bound(self, side):
        return relative_residual(self.gradient[side], self.b[side], self.floors[side])

    def check(self):
        """bound >= truth, for every row of both sides."""
        for side in SIDES:
            slots, gradient, b = self.scan(side)
            assert (self.gradient[side][slots] * (1 + 1e-6) + 1e-9 >= gradient).all()
            assert (self.b[side][slots] <= b * (1 + 1e-6) + 1e-9).all()
            truth = relative_residual(gradient, b, self.floors[side])
            slack = 1e-9 / self.floors[side]
            assert (self.bound(side)[slots] * (1 + 1e-6) + slack >= truth).all()

    def push(self, side, gradient, b):
        self.gradient[side] += gradient
        self.b[side] = np.maximum(self.b[side] - b, 0)

    def drifted(self, side, change):
        """The Gram matrix of a side changed: every row of the other side may have."""
        norms = np.linalg.norm(self.factors[other_side(side)].astype(np.float64), axis=1)
        self.gradient[other_side(side)] += ledger.drift(change) * norms

    def change(self, removed, added):
        """Take ratings out and put others in, as a night does before its loop."""
        before = {side: self.gram(side) for side in SIDES}
        there = {side: set(self.alive(side)) for side in SIDES}
        pairs = [(pair, self.ratings[pair], -1) for pair in removed]
        pairs += [(pair, value, 1) for pair, value in added.items()]
        for pair in removed:
            del self.ratings[pair]
        self.ratings.update(added)
        for at, side in enumerate(SIDES):
            terms = []
            for sign in (1, -1):
                mine = [(pair, value) for pair, value, s in pairs if s == sign]
                terms.append(
                    ledger.rating_terms(
                        np.array([pair[at] for pair, _ in mine], np.int64),
                        np.array([pair[1 - at] for pair, _ in mine], np.int64),
                        np.array([value for _, value in mine], np.float32),
                        self.factors[side],
                        self.factors[other_side(side)],
                        self.objective,
                    )
                )
            self.push(side, *(terms[0] - terms[1]).norms())
            self.untouched[side] -= {pair[at] for pair, _, _ in pairs}
        for side in SIDES:
            gone = set(range(SIZES[side])) - set(self.alive(side))
            self.gradient[side][list(gone)] = 0.0
            came = list(set(self.alive(side)) - there[side])  # nothing is known of a new row
            self.gradient[side][came], self.b[side][came] = np.inf, 0.0
            if before[side] is not None:
                self.drifted(side, self.gram(side) - before[side])

    def page(self, side):
        """The ledger of a side's rows as the loop sees it."""
        slots = np.array(self.alive(side), np.int32)
        counts = np.bincount([pair[SIDES.index(side)] for pair in self.ratings])
        norms = np.linalg.norm(self.factors[side][slots].astype(np.float64), axis=1)
        return Page(
            slots=slots,
            chunks=np.zeros(len(slots), np.int32),
            n_ratings=counts[slots].astype(np.int32),
            gradient_norm=self.gradient[side][slots],
            b_norm=self.b[side][slots],
            factor_norm=norms,
            last_round=np.isin(slots, sorted(self.last_round[side])),
            solved=np.zeros(len(slots), np.bool_),
        )

    def summary(self):
        return {side: self.page(side).summary(1, TAU, MARK, self.floors[side]) for side in SIDES}

    def resolve(self, patch, state, eager):
        """A round on arrays, as a Spark task does it on pages."""
        self.rounds += 1
        pages = {side: self.page(side) for side in SIDES}
        rows, sides = {side: set() for side in SIDES}, {}
        for side in SIDES:
            if side in patch:
                chosen = pages[side].chosen(patch[side], TAU, MARK, self.floors[side])
                rows[side] = set(pages[side].slots[chosen].tolist())
            block = self.block(side, rows[side])
            sides[side] = PatchSide(
                np.arange(SIZES[side], dtype=np.int32),
                self.factors[side],
                block,
                np.isinf(self.gradient[side][block.slots]),
                self.floors[side],
                side in eager,
            )
        grams = {side: self.gram(side) for side in SIDES}
        solver = Solver(self.objective, RANK, "float32")
        results = solve_patch(solver, sides, TAU, MARK, grams)
        for side in SIDES:
            mine = results[side]
            self.work.add(mine.solved_ratings, mine.solved_rows, mine.scanned_ratings)
            assert not set(mine.push_slots.tolist()) & rows[side]
            pushed = np.zeros((2, SIZES[side]))
            pushed[:, mine.push_slots] = mine.push_gradient, mine.push_b
            self.push(side, *pushed)
            if self.objective.implicit_prefs:
                self.drifted(side, mine.gram_change)
        for side in SIDES:
            mine = results[side]
            self.factors[side][mine.slots] = mine.factors
            self.gradient[side][mine.slots] = mine.gradient_norm
            self.b[side][mine.slots] = mine.b_norm
            self.untouched[side] -= set(mine.slots[mine.solved].tolist())
        self.last_round = rows
        self.check()

    def mend(self, part_ratings=10**9):
        """The frontier loop, and whole sweeps where it gives up."""
        self.last_round, self.rounds = {side: set() for side in SIDES}, 0
        self.work = Work(RANK, len(self.ratings), sum(len(self.alive(side)) for side in SIDES))
        end = run_rounds(self, max_rounds=40, training_sweeps=200, part_ratings=part_ratings)
        if end is None:
            self.converge()
            for side in SIDES:
                self.untouched[side] = set()


def trained(seed, implicit, reg_param=0.3):
    """A model of random ratings; with a large lambda most of its rows vanish, or all."""
    random = np.random.default_rng(seed)
    pairs = [(u, i) for u in range(SIZES["user"]) for i in range(SIZES["item"])]
    chosen = random.permutation(len(pairs))[: int(random.integers(20, 50))]
    ratings = {pairs[n]: float(np.float32(random.normal(3, 1))) for n in chosen}
    factors = {s: random.normal(size=(SIZES[s], RANK)).astype(np.float32) for s in SIDES}
    model = Model(Objective(reg_param, implicit, 2.0), ratings, factors)
    model.converge()
    return model


EVENT = st.one_of(
    st.tuples(st.just("user"), st.integers(0, SIZES["user"] - 1)),
    st.tuples(st.just("item"), st.integers(0, SIZES["item"] - 1)),
    st.tuples(st.just("pair"), st.integers(0, 10_000)),
    st.tuples(st.just("value"), st.integers(0, 10_000)),
    st.tuples(st.just("return"), st.integers(0, SIZES["user"] - 1)),
)


def apply(model, night):
    """The night's removed pairs and added ratings; what it asks twice counts once."""
    removed, added = set(), {}
    for kind, number in night:
        known = sorted(set(model.ratings) - removed)
        if kind in ("user", "item"):
            at = SIDES.index(kind)
            removed |= {pair for pair in model.ratings if pair[at] == number}
            added = {pair: value for pair, value in added.items() if pair[at] != number}
        elif kind == "pair" and known:
            removed.add(known[number % len(known)])
        elif kind == "value" and known:
            pair = known[number % len(known)]
            removed.add(pair)
            added[pair] = float(number % 5) + 0.5
        elif kind == "return":
            item = number % SIZES["item"]
            if (number, item) in model.ratings:
                removed.add((number, item))
            added[(number, item)] = 4.0
    if len(removed) >= len(model.ratings):
        return None
    return removed, added


@pytest.mark.parametrize("implicit", [False, True])
@example(seed=12, reg_param=0.3, nights=[[("return", 2)]], part_ratings=5)
@example(
    seed=1, reg_param=20.0, nights=[[("user", 2)], [("return", 2)], [("pair", 3)]], part_ratings=5
)
@given(
    seed=st.integers(0, 1000),
    reg_param=st.sampled_from([0.3, 1.5, 6.0, 20.0]),
    nights=st.lists(st.lists(EVENT, max_size=3), max_size=4),
    part_ratings=st.sampled_from([5, 10**9]),
)
@settings(max_examples=60, deadline=None)
def test_the_ledger_stays_above_the_truth_night_after_night(
    implicit, seed, reg_param, nights, part_ratings
):
    model = trained(seed, implicit, reg_param)
    model.check()
    for night in nights:
        asked = apply(model, night)
        if asked is None:
            continue
        before = {side: rows.copy() for side, rows in model.factors.items()}
        for side in SIDES:
            model.untouched[side] = set(model.alive(side))
        removed, added = asked
        model.change(removed, added)
        model.check()
        model.mend(part_ratings)
        for side in SIDES:
            slots, gradient, b = model.scan(side)
            residual = relative_residual(gradient, b, model.floors[side])
            assert residual.max(initial=0) <= TAU * (1 + 1e-6)
            kept = sorted(model.untouched[side] & set(slots.tolist()))
            np.testing.assert_array_equal(model.factors[side][kept], before[side][kept])
        assert not (removed - set(added)) & set(model.ratings)


@pytest.mark.parametrize("implicit", [False, True])
def test_rows_that_vanish_are_judged_by_the_floor(implicit):
    model = trained(1, implicit, 20.0)
    _, gradient, b = model.scan("user")
    assert (b < model.floors["user"]).all()
    assert relative_residual(gradient, b).max() > 10 * TAU


@pytest.mark.parametrize("implicit", [False, True])
def test_a_night_that_forgets_to_push_is_caught(implicit):
    model = trained(3, implicit)
    gone = {pair for pair in model.ratings if pair[0] == model.alive("user")[0]}
    model.push = lambda *_: None
    model.drifted = lambda *_: None
    model.change(gone, {})
    with pytest.raises(AssertionError):
        model.check()


@pytest.mark.parametrize("implicit", [False, True])
def test_the_order_within_a_night_does_not_matter(implicit):
    ends = []
    for order in (1, -1):
        model = trained(5, implicit)
        pairs = sorted(model.ratings)[::6][::order]
        model.change(pairs, {})
        model.mend()
        ends.append(model.factors["user"][model.alive("user")])
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-5, atol=1e-6)
