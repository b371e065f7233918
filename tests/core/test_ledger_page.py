"""Ledger pages: every step keeps the bounds above the truth, and cutting them changes nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlearn_spark.core.blocks import RatingBlock
from unlearn_spark.core.ledger_page import (
    CHOICES,
    MOST_CHUNKS,
    NO_CHANGES,
    NOTHING,
    Page,
    Paging,
    RatingChanges,
)

FLOOR = 0.7


def page_of(seed, n=40, n_changes=15):
    random = np.random.default_rng(seed)
    slots = np.sort(random.choice(10 * n, n, replace=False)).astype(np.int32)
    changes = RatingChanges(
        random.choice(slots, n_changes),
        random.integers(0, 30, n_changes, dtype=np.int32),
        random.normal(size=n_changes).astype(np.float32),
        random.choice(np.array([-1, 1], np.int32), n_changes),
        random.integers(2, 5, n_changes),
    )
    stored = {
        "slots": slots,
        "chunks": random.integers(-1, 4, n, dtype=np.int32),
        "n_ratings": random.integers(1, 9, n, dtype=np.int32),
        "gradient_norm": random.exponential(size=n),
        "b_norm": random.exponential(size=n),
        "factor_norm": random.exponential(size=n),
    }
    return Page.opened(stored, rows_of(), changes)


def rows_of(**counts):
    """Touched rows: `s5=2` is slot 5 with two ratings."""
    slots = [int(name[1:]) for name in counts]
    return {
        "slots": np.array(slots, np.int32),
        "n_ratings": np.array(list(counts.values()), np.int32),
    }


def same(one, two):
    left, right = one.to_binary(), two.to_binary()
    assert list(left) == list(right)
    assert all(left[name] == right[name] for name in left)


def test_new_rows_must_be_solved_and_rows_that_left_are_gone():
    stored = {
        "slots": np.array([9, 4, 6], np.int32),
        "chunks": np.array([1, 0, 2], np.int32),
        "n_ratings": np.array([3, 6, 1], np.int32),
        "gradient_norm": np.array([0.5, 0.25, 0.0]),
        "b_norm": np.array([2.0, 1.0, 1.0]),
        "factor_norm": np.array([3.0, 1.5, 1.0]),
    }
    page = Page.opened(stored, rows_of(s9=0, s7=2, s4=5), NO_CHANGES)
    assert page.slots.tolist() == [4, 6, 7]
    assert page.n_ratings.tolist() == [5, 1, 2]
    assert page.chunks.tolist() == [0, 2, -1]
    assert page.bound(0.0).tolist() == [0.25, 0.0, np.inf]
    assert page.bound(2.0).tolist() == [0.125, 0.0, np.inf]
    assert page.summary(2, tau=1e-3, mark=1e-4, floor=0.0).over == 2


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 4))
def test_a_block_lies_in_one_page(seed, n_blocks, n_pages):
    keys = tuple(range(10, 10 + n_pages))
    paging = Paging(keys, {"user": n_blocks, "item": 3})
    slots = np.random.default_rng(seed).choice(200, 60, replace=False).astype(np.int32)
    split = dict(paging.split("user", slots))
    assert set(split) <= set(keys)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(60))
    homes = {block: key for key, mine in split.items() for block in slots[mine] % n_blocks}
    assert all((homes[b] == key) for key, mine in split.items() for b in slots[mine] % n_blocks)
    assert set(homes.values()) == set(split)


@given(st.integers(0, 10_000), st.integers(1, 5))
def test_pages_survive_the_way_through_spark_and_any_cut(seed, n_parts):
    page = page_of(seed)
    same(page, Page.from_binary(page.to_binary()))
    parts = dict(page.split(n_parts))
    assert sum(len(part.slots) for part in parts.values()) == len(page.slots)
    assert sum(len(part.changes) for part in parts.values()) == len(page.changes)
    whole = page.summary(8, tau=0.5, mark=0.1, floor=FLOOR)
    assert sum((part.summary(8, 0.5, 0.1, FLOOR) for part in parts.values()), NOTHING) == whole


@given(st.integers(0, 10_000))
def test_pushes_add_up_in_any_order_and_what_is_not_here_is_left_alone(seed):
    page, random = page_of(seed), np.random.default_rng(seed + 1)
    slots = random.choice(np.append(page.slots, [401, 405]), 60).astype(np.int32)
    gradient, b = random.exponential(size=60), random.exponential(size=60) * 0.1
    pushed = page.pushed(slots, gradient, b, drift=0.25)
    for row, slot in enumerate(page.slots):
        mine = slots == slot
        wanted = page.gradient_norm[row] + gradient[mine].sum() + 0.25 * page.factor_norm[row]
        assert pushed.gradient_norm[row] == pytest.approx(wanted, rel=1e-12)
        least = max(0.0, page.b_norm[row] - b[mine].sum())
        assert pushed.b_norm[row] == pytest.approx(least, rel=1e-9, abs=1e-12)
    order = random.permutation(60)
    same(pushed, page.pushed(slots[order], gradient[order], b[order], drift=0.25))
    forced = page.pushed(slots, gradient, b, force=True)
    assert np.array_equal(np.isinf(forced.bound(FLOOR)), np.isin(page.slots, slots))


def test_what_a_round_saw_replaces_bounds_and_is_remembered():
    page = page_of(3)
    rows = np.array([5, 2])
    norms = {name: np.array([0.1, 0.2]) for name in ("gradient_norm", "b_norm", "factor_norm")}
    solved = np.array([True, False])
    after = page.looked_at(page.slots[rows], norms, solved, again=True)
    assert after.gradient_norm[rows].tolist() == [0.1, 0.2]
    assert np.flatnonzero(after.last_round).tolist() == [2, 5]
    assert np.flatnonzero(after.solved).tolist() == [5]
    later = after.looked_at(page.slots[:1], {n: v[:1] for n, v in norms.items()}, solved[1:], False)
    assert not later.last_round.any()
    assert np.flatnonzero(later.solved).tolist() == [5]
    bound = after.bound(FLOOR)
    assert np.array_equal(after.chosen("candidates", 1e9, 1e9, FLOOR), after.last_round)
    candidates = after.chosen("candidates", 0.5, 0.2, FLOOR)
    assert np.array_equal(candidates, after.last_round | (bound > 0.2))
    over = after.chosen("over_tau", 0.5, 0.2, FLOOR)
    assert np.array_equal(over, bound > 0.5)
    summary = after.summary(4, tau=0.5, mark=0.2, floor=FLOOR)
    assert summary.ratings["over_tau"] == page.n_ratings[over].sum()
    stored = over & (page.chunks >= 0)
    assert summary.chunks["over_tau"] == set(page.chunks[stored].tolist())
    assert summary.solved_blocks == {int(page.slots[5] % 4)}


def test_a_floor_in_place_of_a_smaller_right_hand_side():
    page = page_of(4)
    largest = np.maximum(page.b_norm, FLOOR)
    np.testing.assert_allclose(page.bound(FLOOR), page.gradient_norm / largest, rtol=1e-15)
    vanished = page.pushed(page.slots, np.zeros(len(page.slots)), np.full(len(page.slots), 1e9))
    assert vanished.b_norm.tolist() == [0.0] * len(page.slots)
    np.testing.assert_allclose(vanished.bound(FLOOR), page.gradient_norm / FLOOR, rtol=1e-15)


def test_too_many_chunks_are_not_listed():
    n = MOST_CHUNKS + 1
    slots, chunks = np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32)
    stored = {"slots": slots, "chunks": chunks, "n_ratings": np.ones(n, np.int32)}
    stored |= {name: np.ones(n) for name in ("gradient_norm", "b_norm", "factor_norm")}
    page = Page.opened(stored, rows_of(), NO_CHANGES)
    assert page.summary(1, 0.5, 0.5, 0.0).chunks["over_tau"] is None
    halves = [page.of(slots < n // 2), page.of(slots >= n // 2)]
    each = [half.summary(1, 0.5, 0.5, 0.0) for half in halves]
    assert all(summary.chunks["over_tau"] is not None for summary in each)
    assert (each[0] + each[1]).chunks["over_tau"] is None
    assert set(each[0].ratings) == set(CHOICES)


def test_the_newest_change_of_a_pair_counts():
    block = RatingBlock.from_entries(
        np.array([1, 1, 2], np.int32), np.array([5, 6, 5], np.int32), np.ones(3, np.float32)
    )
    changes = RatingChanges(
        np.array([1, 1, 1, 2, 3], np.int32),
        np.array([5, 5, 7, 5, 5], np.int32),
        np.array([1, 4, 2, 1, 3], np.float32),
        np.array([1, -1, 1, -1, 1], np.int32),
        np.array([3, 2, 2, 2, 2], np.int64),
    )
    after = changes.applied(block)
    assert after.slots.tolist() == [1, 3]  # row 2 lost its only rating
    assert after.others.tolist() == [5, 6, 7, 5]
    assert after.values.tolist() == [1, 1, 2, 3]
