"""Ratings on Spark, beyond what tests/contract holds for both engines.

Proves: text is read in pieces whose seams do not show; ingestions side by side do not mix; deletion
and lookup by id touch just their rows, and leave no id in Delta's log.
"""

from __future__ import annotations

import datetime as dt
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.ingestion import rules
from unlearn_spark.spark import ratings
from unlearn_spark.spark.ingest import formats
from unlearn_spark.spark.ingest.ratings import ingest_ratings
from unlearn_spark.tables import ratings as layout
from unlearn_spark.tables.delta_spark import SparkStore
from unlearn_spark.tables.store import TableSpec


def _file(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def _csv(folder: Path, name: str, *lines: str) -> str:
    return _file(folder, name, "\n".join(["user_id,item_id,rating,rated_at", *lines]) + "\n")


def _ingest(store, path, format="csv", **columns):
    return ingest_ratings(store, formats.read_ratings(store.spark, path, format, columns))


def _table(store):
    """{(user, item): (rating, seconds or None, ingest)}."""
    rows = ratings.read(store).withColumn("second", F.unix_seconds("rated_at")).collect()
    return {(r.user_id, r.item_id): (r.rating, r.second, r.ingest_id) for r in rows}


def test_netflix_lines_belong_to_the_movie_above_also_across_pieces(spark, tmp_path):
    movies = {f"{m}": [f"{m * 10 + k}" for k in range(m % 4 * 5)] for m in range(1, 60)}
    text = "".join(
        f"{movie}:\n" + "".join(f"{user},{1 + int(user) % 5},2005-09-06\n" for user in users)
        for movie, users in movies.items()
    )
    folder = tmp_path / "netflix"
    folder.mkdir()
    _file(folder, "a.txt", text)
    _file(folder, "b.txt", "900:\n7,5,2004-01-01\n8,5\n")
    key = "spark.sql.files.maxPartitionBytes"
    before = spark.conf.get(key)
    spark.conf.set(key, "600")  # some pieces begin amid a movie, some have no movie line
    try:
        raw = formats.read_ratings(spark, str(folder), "netflix")
        assert raw.frame.select(F.spark_partition_id()).distinct().count() > 3
        rows = raw.frame.collect()
    finally:
        spark.conf.set(key, before)
    good = {(r.item_id, r.user_id) for r in rows if r.problem is None}
    assert good == {(m, u) for m, users in movies.items() for u in users} | {("900", "7")}
    assert [(r.raw, r.problem) for r in rows if r.problem] == [("900:8,5", rules.WRONG_WIDTH)]
    assert {r.rated_at for r in rows if r.user_id == "7"} == {dt.datetime(2004, 1, 1)}


@pytest.mark.parametrize(
    ("most_pairs", "broadcast_rows"),
    [(1, ratings.BROADCAST_ROWS), pytest.param(0, 0, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_text_ids_lookup_and_deletion_leave_no_id_in_the_log(
    spark, store, tmp_path, monkeypatch, most_pairs, broadcast_rows
):
    monkeypatch.setattr(ratings, "MOST_PAIRS", most_pairs)
    monkeypatch.setattr(ratings, "BROADCAST_ROWS", broadcast_rows)
    monkeypatch.setattr(layout, "choose_blocks", lambda n_ratings: 2)
    lines = [
        f"ZZUSER{u},ZZITEM{i},{1 + (u + i) % 5},{u * 100 + i}" for u in range(9) for i in (1, 2)
    ]
    _ingest(store, _csv(tmp_path, "t.csv", *lines))
    pa.parquet.write_table(
        pa.table({"user_id": [5, 5], "item_id": [1, 2], "rating": [1, 2]}),
        tmp_path / "ints.parquet",
    )
    _ingest(store, str(tmp_path / "ints.parquet"), "parquet")
    table = ratings.read(store)
    assert dict(table.dtypes)["user_id"] == dict(table.dtypes)["item_id"] == "string"
    hashed = "xxhash64(user_id)"
    blocks = ratings.user_blocks(store)
    wrong = table.where(
        f"user_block <> pmod({hashed}, {blocks}) "
        f"or user_key <> user_block * 1024 + pmod(shiftright({hashed}, 32), 1024)"
    )
    assert table.count() == 20
    assert wrong.count() == 0

    users = spark.createDataFrame([("ZZUSER3",), ("5",), ("nobody",)], "user_id string")
    assert {(r.user_id, r.item_id) for r in ratings.covering(store, users).collect()} == {
        ("ZZUSER3", "ZZITEM1"),
        ("ZZUSER3", "ZZITEM2"),
        ("5", "1"),
        ("5", "2"),
    }
    items = spark.createDataFrame([(1,)], "item_id int")
    assert [r.user_id for r in ratings.covering(store, items).collect()] == ["5"]

    before = store.version("ratings")
    pairs = spark.createDataFrame(
        [("ZZUSER3", "ZZITEM1"), ("5", "2")], "user_id string, item_id string"
    )
    after = ratings.delete(store, pairs, before)
    hit = pairs.selectExpr("pmod(xxhash64(user_id), 2) AS block").distinct().count()
    assert after == before + hit, "a commit for each batch"
    assert ratings.delete(store, pairs, after) == after, "nothing left to delete"
    with pytest.raises(ConflictError, match="ingested meanwhile"):
        ratings.delete(store, pairs, before)
    assert ratings.delete(store, pairs.limit(0), before) == before, "asks for nothing"
    assert ratings.read(store).count() == 18
    assert ratings.covering(store, pairs).count() == 0
    assert ratings.covering(store, pairs, before).count() == 2
    log = "".join(
        p.read_text() for p in Path(store.location("ratings"), "_delta_log").glob("*.json")
    )
    assert '"add"' in log
    assert "ZZUSER" not in log
    assert "ZZITEM" not in log
    # A few users share a key: predicates name blocks, as lists or as ranges of all their keys.
    predicates = re.findall(r'"predicate":"(.*?)"(?:,|})', log)
    numbers = {
        int(n) for text in predicates for n in re.findall(r"user_key#\d+L? [<>]=? (\d+)", text)
    }
    assert predicates
    assert not any("user_key" in text and " IN " in text for text in predicates)
    assert numbers <= {0, 1023, 1024, 2047}


IDS = {"integers": st.integers(0, 30), "texts": st.text(max_size=2)}


@pytest.mark.parametrize("kind", IDS)
@given(data=st.data())
def test_pairs_are_found_among_those_to_delete(kind, data):
    pair = st.tuples(IDS[kind], IDS[kind])
    doomed = data.draw(st.sets(pair, min_size=1, max_size=20))
    some = st.sampled_from(sorted(doomed))
    asked = data.draw(st.lists(pair | some | st.builds(lambda a, b: (a[0], b[1]), some, some)))
    of_type = pa.int64() if kind == "integers" else pa.string()

    def columns(pairs):
        return [pa.array([pair[n] for pair in pairs], of_type) for n in (0, 1)]

    is_among = ratings._among(*map(pa.chunked_array, ([column] for column in columns(doomed))))
    assert is_among(*columns(asked)).to_pylist() == [pair in doomed for pair in asked]


OURS = ("1,10,1,100", "1,11,2,100", "1,11,2,100")
THEIRS = ("1,10,5,200", "2,10,4,100")


FIRST_OR_LATER = (
    pytest.param(True, id="first ingest", marks=pytest.mark.slow),
    pytest.param(False, id="later ingest"),
)


def _ingest_as_they_do(store, tmp_path):
    other = SparkStore(store.spark.newSession(), root=store.root)
    return _ingest(other, _csv(tmp_path, "theirs.csv", *THEIRS))


@pytest.mark.parametrize("first", FIRST_OR_LATER)
def test_an_ingest_that_another_overtakes_writes_nothing(store, tmp_path, monkeypatch, first):
    """The other commits all it has between what ours reads of the table and what ours writes."""
    if not first:
        _ingest(store, _csv(tmp_path, "base.csv", "1,10,3,150"))
    module, seam = (layout, "choose_blocks") if first else (ratings, "_changes")
    original = getattr(module, seam)

    def overtaken(*arguments):
        monkeypatch.undo()
        found = original(*arguments)
        theirs = _ingest_as_they_do(store, tmp_path)
        assert (theirs.written, theirs.superseded) == (2, 0)
        return found

    monkeypatch.setattr(module, seam, overtaken)
    source = _csv(tmp_path, "ours.csv", *OURS)
    with pytest.raises(ConflictError, match=r"table ratings.*run this job again"):
        _ingest(store, source)
    after = 1 if first else 2
    state = {(1, 10): (5.0, 200, after), (2, 10): (4.0, 100, after)}
    assert _table(store) == state
    again = _ingest(store, source)
    assert (again.read, again.written, again.superseded, again.quarantined) == (3, 1, 2, 0)
    assert ratings.read(store).count() == 3
    assert _table(store) == {**state, (1, 11): (2.0, 100, after + 1)}


@pytest.mark.parametrize("first", FIRST_OR_LATER)
def test_of_two_ingests_side_by_side_one_fails(store, tmp_path, monkeypatch, first):
    """The other commits while ours writes, to other blocks of the table where there is one."""
    closed, reached = tmp_path / "closed", tmp_path / "reached"

    def wait(batches):
        for batch in batches:
            while closed.exists():
                reached.touch()
                time.sleep(0.05)
            yield batch

    def at_the_gate(frame):
        return frame.coalesce(1).mapInArrow(wait, frame.schema)

    def is_ours():
        return threading.current_thread() is not threading.main_thread()

    def blocks(n_ratings):
        if is_ours():
            closed.touch()
        return 64

    numbered, few = ratings._numbered, ratings._few

    def few_and_closed(rows, *columns):
        found = few(rows, *columns)
        if is_ours() and "ingest_id" in rows.columns:
            rows.unpersist()  # the merge makes them anew
            closed.touch()
        return found

    def numbered_at_the_gate(rows, version):
        rows = numbered(rows, version)
        return at_the_gate(rows) if is_ours() and not first else rows

    monkeypatch.setattr(layout, "choose_blocks", blocks)
    monkeypatch.setattr(ratings, "_numbered", numbered_at_the_gate)
    monkeypatch.setattr(ratings, "_few", few_and_closed)
    if not first:
        _ingest(store, _csv(tmp_path, "base.csv", "3,10,3,150"))
    ours = formats.read_ratings(store.spark, _csv(tmp_path, "ours.csv", "1,10,1,100"), "csv")
    if first:
        ours = replace(ours, frame=at_the_gate(ours.frame))
    theirs = _csv(tmp_path, "theirs.csv", "2,10,4,100")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ingest_ratings, store, ours)
        try:
            while not reached.exists():
                assert not running.done(), running.result()
                time.sleep(0.05)
            _ingest(SparkStore(store.spark.newSession(), root=store.root), theirs)
        finally:
            closed.unlink(missing_ok=True)
        with pytest.raises(ConflictError, match=r"table ratings.*run this job again"):
            running.result()
    base = {} if first else {(3, 10): (3.0, 150, 1)}
    after = 1 if first else 2
    assert _table(store) == {**base, (2, 10): (4.0, 100, after)}


def test_a_table_of_an_earlier_version_may_have_no_row(spark, store, tmp_path):
    _ingest(store, _csv(tmp_path, "texts.csv", "ada,B1,3,4"))
    other = SparkStore(spark, root=str(tmp_path / "other"))
    fields = to_arrow_schema(ratings.read(store).schema)  # without metadata
    other.create("ratings", TableSpec(fields, partition_by=("user_block",)))
    users = spark.createDataFrame([("ada",)], "user_id string")
    with pytest.raises(InputError, match="table ratings has the layout of an earlier version"):
        ratings.covering(other, users)
    name = other.name("ratings")
    spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('{layout.USER_BLOCKS}' = '2')")
    assert _ingest(other, _csv(tmp_path, "texts.csv", "ada,B1,3,4")).written == 1
    assert _table(other) == {("ada", "B1"): (3.0, 4, 3)}
    assert ratings.covering(other, users).count() == 1


def _pages(spark, file, column):
    """Of a column in the file's first row group: number of pages, and has it a dictionary?"""
    jvm = spark._jvm
    path = jvm.org.apache.hadoop.fs.Path(str(file))
    source = jvm.org.apache.parquet.hadoop.util.HadoopInputFile.fromPath(
        path, jvm.org.apache.hadoop.conf.Configuration()
    )
    reader = jvm.org.apache.parquet.hadoop.ParquetFileReader.open(source)
    try:
        chunks = reader.getFooter().getBlocks().get(0).getColumns()
        chunk = next(c for c in chunks if c.getPath().toDotString() == column)
        return reader.readOffsetIndex(chunk).getPageCount(), chunk.hasDictionaryPage()
    finally:
        reader.close()


def test_one_users_ratings_are_in_small_pages_that_need_no_dictionary_of_times(
    spark, store, tmp_path
):
    pa.parquet.write_table(
        pa.table(
            {
                "user_id": [n // 10 for n in range(11_000)],
                "item_id": [n % 10 for n in range(11_000)],
                "rating": [1.0] * 11_000,
                "rated_at": list(range(11_000)),
            }
        ),
        tmp_path / "input.parquet",
    )
    _ingest(store, str(tmp_path / "input.parquet"), "parquet")
    (file,) = Path(store.location("ratings")).rglob("*.parquet")
    assert _pages(spark, file, "user_key") == (3, True)
    assert _pages(spark, file, "rated_at") == (3, False)
    # The session has its own settings again.
    assert spark.conf.get("parquet.page.row.count.limit", None) is None
