"""Adopted factors: MLlib's own satisfy our equations, and bad input is named in one line.

MLlib is the oracle of the objective. It solves users last, so their residuals show its rounding
alone; the items' show how far it was from converged.
"""

from __future__ import annotations

import numpy as np
import pytest
from pyspark.ml.recommendation import ALS
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.spark.ingest.factors import read_factors
from unlearn_spark.spark.sql import bound_expression
from unlearn_spark.spark.training.adoption import adopt_factors

EXECUTION = ExecutionSettings()
RANK = 3


def some_ratings(n_users=60, n_items=30, share=0.4):
    """(user, item, rating): a low-rank table with noise and, as MLlib allows, values below 0."""
    random = np.random.default_rng(5)
    truth = 1 + random.normal(size=(n_users, 2)) @ random.normal(size=(2, n_items))
    users, items = np.nonzero(random.random((n_users, n_items)) < share)
    values = truth[users, items] + 0.3 * random.normal(size=len(users))
    return [
        (int(u), int(i), round(float(r), 2)) for u, i, r in zip(users, items, values, strict=True)
    ]


@pytest.fixture(scope="module")
def rated(spark):
    frame = spark.createDataFrame(some_ratings(), "user_id int, item_id int, rating float")
    frame = frame.coalesce(1).persist()
    yield frame
    frame.unpersist()


def mllib(rated, als, iterations):
    model = ALS(
        rank=als.rank,
        maxIter=iterations,
        regParam=als.reg_param,
        implicitPrefs=als.implicit_prefs,
        alpha=als.alpha,
        nonnegative=als.nonnegative,
        userCol="user_id",
        itemCol="item_id",
        ratingCol="rating",
        numUserBlocks=1,
        numItemBlocks=1,
        checkpointInterval=-1,
        seed=1,
    ).fit(rated)
    return model.userFactors, model.itemFactors


def as_ours(factors):
    return factors.selectExpr("id", "features AS factors")


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"implicit_prefs": True, "alpha": 2.0}, marks=pytest.mark.slow),
        pytest.param({"nonnegative": True}, marks=pytest.mark.slow),
    ],
    ids=["explicit", "implicit", "nonnegative"],
)
def test_converged_factors_of_mllib_solve_our_equations(rated, more):
    als = AlsSettings(rank=RANK, reg_param=0.1, **more)
    users, items = (as_ours(side) for side in mllib(rated, als, 60))
    adopted = adopt_factors(rated, users, items, als, EXECUTION)
    floors = adopted.encoded.floors
    residuals = {
        side: rows.agg(F.max(bound_expression(F.lit(floors[side])))).first()[0]
        for side, rows in adopted.rows.items()
    }
    assert residuals["user"] < 1e-5
    assert residuals["item"] < 1e-3
    assert adopted.summary.max_residual == adopted.residual_before == max(residuals.values())
    assert adopted.rows_over(1e-5) == {
        "user": 0,
        "item": sum(
            row.gradient_norm > 1e-5 * row.b_norm for row in adopted.rows["item"].collect()
        ),
    }
    kept = {row.id: row.factors for row in adopted.user_factors.collect()}
    assert kept == {row.id: row.factors for row in users.collect()}
    adopted.release()
    # The check can fail: another lambda is another model.
    other = als.model_copy(update={"reg_param": 0.2})
    assert adopt_factors(rated, users, items, other, EXECUTION).summary.max_residual > 1e-2


def objective(pairs, users, items, als):
    """The two objectives, written out over all pairs."""
    x = np.array([users[i] for i in sorted(users)], np.float64)
    y = np.array([items[i] for i in sorted(items)], np.float64)
    r, seen = np.zeros((len(x), len(y))), np.zeros((len(x), len(y)), bool)
    at = {
        side: {id: n for n, id in enumerate(sorted(ids))}
        for side, ids in (("u", users), ("i", items))
    }
    for user, item, value in pairs:
        r[at["u"][user], at["i"][item]] = np.float32(value)
        seen[at["u"][user], at["i"][item]] = True
    if als.implicit_prefs:
        counted = seen & (r > 0)
        loss = ((1 + als.alpha * np.abs(r)) * (counted - x @ y.T) ** 2).sum()
    else:
        counted = seen
        loss = (seen * (r - x @ y.T) ** 2).sum()
    penalty = counted.sum(1) @ (x**2).sum(1) + counted.sum(0) @ (y**2).sum(1)
    return loss + als.reg_param * penalty


