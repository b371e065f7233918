"""Metrics of DataFrames against hand-computed values, and properties of the split."""

from __future__ import annotations

import math

import pytest

from unlearn_spark.errors import InputError
from unlearn_spark.evaluation.metrics import as_json
from unlearn_spark.spark import metrics


def test_errors_of_predictions(spark):
    frame = spark.createDataFrame(
        [(4.0, 3.0), (1.0, 3.0), (2.0, 2.0)], "rating float, prediction float"
    )
    assert metrics.rmse(frame) == pytest.approx(math.sqrt(5 / 3))
    assert metrics.mae(frame) == pytest.approx(1.0)
    unknown = frame.union(spark.createDataFrame([(1.0, math.nan)], frame.schema))
    assert math.isnan(metrics.rmse(unknown))
    with pytest.raises(InputError, match="no predictions"):
        metrics.rmse(frame.where("rating > 9"))


def test_ranking_metrics_of_frames(spark):
    recommendations = spark.createDataFrame(
        [
            ("a", [(1, 0.9), (2, 0.8), (3, 0.7), (4, 0.6)]),
            ("b", [(5, 0.9)]),
            ("not asked", [(1, 1.0)]),
        ],
        "user string, recommendations array<struct<item:int,rating:float>>",
    )
    held_out = spark.createDataFrame(
        [("a", 1), ("a", 3), ("a", 3), ("a", 4), ("b", 6), ("c", 1), ("d", 1)],
        "user_id string, item_id int",
    )
    found = metrics.ranking_metrics(recommendations, held_out, 3)
    # Of a's three places 1 and 3 are hits; b misses; c and d were given nothing.
    ideal = 1 + 1 / math.log2(3) + 0.5
    assert found.users == 4
    assert found.ndcg == pytest.approx(1.5 / ideal / 4)
    assert found.precision == pytest.approx(2 / 3 / 4)
    assert found.recall == pytest.approx(2 / 3 / 4)
    assert found.map == pytest.approx((1 + 2 / 3) / 3 / 4)
    assert metrics.ndcg_at_k(recommendations, held_out, 1) == pytest.approx(1 / 4)
    assert metrics.recall_at_k(recommendations, held_out, 1) == pytest.approx(1 / 3 / 4)
    assert set(as_json(found, 3)) == {
        "ndcg_at_3",
        "precision_at_3",
        "recall_at_3",
        "map_at_3",
    }
    with pytest.raises(InputError, match="no held-out items"):
        metrics.ranking_metrics(recommendations, held_out.where("item_id > 9"), 3)


def test_split_is_a_partition_that_stays_put(spark):
    pairs = spark.range(4000).selectExpr("id % 97 AS user_id", "concat('i', id) AS item_id")
    train, held_out = metrics.split_by_hash(pairs, 0.2, seed=3)
    kept, out = train.collect(), held_out.collect()
    assert len(kept) + len(out) == 4000
    assert not set(kept) & set(out)
    assert 0.16 < len(out) / 4000 < 0.24
    fewer = pairs.where("user_id > 40").repartition(3)
    _, again = metrics.split_by_hash(fewer, 0.2, seed=3)
    assert set(again.collect()) == {row for row in out if row["user_id"] > 40}
    _, other = metrics.split_by_hash(pairs, 0.2, seed=4)
    assert set(other.collect()) != set(out)
    with pytest.raises(InputError, match="between 0 and 1"):
        metrics.split_by_hash(pairs, 1.0)
