"""Rating files and the ratings table.

Proves: every format gives the same rows and finds the same faults; the newest rating of a pair
wins, in a file and against the table; counts add up; nothing is half-written; no id or rating
reaches Delta's log; deletion and lookup by id touch just their rows.
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
from chispa import assert_df_equality
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import ConflictError, InputError, SettingsError
from unlearn_spark.ingestion import formats
from unlearn_spark.ingestion.ratings import ingest_ratings
from unlearn_spark.tables import quarantine, ratings
from unlearn_spark.tables.store import Store, TableSpec

THREE = [("1", "31", 2.5, 1260759144), ("1", "1029", 3.0, 1260759179), ("2", "31", 4.0, 835355493)]


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


def _problems(raw):
    return [r.problem for r in raw.frame.orderBy("position").select("problem").collect()]


def _three_in_every_format(spark, folder):
    rows = [tuple(map(str, row)) for row in THREE]
    yield (
        _file(
            folder,
            "ratings.csv",
            "userId,movieId,rating,timestamp\r\n" + "".join(",".join(r) + "\r\n" for r in rows),
        ),
        "movielens",
        {},
    )
    yield _file(folder, "u.data", "".join("\t".join(r) + "\n" for r in rows)), "movielens", {}
    yield _file(folder, "ratings.dat", "".join("::".join(r) + "\n" for r in rows)), "movielens", {}
    yield (
        _file(
            folder,
            "named.csv",
            'when,"stars",uid,iid\n'
            "2009-12-14T02:52:24Z,2.5,1,31\n\n"
            '1260759179.0, 3 ,"1","1029"\n'
            "1996-06-21 13:11:33+02:00,4e0,2,31\n",
        ),
        "csv",
        {"user_id": "uid", "item_id": "iid", "rating": "stars", "rated_at": "when"},
    )
    frame = spark.createDataFrame(
        [(int(u), i, r, t) for u, i, r, t in THREE], "user_id int, item_id string, r double, t long"
    ).coalesce(1)
    named = {"rating": "r", "rated_at": "t"}
    frame.write.parquet(str(folder / "p.parquet"))
    yield str(folder / "p.parquet"), "parquet", named
    frame.withColumn("t", F.timestamp_seconds("t")).write.format("delta").save(str(folder / "d"))
    yield str(folder / "d"), "delta", named


def test_every_format_gives_the_same_rows(spark, tmp_path):
    expected = spark.createDataFrame(THREE, "user_id string, item_id string, rating double, s long")
    for path, format, columns in _three_in_every_format(spark, tmp_path):
        raw = formats.read_ratings(spark, path, format, columns)
        found = raw.frame.where("problem is null").select(
            F.col("user_id").cast("string").alias("user_id"),
            "item_id",
            "rating",
            F.unix_seconds("rated_at").alias("s"),
        )
        assert_df_equality(found, expected, ignore_row_order=True, ignore_nullable=True)


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
    assert [(r.raw, r.problem) for r in rows if r.problem] == [("900:8,5", formats.WRONG_WIDTH)]
    assert {r.rated_at for r in rows if r.user_id == "7"} == {dt.datetime(2004, 1, 1)}


def test_every_fault_of_a_row_has_its_reason(spark, tmp_path):
    faults = {
        "1,2,3,4": None,
        "1,2,3,": None,
        '"a,""b""",2,3,2020-01-01': None,
        "1,2,3": formats.WRONG_WIDTH,
        "1,2,3,4,5": formats.WRONG_WIDTH,
        '"1,2,3,4': formats.WRONG_WIDTH,
        " ,2,3,4": "user_id is missing",
        "1,,3,4": "item_id is missing",
        "1,2,,4": "rating is missing",
        "1,2,good,4": "rating is not a number",
        "1,2,3d,4": "rating is not a number",
        "1,2,NaN,4": "rating is not finite",
        "1,2,-Infinity,4": "rating is not finite",
        "1,2,1e39,4": "rating is not finite",
        "1,2,3,yesterday": formats.BAD_TIME,
        "1,2,3,12:30": formats.BAD_TIME,
        "1,2,3,2020-02-30": formats.BAD_TIME,
        "1,2,3,1577836800000": formats.TIME_RANGE,
    }
    raw = formats.read_ratings(spark, _csv(tmp_path, "f.csv", *faults), "csv")
    assert _problems(raw) == list(faults.values())
    frame = spark.createDataFrame(
        [
            ("", 1, 1.0, 1.0),
            ("a", None, 1.0, 1.0),
            ("a", 1, float("nan"), 1.0),
            ("a", 1, None, 1.0),
            ("a", 1, 1.0, float("nan")),
            ("a", 1, 1.0, None),
        ],
        "user_id string, item_id long, rating double, rated_at double",
    ).coalesce(1)
    frame.write.parquet(str(tmp_path / "f.parquet"))
    assert _problems(formats.read_ratings(spark, str(tmp_path / "f.parquet"), "parquet")) == [
        "user_id is missing",
        "item_id is missing",
        "rating is not finite",
        "rating is missing",
        formats.BAD_TIME,
        None,
    ]


