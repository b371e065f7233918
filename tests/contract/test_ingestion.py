"""Ratings go in: from every format and from tables in memory, on both engines.

Proves: every format gives the same rows and finds the same faults; the newest rating of a pair
wins, in an input and against the table; counts add up; nothing is half-written; requests keep
ratings out; no id reaches Delta's log; an engine goes on where the other stopped.
"""

from __future__ import annotations

import datetime as dt
import importlib
from pathlib import Path

import deltalake
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet
import pytest

import unlearn_spark
from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion import rules
from unlearn_spark.recommender import silent

THREE = [("1", "31", 2.5, 1260759144), ("1", "1029", 3.0, 1260759179), ("2", "31", 4.0, 835355493)]


def file(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def csv(folder: Path, name: str, *lines: str) -> str:
    return file(folder, name, "\n".join(["user_id,item_id,rating,rated_at", *lines]) + "\n")


def seconds(time: dt.datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())


def stored(shop) -> dict:
    """{(user, item): (rating, seconds or None, ingest)}."""
    return {
        (row["user_id"], row["item_id"]): (
            row["rating"],
            seconds(row["rated_at"]),
            row["ingest_id"],
        )
        for row in shop.table("ratings").to_pylist()
    }


def counts(report) -> tuple[int, ...]:
    names = ("ratings_read", "ratings_written", "superseded", "quarantined")
    return tuple(report[name] for name in names)


def in_every_format(folder: Path):
    """The three ratings: name, input, format, columns."""
    rows = [tuple(map(str, row)) for row in THREE]
    lines = "".join(",".join(row) + "\r\n" for row in rows)
    header = "userId,movieId,rating,timestamp\r\n"
    yield "ratings.csv", file(folder, "ratings.csv", header + lines), "movielens", {}
    lines = "".join("\t".join(row) + "\n" for row in rows)
    yield "u.data", file(folder, "u.data", lines), "movielens", {}
    lines = "".join("::".join(row) + "\n" for row in rows)
    yield "ratings.dat", file(folder, "ratings.dat", lines), "movielens", {}
    lines = (
        'when,"stars",uid,iid\n'
        "2009-12-14T02:52:24Z,2.5,1,31\n\n"
        '1260759179.0, 3 ,"1","1029"\n'
        "1996-06-21 13:11:33+02:00,4e0,2,31\n"
    )
    named = {"user_id": "uid", "item_id": "iid", "rating": "stars", "rated_at": "when"}
    yield "csv", file(folder, "named.csv", lines), "csv", named
    lines = "31:\n1,2.5,2009-12-14T02:52:24\n2,4,1996-06-21T11:11:33\n1029:\n1,3,1260759179\n"
    yield "netflix", file(folder, "movies.txt", lines), "netflix", {}
    users, items, stars, times = zip(*THREE, strict=True)
    table = pa.table(
        {
            "user_id": pa.array([int(user) for user in users], pa.int32()),
            "item_id": pa.array([int(item) for item in items], pa.int16()),
            "r": stars,
            "t": times,
        }
    )
    renamed = {"rating": "r", "rated_at": "t"}
    pyarrow.parquet.write_table(table, folder / "p.parquet")
    yield "parquet", str(folder / "p.parquet"), "parquet", renamed
    moments = table["t"].cast(pa.timestamp("s", "UTC")).cast(pa.timestamp("us", "UTC"))
    timed = table.set_column(3, "t", moments)
    deltalake.write_deltalake(folder / "delta", timed)
    yield "delta", str(folder / "delta"), "delta", renamed
    yield "arrow", timed, "parquet", renamed
    yield "pandas", timed.to_pandas(), "parquet", renamed


@pytest.mark.on_both
def test_every_format_gives_the_same_rows(shop, tmp_path):
    expected = {(int(user), int(item)): (stars, time) for user, item, stars, time in THREE}
    for name, source, format, columns in in_every_format(tmp_path):
        report = shop.ingest_ratings(source, format, columns)
        assert report.ratings_read == 3, name
        assert report.quarantined == 0, name
        assert {pair: row[:2] for pair, row in stored(shop).items()} == expected, name
    assert {row[2] for row in stored(shop).values()} == {1}, "nobody had anything new"


def test_tables_of_memory_may_come_in_batches(shop):
    users = pa.chunked_array([["ann", None, "bob"], ["cat"]]).dictionary_encode()
    table = pa.table({"user_id": users, "item_id": [1, 2, 3, 4], "rating": [1.0, 2.0, 3.0, 4.0]})
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=1))
    assert counts(shop.ingest_ratings(reader)) == (4, 3, 0, 1)
    assert set(stored(shop)) == {("ann", 1), ("bob", 3), ("cat", 4)}
    (held,) = shop.table("quarantine").to_pylist()
    assert held["source"] == rules.GIVEN_TABLE
    assert held["raw"] == '{"user_id":null,"item_id":2,"rating":2.0,"rated_at":null}'


