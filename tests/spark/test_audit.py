"""Audits of published models: clean ones agree with NumPy, and every kind of damage is found."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyspark.sql import functions as F

from unlearn_spark import publishing
from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.errors import InputError
from unlearn_spark.ingestion import formats
from unlearn_spark.ingestion.ratings import ingest_ratings
from unlearn_spark.spark.audit import Equations, audit
from unlearn_spark.spark.training.training import fit_factors
from unlearn_spark.tables import factors, models, ratings, receipts, tombstones
from unlearn_spark.tables.store import Store

USERS, ITEMS, RANK = 60, 30, 4
TAU = 2e-2
SHARED = {"rank": RANK, "reg_param": 0.3, "max_sweeps": 40, "tol": TAU}
SHARED |= {"user_blocks": 2, "item_blocks": 2}
EXPLICIT = AlsSettings(**SHARED)
IMPLICIT = AlsSettings(**SHARED, implicit_prefs=True, alpha=2.0)
GONE = "u7"


def dense_residual(x, others, values, als, every_other=None, nonnegative=False, floor=0.0):
    """||A x - b|| / max(||b||, floor) of one row with A written out: the textbook's formula."""
    m, r = np.asarray(others, np.float64), np.asarray(values, np.float64)
    if als.implicit_prefs:
        confidence, liked = als.alpha * np.abs(r), r > 0
        y = np.asarray(every_other, np.float64)
        a = y.T @ y + m.T @ np.diag(confidence) @ m + als.reg_param * liked.sum() * np.eye(len(x))
        b = m.T @ ((1 + confidence) * liked)
    else:
        a = m.T @ m + als.reg_param * len(r) * np.eye(len(x))
        b = m.T @ r
    gradient = a @ np.asarray(x, np.float64) - b
    if nonnegative:
        gradient = np.where(np.asarray(x) > 0, gradient, np.minimum(gradient, 0))
    return np.linalg.norm(gradient) / max(np.linalg.norm(b), floor)


# --- the arithmetic, without Spark ---------------------------------------------------------------


def records(ids, is_rating, values, vectors):
    return pa.RecordBatch.from_arrays(
        [
            pa.array(ids, pa.string()),
            pa.array(is_rating, pa.bool_()),
            pa.array(values, pa.float32()),
            pa.array([None if v is None else v.tolist() for v in vectors], pa.list_(pa.float32())),
        ],
        ["id", "is_rating", "rating", "vector"],
    )


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    implicit=st.booleans(),
    nonnegative=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    floor=st.sampled_from([0.0, 2.0, 1e6]),
)
def test_streamed_residuals_equal_the_textbook_however_the_batches_are_cut(
    seed, sizes, implicit, nonnegative, cuts, floor
):
    rng = np.random.default_rng(seed)
    als = IMPLICIT if implicit else EXPLICIT
    others = rng.normal(size=(12, RANK)).astype(np.float32)
    ids, is_rating, values, vectors, expected = [], [], [], [], []
    for number, size in enumerate(sizes):
        x = rng.normal(size=RANK).astype(np.float32)
        if nonnegative:
            x = np.maximum(x, 0)
        rated = rng.choice(12, size, replace=False)
        r = rng.normal(size=size).astype(np.float32)
        r[0] = abs(r[0]) + 0.1  # an implicit row without a positive rating has b = 0
        ids += [f"r{number}"] * (size + 1)
        is_rating += [False] + [True] * size
        values += [None, *r]
        vectors += [x, *others[rated]]
        expected.append(dense_residual(x, others[rated], r, als, others, nonnegative, floor))
    wide = others.astype(np.float64)
    equations = Equations(
        RANK,
        als.reg_param,
        als.alpha if implicit else None,
        nonnegative,
        wide.T @ wide if implicit else None,
        floor,
    )
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    whole = records(ids, is_rating, values, vectors)
    batches = [whole.slice(a, b - a) for a, b in pairwise(edges)]
    batches.insert(1, whole.slice(0, 0))
    found = pa.Table.from_batches(equations.scan(batches)).to_pydict()
    assert found["id"] == [f"r{number}" for number in range(len(sizes))]
    assert found["n_ratings"] == sizes
    assert found["unmatched"] == [0] * len(sizes)
    np.testing.assert_allclose(found["residual"], expected, rtol=1e-9)


