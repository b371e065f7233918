"""The best candidates against a full sort: ties, exclusions, and however the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.core import ranking
from unlearn_spark.core.ranking import best


def brute_force(queries, candidates, n, excluded=frozenset()):
    """Lists of (candidate row, score), sorted in full, one query at a time."""
    lists = []
    for q, x in enumerate(queries):
        scored = [
            (-float(np.float32(x @ y)), c)
            for c, y in enumerate(candidates)
            if (q, c) not in excluded
        ]
        lists.append([(c, -score) for score, c in sorted(scored)[:n]])
    return lists


@settings(deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**32), st.booleans()
)
def test_best_equals_a_full_sort_with_ties_and_exclusions(m, c, n, seed, few_values):
    rng = np.random.default_rng(seed)
    # Small whole numbers: exact products, and many ties.
    spread = 2 if few_values else 50
    queries = rng.integers(-spread, spread, (m, 3)).astype(np.float32)
    candidates = rng.integers(-spread, spread, (c, 3)).astype(np.float32)
    forbidden = rng.random((m, c)) < 0.3
    rows, columns = np.nonzero(forbidden)
    shuffled = rng.permutation(len(rows))
    counts, chosen, scores = best(queries, candidates, n, (rows[shuffled], columns[shuffled]))
    expected = brute_force(
        queries, candidates, n, set(zip(rows.tolist(), columns.tolist(), strict=True))
    )
    assert counts.tolist() == [len(entries) for entries in expected]
    flat = [entry for entries in expected for entry in entries]
    assert list(zip(chosen.tolist(), scores.tolist(), strict=True)) == flat


def test_best_does_not_depend_on_how_many_scores_are_held(monkeypatch):
    rng = np.random.default_rng(1)
    queries = rng.integers(-3, 3, (40, 4)).astype(np.float32)
    candidates = rng.integers(-3, 3, (30, 4)).astype(np.float32)
    excluded = (rng.integers(0, 40, 90), rng.integers(0, 30, 90))
    whole = best(queries, candidates, 5, excluded)
    monkeypatch.setattr(ranking, "SCORE_BYTES", 4 * 30 * 7)
    for one, other in zip(whole, best(queries, candidates, 5, excluded), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("spread", [1, 40], ids=["many ties", "few ties"])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_groups_find_the_same(monkeypatch, n, spread):
    monkeypatch.setattr(ranking, "LEAST_GROUPS", 10)
    monkeypatch.setattr(ranking, "GROUPS_PER_PLACE", 2)
    rng = np.random.default_rng(n)
    queries = rng.integers(-spread, spread + 1, (30, 3)).astype(np.float32)
    candidates = rng.integers(-spread, spread + 1, (97, 3)).astype(np.float32)
    forbidden = rng.random((30, 97)) < 0.3
    forbidden[0] = True
    forbidden[1, : 97 - n // 2] = True  # fewer are left than were asked for
    counts, chosen, scores = best(queries, candidates, n, np.nonzero(forbidden))
    pairs = set(zip(*(each.tolist() for each in np.nonzero(forbidden)), strict=True))
    expected = brute_force(queries, candidates, n, pairs)
    assert counts.tolist() == [len(entries) for entries in expected]
    flat = [entry for entries in expected for entry in entries]
    assert list(zip(chosen.tolist(), scores.tolist(), strict=True)) == flat


def test_scores_that_are_no_numbers_are_not_chosen():
    candidates = np.array([[1], [np.nan], [3], [np.inf]], np.float32)
    counts, chosen, _ = best(np.ones((1, 1), np.float32), candidates, 4)
    assert (counts.tolist(), chosen.tolist()) == ([2], [2, 0])