@pytest.mark.on_both
def test_what_is_no_table_is_refused(shop):
    mixed = pandas.DataFrame({"user_id": [1, "a"], "item_id": [1, 2], "rating": [1.0, 2.0]})
    for source in (7, mixed):
        with pytest.raises(InputError, match=f"--input {rules.GIVEN_TABLE}: cannot be read"):
            shop.ingest_ratings(source)
    with pytest.raises(InputError, match="the given table: has no column rating"):
        shop.ingest_ratings(pa.table({"user_id": [1], "item_id": [1]}))
    with pytest.raises(InputError, match="the given table: has no ratings"):
        shop.ingest_ratings(mixed.head(0))
    assert not shop.store.exists("ratings")


FAULTS = {
    "1,2,3,4": None,
    "1,2,3,": None,
    '"a,""b""",2,3,2020-01-01': None,
    "1,2,3": rules.WRONG_WIDTH,
    "1,2,3,4,5": rules.WRONG_WIDTH,
    '"1,2,3,4': rules.WRONG_WIDTH,
    " ,2,3,4": "user_id is missing",
    "1,,3,4": "item_id is missing",
    "1,2,,4": "rating is missing",
    "1,2,good,4": "rating is not a number",
    "1,2,3d,4": "rating is not a number",
    "1,2,1_0,4": "rating is not a number",
    "1,2,0x10,4": "rating is not a number",
    "1,2,NaN,4": "rating is not finite",
    "1,2,-Infinity,4": "rating is not finite",
    "1,2,1e39,4": "rating is not finite",
    "1,2,1e400,4": "rating is not finite",
    "1,2,3,yesterday": rules.BAD_TIME,
    "1,2,3,12:30": rules.BAD_TIME,
    "1,2,3,2020-02-30": rules.BAD_TIME,
    "1,2,3,2020-01-01T24:00:00": rules.BAD_TIME,
    "1,2,3,2020-01-01T12:00+19:00": rules.BAD_TIME,
    "1,2,3,1577836800000": rules.TIME_RANGE,
}


@pytest.mark.on_both
def test_every_fault_of_a_row_has_its_reason(shop, tmp_path):
    path = csv(tmp_path, "f.csv", *FAULTS)
    good = sum(why is None for why in FAULTS.values())
    report = shop.ingest_ratings(path, "csv")
    assert (report.ratings_read, report.quarantined) == (len(FAULTS), len(FAULTS) - good)
    held = {row["raw"]: row for row in shop.table("quarantine").to_pylist()}
    assert {raw: row["reason"] for raw, row in held.items()} == {
        raw: why for raw, why in FAULTS.items() if why
    }
    assert {row["source"] for row in held.values()} == {path}
    assert held["1,2,,4"]["user_id"] == "1"
    assert held["1,,3,4"]["item_id"] is None
    assert set(stored(shop)) == {("1", 2), ('a,"b"', 2)}


