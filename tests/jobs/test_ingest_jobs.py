"""The jobs that bring data in, from their command lines.

Proves: flags, JSON keys and exit codes; a real file goes in whole; tombstones keep deleted ratings
out; synthetic ratings are what they promise; each entry point also runs as a script of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from unlearn_spark.evaluation import synthetic
from unlearn_spark.tables import quarantine, ratings
from unlearn_spark.tables.store import Store

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_movielens_goes_in_whole_and_only_once(run_job, spark, ml_small, tmp_path):
    arguments = ("--root", tmp_path / "t", "--input", ml_small, "--format", "MovieLens")
    first = run_job("ingest_ratings", *arguments)
    assert first.exit_code == 0, first.stderr
    version = first.json["ratings_version"]
    assert first.json == {
        "ratings_read": 100_004,
        "ratings_written": 100_004,
        "superseded": 0,
        "quarantined": 0,
        "ratings_version": version,
    }
    table = ratings.read(Store(spark, root=str(tmp_path / "t")))
    users, items = table.selectExpr("count(distinct user_id)", "count(distinct item_id)").first()
    assert (users, items) == (671, 9066)
    again = run_job("ingest_ratings", *arguments)
    assert again.json == {**first.json, "ratings_written": 0, "superseded": 100_004}


def test_what_a_tombstone_covers_stays_out(run_job, spark, tmp_path):
    root = ("--root", tmp_path / "t")
    requests = tmp_path / "requests.csv"
    requests.write_text(
        "request_id,scope,user_id,item_id,requested_at\n"
        "gone,user,1,,1000\npair,rating,2,5,1000\nbad,user,,,1000\n"
    )
    done = run_job("ingest_tombstones", *root, "--input", requests)
    assert done.json["tombstones_version"] >= 1
    assert {k: done.json[k] for k in ("read", "accepted", "duplicates", "quarantined")} == {
        "read": 3,
        "accepted": 2,
        "duplicates": 0,
        "quarantined": 1,
    }
    source = tmp_path / "r.csv"
    source.write_text(
        "uid,item_id,rating,rated_at\n"
        "1,5,4,10\n1,6,4,2000\n2,5,4,10\n2,6,4,10\n3,5,4,10\n3,6,4,oops\n"
    )
    arguments = ("--input", source, "--format", "csv", "--columns", "user_id=uid")
    done = run_job("ingest_ratings", *root, *arguments)
    assert done.exit_code == 0, done.stderr
    assert [done.json[k] for k in ("ratings_read", "ratings_written", "quarantined")] == [6, 2, 4]
    store = Store(spark, root=str(tmp_path / "t"))
    kept = {(r.user_id, r.item_id) for r in ratings.read(store).collect()}
    assert kept == {(2, 6), (3, 5)}
    held = store.read(quarantine.TABLE).where("reason like 'covered%'").collect()
    assert {(r.reason, r.raw, r.user_id) for r in held} == {
        ("covered by tombstone gone", None, None),
        ("covered by tombstone pair", None, None),
    }

    requests.write_text("request_id,scope,user_id,requested_at\nback,reinstate,1,3000\n")
    run_job("ingest_tombstones", *root, "--input", requests)
    done = run_job("ingest_ratings", *root, *arguments)
    assert [done.json[k] for k in ("ratings_written", "superseded", "quarantined")] == [2, 2, 2]
    assert {r.user_id for r in ratings.read(store).collect()} == {1, 2, 3}


def test_mistakes_are_one_line(run_job, tmp_path):
    root = ("--root", tmp_path / "t")
    absent = tmp_path / "absent.csv"
    line = run_job("ingest_ratings", *root, "--input", absent, "--format", "csv").error
    assert f"{absent}: no such file" in line
    assert "absent.csv" in run_job("ingest_tombstones", *root, "--input", absent).error
    assert "'excel'" in run_job("ingest_ratings", "--input", absent, "--format", "excel").error
    bad = ("--input", absent, "--format", "csv", "--columns", "uid=user_id")
    assert "uid is none of" in run_job("ingest_ratings", *root, *bad).error
    sizes = ("--users", 2, "--items", 3, "--ratings", 7)
    line = run_job("generate_ratings", *sizes, "--output", tmp_path / "r.csv").error
    assert "only 6 pairs" in line
    line = run_job("generate_ratings", *sizes[:5], 6, "--output", tmp_path / "r.txt").error
    assert ".csv or .parquet" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("users", "items", "count"),
    [
        (300, 200, 20_000),
        (50, 80, 80),
        (80, 50, 80),
        (9, 7, 63),
        (7, 9, 62),
        (40, 30, 10),
        (1, 1, 1),
    ],
)
def test_synthetic_ratings_are_distinct_exact_and_within_range(users, items, count, monkeypatch):
    monkeypatch.setattr(synthetic, "_SLICE", 3_000)
    table = pyarrow.concat_tables(synthetic.generate(users, items, count, seed=3))
    u, i, rating = (table.column(n).to_numpy() for n in ("user_id", "item_id", "rating"))
    assert len(u) == len(set(zip(u.tolist(), i.tolist(), strict=True))) == count
    assert u.min() >= 1
    assert i.min() >= 1
    assert u.max() <= users
    assert i.max() <= items
    if count >= max(users, items):
        assert len(np.unique(u)) == users
        assert len(np.unique(i)) == items
    assert set(np.unique(rating * 2)) <= set(range(1, 11))
    again = pyarrow.concat_tables(synthetic.generate(users, items, count, seed=3))
    assert again.equals(table)


def test_synthetic_ratings_have_a_long_tail_and_a_taste_to_learn():
    users, items = 1000, 600
    table = pyarrow.concat_tables(synthetic.generate(users, items, 60_000, seed=1))
    u, i, rating = (table.column(n).to_numpy() for n in ("user_id", "item_id", "rating"))
    per_item = np.sort(np.bincount(i - 1, minlength=items))[::-1]
    assert per_item[: items // 10].sum() > 2.5 * len(u) / 10
    assert per_item[-1] >= 1
    # Biases and a few factors explain far more than the mean does.
    matrix = np.zeros((users, items))
    weight = np.zeros_like(matrix)
    matrix[u - 1, i - 1], weight[u - 1, i - 1] = rating - rating.mean(), 1
    rng = np.random.default_rng(0)
    held = (rng.random(matrix.shape) < 0.1) & (weight > 0)
    train = weight * ~held
    x, y = rng.standard_normal((users, 6)) / 3, rng.standard_normal((items, 6)) / 3
    for _ in range(15):
        for left, right, w, m in ((x, y, train, matrix), (y, x, train.T, matrix.T)):
            for row in range(len(left)):
                near = right[w[row] > 0]
                gram = near.T @ near + (0.1 * len(near) + 1e-3) * np.eye(6)
                left[row] = np.linalg.solve(gram, near.T @ m[row, w[row] > 0])
    error = np.sqrt(np.mean((matrix - x @ y.T)[held] ** 2))
    assert error < 0.85 * matrix[held].std()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_generated_file_as_a_script(suffix, tmp_path):
    path = tmp_path / f"r.{suffix}"
    done = _script(
        "generate_ratings", "--users", 60, "--items", 40, "--ratings", 900, "--output", path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"users": 60, "items": 40, "ratings": 900}
    read = pyarrow.csv.read_csv if suffix == "csv" else pyarrow.parquet.read_table
    assert read(path).column_names == ["user_id", "item_id", "rating", "rated_at"]


def test_an_ingest_job_as_a_script(tmp_path):
    source = tmp_path / "r.csv"
    source.write_text("user_id,item_id,rating,rated_at\na,b,3,2020-01-01\n")
    done = _script("ingest_ratings", "--root", tmp_path / "t", "--input", source, "--format", "csv")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ratings_written"] == 1


def _script(name, *arguments):
    command = [sys.executable, REPOSITORY / "jobs" / f"{name}.py", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd="/"
    )
