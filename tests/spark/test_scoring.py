"""Scoring: the best n against brute force, ties, exclusions, many blocks, and pair predictions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pyspark.sql import functions as F

from unlearn_spark.errors import InputError
from unlearn_spark.spark.scoring import predict_pairs, top_n


def brute_force(queries, candidates, n, excluded=frozenset()):
    """Lists of (candidate row, score), sorted in full, one query at a time."""
    lists = []
    for q, x in enumerate(queries):
        scored = [
            (-float(np.float32(x @ y)), c)
            for c, y in enumerate(candidates)
            if (q, c) not in excluded
        ]
        lists.append([(c, -score) for score, c in sorted(scored)[:n]])
    return lists


def factors_frame(spark, ids, factors):
    kind = "string" if isinstance(ids[0], str) else "bigint"
    rows = [(key, row.tolist()) for key, row in zip(ids, factors, strict=True)]
    return spark.createDataFrame(rows, f"id {kind}, factors array<float>")


@pytest.mark.parametrize("query_rows", [1000, 9])
def test_top_n_over_blocks_equals_brute_force(spark, query_rows):
    """Nine-row blocks give a grid of 4 x 2 block pairs, 1000-row ones a single pair."""
    rng = np.random.default_rng(2)
    users = [f"u{number:02d}" for number in range(31)]
    items = list(range(100, 200))
    x = rng.integers(-2, 3, (31, 4)).astype(np.float32)
    y = rng.integers(-2, 3, (100, 4)).astype(np.float32)
    seen = {(int(u), int(i)) for u, i in rng.integers(0, [31, 100], (400, 2))}
    seen |= {(0, i) for i in range(98)}  # two items are left for user u00
    seen |= {(1, i) for i in range(100)}  # and none for u01
    exclude = spark.createDataFrame(
        [(users[u], items[i]) for u, i in seen] + [("nobody", 100), ("u05", -1)],
        "query_id string, candidate_id bigint",
    )
    found = top_n(
        factors_frame(spark, users, x),
        factors_frame(spark, items, y),
        6,
        exclude,
        query_rows=query_rows,
    )
    assert found.schema.simpleString() == (
        "struct<id:string,recommendations:array<struct<id:bigint,rating:float>>>"
    )
    lists = {row["id"]: [(r["id"], r["rating"]) for r in row[1]] for row in found.collect()}
    expected = brute_force(x, y, 6, seen)
    assert lists == {
        user: [(items[c], score) for c, score in expected[u]] for u, user in enumerate(users)
    }
    assert [len(lists["u00"]), len(lists["u01"])] == [2, 0]


def test_top_n_without_candidates_and_with_a_bad_n(spark):
    users = factors_frame(spark, ["a"], np.ones((1, 2), np.float32))
    items = factors_frame(spark, [1], np.ones((1, 2), np.float32))
    assert top_n(users, items.where("id > 1"), 3).collect() == [("a", [])]
    assert top_n(users.where("id > 'a'"), items, 3).collect() == []
    with pytest.raises(InputError, match="ask for 1 or more"):
        top_n(users, items, 0)


def test_exclusions_of_another_type_name_the_ids_that_equal_them(spark):
    rows = spark.createDataFrame([(1, [1.0]), (2, [2.0])], "id int, factors array<float>")
    pairs = [(1.0, 2**40), (1.0, 1), (1.5, 2), (2.0, 2)]
    exclude = spark.createDataFrame(pairs, "query_id double, candidate_id long")
    found = {
        r.id: [e.id for e in r.recommendations] for r in top_n(rows, rows, 2, exclude).collect()
    }
    assert found == {1: [2], 2: [1]}


def test_predictions_of_pairs(spark):
    users = factors_frame(spark, ["a", "b"], np.array([[1, 2], [3, 4]], np.float32))
    items = factors_frame(spark, [7, 8], np.array([[1, 0], [0.5, -1]], np.float32))
    pairs = spark.createDataFrame(
        [("b", 7, "x"), ("a", 8, None), ("z", 7, "y"), ("a", 9, "w"), (None, 7, "v")],
        "`the user` string, i int, note string",
    )
    found = predict_pairs(pairs, users, items, user_col="the user", item_col="i")
    assert found.columns == ["the user", "i", "note", "prediction"]
    assert dict(found.dtypes)["prediction"] == "float"
    by_note = {row["note"]: row["prediction"] for row in found.collect()}
    assert (by_note["x"], by_note[None]) == (3.0, -1.5)
    assert all(math.isnan(by_note[note]) for note in "ywv")
    dropped = predict_pairs(
        pairs, users, items, user_col="the user", item_col="i", cold_start="drop"
    )
    assert {row["note"] for row in dropped.collect()} == {"x", None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_col": "nobody"}, "column nobody is missing"),
        ({"prediction_col": "i"}, "column i exists already"),
        ({"cold_start": "guess"}, "'guess' is unknown"),
        ({"user_col": "i"}, "column i is int and the model's ids are string"),
    ],
)
def test_unusable_pairs_are_refused(spark, change, message):
    users = factors_frame(spark, ["a"], np.ones((1, 2), np.float32))
    items = factors_frame(spark, [7], np.ones((1, 2), np.float32))
    pairs = spark.range(1).select(F.lit("a").alias("u"), F.lit(7).alias("i"))
    with pytest.raises(InputError, match=message):
        predict_pairs(pairs, users, items, **{"user_col": "u", "item_col": "i", **change})
