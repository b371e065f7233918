"""A model that MLlib trained, taken over from each format, and forgetting from it."""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import types as T

from unlearn_spark.ingestion.factors import read_factors
from unlearn_spark.tables import models

SETS = [
    word
    for value in ("als.reg_param=0.1", "als.tol=5e-3", "unlearn.tau=2e-2")
    for word in ("--set", value)
]

MLLIB, PARQUET = ("--format", "mllib"), ("--format", "parquet")


@pytest.fixture(scope="module")
def ratings_csv(tmp_path_factory):
    """60 users x 30 items, two in five pairs rated; integer ids, as MLlib needs."""
    random = np.random.default_rng(6)
    stars = 3 + random.normal(size=(60, 2)) @ random.normal(size=(2, 30))
    stars += 0.3 * random.normal(size=stars.shape)
    lines = ["user_id,item_id,rating,rated_at"]
    for user, item in zip(*np.nonzero(random.random(stars.shape) < 0.4), strict=True):
        lines.append(f"{user},{item},{stars[user, item]:.2f},2020-01-01")
    path = tmp_path_factory.mktemp("ratings") / "ratings.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def saved(spark, ratings_csv, tmp_path_factory):
    """A rank-4 model after five iterations of MLlib, as `save` leaves it."""
    rows = spark.read.csv(str(ratings_csv), header=True, inferSchema=True).coalesce(1)
    als = ALS(
        rank=4,
        maxIter=5,
        regParam=0.1,
        userCol="user_id",
        itemCol="item_id",
        numUserBlocks=1,
        numItemBlocks=1,
        checkpointInterval=-1,
        seed=3,
    )
    path = str(tmp_path_factory.mktemp("mllib") / "model")
    als.fit(rows).save(path)
    return path


@pytest.fixture
def job(store, run_job):
    """A function that runs a job on this root and returns how it ended."""

    def run(name, *arguments):
        return run_job(name, "--root", store.root, *SETS, *arguments)

    return run


def matrix(rows):
    ordered = sorted(rows.collect())
    return np.array([row[0] for row in ordered]), np.array([row[1] for row in ordered], np.float32)


def test_each_format_gives_the_same_model(spark, store, job, ratings_csv, saved, tmp_path):
    assert "jobs/ingest_ratings.py" in job("import_model", "--input", saved, *MLLIB).error
    job("ingest_ratings", "--input", ratings_csv, "--format", "csv")
    assert "no such file" in job("import_model", "--input", "gone", "--format", "npz").error
    assert "has no user_factors or" in job("import_model", "--input", saved, *PARQUET).error
    assert not store.exists(models.TABLE)

    model = ALSModel.load(saved)
    sides = {"user": model.userFactors, "item": model.itemFactors}
    arrays = {}
    for side, rows in sides.items():
        rows.withColumnRenamed("features", "factors").write.parquet(
            str(tmp_path / f"{side}_factors.parquet")
        )
        arrays[f"{side}_ids"], arrays[f"{side}_factors"] = matrix(rows)
    np.savez(tmp_path / "factors.npz", **{**arrays, "user_ids": arrays["user_ids"].astype(str)})

    def same(side, rows):
        ids, factors = matrix(rows.select("id", "factors"))
        np.testing.assert_array_equal(ids, arrays[f"{side}_ids"])
        np.testing.assert_array_equal(factors, arrays[f"{side}_factors"])

    types = {side: T.LongType() for side in sides}
    for path, form in ((saved, "mllib"), (str(tmp_path), "parquet"), (str(tmp_path), "npz")):
        read = read_factors(spark, path, form, types)
        assert (read.rank, read.n_users, read.n_items) == (4, 60, 30)
        same("user", read.user)
        same("item", read.item)

    done = job("import_model", "--input", tmp_path, "--format", "npz")
    assert done.exit_code == 0, done.stderr
    assert "als.rank = 32 is not used: the factors have 4" in done.stderr
    assert "Run with --converge" in done.stderr
    published = models.published(store)
    assert (published.kind, published.model_version, published.parent) == ("import", 1, None)
    assert published.als.rank == 4
    assert not published.certificate["holds"]
    for side, rows in zip(sides, models.read_factors(store, published), strict=True):
        same(side, rows)
    found = done.json
    assert (found["model_version"], found["users"], found["items"]) == (1, 60, 30)
    assert (found["sweeps"], found["converged"]) == (0, False)
    assert found["max_residual"] == published.certificate["max_residual"] > 5e-3
    assert found["rows_over_tau"]["user"] == 0  # MLlib solves them last
    assert found["rows_over_tau"]["item"] > 0
    assert found["factors_without_ratings"] == {"user": 0, "item": 0}


@pytest.mark.slow
def test_an_imported_model_forgets(spark, store, job, ratings_csv, saved, tmp_path):
    def done(name, *arguments):
        ended = job(name, *arguments)
        assert ended.exit_code == 0, ended.stderr
        return ended.json

    source = ("--input", saved, *MLLIB)
    done("ingest_ratings", "--input", ratings_csv, "--format", "csv")
    taken = done("import_model", *source, "--converge")
    assert taken["converged"]
    assert taken["sweeps"] > 1
    assert taken["max_residual"] <= 5e-3 < taken["residual_before"]
    assert taken["rows_over_tau"] == {"user": 0, "item": 0}
    assert taken["rows_without_factors"] == {"user": 0, "item": 0}
    assert done("audit")["holds"]

    asked = tmp_path / "requests.csv"
    asked.write_text("request_id,scope,user_id,item_id,requested_at\nr-1,user,7,,2021-01-01\n")
    done("ingest_tombstones", "--input", asked)
    night = done("unlearn")
    assert night["requests"] == 1
    rated = sum(line.startswith("7,") for line in ratings_csv.read_text().splitlines())
    assert night["ratings_removed"] == rated > 0
    assert night["max_residual"] <= 2e-2
    audited = done("audit")
    assert audited["holds"]
    assert audited["tombstoned_ratings_found"] == 0

    # Importing again does not bring back who was forgotten: MLlib still has that user's row.
    again = done("import_model", *source)
    assert again["factors_without_ratings"] == {"user": 1, "item": 0}
    assert again["users"] == 59
    users, _ = models.read_factors(store, models.published(store, again["model_version"]))
    assert users.where("id = 7").count() == 0
    assert done("unlearn")["requests"] == 0