@pytest.mark.parametrize("implicit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_objective_of_factors_as_they_are(spark, rated, implicit):
    als = AlsSettings(rank=RANK, reg_param=0.1, implicit_prefs=implicit, alpha=2.0)
    random = np.random.default_rng(2)
    sides = {
        name: {i: [float(v) for v in random.normal(size=RANK).astype(np.float32)] for i in range(n)}
        for name, n in (("user", 60), ("item", 30))
    }
    users, items = (
        spark.createDataFrame(list(rows.items()), "id int, factors array<float>")
        for rows in sides.values()
    )
    adopted = adopt_factors(rated, users, items, als, EXECUTION)
    wanted = objective(some_ratings(), sides["user"], sides["item"], als)
    assert adopted.summary.objective == pytest.approx(wanted, rel=1e-5)
    assert not adopted.summary.converged
    assert adopted.summary.sweeps == 0
    adopted.release()


@pytest.mark.slow
def test_converging_starts_where_the_factors_are_and_new_rows_start_afresh(spark, rated):
    als = AlsSettings(rank=RANK, reg_param=0.1, tol=1e-3)
    users, items = (as_ours(side) for side in mllib(rated, als, 10))
    known_users, known_items = users.where("id >= 7"), items.where("id != 4")
    with pytest.raises(InputError, match=r"7 of 60 rated users and 1 of 30 .* --converge"):
        adopt_factors(rated, known_users, known_items, als, EXECUTION)
    partly = adopt_factors(rated, known_users, known_items, als, EXECUTION, converge=True)
    assert partly.without_factors == {"user": 7, "item": 1}
    assert partly.summary.converged
    assert partly.summary.sweeps > 1
    assert partly.summary.max_residual <= als.tol < partly.residual_before
    users, items = (
        frame.select("id", "factors").localCheckpoint()
        for frame in (partly.user_factors, partly.item_factors)
    )
    assert users.count() == 60
    partly.release()

    stranger = spark.createDataFrame([(1000, [1.0] * RANK)], "id int, factors array<float>")
    scanned = []
    again = adopt_factors(
        rated,
        users.unionByName(stranger),
        items,
        als,
        EXECUTION,
        converge=True,
        on_scan=scanned.append,
    )
    assert again.summary.converged
    assert again.summary.sweeps == 1  # it starts where the first one ended
    assert scanned == [again.residual_before]
    assert again.without_ratings == {"user": 1, "item": 0}
    assert again.user_factors.where("id = 1000").count() == 0
    again.release()


def test_factors_that_do_not_belong_are_refused(spark, rated):
    als = AlsSettings(rank=2)
    users = spark.range(60).selectExpr("cast(id AS int) id", "array(1f, 0f) AS factors")
    items = spark.range(30).selectExpr("cast(id AS int) id", "array(-1f, 1f) AS factors")
    far = users.selectExpr("id + 500 AS id", "factors")
    for converge in (False, True):
        with pytest.raises(InputError, match="none of the 60 rated users has factors"):
            adopt_factors(rated, far, items, als, EXECUTION, converge=converge)
        positive = als.model_copy(update={"nonnegative": True})
        with pytest.raises(InputError, match="0 users and 30 items have negative factors"):
            adopt_factors(rated, users, items, positive, EXECUTION, converge=converge)
    unrated = rated.selectExpr("user_id", "item_id", "0f AS rating")
    with pytest.raises(InputError, match=r"ratings are all zero .* factors are not"):
        adopt_factors(unrated, users, items, als, EXECUTION)


# --- reading --------------------------------------------------------------------------------


def good_arrays():
    random = np.random.default_rng(0)
    return {
        "user_factors": random.normal(size=(4, 2)),
        "item_factors": random.normal(size=(3, 2)).astype(np.float32),
        "user_ids": np.array(["10", "11", "12", "13"]),
        "item_ids": np.array([1, 2, 3], np.uint8),
    }


BIGINT = {"user": T.LongType(), "item": T.LongType()}
STRING = {"user": T.StringType(), "item": T.StringType()}


def test_npz_ids_take_the_type_of_the_ratings(spark, tmp_path):
    arrays = good_arrays()
    np.savez(tmp_path / "anything.npz", regularization=0.1, **arrays)
    for types, ids in ((BIGINT, [10, 11, 12, 13]), (STRING, ["10", "11", "12", "13"])):
        read = read_factors(spark, str(tmp_path), "npz", types)
        assert (read.rank, read.n_users, read.n_items) == (2, 4, 3)
        assert read.user.schema["id"].dataType == types["user"]
        assert read.item.schema["id"].dataType == types["item"]
        rows = sorted(read.user.collect())
        assert [row.id for row in rows] == ids
        found = np.array([row.factors for row in rows], np.float32)
        np.testing.assert_array_equal(found, arrays["user_factors"].astype(np.float32))
    by_file = read_factors(spark, str(tmp_path / "anything.npz"), "npz")
    assert [row.id for row in by_file.user.take(1)] == ["10"]


def without(name):
    arrays = good_arrays()
    del arrays[name]
    return arrays


def replaced(**more):
    return {**good_arrays(), **{name: np.array(value) for name, value in more.items()}}


BAD_NPZ = {
    "missing array": (without("user_ids"), "has no array user_ids (found: user_factors, "),
    "no rows": (
        replaced(user_factors=np.zeros((0, 2)), user_ids=np.zeros(0, np.int64)),
        "user_factors has no rows",
    ),
    "number of ids": (replaced(item_ids=[1, 2]), "2 item_ids name 3 rows of item_factors"),
    "vector": (replaced(item_factors=[1.0, 2.0, 3.0]), "item_factors is float64 of shape (3,)"),
    "integers": (replaced(item_factors=[[1, 2]] * 3), "must be floating point"),
    "float ids": (replaced(item_ids=[1.0, 2.0, 3.0]), "item_ids is float64 of shape (3,)"),
    "huge ids": (replaced(item_ids=np.array([1, 2, 2**63], np.uint64)), "beyond int64"),
    "objects": (
        replaced(user_ids=np.array([1, "a", None, 2], object)),
        "array user_ids holds Python objects",
    ),
    "text for integers": (
        replaced(user_ids=["10", "x", "012", "13"]),
        "as those of the ratings table are: 2; map",
    ),
    "repeated": (replaced(user_ids=["10", "11", "10", "10"]), "rows that repeat an id: 2; keep"),
    "sides": (replaced(item_factors=np.ones((3, 5))), "users have 2 factors and items 5"),
    "rank 0": (replaced(item_factors=np.ones((3, 0))), "rows have 0 factors"),
    "rank 2049": (replaced(item_factors=np.ones((3, 2049))), "a rank is from 1 to 2048"),
    "nan": (
        replaced(item_factors=[[1, 2], [np.nan, 1], [1, -np.inf]]),
        "beyond float32: 2; export",
    ),
    "overflow": (
        replaced(item_factors=[[1, 2], [1e300, 1], [1, 3.0]]),
        "beyond float32: 1; export",
    ),
}


@pytest.mark.parametrize(("arrays", "problem"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_bad_npz(spark, tmp_path, arrays, problem):
    np.savez(tmp_path / "model.npz", **arrays)
    with pytest.raises(InputError) as caught:
        read_factors(spark, str(tmp_path), "npz", BIGINT)
    message = str(caught.value)
    assert problem in message
    assert message.startswith(f"--input {tmp_path}")
    assert "\n" not in message


def parquet_case(**sides):
    good = dict.fromkeys(("user", "item"), "SELECT id, array(1f, 2f) AS factors FROM range(5)")
    return {**good, **sides}


VALUES = "SELECT * FROM VALUES"
BAD_PARQUET = {
    "missing side": (parquet_case(item=None), "has no item_factors or item_factors.parquet; write"),
    "no rows": (
        parquet_case(item="SELECT id, array(1f) AS factors FROM range(0)"),
        "item_factors: has no rows",
    ),
    "no id": (
        parquet_case(user="SELECT id AS user, array(1f) AS factors FROM range(2)"),
        "user_factors: has no column id (found: user, factors)",
    ),
    "no factors": (
        parquet_case(user="SELECT id, array(1f) AS vector FROM range(2)"),
        "user_factors: has no column factors (found: id, vector)",
    ),
    "both names": (
        parquet_case(user="SELECT id, array(1f) AS factors, array(1f) AS features FROM range(2)"),
        "has both columns factors and features",
    ),
    "id type": (
        parquet_case(user="SELECT id / 2 AS id, array(1f) AS factors FROM range(2)"),
        "column id has type double",
    ),
    "factor type": (
        parquet_case(user="SELECT id, array('1') AS factors FROM range(2)"),
        "column factors has type array<string>",
    ),
    "null id": (
        parquet_case(user=f"{VALUES} (1, array(1f)), (null, array(1f)) AS t(id, factors)"),
        "user_factors: rows without an id: 1; remove",
    ),
    "null factors": (
        parquet_case(user=f"{VALUES} (1, array(1f)), (2, null) AS t(id, factors)"),
        "rows without factors: 1; remove",
    ),
    "null element": (
        parquet_case(user=f"{VALUES} (1, array(1f)), (2, array(null)) AS t(id, factors)"),
        "factors that are null, not finite or beyond float32: 1; export",
    ),
    "ranks differ": (
        parquet_case(user=f"{VALUES} (1, array(1f)), (2, array(1f, 2f)) AS t(id, factors)"),
        "rows have from 1 to 2 factors",
    ),
    "repeated id": (
        parquet_case(user=f"{VALUES} ('1', array(1f)), ('1', array(1f)) AS t(id, factors)"),
        "rows that repeat an id: 1; keep",
    ),
}


BY_DEFAULT = ("no rows", "id type", "null id", "ranks differ")


@pytest.mark.parametrize(
    ("sides", "problem"),
    [
        pytest.param(*case, id=name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow])
        for name, case in BAD_PARQUET.items()
    ],
)
def test_bad_parquet(spark, tmp_path, sides, problem):
    for side, query in sides.items():
        if query is not None:
            spark.sql(query).coalesce(1).write.parquet(str(tmp_path / f"{side}_factors"))
    with pytest.raises(InputError) as caught:
        read_factors(spark, str(tmp_path), "parquet", BIGINT)
    message = str(caught.value)
    assert problem in message
    assert message.startswith(f"--input {tmp_path}")


def test_bad_places(spark, tmp_path):
    def refused(path, form, problem):
        with pytest.raises(InputError) as caught:
            read_factors(spark, str(path), form)
        assert problem in str(caught.value)

    refused(tmp_path / "nowhere", "npz", "no such file or folder")
    refused(tmp_path, "npz", "has no .npz file")
    refused(tmp_path, "mllib", "has no userFactors; give the folder that ALSModel.save() wrote")
    refused("s3a://bucket/model.npz", "npz", "copy it to a local folder")
    (tmp_path / "user_factors.parquet").write_text("this is text\n")
    refused(tmp_path, "parquet", "user_factors.parquet: cannot be read as parquet")
    (tmp_path / "userFactors").mkdir()
    refused(tmp_path, "mllib", "userFactors: cannot be read as parquet")
    (tmp_path / "a.npz").write_text("this is text\n")
    refused(tmp_path, "npz", "is no .npz file of NumPy")
    np.save(tmp_path / "one.npy", np.ones(3))
    refused(tmp_path / "one.npy", "npz", "is one array")
    (tmp_path / "b.npz").write_text("")
    refused(tmp_path, "npz", "has 2 .npz files and none is factors.npz")
    refused(tmp_path / "b.npz", "npz", "is no .npz file of NumPy")
    np.savez(tmp_path / "factors.npz", **good_arrays())
    assert read_factors(spark, str(tmp_path), "npz").n_users == 4
    whole = (tmp_path / "factors.npz").read_bytes()
    at = whole.index(b"NUMPY") + 140
    damaged = whole[:at] + bytes(byte ^ 0xFF for byte in whole[at : at + 8]) + whole[at + 8 :]
    (tmp_path / "factors.npz").write_bytes(damaged)
    refused(tmp_path, "npz", "array user_factors is damaged")
    with pytest.raises(SettingsError, match="expected one of mllib, parquet, npz"):
        read_factors(spark, str(tmp_path), "pickle")
