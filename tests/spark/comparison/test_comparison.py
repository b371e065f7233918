"""The comparison with retraining: its parts against NumPy, and a whole one on real tables."""

from __future__ import annotations

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from unlearn_spark.audit import membership
from unlearn_spark.audit.figures import DELETED, NEIGHBOURING, RANDOM, UNSEEN
from unlearn_spark.config import AlsSettings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.spark.comparison.contestants import (
    direct_step,
    objective_of,
    penalty_weights,
)
from unlearn_spark.spark.comparison.deletion import Deletion
from unlearn_spark.spark.comparison.sample import draw_sample, score_sample
from unlearn_spark.tables import models

RANK = 3


# --- the parts on Spark --------------------------------------------------------------------------


def textbook_objective(x, y, rated, r, als):
    """x (m, k), y (n, k), rated bool (m, n), r (m, n): every term written out."""
    s = x @ y.T
    if als.implicit_prefs:
        liked = rated & (r > 0)
        confidence = 1 + als.alpha * np.abs(r) * rated
        data = (confidence * (liked - s) ** 2).sum()
    else:
        liked = rated
        data = ((r - s) ** 2 * rated).sum()
    penalty = (liked.sum(1) * (x**2).sum(1)).sum() + (liked.sum(0) * (y**2).sum(1)).sum()
    return data + als.reg_param * penalty


@pytest.mark.slow
@pytest.mark.parametrize("implicit", [False, True])
def test_objective_direct_step_and_sample_agree_with_numpy(spark, implicit):
    als = AlsSettings(rank=RANK, reg_param=0.2, implicit_prefs=implicit, alpha=1.5, dtype="float64")
    rng = np.random.default_rng(3)
    users, items = 12, 8
    x, y = rng.normal(size=(users, RANK)), rng.normal(size=(items, RANK))
    x, y = x.astype(np.float32).astype(float), y.astype(np.float32).astype(float)
    r = rng.normal(size=(users, items)).round(2)
    known = rng.random((users, items)) < 0.5
    known[0, :4], known[1, :3] = True, True
    gone = np.zeros_like(known)
    gone[0] = known[0]  # a whole user
    gone[1, :2] = True
    retained = known & ~gone

    def rating_rows(mask):
        rows = [(int(u), f"i{i}", float(r[u, i])) for u, i in np.argwhere(mask)]
        return spark.createDataFrame(rows, "user_id bigint, item_id string, rating float")

    def factor_rows(matrix, name, kind):
        rows = [(name(n), [float(v) for v in row]) for n, row in enumerate(matrix)]
        return spark.createDataFrame(rows, f"id {kind}, factors array<float>")

    before = {
        "user": factor_rows(x, lambda n: n, "bigint"),
        "item": factor_rows(y, lambda n: f"i{n}", "string"),
    }
    deletion = Deletion(
        before=None,
        after=SimpleNamespace(als=als),
        known=rating_rows(known),
        retained=rating_rows(retained),
        deleted=rating_rows(gone).select("user_id", "item_id"),
        n_retained=int(retained.sum()),
        n_deleted=int(gone.sum()),
    )
    weights = penalty_weights(deletion.retained, implicit)
    # Users and items without a retained rating do not count; the missing rows of others are zeros.
    u, i = retained.any(1), retained.any(0)
    r32 = r.astype(np.float32).astype(float)
    part = (retained[u][:, i], r32[u][:, i], als)
    found = objective_of(deletion.retained, weights, before, als)
    assert found == pytest.approx(textbook_objective(x[u], y[i], *part), rel=1e-5)
    fewer = {"user": before["user"].where("id != 5"), "item": before["item"]}
    without = np.where((np.arange(users) == 5)[:, None], 0, x)
    found = objective_of(deletion.retained, weights, fewer, als)
    assert found == pytest.approx(textbook_objective(without[u], y[i], *part), rel=1e-5)

    stepped = direct_step(deletion, before, weights, "local")
    new = {side: {row.id: row.factors for row in stepped[side].collect()} for side in SIDES}
    assert set(new["user"]) == set(np.flatnonzero(u))
    new_x, new_y = x.copy(), y.copy()
    new_x[1] = solved(y, i, retained[1], r32[1], als)
    for item in np.flatnonzero(gone.any(0) & i):
        new_y[item] = solved(new_x, u, retained[:, item], r32[:, item], als)
    for n in np.flatnonzero(u):
        np.testing.assert_allclose(new["user"][n], new_x[n], rtol=1e-4, atol=1e-5)
    for n in np.flatnonzero(i):
        np.testing.assert_allclose(new["item"][f"i{n}"], new_y[n], rtol=1e-4, atol=1e-5)
    assert not np.allclose(new_x[1], x[1])

    sample = draw_sample(deletion, "local")
    pairs = {}
    for row in sample.pairs.collect():
        pair = (row.user_id, int(row.item_id[1:]))
        pairs.setdefault(row.kind, []).append((*pair, row.matched))
    assert {row[:2] for row in pairs[DELETED]} == {tuple(pair) for pair in np.argwhere(gone)}
    matched = [row for row in pairs[DELETED] if row[2]]
    assert sorted(row[0] for row in matched) == sorted(row[0] for row in pairs[UNSEEN])
    assert matched
    assert not any(known[row[:2]] for row in pairs[UNSEEN])
    affected = retained & ((np.arange(users) == 1)[:, None] | gone.any(0))
    assert {row[:2] for row in pairs[NEIGHBOURING]} == {tuple(p) for p in np.argwhere(affected)}
    assert {row[:2] for row in pairs[RANDOM]} == {
        (a, b) for a in np.flatnonzero(u) for b in np.flatnonzero(i)
    }

    scores = score_sample(sample, fewer, RANK)
    order = sorted(
        (kind, str(row[0]), f"i{row[1]}", row[0], row[1])
        for kind, rows in pairs.items()
        for row in rows
    )
    assert scores.kind.tolist() == [row[0] for row in order]
    at = np.array([row[3] for row in order]), np.array([row[4] for row in order])
    panel = u & (np.arange(users) != 5)
    expected = membership.attack_features(without[at[0]], y[at[1]], x[panel], y[i])
    np.testing.assert_allclose(scores.features, expected, rtol=1e-6, atol=1e-6)
    assert scores.scorable.tolist() == (at[0] != 5).tolist()


