"""The figures of a comparison with retraining, from given scores."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from unlearn_spark.audit.figures import (
    DELETED,
    NEIGHBOURING,
    RANDOM,
    UNSEEN,
    Measured,
    Scores,
    side_by_side,
)
from unlearn_spark.audit.report import tables_of
from unlearn_spark.audit.versions import version_before
from unlearn_spark.errors import InputError
from unlearn_spark.tables import models


def measured(scores, scorable=None, objective=1.0):
    """A model's scores of three deleted, three unseen, one neighbouring and two random pairs."""
    kind = np.array([DELETED] * 3 + [NEIGHBOURING] + [RANDOM] * 2 + [UNSEEN] * 3)
    features = np.zeros((9, 4))
    features[:, 0] = scores
    scorable = np.ones(9, bool) if scorable is None else np.array(scorable, bool)
    matched = np.array([True, True, False] + [False] * 3 + [True] * 3)
    return Measured({"objective": objective}, Scores(kind, matched, scorable, features))


def test_models_are_measured_by_their_distance_from_the_retrained_mean():
    lost = [1, 1, 0, 1, 1, 1, 1, 1, 1]  # the third deleted pair's user has no row any more
    runs = [
        measured([1, 2, 0, 4, 0, 0, 1, 1, 1], lost, objective=10),
        measured([3, 2, 0, 6, 0, 2, 1, 1, 1], lost, objective=14),
    ]
    others = {
        "before": measured([5, 5, 9, 5, 3, 5, 1, 1, 1], objective=20),
        "unlearned": measured([2, 2, 0, 5, 0, 1, 1, 1, 1], lost, objective=12),
    }
    deletion = SimpleNamespace(
        before=SimpleNamespace(model_version=1),
        after=SimpleNamespace(model_version=4),
        n_retained=50,
        n_deleted=3,
    )
    trainings = [{"seed": 1, "sweeps": 8, "converged": True}, {"seed": 2, "sweeps": 9}]
    found = side_by_side(deletion, others, runs, trainings)
    figures = found.figures
    assert (figures["before"], figures["unlearned"]) == (1, 4)
    assert figures["pairs"] == {
        "deleted": 3,
        "neighbouring": 1,
        "random": 2,
        "unseen": 3,
        "scorable_by_all": 2,
    }
    before, after = figures["models"]["before"], figures["models"]["unlearned"]
    retrained = figures["models"]["retrained"]
    nearly = pytest.approx
    assert after["distance"] == {
        kind: {"rms": 0, "max": 0, "pairs": n}
        for kind, n in ((DELETED, 2), (NEIGHBOURING, 1), (RANDOM, 2))
    }
    assert before["distance"][DELETED] == {"rms": nearly(3), "max": nearly(3), "pairs": 2}
    assert before["distance"][RANDOM] == {"rms": nearly(np.sqrt(12.5)), "max": 4, "pairs": 2}
    # Each of the two runs is measured against the other.
    assert retrained["mean"]["distance"][NEIGHBOURING] == {"rms": 2, "max": 2, "pairs": 1}
    assert retrained["mean"]["distance"][DELETED]["rms"] == nearly(np.sqrt(2))
    assert figures["seed_to_seed"] == {
        DELETED: nearly(np.sqrt(2)),
        NEIGHBOURING: 2,
        RANDOM: nearly(np.sqrt(2)),
    }
    assert before["deleted_score"] == {"mean": nearly(19 / 3), "mean_scorable": 5}
    assert after["deleted_score"] == {"mean": nearly(4 / 3), "mean_scorable": 2}
    assert (before["deleted_scorable"], after["deleted_scorable"]) == (3, 2)
    # Scores of matched members before: 5, 5 against 1, 1, 1; retrained: 1, 2 and 3, 2.
    assert before["auc"]["score"] == 1
    assert [run["auc"]["score"] for run in retrained["runs"]] == [0.75, 1]
    assert retrained["mean"]["auc"]["score"] == 0.875
    assert before["auc"]["score_excess"] == 0.125
    assert retrained["mean"]["objective"] == 12
    assert retrained["spread"]["objective"] == nearly(np.sqrt(8))
    assert retrained["spread"]["distance"][RANDOM]["rms"] is None  # two are equally far apart
    assert [run["seed"] for run in retrained["runs"]] == [1, 2]
    assert found.deleted_scores["before"].tolist() == [5, 5, 9]
    assert found.deleted_scores["retrained"].tolist() == [1, 2, 0, 3, 2, 0]


def test_one_retrained_model_has_no_yardstick():
    run = measured(np.arange(9))
    deletion = SimpleNamespace(
        before=SimpleNamespace(model_version=1),
        after=SimpleNamespace(model_version=2),
        n_retained=5,
        n_deleted=3,
    )
    others = {"before": measured(np.zeros(9)), "unlearned": measured(np.arange(9) + 2)}
    figures = side_by_side(deletion, others, [run], [{"seed": 1}]).figures
    assert set(figures["seed_to_seed"].values()) == {None}
    retrained = figures["models"]["retrained"]
    assert retrained["mean"]["distance"][DELETED] == {"rms": None, "max": None, "pairs": 0}
    assert retrained["spread"]["objective"] is None
    assert figures["models"]["unlearned"]["distance"][RANDOM]["rms"] == 2
    assert [table.row_count for table in tables_of(figures)] == [3, 3]


def test_the_version_before_is_the_nearest_that_was_trained(monkeypatch):
    kinds = ["train", "unlearn", "train", "update", "rollback", "unlearn"]
    published = [
        SimpleNamespace(model_version=n, parent=n - 1 or None, kind=kind)
        for n, kind in enumerate(kinds, 1)
    ]
    monkeypatch.setattr(models, "versions", lambda store: published)
    found = [version_before(None, model).model_version for model in published[1:]]
    assert found == [1, 1, 3, 3, 3]
    with pytest.raises(InputError, match="version 1 follows no trained version"):
        version_before(None, published[0])
