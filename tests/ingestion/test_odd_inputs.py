"""Inputs as other software writes them: what of each becomes ratings and requests.

The cases are plain data: a function that writes the input, the ids that are read, and the reasons
for what is refused. Proves: one rule for white space, for bytes that are not UTF-8, for numbers as
ids, for the case of column names, for types and for paths, in all formats.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.config import Settings
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion import formats
from unlearn_spark.ingestion.factors import read_factors
from unlearn_spark.ingestion.ratings import ingest_ratings
from unlearn_spark.ingestion.requests import ingest_requests
from unlearn_spark.spark.session import get_spark
from unlearn_spark.tables import quarantine, ratings, tombstones

NBSP, TAB, WIDE = "\u00a0", "\t", "\u3000"
NEW_YEAR = 1609459200  # 2021-01-01, in seconds


def text(content, name="input", encoding="utf-8"):
    """Writes one text file."""

    def write(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode(encoding, "surrogateescape"))
        return str(path)

    return write


def files(**written):
    """Writes several inputs into one folder, which is the input."""

    def write(folder: Path) -> str:
        for each in written.values():
            each(folder / "folder")
        return str(folder / "folder")

    return write


def parquet(name="input.parquet", **columns):
    """Writes one Parquet file."""

    def write(folder: Path) -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.table(columns), path)
        return str(path)

    return write


def raw_strings(*values):
    """A string column of any bytes."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


def rated(*users, **others):
    n = len(users)
    return {"user_id": list(users), "item_id": list(range(n)), "rating": [3.0] * n, **others}


CSV = "user_id,item_id,rating\n"
INEXACT = formats.INEXACT_ID.format(column="user_id")
MISSING = "user_id is missing"