def test_a_file_that_is_of_no_use_writes_nothing(spark, store, tmp_path):
    pa.parquet.write_table(
        pa.table({"user_id": [1.5], "item_id": [1], "rating": [1.0]}), tmp_path / "float.parquet"
    )
    two = tmp_path / "two"
    two.mkdir()
    _csv(two, "a.csv", "1,2,3,4", "1,3,3,4")
    _file(two, "b.csv", "item_id,user_id,rating,rated_at\n1,2,3,4\n")
    cases = [
        (str(tmp_path / "absent.csv"), "csv", "no such file"),
        (_file(tmp_path, "empty.csv", ""), "csv", "is empty"),
        (_csv(tmp_path, "header.csv"), "csv", "has no ratings"),
        (_file(tmp_path, "other.csv", "a,b,c\n1,2,3\n"), "csv", "no column user_id"),
        (_file(tmp_path, "tags.csv", "userId,movieId,tag,timestamp\n"), "movielens", "MovieLens"),
        (_file(tmp_path, "n.txt", "1,2,2005-01-01\n"), "netflix", "Netflix"),
        (_file(tmp_path, "x.parquet", "no parquet at all"), "parquet", "cannot be read as parquet"),
        (str(tmp_path / "float.parquet"), "parquet", "user_id is a fraction"),
        (str(two), "delta", "cannot be read as delta"),
        (str(two), "csv", "different headers"),
        (_csv(tmp_path, "bad.csv", "1,2,x,4", "1,2,y,4", ",2,1,4"), "csv", "rating is not a num"),
    ]
    for path, format, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            _ingest(store, path, format)
        assert path in str(caught.value)
    assert not store.exists("ratings")
    assert not store.exists("quarantine")


def test_columns_option_is_checked(spark, tmp_path):
    assert formats.parse_columns("user_id=u, rating=r") == {"user_id": "u", "rating": "r"}
    for text in ("user=u", "user_id", "user_id=a,user_id=b"):
        with pytest.raises(SettingsError, match="--columns"):
            formats.parse_columns(text)
    path = _file(tmp_path, "no_time.csv", "user_id,item_id,rating\n1,2,3\n")
    assert formats.read_ratings(spark, path, "csv").frame.first().rated_at is None
    with pytest.raises(InputError, match="no column ts"):
        formats.read_ratings(spark, path, "csv", {"rated_at": "ts"})


