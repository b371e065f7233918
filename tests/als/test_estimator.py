"""The MLlib-shaped front: the same quality as MLlib, brute-force recommendations, ids of any type,
cold starts, the pyspark.ml machinery around it, and a round trip to disk."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import SQLTransformer
from pyspark.ml.recommendation import ALS as MLlibALS
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F

from unlearn_spark.als import ALS, ALSModel
from unlearn_spark.errors import InputError, SettingsError

RANK = 3


@pytest.fixture(scope="module")
def table():
    """60 users x 40 items, rank 3 and noise, half of the pairs: (user, item, rating, held out)."""
    rng = np.random.default_rng(11)
    truth = rng.normal(size=(60, RANK)) @ rng.normal(size=(RANK, 40))
    noisy = truth + 0.1 * rng.normal(size=truth.shape)
    pairs = np.argwhere(rng.random(truth.shape) < 0.5)
    held = rng.random(len(pairs)) < 0.15
    return [
        (int(u), int(i), float(noisy[u, i]), bool(h)) for (u, i), h in zip(pairs, held, strict=True)
    ]


@pytest.fixture(scope="module")
def split(spark, table):
    frame = spark.createDataFrame(table, "user int, item int, rating float, held boolean").cache()
    frame.count()
    yield frame.where("not held").drop("held"), frame.where("held").drop("held")
    frame.unpersist()


@pytest.fixture(scope="module")
def model(split):
    return ALS(rank=RANK, maxIter=40, regParam=0.02, seed=5, tol=1e-3).fit(split[0])


def factors(frame):
    rows = sorted(frame.collect())
    return [row["id"] for row in rows], np.array([row["features"] for row in rows], np.float32)


def rmse(model, held_out):
    return RegressionEvaluator(labelCol="rating").evaluate(model.transform(held_out))


def test_quality_equals_mllib(split, model):
    train, held_out = split
    theirs = MLlibALS(rank=RANK, maxIter=40, regParam=0.02, seed=5).fit(train)
    ours_rmse, theirs_rmse = rmse(model, held_out), rmse(theirs, held_out)
    assert ours_rmse < 0.5  # the ratings' own spread is about 1.8
    assert ours_rmse == pytest.approx(theirs_rmse, rel=0.02)
    # Both minimise one objective, here to its one good minimum: predictions agree pair by pair.
    both = model.transform(held_out).join(
        theirs.transform(held_out).withColumnRenamed("prediction", "theirs"), ["user", "item"]
    )
    gap = both.agg(F.max(F.abs(F.col("prediction") - F.col("theirs")))).first()[0]
    assert gap < 0.05
    assert model.summary.sweeps < 40
    assert model.summary.max_residual <= 1e-3


def test_same_parameters_and_defaults_as_mllib(spark):
    ours, theirs = ALS(), MLlibALS()
    for param in theirs.params:
        assert ours.hasParam(param.name)
        suffix = param.name[0].upper() + param.name[1:]
        assert callable(getattr(ours, f"get{suffix}"))
        if hasattr(theirs, f"set{suffix}"):
            assert callable(getattr(ours, f"set{suffix}"))
        if param.name not in ("seed", "predictionCol"):
            assert ours.getOrDefault(param.name) == theirs.getOrDefault(param.name)
    assert ours.getPredictionCol() == "prediction"
    known = inspect.signature(ALS.__init__).parameters
    for name, parameter in inspect.signature(MLlibALS.__init__).parameters.items():
        if name != "kwargs":
            assert known[name].default == parameter.default
    assert ours.setRank(7).setNumBlocks(3).setTol(0.1).getRank() == 7
    assert (ours.getNumUserBlocks(), ours.getNumItemBlocks(), ours.getTol()) == (3, 3, 0.1)


def test_recommendations_equal_brute_force(spark, split, model):
    train, _ = split
    users, x = factors(model.userFactors)
    items, y = factors(model.itemFactors)
    scores = x @ y.T
    found = model.recommendForAllUsers(4)
    assert found.schema.simpleString() == (
        "struct<user:int,recommendations:array<struct<item:int,rating:float>>>"
    )
    rows = {row["user"]: row["recommendations"] for row in found.collect()}
    assert sorted(rows) == users
    for place, user in enumerate(users):
        best = np.argsort(-scores[place])[:4]
        assert [r["item"] for r in rows[user]] == [items[b] for b in best]
        np.testing.assert_allclose([r["rating"] for r in rows[user]], scores[place][best], 1e-5)

    asked = spark.createDataFrame([(3,), (3,), (999,)], "item int")
    [row] = model.recommendForItemSubset(asked, 5, excludeSeen=train).collect()
    seen = {r["user"] for r in train.where("item = 3").collect()}
    ranked = [users[u] for u in np.argsort(-scores[:, items.index(3)]) if users[u] not in seen]
    assert row["item"] == 3
    assert [r["user"] for r in row["recommendations"]] == ranked[:5]


@pytest.mark.slow
def test_exclude_seen_leaves_only_unrated_items(split, model):
    train, _ = split
    rated = {(row["user"], row["item"]) for row in train.collect()}
    for row in model.recommendForAllUsers(100, excludeSeen=train).collect():
        named = {(row["user"], r["item"]) for r in row["recommendations"]}
        assert not named & rated
        # All that is left is named: nothing is lost with what is excluded.
        assert len(named) == 40 - sum(user == row["user"] for user, _ in rated)


def test_string_ids_and_cold_starts(spark, split):
    train, _ = split
    named = train.select(
        F.concat(F.lit("u"), "user").alias("who"),
        F.concat(F.lit("i"), "item").alias("what"),
        F.col("rating").alias("stars"),
    )
    als = ALS(rank=2, maxIter=2, userCol="who", itemCol="what", ratingCol="stars")
    model = als.setPredictionCol("guess").fit(named)
    assert model.userFactors.dtypes == [("id", "string"), ("features", "array<float>")]
    pairs = spark.createDataFrame(
        [("u1", "i1"), ("u1", "nothing"), ("nobody", "i1")], "who string, what string"
    )
    guesses = {(row[0], row[1]): row[2] for row in model.transform(pairs).collect()}
    assert math.isfinite(guesses["u1", "i1"])
    assert math.isnan(guesses["u1", "nothing"])
    assert math.isnan(guesses["nobody", "i1"])
    dropped = model.copy({model.coldStartStrategy: "drop"}).transform(pairs).collect()
    assert [(row["who"], row["what"]) for row in dropped] == [("u1", "i1")]
    assert model.getColdStartStrategy() == "nan"


@pytest.mark.slow
def test_implicit_preferences_equal_mllib(split):
    """Two groups of users and of items: the best rank-2 model is one, so predictions agree."""
    train, _ = split
    alike = F.col("user") % 2 == F.col("item") % 2
    strength = (F.col("user") + F.col("item")) % 3 + 1
    counts = train.withColumn("rating", F.when(alike, strength).otherwise(0))
    settings = {"rank": 2, "maxIter": 15, "regParam": 0.05, "implicitPrefs": True, "alpha": 2.0}
    ours = ALS(**settings).fit(counts).transform(counts)
    theirs = MLlibALS(**settings, seed=1).fit(counts).transform(counts)
    both = ours.join(theirs.withColumnRenamed("prediction", "theirs"), ["user", "item"])
    gap, spread = both.agg(
        F.max(F.abs(F.col("prediction") - F.col("theirs"))), F.stddev("theirs")
    ).first()
    assert spread > 0.2
    assert gap < 0.05 * spread


@pytest.mark.slow
def test_without_a_rating_column_every_rating_is_one(split):
    train, _ = split
    model = ALS(rank=1, maxIter=10, regParam=0.0, ratingCol="").fit(train)
    low, high = model.transform(train).agg(F.min("prediction"), F.max("prediction")).first()
    assert low == pytest.approx(1, abs=0.01)
    assert high == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_pipeline_cross_validation_and_round_trip(spark, split, model, tmp_path):
    train, held_out = split
    als = ALS(rank=RANK, maxIter=4, coldStartStrategy="drop")
    doubled = SQLTransformer(statement="SELECT user, item, 2 * rating AS rating FROM __THIS__")
    grid = ParamGridBuilder().addGrid(als.regParam, [0.1, 50.0]).build()
    validator = CrossValidator(
        estimator=Pipeline(stages=[doubled, als]),
        estimatorParamMaps=grid,
        evaluator=RegressionEvaluator(labelCol="rating"),
        numFolds=2,
        seed=1,
    )
    validated = validator.fit(train)
    assert validated.avgMetrics[0] < validated.avgMetrics[1]
    pipeline = validated.bestModel
    pipeline.write().overwrite().save(str(tmp_path / "pipeline"))
    again = PipelineModel.load(str(tmp_path / "pipeline"))
    assert isinstance(again.stages[-1], ALSModel)
    assert again.stages[-1].uid == als.uid
    expected = sorted(pipeline.transform(held_out).collect())
    assert sorted(again.transform(held_out).collect()) == expected

    path = str(tmp_path / "model")
    model.save(path)
    with pytest.raises(Exception, match=r"(?i)already exists"):
        model.save(path)
    model.write().overwrite().save(path)
    loaded = ALSModel.load(path)
    assert (loaded.rank, loaded.uid, loaded.summary) == (RANK, model.uid, model.summary)
    assert sorted(loaded.itemFactors.collect()) == sorted(model.itemFactors.collect())
    with pytest.raises(InputError, match="holds a pyspark"):
        ALSModel.load(str(tmp_path / "pipeline"))

    als.save(str(tmp_path / "als"))
    same = ALS.load(str(tmp_path / "als"))
    assert {p.name: v for p, v in same.extractParamMap().items()} == {
        p.name: v for p, v in als.extractParamMap().items()
    }


def test_a_model_that_was_not_saved_whole_is_none(spark, tmp_path, monkeypatch):
    """Saving over a model dies before each of its writes: never one's users with other's items."""
    path = str(tmp_path / "model")

    def save_over(value):
        rows = spark.createDataFrame([(1, [value])], "id int, features array<float>")
        ALSModel(1, rows, rows).write().overwrite().save(path)

    def load():
        model = ALSModel.load(path)
        return [rows.first()["features"] for rows in (model.userFactors, model.itemFactors)]

    writer = type(spark.range(1).write)
    for survived, left in ((0, [[1.0], [1.0]]), (1, None), (2, None), (3, None)):
        save_over(1.0)
        to_come = iter([None] * survived)

        def dying(write, to_come=to_come):
            return lambda *arguments: (next(to_come), write(*arguments))  # StopIteration: killed

        with monkeypatch.context() as patched:
            for name in ("parquet", "text"):
                patched.setattr(writer, name, dying(getattr(writer, name)))
            with pytest.raises(StopIteration):
                save_over(2.0)
        if left is None:
            with pytest.raises(InputError, match=f"{path}: no model here"):
                load()
        else:
            assert load() == left
    save_over(3.0)
    with pytest.raises(InputError, match="the model is read from there; save it elsewhere"):
        ALSModel.load(path).write().overwrite().save(path)
    assert load() == [[3.0], [3.0]]
    with pytest.raises(InputError, match="no model here"):
        ALSModel.load(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((None, 1, 1.0), "1 row has a null user id"),
        ((1, None, 1.0), "a null item id"),
        ((1, 1, None), "a null rating"),
        ((1, 1, math.nan), "not finite"),
        ((1, 1, -math.inf), "not finite"),
    ],
)
def test_unusable_ratings_are_refused(spark, row, message):
    frame = spark.createDataFrame([(1, 2, 3.0), row], "user int, item int, rating float")
    with pytest.raises(InputError, match=message):
        ALS().fit(frame)


def test_unusable_parameters_are_refused(spark):
    frame = spark.createDataFrame([(1, 2, 3.0)], "user int, item int, rating float")
    for wrong, message in (
        ({"rank": 0}, "rank = 0"),
        ({"maxIter": 0}, "maxIter = 0"),
        ({"regParam": -1.0}, "regParam = -1.0"),
        ({"coldStartStrategy": "guess"}, "coldStartStrategy = 'guess'"),
        ({"finalStorageLevel": "ATTIC"}, "finalStorageLevel = 'ATTIC'"),
        ({"intermediateStorageLevel": "NONE"}, "cannot be NONE"),
    ):
        with pytest.raises(SettingsError, match=message):
            ALS(**wrong).fit(frame)
    with pytest.raises(InputError, match="column stars is missing"):
        ALS(ratingCol="stars").fit(frame)


def test_the_kernel_is_imported_without_spark():
    code = "import sys, unlearn_spark.core.kernel; sys.exit('pyspark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