@pytest.mark.on_both
def test_every_fault_of_a_row_of_a_table_has_its_reason(read, tmp_path):
    table = pa.table(
        {
            "user_id": ["", *["a"] * 6],
            "item_id": [1, None, *[1] * 5],
            "rating": [1.0, 1.0, float("nan"), None, 1e39, 1.0, 1.0],
            "rated_at": [1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    found = read(str(tmp_path / "f.parquet"), "parquet")
    assert found.pairs == [("a", "1")]
    assert found.reasons == sorted(
        ["user_id is missing", "item_id is missing", "rating is missing", rules.BAD_TIME]
        + ["rating is not finite"] * 2
    )


@pytest.mark.on_both(slow=True)
def test_an_input_that_is_of_no_use_writes_nothing(shop, tmp_path):
    pa.parquet.write_table(
        pa.table({"user_id": [1.5], "item_id": [1], "rating": [1.0]}), tmp_path / "float.parquet"
    )
    folder = tmp_path / "folder"
    csv(folder, "a.csv", "1,2,3,4", "1,3,3,4")
    log_alone = tmp_path / "log-alone"
    (log_alone / "_delta_log").mkdir(parents=True)
    cases = [
        (str(tmp_path / "absent.csv"), "csv", "no such file or folder; check the path"),
        (str(tmp_path / "*.gz"), "csv", "no such file or folder; check the path"),
        (file(tmp_path, "empty.csv", ""), "csv", "is empty; give a file with some rows"),
        (file(tmp_path, "blank.csv", "\n   \n\n"), "csv", "is empty"),
        (csv(tmp_path, "header.csv"), "csv", "has no ratings; give a file with some"),
        (
            file(tmp_path, "other.csv", "a,b,c\n1,2,3\n"),
            "csv",
            "no column user_id (found: a, b, c)",
        ),
        (
            file(tmp_path, "twice.csv", "user_id,item_id,rating,rating\n"),
            "csv",
            "two columns rating",
        ),
        (file(tmp_path, "tags.csv", "userId,movieId,tag,timestamp\n"), "movielens", "MovieLens"),
        (file(tmp_path, "n.txt", "1,2,2005-01-01\n"), "netflix", "is no Netflix Prize file"),
        (file(tmp_path, "x.parquet", "no parquet at all"), "parquet", "cannot be read as parquet"),
        (str(tmp_path / "float.parquet"), "parquet", "user_id is a fraction"),
        (str(folder), "delta", "cannot be read as delta; check --format"),
        (str(log_alone), "delta", "cannot be read as delta"),
        (str(tmp_path / "float.parquet"), "csv", "is no text in UTF-8; check --format"),
        (
            csv(tmp_path, "bad.csv", "1,2,x,4", "1,2,y,4", ",2,1,4"),
            "csv",
            "none of its 3 rows is usable; the most frequent reason: rating is not a number",
        ),
    ]
    for path, format, message in cases:
        with pytest.raises(InputError) as caught:
            shop.ingest_ratings(path, format)
        assert str(caught.value).startswith(f"--input {path}: "), path
        assert message in str(caught.value), path
    assert not shop.store.exists("ratings")
    assert not shop.store.exists("quarantine")


@pytest.mark.on_both(slow=True)
def test_columns_may_have_other_names(shop, tmp_path):
    path = file(tmp_path, "no_time.csv", "uid,item_id,rating\n1,2,3\n")
    for columns, message in (
        ({}, "has no column user_id"),
        ({"user_id": "uid", "rated_at": "ts"}, "has no column ts"),
    ):
        with pytest.raises(InputError, match=message):
            shop.ingest_ratings(path, "csv", columns)
    with pytest.raises(SettingsError, match="columns of movielens are fixed"):
        shop.ingest_ratings(path, "movielens", {"user_id": "uid"})
    shop.ingest_ratings(path, "csv", {"user_id": "uid"})
    assert stored(shop) == {(1, 2): (3.0, None, 1)}


def test_columns_option_is_checked():
    assert rules.parse_columns("user_id=u, rating=r") == {"user_id": "u", "rating": "r"}
    for text in ("user=u", "user_id", "user_id=a,user_id=b"):
        with pytest.raises(SettingsError, match="--columns"):
            rules.parse_columns(text)


@pytest.mark.on_both
def test_newest_rating_of_a_pair_wins_and_the_same_file_changes_nothing(shop, tmp_path):
    first = csv(
        tmp_path,
        "first.csv",
        "1,10,1,100",
        "1,10,2,300",  # newest of the pair
        "1,10,3,200",
        "2,10,4,",
        "2,10,5,",  # no times: the later line
        "3,10,1,50",
        "3,10,oops,60",
    )
    report = shop.ingest_ratings(first, "csv")
    assert counts(report) == (7, 3, 3, 1)
    state = {(1, 10): (2.0, 300, 1), (2, 10): (5.0, None, 1), (3, 10): (1.0, 50, 1)}
    assert stored(shop) == state
    held = shop.table("quarantine").to_pylist()
    assert [(row["source"], row["raw"], row["reason"], row["user_id"]) for row in held] == [
        (first, "3,10,oops,60", "rating is not a number", "3")
    ]

    again = shop.ingest_ratings(first, "csv")
    assert counts(again) == (7, 0, 6, 1)
    assert again.ratings_version == report.ratings_version == shop.store.version("ratings")
    assert shop.table("quarantine").num_rows == 1

    second = csv(
        tmp_path,
        "second.csv",
        "1,10,5,299",  # older than the table's
        "2,10,1,5",  # any time beats none
        "3,10,4,50",  # the same time: the later ingest
        "4,99,3,7",  # new
        "007,10,3,8",
        "x,10,3,8",
    )
    report = shop.ingest_ratings(second, "csv")
    assert counts(report) == (6, 3, 1, 2)
    state |= {(2, 10): (1.0, 5, 2), (3, 10): (4.0, 50, 2), (4, 99): (3.0, 7, 2)}
    assert stored(shop) == state
    with pytest.raises(InputError, match="id is not an integer as in the table"):
        shop.ingest_ratings(csv(tmp_path, "text.csv", "a,10,3,8", "b,10,3,8"), "csv")
    with pytest.raises(InputError, match="id is not an integer as in the table"):
        shop.ingest_ratings(pa.table({"user_id": ["a"], "item_id": [10], "rating": [3.0]}))
    assert stored(shop) == state


@pytest.mark.on_both(slow=True)
def test_integers_go_into_a_table_of_text(shop, tmp_path):
    shop.ingest_ratings(csv(tmp_path, "t.csv", "ann,B1,3,1"), "csv")
    shop.ingest_ratings(pa.table({"user_id": [5], "item_id": [1.0], "rating": [1]}))
    shop.ingest_ratings(csv(tmp_path, "u.csv", "007,2,3,1"), "csv")
    assert set(stored(shop)) == {("ann", "B1"), ("5", "1"), ("007", "2")}


@pytest.mark.on_both
def test_what_a_request_covers_stays_out(shop, tmp_path):
    requests = file(
        tmp_path,
        "requests.csv",
        "request_id,scope,user_id,item_id,requested_at\n"
        "gone,user,1,,1000\npair,rating,2,5,1000\nbad,user,,,1000\n",
    )
    shop.ingest_tombstones(requests)
    source = csv(
        tmp_path,
        "r.csv",
        "1,5,4,10",
        "1,6,4,2000",
        "2,5,4,10",
        "2,6,4,10",
        "3,5,4,10",
        "3,6,4,oops",
    )
    report = shop.ingest_ratings(source, "csv")
    assert counts(report) == (6, 2, 0, 4)
    assert set(stored(shop)) == {(2, 6), (3, 5)}
    held = shop.table("quarantine").to_pylist()
    assert {
        (row["reason"], row["raw"], row["user_id"], row["item_id"])
        for row in held
        if row["reason"].startswith(rules.REFUSED)
    } == {(f"{rules.REFUSED}{id}", None, None, None) for id in ("gone", "pair")}

    lift = "request_id,scope,user_id,requested_at\nback,reinstate,1,3000\n"
    shop.ingest_tombstones(file(tmp_path, "lift.csv", lift))
    assert counts(shop.ingest_ratings(source, "csv")) == (6, 2, 2, 2)
    assert set(stored(shop)) == {(1, 5), (1, 6), (2, 6), (3, 5)}


@pytest.mark.on_both
def test_what_a_request_covers_by_the_commit_goes_again(engine, shop, tmp_path, monkeypatch):
    shop.ingest_ratings(csv(tmp_path, "a.csv", "1,5,4,10", "2,6,4,10"), "csv")
    other = unlearn_spark.open(tmp_path / "tables", "embedded", progress=silent)
    name = {"embedded": "unlearn_spark.embedded.ingest", "spark": "unlearn_spark.spark.ratings"}
    module, events = importlib.import_module(name[engine]), []
    upsert, delete = module.upsert, module.delete

    def late_upsert(*given):
        if not events:
            events.append("asked")
            other.ingest_tombstones(
                pa.table({"request_id": ["r"], "scope": ["user"], "user_id": [9]})
            )
        return upsert(*given)

    def late_delete(*given):
        if events == ["asked"]:
            events.append("overtaken")
            other.ingest_ratings(csv(tmp_path, "c.csv", "3,7,4,10"), "csv")
        return delete(*given)

    monkeypatch.setattr(module, "upsert", late_upsert)
    monkeypatch.setattr(module, "delete", late_delete)
    report = shop.ingest_ratings(csv(tmp_path, "b.csv", "1,6,4,10", "9,5,4,10"), "csv")
    assert counts(report) == (2, 2, 0, 0)
    assert events == ["asked", "overtaken"]
    assert set(stored(shop)) == {(1, 5), (2, 6), (1, 6), (3, 7)}


@pytest.mark.on_both(slow=True)
def test_everything_is_covered(shop, tmp_path):
    shop.ingest_tombstones(pa.table({"request_id": ["r"], "scope": ["user"], "user_id": [1]}))
    report = shop.ingest_ratings(csv(tmp_path, "r.csv", "1,5,4,10"), "csv")
    assert counts(report) == (1, 0, 0, 1)
    assert report.ratings_version is None
    assert not shop.store.exists("ratings")


@pytest.mark.on_both
def test_no_id_reaches_the_log(shop, tmp_path):
    lines = [
        f"ZZUSER{u},ZZITEM{i},{1 + (u + i) % 5},{u * 100 + i}" for u in range(9) for i in (1, 2)
    ]
    shop.ingest_ratings(csv(tmp_path, "t.csv", *lines), "csv")
    shop.ingest_ratings(csv(tmp_path, "u.csv", "ZZUSER1,ZZITEM1,5,999999", "ZZUSER99,x,1,1"), "csv")
    assert shop.table("ratings").num_rows == 19
    log = "".join(
        path.read_text()
        for path in Path(shop.store.location("ratings"), "_delta_log").glob("*.json")
    )
    assert '"add"' in log
    assert "ZZUSER" not in log
    assert "ZZITEM" not in log
    assert "999999" not in log


@pytest.mark.on_both(slow=True)
def test_what_a_dead_first_ingest_left_is_no_hindrance(shop, tmp_path):
    """Files and a log, but no commit."""
    left = Path(shop.store.location("ratings"))
    (left / "_delta_log").mkdir(parents=True)
    (left / "_delta_log" / ".00000000000000000000.json.0.tmp").touch()
    (left / "user_block=0").mkdir()
    pa.parquet.write_table(pa.table({"user_id": [1.5]}), left / "user_block=0" / "part-0.parquet")
    assert not shop.store.exists("ratings")
    report = shop.ingest_ratings(csv(tmp_path, "texts.csv", "ada,B1,3,4"), "csv")
    assert report.ratings_written == 1
    assert stored(shop) == {("ada", "B1"): (3.0, 4, 1)}


def test_movielens_goes_in_whole_and_only_once(shop, ml_small):
    report = shop.ingest_ratings(ml_small, "movielens")
    assert counts(report) == (100_004, 100_004, 0, 0)
    table = shop.table("ratings")
    assert len(table["user_id"].unique()) == 671
    assert len(table["item_id"].unique()) == 9066
    assert counts(shop.ingest_ratings(ml_small, "movielens")) == (100_004, 0, 100_004, 0)


@pytest.mark.spark
@pytest.mark.parametrize("first", ["embedded", pytest.param("spark", marks=pytest.mark.slow)])
def test_an_engine_goes_on_where_the_other_stopped(spark, tmp_path, first):
    """Blocks, keys, ids and ingests are the same, whoever wrote them."""
    other = {"embedded": "spark", "spark": "embedded"}[first]
    random = np.random.default_rng(3)
    lines = [f"u{u},{i},{u % 5 + 1},{u}" for u, i in random.integers(0, 60, (500, 2))]
    path = csv(tmp_path, "r.csv", *lines)
    shops = {name: unlearn_spark.open(tmp_path / "t", name) for name in (first, other)}
    report = shops[first].ingest_ratings(path, "csv")
    again = shops[other].ingest_ratings(path, "csv")
    assert again.ratings_written == 0
    assert again.ratings_version == report.ratings_version
    shops[other].ingest_ratings(csv(tmp_path, "s.csv", "u1,1,5,99", "v,1,5,99"), "csv")
    alone = unlearn_spark.open(tmp_path / "alone", other)
    alone.ingest_ratings(path, "csv")

    def rows(shop):
        columns = ["user_id", "item_id", "user_block", "user_key", "ingest_id"]
        return sorted(
            tuple(row.values()) for row in shop.table("ratings").select(columns).to_pylist()
        )

    written = rows(shops[first])
    assert written == rows(shops[other])
    assert [row for row in written if row[4] == 1] == [
        row for row in rows(alone) if row[:2] not in {("u1", 1), ("v", 1)}
    ]
    assert {row[:2] for row in written if row[4] == report.ratings_version + 2} == {
        ("u1", 1),
        ("v", 1),
    }