def test_rows_that_cannot_be_judged_are_never_good():
    one = np.ones(RANK, np.float32)
    broken = np.array([1, np.nan, 1, 1], np.float32)
    ids = ["alone", "broken", "broken", "negative", "negative", "orphan", "twice", "twice"]
    is_rating = [False, False, True, False, True, True, False, False]
    vectors = [one, broken, one, -one, one, one, one, one]
    values = [3.0 if rated else None for rated in is_rating]
    equations = Equations(RANK, 0.1, nonnegative=True)
    found = pa.Table.from_batches(
        equations.scan([records(ids, is_rating, values, vectors)])
    ).to_pydict()
    by_id = dict(zip(found["id"], zip(*list(found.values())[1:], strict=True), strict=True))
    infinite = float("inf")
    assert by_id == {  # copies, ratings, ratings without a row, residual
        "alone": (1, 0, 0, 0.0),
        "broken": (1, 1, 0, infinite),
        "negative": (1, 1, 0, infinite),
        "orphan": (0, 1, 1, infinite),
        "twice": (2, 0, 0, infinite),
    }


# --- published models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(spark, tmp_path_factory):
    """A store with 60 users x 30 items, published explicit (version 1) and implicit (version 2)."""
    folder = tmp_path_factory.mktemp("audited")
    rng = np.random.default_rng(11)
    rated = rng.random((USERS, ITEMS)) < 0.4
    stars = rng.normal(size=(USERS, RANK)) @ rng.normal(size=(RANK, ITEMS))
    stars += 0.2 * rng.normal(size=stars.shape)
    lines = ["user_id,item_id,rating,rated_at"]
    lines += [f"u{u},{i},{stars[u, i]:.3f},1500000000" for u, i in np.argwhere(rated)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    store = Store(spark, root=str(folder / "tables"))
    ingest_ratings(store, formats.read_ratings(spark, str(folder / "ratings.csv"), "csv"))
    table = ratings.read(store).select("user_id", "item_id", "rating")
    parent = None
    for als in (EXPLICIT, IMPLICIT):
        fitted = fit_factors(table, als, ExecutionSettings())
        assert fitted.summary.converged
        parent = publishing.publish_fit(
            store,
            fitted.to_publish(),
            als,
            kind="train",
            parent=parent,
            ratings_version=store.version(ratings.TABLE),
            ratings_ingest_id=ratings.newest_ingest(store),
        )
        fitted.release()
    return store


def brute_force(store, model):
    """Residual by side and id, from everything collected to NumPy."""
    table = ratings.read(store, model.ratings_version).toPandas()
    vectors = {
        side: {row["id"]: np.array(row["factors"], np.float32) for row in rows.collect()}
        for side, rows in zip(("user", "item"), models.read_factors(store, model), strict=True)
    }
    found = {}
    for side, other in (("user", "item"), ("item", "user")):
        every_other = np.array(list(vectors[other].values()))
        for id, rows in table.groupby(f"{side}_id"):
            rows = rows[rows[f"{other}_id"].isin(vectors[other])]
            if id in vectors[side]:
                m = np.array([vectors[other][o] for o in rows[f"{other}_id"]])
                found[side, id] = dense_residual(
                    vectors[side][id],
                    m,
                    rows["rating"],
                    model.als,
                    every_other,
                    floor=model.floors[side],
                )
    return found


def largest(residuals):
    return {
        side: pytest.approx(max(r for (of, _), r in residuals.items() if of == side), rel=1e-9)
        for side in ("user", "item")
    }


@pytest.mark.parametrize("version", [1, 2], ids=["explicit", "implicit"])
def test_a_trained_model_audits_clean_and_agrees_with_numpy(trained, run_job, version):
    result = run_job("audit", "--root", trained.root, "--model-version", version)
    assert result.exit_code == 0, result.stderr
    model = models.published(trained, version)
    residuals = brute_force(trained, model)
    assert min(model.floors.values()) > 0
    assert result.json == {
        "model_version": version,
        "max_residual": largest(residuals),
        "ledger_holds": True,
        "tombstoned_ratings_found": 0,
        "tau": TAU,
        "floor": model.floors,
        "holds": True,
        "rows": {"user": USERS, "item": ITEMS},
        "rows_without_ratings": 0,
        "ratings_without_rows": 0,
    }
    assert max(result.json["max_residual"].values()) > 1e-8  # of float32 factors it cannot be 0
    evidence = trained.read("audits").where(F.col("model_version") == version).first().asDict()
    assert evidence.pop("audited_at") is not None
    assert evidence == {
        "model_version": version,
        "max_residual_user": result.json["max_residual"]["user"],
        "max_residual_item": result.json["max_residual"]["item"],
        "tau": TAU,
        "ledger_holds": True,
        "tombstoned_ratings_found": 0,
        "holds": True,
    }


@pytest.mark.parametrize(
    "version", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["explicit", "implicit"]
)
def test_a_changed_and_a_lost_factor_row_are_found(trained, version):
    model = models.published(trained, version)
    users = models.read_factors(trained, model)[0]
    shifted = F.transform("factors", lambda value: value + F.lit(0.5).cast("float"))
    damaged = users.where(F.col("id") != GONE).withColumn(
        "factors", F.when(F.col("id") == "u3", shifted).otherwise(F.col("factors"))
    )
    broken = replace(model, user_factors_version=factors.write_factors(trained, "user", damaged))
    residuals = brute_force(trained, broken)
    found = audit(trained, broken)
    assert found.max_residual == largest(residuals)
    assert found.max_residual["user"] > 3 * found.tau
    assert found.rows == {"user": USERS - 1, "item": ITEMS}
    lost = ratings.read(trained).where(F.col("user_id") == GONE).count()
    assert found.ratings_without_rows == lost > 0
    assert (found.ledger_missing, found.ledger_extra) == (0, 1)
    bounds = {
        (row["side"], row["id"]): row["bound"]
        for row in trained.read(factors.LEDGER, model.ledger_version).collect()
    }
    below = sum(bounds[side, str(id)] * 1.000001 < r for (side, id), r in residuals.items())
    assert found.ledger_below == below > 0
    assert not found.holds
    # The version that was published is read at its own Delta versions, and is as good as before.
    assert audit(trained, model).holds


def test_a_ledger_bound_below_the_residual_fails_the_job(trained, run_job):
    head = models.published(trained)
    ledger = trained.read(factors.LEDGER, head.ledger_version)
    worst = ledger.orderBy(F.desc("bound")).first()
    is_worst = (F.col("side") == worst["side"]) & (F.col("id") == worst["id"])
    lowered = ledger.withColumn(
        "bound", F.when(is_worst, F.col("bound") * 0.99).otherwise(F.col("bound"))
    )
    damaged = models.publish(
        trained,
        replace(
            head,
            model_version=head.model_version + 1,
            parent=head.model_version,
            ledger_version=factors.write_ledger(trained, lowered),
        ),
    )
    result = run_job("audit", "--root", trained.root)
    assert result.exit_code == 1
    assert result.json["model_version"] == damaged.model_version
    assert max(result.json["max_residual"].values()) <= result.json["tau"]
    assert result.json["ledger_holds"] is False
    assert result.json["holds"] is False
    lines = [line for line in result.stderr.splitlines() if "fails" in line]
    assert lines == [
        f"model version {damaged.model_version} fails: 1 ledger bounds are below the residual"
    ]
    evidence = trained.read("audits").where(~F.col("holds")).collect()
    assert [row["model_version"] for row in evidence] == [damaged.model_version]


def test_ratings_of_honoured_requests_that_are_still_there_are_counted(trained, run_job, tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text(
        "request_id,scope,user_id,item_id,requested_at\n"
        f"done,user,{GONE},,1700000000\n"
        "done too,item,,4,1700000000\n"
        "waiting,user,u8,,1700000000\n"
    )
    accepted = run_job("ingest_tombstones", "--root", trained.root, "--input", path)
    assert accepted.exit_code == 0, accepted.stderr
    model = models.published(trained, 1)
    done = trained.spark.createDataFrame(
        [(id, 1, 0, 0, 0.0, None, None) for id in ("done", "done too")], receipts.SPEC.schema
    )
    claimed = replace(
        model,
        receipts_version=receipts.append(trained, model, done),
        tombstones_version=tombstones.version(trained),
    )
    found = audit(trained, claimed)
    table = ratings.read(trained, model.ratings_version)
    left = table.where((F.col("user_id") == GONE) | (F.col("item_id") == 4)).count()
    assert found.tombstoned_ratings_found == left > 0
    # Their rows are in the factor tables still, and what u8 asked for is not in the model either.
    assert found.rows_without_ratings == 3
    assert not found.holds
    assert any("honoured requests" in clause for clause in found.failures)


def test_a_model_without_ratings_cannot_be_audited(trained):
    imported = replace(models.published(trained, 1), ratings_version=None)
    with pytest.raises(InputError, match="version 1 names no ratings"):
        audit(trained, imported)
