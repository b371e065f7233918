"""Metrics against hand-computed values and scikit-learn; the plots."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.errors import InputError
from unlearn_spark.evaluation import metrics, plots


def test_ranking_scores_by_hand():
    hits = np.array([[True, False, True], [False, False, False], [True, True, True]])
    scores = metrics.ranking_scores(hits, np.array([2, 1, 5]))
    gain = [1.0, 1 / math.log2(3), 0.5]
    np.testing.assert_allclose(scores["ndcg"], [1.5 / (gain[0] + gain[1]), 0, 1])
    np.testing.assert_allclose(scores["precision"], [2 / 3, 0, 1])
    np.testing.assert_allclose(scores["recall"], [1, 0, 3 / 5])
    np.testing.assert_allclose(scores["map"], [(1 + 2 / 3) / 2, 0, 1])


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32))
def test_ranking_scores_equal_scikit_learn(k, seed):
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    # All n items are ranked and n = k, so that scikit-learn sees the same list.
    hits = rng.random((4, k)) < 0.4
    hits[:, rng.integers(k)] = True
    scores = metrics.ranking_scores(hits, hits.sum(axis=1))
    order = np.broadcast_to(-np.arange(k, dtype=float), hits.shape)
    for row in range(4):
        assert scores["ndcg"][row] == pytest.approx(sklearn.ndcg_score(hits[[row]], order[[row]]))
        assert scores["map"][row] == pytest.approx(
            sklearn.average_precision_score(hits[row], order[row])
        )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30))
def test_auc_counts_pairs(rows):
    members = [score for score, label in rows if label]
    others = [score for score, label in rows if not label]
    scores, labels = zip(*rows, strict=True)
    if not members or not others:
        with pytest.raises(InputError, match="one of the classes is empty"):
            metrics.auc(scores, labels)
        return
    won = sum((m > o) + 0.5 * (m == o) for m in members for o in others)
    assert metrics.auc(scores, labels) == pytest.approx(won / len(members) / len(others))


def test_auc_refuses_nan():
    with pytest.raises(InputError, match="NaN"):
        metrics.auc([0.1, math.nan], [0, 1])


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    history = [
        {"sweep": n, "objective": 10 + 5 / n, "max_residual": 10.0**-n, "seconds": 0.5}
        for n in range(1, 5)
    ]
    plots.convergence(history, tmp_path / "convergence.png", tol=1e-3)
    rng = np.random.default_rng(0)
    plots.scores(*rng.normal(size=(3, 50)), tmp_path / "scores.png")
    plots.growth({"seconds": {"ours": [(10, 1.0), (100, 5.0)]}}, tmp_path / "growth.png")
    for name in ("convergence.png", "scores.png", "growth.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(InputError, match="no sweeps"):
        plots.convergence([], tmp_path / "none.png")


def test_sparkline():
    assert plots.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert plots.sparkline([1, 10, 100], log=True) == "▁▅█"
    assert plots.sparkline([2, 2]) == "▁▁"
    assert plots.sparkline([1, math.nan, 2]) == "▁ █"
    assert plots.sparkline([]) == ""
    assert len(plots.sparkline(range(1000), width=40)) == 40