# name, format, what writes it, the (user, item) that are read, the reasons of the other rows
RATINGS = [
    ("white space in csv", "csv",
     text(f'{CSV}ann ,x,5\n{TAB}bob{NBSP},{WIDE}y, 4{TAB}\n" cat",z,3\n{NBSP},x,3\n'),
     [("ann", "x"), ("bob", "y"), ("cat", "z")], [MISSING]),
    ("white space in u.data", "movielens",
     text(f"ann \tx\t5\t1\n{NBSP}bob\ty\t 4\t1\n \tx\t3\t1\n"),
     [("ann", "x"), ("bob", "y")], [MISSING]),
    ("white space in ratings.dat", "movielens", text(f"ann ::x{TAB}::5::1\n{NBSP}::x::3::1\n"),
     [("ann", "x")], [MISSING]),
    ("white space in netflix", "netflix", text(f"7:\nann{NBSP},3,2005-01-01\n{TAB},3,2005-01-01\n"),
     [("ann", "7")], [MISSING]),
    ("white space in parquet", "parquet",
     parquet(user_id=["ann ", f"{TAB}bob{NBSP}", NBSP], item_id=["x", f"{WIDE}y", "z"],
             rating=[f" 5{NBSP}", "4", "3"], rated_at=[f"2020-01-01{NBSP}", " ", ""]),
     [("ann", "x"), ("bob", "y")], [MISSING]),
    ("a quoted value over two lines", "csv",
     text(f'{CSV}"x\ny",1,5\n"a,b",2,5\n'), [("a,b", "2")], [formats.WRONG_WIDTH] * 2),
    ("line breaks in parquet", "parquet",
     parquet(user_id=["x\ny", "x\ry", "x\n"], item_id=["1", "2", "3"], rating=[5, 5, 5]),
     [("x", "3")], [formats.LINE_BREAK] * 2),
    ("latin-1 in csv", "csv", text(f"{CSV}andré,x,5\nandrè,x,1\neve,x,2\n", encoding="latin-1"),
     [("eve", "x")], [formats.NOT_UTF8] * 2),
    ("latin-1 in ratings.dat", "movielens",
     text("andré::x::5::1\neve::x::2::1\n", encoding="latin-1"),
     [("eve", "x")], [formats.NOT_UTF8]),
    ("latin-1 in netflix", "netflix",
     text("7:\nandré,3,2005-01-01\neve,3,2005-01-01\né:\neve,3,2005-01-01\n", encoding="latin-1"),
     [("eve", "7")], [formats.NOT_UTF8] * 2),
    ("latin-1 in parquet", "parquet", parquet(**rated() | {
        "user_id": raw_strings(b"andr\xe9", b"andr\xe8", "andré".encode()),
        "item_id": ["x", "y", "z"], "rating": [1, 2, 3]}),
     [("andré", "z")], [formats.NOT_UTF8] * 2),
    ("marks of UTF-8", "csv",
     files(a=text(f"{CSV}ann,x,5\n", "a.csv", "utf-8-sig"),
           b=text(f"{CSV}bob,y,5\n", "b.csv", "utf-8-sig")),
     [("ann", "x"), ("bob", "y")], []),
    ("names of other case in csv", "csv", text("User_ID,ITEM_ID,Rating\nann,x,5\n"),
     [("ann", "x")], []),
    ("names of other case in parquet", "parquet",
     parquet(User_ID=["ann"], ITEM_ID=["x"], Rating=[5], RATED_AT=[1]), [("ann", "x")], []),
    ("doubles", "parquet", parquet(**rated(1.0, 2.5, None, float("nan"), 2.0**53, 2.0**53 + 2)),
     [(1, 0), (2**53, 4)], [INEXACT] * 2 + [MISSING] * 2),
    ("floats", "parquet", parquet(**rated() | {
        "user_id": pa.array([1.0, 2.0**24 + 2], pa.float32()),
        "item_id": [0, 1], "rating": [1, 2]}),
     [(1, 0)], [INEXACT]),
    ("decimals", "parquet", parquet(**rated() | {
        "user_id": pa.array(["1.00", "2.50", "9007199254740993.00"]).cast(pa.decimal128(38, 2)),
        "item_id": [0, 1, 2], "rating": pa.array(["1.5"] * 3).cast(pa.decimal128(3, 1))}),
     [(1, 0), (2**53 + 1, 2)], [INEXACT]),
    ("unsigned integers", "parquet", parquet(
        user_id=pa.array([1, 2**63 - 1, 2**63], pa.uint64()),
        item_id=pa.array([0, 2**32 - 1, 2], pa.uint32()), rating=pa.array([1, 2, 3], pa.uint8())),
     [(1, 0), (2**63 - 1, 2**32 - 1)], [INEXACT]),
    ("files of other widths", "parquet", files(
        a=parquet("a.parquet", user_id=pa.array([1], pa.int32()), item_id=[1], rating=[1.0]),
        b=parquet("b.parquet", user_id=[2**40], item_id=pa.array([2], pa.int16()), rating=[1.0])),
     [(1, 1), (2**40, 2)], []),
    ("ids in names of folders", "parquet", files(
        a=parquet("item_id=007/a.parquet", user_id=[1], rating=[3.0]),
        b=parquet("item_id=7/a.parquet", user_id=[2], rating=[3.0])),
     [(1, "007"), (2, "7")], []),
    ("nanoseconds that nobody needs", "parquet",
     parquet(**rated(1, exported=pa.array([NEW_YEAR * 10**9], pa.timestamp("ns")))), [(1, 0)], []),
    *[
        (f"the name {name}", "csv", text(f"{CSV}ann,x,5\n", name), [("ann", "x")], [])
        for name in ("r[1] {2}.csv", "r*?.csv", "r\\.csv", "ü%20,r.csv", "f[1]/_f/r.csv")
    ],
    ("a folder of odd names", "parquet",
     files(a=parquet("p [2]{*}%20.parquet", **rated(1)), b=parquet("_hidden", **rated(2))),
     [(1, 0)], []),
]  # fmt: skip

