"""The two jobs that read a published model, from ingested ratings to their JSON and files."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def unseen():
    """Which of 24 users x 15 items are held out: about three in ten."""
    rng = np.random.default_rng(3)
    unseen = rng.random((24, 15)) < 0.3
    assert unseen.sum(axis=1).min() >= 1
    return unseen


@pytest.fixture
def ratings_csv(tmp_path, unseen):
    """Users u0..u23, rank-2 ratings (means and one factor) with a little noise."""
    rng = np.random.default_rng(4)
    stars = 3 + np.outer(rng.uniform(-1, 1, 24), rng.uniform(-2, 2, 15))
    stars += 0.05 * rng.normal(size=stars.shape)
    files = {name: tmp_path / f"{name}.csv" for name in ("train", "held_out")}
    lines = {name: ["user_id,item_id,rating"] for name in files}
    for user, item in np.ndindex(stars.shape):
        name = "held_out" if unseen[user, item] else "train"
        lines[name].append(f"u{user},{item},{stars[user, item]:.3f}")
    lines["held_out"] += ["nobody,1,3.0", "u1,999,3.0", "u1,1,not a number"]
    for name, path in files.items():
        path.write_text("\n".join(lines[name]) + "\n")
    return files


def test_from_ratings_to_recommendations_and_metrics(
    spark, store, run_job, unseen, ratings_csv, tmp_path
):
    root = ("--root", store.root)
    small = ("--set", "als.rank=2", "--set", "als.reg_param=0.02", "--set", "als.max_sweeps=12")
    assert "jobs/train.py first" in run_job("recommend", *root, "--top", 3).error
    run_job("ingest_ratings", *root, "--input", ratings_csv["train"], "--format", "csv")
    assert run_job("train", *root, *small).exit_code == 0

    everybody = run_job("recommend", *root, "--top", 3)
    assert everybody.exit_code == 0, everybody.stderr
    assert everybody.json["users"] == 24
    assert everybody.json["rows"] == np.minimum(3, unseen.sum(axis=1)).sum()
    assert everybody.json["model_version"] == 1
    rows = store.read("recommendations").collect()
    assert len(rows) == everybody.json["rows"]
    assert all(unseen[int(row["user_id"][1:]), row["item_id"]] for row in rows)
    by_user = sorted((r for r in rows if r["user_id"] == "u5"), key=lambda r: r["rank"])
    assert [r["rank"] for r in by_user] == list(range(1, min(3, unseen[5].sum()) + 1))
    scores = [r["score"] for r in by_user]
    assert scores == sorted(scores, reverse=True)

    out = tmp_path / "some.csv"
    some = run_job(
        "recommend", *root, "--top", 99, "--users", "u3,zed,u7", "--include-seen", "--output", out
    )
    assert some.exit_code == 0, some.stderr
    assert (some.json["users"], some.json["rows"]) == (2, 30)
    assert some.json["unknown_users"] == ["zed"]
    written = spark.read.option("header", True).csv(str(out))
    assert written.columns == ["user_id", "rank", "item_id", "score", "model_version"]
    assert written.count() == 30
    again = run_job("recommend", *root, "--top", 1, "--output", out)
    assert "exists already" in again.error
    assert "zed" in run_job("recommend", *root, "--top", 1, "--users", "zed").error
    assert "versions are [1]" in run_job("recommend", *root, "--top", 1, "--model-version", 9).error

    measured = run_job("evaluate", *root, "--input", ratings_csv["held_out"], "--k", 2)
    assert measured.exit_code == 0, measured.stderr
    assert (measured.json["ratings"], measured.json["ratings_known"]) == (
        unseen.sum() + 2,
        unseen.sum(),
    )
    assert 0 < measured.json["mae"] <= measured.json["rmse"] < 0.15
    assert measured.json["users"] == 25  # nobody counts too, with 0
    # Everything that is unseen was held out, so every place is a hit but nobody's.
    assert measured.json["precision_at_2"] == pytest.approx(
        np.minimum(2, unseen.sum(axis=1)).sum() / 2 / 25
    )

    split = run_job("evaluate", *root, "--split", 0.2, "--min-rating", 3, *small)
    assert split.exit_code == 0, split.stderr
    assert split.json["ratings"] + split.json["ratings_fitted"] == (~unseen).sum()
    assert split.json["rmse"] < 0.5
    assert 0 < split.json["ndcg_at_10"] <= 1
    assert store.read("models").count() == 1
    assert "exactly one" in run_job("evaluate", *root).error
