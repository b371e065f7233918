"""Inputs that are odd to Spark alone; those that both engines read are in tests/contract."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pyarrow.parquet
import pytest
from contract.odd_inputs import CSV, NBSP, NEW_YEAR, TAB, files, parquet, rated, raw_strings, text
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.config import Settings
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.spark import ratings
from unlearn_spark.spark.ingest import formats
from unlearn_spark.spark.ingest.factors import read_factors
from unlearn_spark.spark.ingest.ratings import ingest_ratings
from unlearn_spark.spark.ingest.requests import ingest_requests
from unlearn_spark.spark.session import get_spark
from unlearn_spark.tables import tombstones

# name, format, what writes it, what the line has to say
REFUSED = [
    ("files of other units", "parquet", files(
        a=parquet("a.parquet", **rated(1, rated_at=pa.array([0], pa.timestamp("ns")))),
        b=parquet("b.parquet", **rated(2, rated_at=pa.array([0], pa.timestamp("us"))))),
     "its files count rated_at in different units"),
    ("a colon", "csv", text(f"{CSV}ann,x,5\n", "10:30.csv"),
     "Hadoop cannot read names with a colon, as 10:30.csv; rename it"),
    ("a colon in a folder", "parquet", files(a=parquet("10:30.parquet", **rated(1))),
     "Hadoop cannot read names with a colon, as 10:30.parquet; rename it"),
    ("hidden", "csv", text(f"{CSV}ann,x,5\n", "_r.csv"),
     "Spark skips files whose names begin with _ or .; rename"),
    ("hidden parquet", "parquet", parquet(".r.parquet", **rated(1)), "Spark skips files"),
]  # fmt: skip

REFUSED_REQUESTS = [
    (text("{}\n", "_r.jsonl"), "Spark skips files whose names begin with _"),
    (text("{}\n", "10:30.jsonl"), "Hadoop cannot read names with a colon"),
]


@pytest.mark.parametrize(
    ("format", "write", "says"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED]
)
def test_what_is_refused(spark, tmp_path, format, write, says):
    path = write(tmp_path)
    with pytest.raises(InputError) as caught, formats.explained(path, format):
        formats.read_ratings(spark, path, format).frame.collect()
    assert str(caught.value).startswith(f"--input {path}: ")
    assert says in str(caught.value)


def test_requests_that_are_refused(store, tmp_path):
    for write, says in REFUSED_REQUESTS:
        path = write(tmp_path)
        with pytest.raises(InputError, match=says) as caught:
            ingest_requests(store, path)
        assert str(caught.value).startswith(f"--input {path}: ")
    assert not tombstones.exists(store)


@pytest.mark.parametrize(
    ("unit", "zone"),
    [
        ("ns", None),
        ("us", "UTC"),
        ("seconds", None),
        *(
            pytest.param(unit, zone, marks=pytest.mark.slow)
            for unit, zone in (("ns", "UTC"), ("us", None), ("ms", "UTC"), ("s", None))
        ),
    ],
)
def test_times_of_every_unit(spark, tmp_path, unit, zone):
    if unit == "seconds":
        times = pa.array([NEW_YEAR, None])
    else:
        times = pa.array([NEW_YEAR, None], pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
    # What one column counts says nothing about another.
    others = {"exported": pa.array([0, 0], pa.timestamp("ns"))}
    path = parquet(**rated(1, 2, rated_at=times, **others))(tmp_path)
    rows = formats.read_ratings(spark, path, "parquet").frame.orderBy("user_id").collect()
    assert [r.rated_at for r in rows] == [dt.datetime(2021, 1, 1), None]
    assert [r.problem for r in rows] == [None, None]


def test_collated_text_is_stored_as_plain_text(spark, store, tmp_path):
    """Names that a collation takes for one are different ids, for ratings and requests."""
    schema = "user_id string collate UTF8_LCASE, item_id string, rating int"
    rows = [("Ann", "x", 1), ("ann", "x", 2), ("BOB", "x", 3)]
    path = str(tmp_path / "collated.parquet")
    spark.createDataFrame(rows, schema).coalesce(1).write.parquet(path)
    assert ingest_ratings(store, formats.read_ratings(spark, path, "parquet")).written == 3
    table = ratings.read(store)
    assert table.schema["user_id"].dataType == T.StringType()
    assert {r.user_id for r in table.collect()} == {"Ann", "ann", "BOB"}
    asked = spark.read.parquet(path).select(
        F.col("user_id").alias("request_id"), F.lit("user").alias("scope"), "user_id"
    )
    asked.write.parquet(str(tmp_path / "asked.parquet"))
    assert ingest_requests(store, str(tmp_path / "asked.parquet")).accepted == 3
    assert store.read(tombstones.TABLE).schema["user_id"].dataType == T.StringType()


def test_ids_of_models_from_elsewhere_have_no_white_space_around_them(spark, tmp_path):
    factors = [[1.0, 2.0], [3.0, 4.0]]
    folder = tmp_path / "model [1]"
    for side in ("user", "item"):
        name = f"{side}_factors.parquet"
        parquet(name, id=[f"a{NBSP}", f"{TAB}b"], factors=factors)(folder)
    read = read_factors(spark, str(folder), "parquet")
    assert {r.id for r in read.user.collect()} == {"a", "b"}
    for ids, says in ((["a", "a "], "repeat an id: 1"), (["a", NBSP], "without an id: 1"),
                      (raw_strings(b"a", b"\xff"), "not valid UTF-8: 1")):  # fmt: skip
        parquet("item_factors.parquet", id=ids, factors=factors)(folder)
        with pytest.raises(InputError, match=says):
            read_factors(spark, str(folder), "parquet")


def test_a_session_of_local_times_is_changed(spark, run_job, tmp_path):
    key = "spark.sql.timestampType"
    path = text(f"user_id,item_id,rating,rated_at\n1,2,3,{NEW_YEAR}\n", "r.csv")(tmp_path)
    arguments = ("--root", tmp_path / "t", "--input", path, "--format", "csv")
    spark.conf.set(key, "TIMESTAMP_NTZ")
    try:
        done = run_job("ingest_ratings", *arguments)
        assert done.exit_code == 0, done.stderr
        assert spark.conf.get(key) == "TIMESTAMP_LTZ"
    finally:
        spark.conf.unset(key)
    table = spark.read.format("delta").load(str(tmp_path / "t" / "ratings"))
    assert table.schema["rated_at"].dataType == T.TimestampType()
    assert table.first().rated_at == dt.datetime(2021, 1, 1)
    with pytest.raises(SettingsError, match=f"{key}: tables have TIMESTAMP_LTZ; leave it out"):
        get_spark(Settings.model_validate({"spark": {"conf": {key: "TIMESTAMP_NTZ"}}}))