# name, format, what writes it, what the line has to say
REFUSED = [
    ("utf-16", "csv", text(f"{CSV}ann,x,5\n", encoding="utf-16"), "is no text in UTF-8"),
    ("two names in csv", "csv", text("user_id,User_ID,item_id,rating\na,b,x,1\n"),
     "has two columns User_ID and user_id; rename one"),
    ("two names in parquet", "parquet", parquet(**rated(1, User_ID=[2])),
     "columns whose names differ only in case; rename"),
    ("a list", "parquet", parquet(**rated([1])), "column user_id has type array<bigint>"),
    ("a time as an id", "parquet", parquet(**rated(dt.datetime(2020, 1, 1))),
     "column user_id has type timestamp"),
    ("files of other types", "parquet", files(
        a=parquet("a.parquet", **rated("1")), b=parquet("b.parquet", **rated(1))),
     "its files hold a column in different types"),
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
    ("hidden in a folder", "csv", files(a=text(f"{CSV}ann,x,5\n", "_r.csv")), "Spark skips files"),
    ("no such pattern", "csv", lambda folder: f"{folder}/r[1].csv", "no such file or folder"),
]  # fmt: skip


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def request(id, user, **others):
    return {"request_id": id, "scope": "user", "user_id": user, **others}


FOREIGN = formats.FOREIGN_ID.format(column="user_id")
NO_VALUE = "{} is a list, an object, true or false"

# name, what writes it, the user (or item) by request_id that is accepted, the other reasons.
# All are read where the ratings have integer ids.
REQUESTS = [
    ("csv", text(
        "Request_ID,scope,user_id,item_id\n"
        f" c1 ,user,43{NBSP},\nc2, USER{TAB}, 44{TAB},\nc3,item,,{WIDE}5\n"
        f"c4,user,42.0,\nc5,user,042,\nc6,user,+45,\nc7,user,abc,\nc8,user,{NBSP},\n"
        'c9,item,," 5.0"\nc10,user,4\udce9,\n',
        "re quests [1] ü%20.csv"),
     {"c1": "43", "c2": "44", "c3": "5"},
     [FOREIGN] * 4 + [FOREIGN.replace("user", "item"), "user_id is missing for this scope",
                      formats.NOT_UTF8]),
    ("jsonl", text(lines_of(
        request(1, 42), request(2.0, 42.0), request(f" j3{NBSP}", f"42{WIDE}"),
        request("j4", "42.0"), request("j5", 1.5), request("j6", 2**53 + 1), request("j7", 2**64),
        request("j8", [42]), request("j9", {"id": 42}), request("j10", True),
        request(["j11"], 42), request("j12", 42, requested_at=[1]), request("j13", None),
        request("j14", 42, requested_at=NEW_YEAR + 0.5)), "r.jsonl"),
     {"1": "42", "2": "42", "j3": "42", "j6": str(2**53 + 1), "j14": "42"},
     [FOREIGN, INEXACT, INEXACT] + [NO_VALUE.format("user_id")] * 3
     + [NO_VALUE.format("request_id"), NO_VALUE.format("requested_at"),
        "user_id is missing for this scope"]),
    ("doubles in parquet", parquet("r.parquet",
        request_id=["p1", "p2", "p3"], scope=["user", "item", "user"],
        user_id=[43.0, float("nan"), 1.5], item_id=[None, 6.0, None]),
     {"p1": "43", "p2": "6"}, [INEXACT]),
    ("text in parquet", parquet("r.parquet",
        request_id=[f"{TAB}q1", "q2", "q3"], scope=[f"User{NBSP}"] * 3,
        user_id=raw_strings(b"43 ", b"42.0", b"4\xff"), item_id=pa.nulls(3), from_ts=pa.nulls(3),
        requested_at=pa.array([NEW_YEAR * 10**9] * 3, pa.timestamp("ns", "UTC"))),
     {"q1": "43"}, [FOREIGN, formats.NOT_UTF8]),
]  # fmt: skip