def solved(others, exist, rated, r, als):
    """One row's normal equations written out, on the other side's rows that exist."""
    m, values = others[rated & exist], r[rated & exist]
    if not als.implicit_prefs:
        return np.linalg.solve(m.T @ m + als.reg_param * len(m) * np.eye(RANK), m.T @ values)
    c, liked = als.alpha * np.abs(values), values > 0
    gram = others[exist].T @ others[exist]
    a = gram + (m.T * c) @ m + als.reg_param * liked.sum() * np.eye(RANK)
    return np.linalg.solve(a, m.T @ ((1 + c) * liked))


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_night_is_compared_with_retraining(run_job, store, tmp_path):
    settings = ["als.rank=2", "als.reg_param=0.1", "als.tol=3e-2", "unlearn.tau=6e-2"]
    sets = [word for value in settings for word in ("--set", value)]

    def job(name, *arguments):
        return run_job(name, "--root", store.root, *sets, *arguments)

    def write(name, header, rows):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows([header.split(","), *rows])
        return tmp_path / name

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), rng.normal(size=(20, 2))
    rows = [
        (f"u{u}", f"i{i}", round(3 + x[u] @ y[i] / 2, 2), 1_500_000_000)
        for u, i in np.argwhere(rng.random((40, 20)) < 0.6)
    ]
    rng.shuffle(rows)
    header = "user_id,item_id,rating,rated_at"
    held_out = write("held.csv", header, rows[:40])
    source = write("ratings.csv", header, rows[40:])
    assert job("ingest_ratings", "--input", source, "--format", "csv").exit_code == 0
    assert job("train").exit_code == 0
    assert "--seeds belongs to --retrain" in job("audit", "--seeds", 2).error
    assert "version 1 follows no trained version" in job("audit", "--retrain").error

    first = models.published(store)
    models.publish(store, replace(first, model_version=2, parent=1, kind="update"))
    assert "version 2 removed nothing since version 1" in job("audit", "--retrain").error

    asked = [(f"p{n}", "rating", *rows[40 + n][:2]) for n in range(20)]
    asked.append(("whole", "user", "u3", ""))
    source = write("requests.csv", "request_id,scope,user_id,item_id", asked)
    assert job("ingest_tombstones", "--input", source).exit_code == 0
    night = job("unlearn")
    assert night.exit_code == 0, night.stderr
    removed = night.json["ratings_removed"]

    picture = tmp_path / "closeness.png"
    options = ["--retrain", "--seeds", 2, "--held-out", held_out, "--plot", picture]
    done = job("audit", *options)
    assert done.exit_code == 0, done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = done.json["comparison"]
    assert (found["before"], found["unlearned"]) == (1, 3)
    whole = sum(row[0] == "u3" for row in rows[40:])
    in_both = sum(row[0] == "u3" for row in rows[40:60])
    assert found["ratings"]["deleted"] == removed == whole + 20 - in_both
    contestants = found["models"]
    assert list(contestants) == [
        "before",
        "rows_deleted",
        "direct_step",
        "warm_1",
        "warm_3",
        "warm_10",
        "unlearned",
        "retrained",
    ]
    # Plain sweeps never raise the objective, and every contestant starts from before.
    objectives = [
        contestants[name]["objective"] for name in ("before", "warm_1", "warm_3", "warm_10")
    ]
    assert objectives == sorted(objectives, reverse=True)
    assert contestants["direct_step"]["objective"] < contestants["before"]["objective"]
    assert contestants["rows_deleted"] == contestants["before"]
    assert [run["seed"] for run in contestants["retrained"]["runs"]] == [1, 2]
    assert all(run["converged"] for run in contestants["retrained"]["runs"])
    assert contestants["before"]["deleted_scorable"] == found["ratings"]["deleted"]
    assert contestants["unlearned"]["deleted_scorable"] == 20 - in_both
    assert contestants["unlearned"]["deleted_scorable"] == found["pairs"]["scorable_by_all"]
    assert all(0 < one["rmse"] < 2 for name, one in contestants.items() if name != "retrained")
    assert "rows_deleted" in done.stderr