def test_newest_rating_of_a_pair_wins_and_the_same_file_changes_nothing(store, tmp_path):
    first = _csv(
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
    report = _ingest(store, first)
    assert (report.read, report.written, report.superseded, report.quarantined) == (7, 3, 3, 1)
    state = {(1, 10): (2.0, 300, 1), (2, 10): (5.0, None, 1), (3, 10): (1.0, 50, 1)}
    assert _table(store) == state
    held = store.read(quarantine.TABLE).collect()
    assert [(r.source, r.raw, r.reason, r.user_id) for r in held] == [
        (first, "3,10,oops,60", "rating is not a number", "3")
    ]

    again = _ingest(store, first)
    assert (again.read, again.written, again.superseded, again.quarantined) == (7, 0, 6, 1)
    assert again.version == report.version == store.version("ratings")
    assert store.read(quarantine.TABLE).count() == 1

    second = _csv(
        tmp_path,
        "second.csv",
        "1,10,5,299",  # older than the table's
        "2,10,1,5",  # any time beats none
        "3,10,4,50",  # the same time: the later ingest
        "4,99,3,7",  # new
        "007,10,3,8",
        "x,10,3,8",
    )
    report = _ingest(store, second)
    assert (report.read, report.written, report.superseded, report.quarantined) == (6, 3, 1, 2)
    state |= {(2, 10): (1.0, 5, 2), (3, 10): (4.0, 50, 2), (4, 99): (3.0, 7, 2)}
    assert _table(store) == state
    assert ratings.newest_ingest(store) == 2
    assert ratings.newest_ingest(store, again.version) == 1
    assert {r.user_id for r in ratings.since(store, 1).collect()} == {2, 3, 4}
    with pytest.raises(InputError, match="id is not an integer as in the table"):
        _ingest(store, _csv(tmp_path, "text.csv", "a,10,3,8", "b,10,3,8"))
    assert _table(store) == state


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
    monkeypatch.setattr(ratings, "_choose_blocks", lambda n_ratings: 2)
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


def _ingest_as_they_do(store, tmp_path):
    other = Store(store.spark.newSession(), root=store.root)
    return _ingest(other, _csv(tmp_path, "theirs.csv", *THEIRS))


@pytest.mark.parametrize("first", [True, False], ids=["first ingest", "later ingest"])
def test_an_ingest_that_another_overtakes_writes_nothing(store, tmp_path, monkeypatch, first):
    """The other commits all it has between what ours reads of the table and what ours writes."""
    if not first:
        _ingest(store, _csv(tmp_path, "base.csv", "1,10,3,150"))
    seam = "_choose_blocks" if first else "_changes"
    original = getattr(ratings, seam)

    def overtaken(*arguments):
        monkeypatch.undo()
        found = original(*arguments)
        theirs = _ingest_as_they_do(store, tmp_path)
        assert (theirs.written, theirs.superseded) == (2, 0)
        return found

    monkeypatch.setattr(ratings, seam, overtaken)
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


@pytest.mark.parametrize("first", [True, False], ids=["first ingest", "later ingest"])
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

    monkeypatch.setattr(ratings, "_choose_blocks", blocks)
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
            _ingest(Store(store.spark.newSession(), root=store.root), theirs)
        finally:
            closed.unlink(missing_ok=True)
        with pytest.raises(ConflictError, match=r"table ratings.*run this job again"):
            running.result()
    base = {} if first else {(3, 10): (3.0, 150, 1)}
    after = 1 if first else 2
    assert _table(store) == {**base, (2, 10): (4.0, 100, after)}


def test_what_a_dead_first_ingest_left_is_no_hindrance(spark, store, tmp_path):
    """Files and a log, but no commit; and, by an earlier version, a table without a row."""
    left = Path(store.location("ratings"))
    (left / "_delta_log").mkdir(parents=True)
    (left / "_delta_log" / ".00000000000000000000.json.0.tmp").touch()
    (left / "user_block=0").mkdir()
    pa.parquet.write_table(pa.table({"user_id": [1.5]}), left / "user_block=0" / "part-0.parquet")
    assert not store.exists("ratings")
    assert _ingest(store, _csv(tmp_path, "texts.csv", "ada,B1,3,4")).written == 1
    assert _table(store) == {("ada", "B1"): (3.0, 4, 1)}

    other = Store(spark, root=str(tmp_path / "other"))
    fields = [T.StructField(f.name, f.dataType) for f in ratings.read(store).schema.fields]
    other.create("ratings", TableSpec(T.StructType(fields), partition_by=("user_block",)))
    users = spark.createDataFrame([("ada",)], "user_id string")
    with pytest.raises(InputError, match="table ratings has the layout of an earlier version"):
        ratings.covering(other, users)
    name = other.name("ratings")
    spark.sql(f"ALTER TABLE {name} SET TBLPROPERTIES ('{ratings.USER_BLOCKS}' = '2')")
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


def test_number_of_user_blocks():
    sizes = [1, 10**6, 10**6 + 1, 3 * 10**6, 10**7, 10**9]
    assert [ratings._choose_blocks(n) for n in sizes] == [1, 1, 2, 4, 16, 256]