REFUSED_REQUESTS = [
    ("booleans", parquet("r.parquet", request_id=["z"], scope=["user"], user_id=[True]),
     "column user_id has type boolean"),
    ("structs", parquet("r.parquet", request_id=["z"], scope=["user"], user_id=[{"a": 1}]),
     "column user_id has type struct<a:bigint>"),
    ("times that are none", parquet("r.parquet", request_id=["z"], scope=["user"], to_ts=[True]),
     "column to_ts has type boolean"),
    ("two names", text("request_id,scope,user_id,USER_ID\nz,user,1,2\n", "r.csv"),
     "has two columns USER_ID and user_id; rename one"),
    ("hidden", text("{}\n", "_r.jsonl"), "Spark skips files whose names begin with _"),
    ("a colon", text("{}\n", "10:30.jsonl"), "Hadoop cannot read names with a colon"),
]  # fmt: skip


def parameters(cases):
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@dataclass(frozen=True)
class Read:
    ids: list[tuple[object, object]]
    reasons: list[str]


def read(spark, path, format) -> Read:
    rows = formats.read_ratings(spark, path, format).frame.collect()
    return Read(
        sorted((r.user_id, r.item_id) for r in rows if r.problem is None),
        sorted(r.problem for r in rows if r.problem is not None),
    )


@pytest.mark.parametrize(("format", "write", "ids", "reasons"), parameters(RATINGS))
def test_what_becomes_ratings(spark, tmp_path, format, write, ids, reasons):
    assert read(spark, write(tmp_path), format) == Read(sorted(ids), sorted(reasons))


@pytest.mark.parametrize(("format", "write", "says"), parameters(REFUSED))
def test_what_is_refused(spark, tmp_path, format, write, says):
    path = write(tmp_path)
    with pytest.raises(InputError) as caught, formats.explained(path, format):
        read(spark, path, format)
    assert str(caught.value).startswith(f"--input {path}: ")
    assert says in str(caught.value)


def test_what_becomes_requests(store, tmp_path):
    """All cases in one table: ids of requests are told apart by their first letter."""
    types = {"user_id": T.LongType(), "item_id": T.LongType()}
    accepted, reasons = {}, {}
    for number, (name, write, good, bad) in enumerate(REQUESTS):
        path = write(tmp_path / str(number))
        report = ingest_requests(store, path, id_types=types)
        assert (report.accepted, report.quarantined) == (len(good), len(bad)), name
        accepted |= good
        reasons[path] = sorted(bad)
    found = {r.request_id: r for r in tombstones.read(store).collect()}
    assert {id: r.user_id or r.item_id for id, r in found.items()} == accepted
    assert {r.scope for r in found.values()} == {"user", "item"}
    assert found["q1"].requested_at == dt.datetime(2021, 1, 1)
    assert found["j14"].requested_at == dt.datetime(2021, 1, 1, 0, 0, 0, 500_000)
    held = store.read(quarantine.TABLE).collect()
    for path, expected in reasons.items():
        assert sorted(r.reason for r in held if r.source == path) == expected


def test_requests_before_any_ratings_keep_their_ids(store, tmp_path):
    _, write, _, _ = REQUESTS[0]
    report = ingest_requests(store, write(tmp_path))
    assert (report.accepted, report.quarantined) == (8, 2)
    assert {"42.0", "042", "+45", "abc"} < {r.user_id for r in tombstones.read(store).collect()}


@pytest.mark.parametrize(("write", "says"), parameters(REFUSED_REQUESTS))
def test_requests_that_are_refused(store, tmp_path, write, says):
    path = write(tmp_path)
    with pytest.raises(InputError) as caught:
        ingest_requests(store, path)
    assert str(caught.value).startswith(f"--input {path}: ")
    assert says in str(caught.value)
    assert not tombstones.exists(store)


@pytest.mark.parametrize("zone", [None, "UTC"])
@pytest.mark.parametrize("unit", ["ns", "us", "ms", "s", "seconds"])
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
    assert tombstones.read(store).schema["user_id"].dataType == T.StringType()


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


def test_relative_paths_may_begin_like_a_scheme(spark, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text(f"{CSV}ann,x,5\n", "10:30/r.csv")(tmp_path)
    assert os.path.exists("10:30/r.csv")
    assert read(spark, "10:30/r.csv", "csv").ids == [("ann", "x")]
