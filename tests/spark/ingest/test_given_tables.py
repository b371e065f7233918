"""Tables in memory as inputs: Arrow, pandas and Spark hold the same ratings and requests."""

from __future__ import annotations

import datetime as dt

import pandas as pd
import pyarrow as pa
import pytest

from unlearn_spark.errors import InputError
from unlearn_spark.ingestion.rules import GIVEN_TABLE
from unlearn_spark.spark.ingest.formats import read_ratings
from unlearn_spark.spark.ingest.ratings import ingest_ratings
from unlearn_spark.spark.ingest.requests import ingest_requests
from unlearn_spark.tables import quarantine, tombstones

DAY = dt.datetime(2021, 1, 1, tzinfo=dt.UTC)


def arrow(spark):
    return pa.table(
        {
            "User_ID": pa.array(["ann", "bob", None]).dictionary_encode(),
            "item_id": pa.array([1, 2, 3], pa.uint32()),
            "rating": pa.array([5, 4, 3], pa.int8()),
            "rated_at": pa.array([DAY, None, DAY], pa.timestamp("ns", "UTC")),
            "note": pa.nulls(3),
        }
    )


def pandas(spark):
    times = pd.to_datetime([DAY, None, DAY])
    columns = {"user_id": ["ann", "bob", None], "item_id": [1.0, 2.0, 3.0], "rating": [5, 4, 3]}
    return pd.DataFrame({**columns, "rated_at": times}, index=[7, 8, 9])


def frame(spark):
    return spark.createDataFrame(
        [("ann", 1, "5", DAY), ("bob", 2, "4", None), (None, 3, "3", DAY)],
        "user_id string, item_id int, rating string, rated_at timestamp",
    )


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(arrow, marks=pytest.mark.slow),
        pytest.param(pandas, marks=pytest.mark.slow),
        frame,
    ],
)
def test_ratings_of_a_table(spark, store, made):
    report = ingest_ratings(store, read_ratings(spark, made(spark), "parquet"))
    assert (report.read, report.written, report.quarantined) == (3, 2, 1)
    found = store.arrow("ratings", columns=["user_id", "item_id", "rating", "rated_at"])
    assert sorted(found.to_pylist(), key=lambda row: row["user_id"]) == [
        {"user_id": "ann", "item_id": 1, "rating": 5.0, "rated_at": DAY},
        {"user_id": "bob", "item_id": 2, "rating": 4.0, "rated_at": None},
    ]
    (held,) = store.arrow(quarantine.TABLE).to_pylist()
    assert (held["source"], held["reason"]) == (GIVEN_TABLE, "user_id is missing")


def test_requests_of_a_table(spark, store):
    texts = pa.table({"request_id": ["a"], "scope": ["user"], "user_id": ["7"], "item_id": [None]})
    assert ingest_requests(store, texts).accepted == 1
    numbers = pd.DataFrame({"request_id": ["b", "c"], "scope": "item", "item_id": [8, 9]})
    assert ingest_requests(store, numbers).accepted == 2
    rows = tombstones.read(store).sort_by("request_id").to_pylist()
    named = [(row["request_id"], row["user_id"], row["item_id"]) for row in rows]
    assert named == [("a", "7", None), ("b", None, "8"), ("c", None, "9")]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (["user_id"], "cannot be read"),
        (pa.table({"user_id": ["a"], "rating": [1.0]}), "has no column item_id"),
        (pd.DataFrame({"user_id": ["a", 1], "item_id": 1, "rating": 1}), "cannot be read"),
    ],
)
def test_tables_that_are_refused(spark, table, says):
    with pytest.raises(InputError, match=f"{GIVEN_TABLE}: {says}"):
        read_ratings(spark, table, "parquet")
