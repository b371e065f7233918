"""What an ingestion does to the ratings table in one process.

Proves: it agrees with a plain reading of the rules, for any ratings, ids and number of blocks; the
files are sorted and laid out as a night reads them; an ingestion that another overtakes writes
nothing.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn_spark.embedded import upsert as upserting
from unlearn_spark.embedded.upsert import upsert
from unlearn_spark.errors import ConflictError
from unlearn_spark.tables import ratings
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.store import TIMESTAMP

IDS = {"integers": st.integers(-3, 6), "texts": st.text(max_size=2)}
KINDS = {"integers": pa.int64(), "texts": pa.string()}


def rows_of(inputs, users, items):
    """(user, item, rating, seconds or None) as the table that `upsert` takes."""
    columns = list(zip(*inputs, strict=True)) or [(), (), (), ()]
    times = pa.array(columns[3], pa.int64()).cast(pa.timestamp("s")).cast(pa.timestamp("us"))
    return pa.table(
        {
            "user_id": pa.array(columns[0], KINDS[users]),
            "item_id": pa.array(columns[1], KINDS[items]),
            "rating": pa.array(columns[2], pa.float32()),
            "rated_at": times.cast(TIMESTAMP),
        }
    )


def upserted(table, inputs, ingest):
    """The rules, one rating at a time; how many rows the input changed."""
    before = dict(table)
    for user, item, rating, time in inputs:
        known = table.get((user, item))
        age = -1 if time is None else time
        if known is None or age >= (-1 if known[1] is None else known[1]):
            table[user, item] = (rating, time, ingest)
    for pair, row in table.items():
        if pair in before and before[pair][:2] == row[:2]:
            table[pair] = before[pair]
    return sum(before.get(pair) != row for pair, row in table.items())


def in_table(store):
    epoch = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    return {
        (row["user_id"], row["item_id"]): (
            row["rating"],
            None if row["rated_at"] is None else int((row["rated_at"] - epoch).total_seconds()),
            row["ingest_id"],
        )
        for row in store.read(ratings.TABLE).to_pylist()
    }


@pytest.mark.parametrize("users", KINDS)
@pytest.mark.parametrize("items", KINDS)
@given(data=st.data(), blocks=st.sampled_from([1, 2, 8]))
@settings(max_examples=5, deadline=None)
def test_the_newest_rating_of_a_pair_wins(users, items, data, blocks, tmp_path_factory):
    one = st.tuples(
        IDS[users], IDS[items], st.sampled_from([1.0, 2.0]), st.none() | st.integers(0, 3)
    )
    store = DeltaRsStore(str(tmp_path_factory.mktemp("tables")))
    expected, version = {}, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratings, "choose_blocks", lambda n_ratings: blocks)
        patch.setattr(upserting, "_MERGED_ROWS", 3)  # so that blocks are merged one by one
        for inputs in data.draw(st.lists(st.lists(one, max_size=12), min_size=1, max_size=3)):
            ingest = ratings.next_ingest(version)
            changed = upserted(expected, inputs, ingest)
            before = version
            written, version = upsert(store, rows_of(inputs, users, items))
            assert written == changed
            assert changed or version == before
            if version is not None:
                assert in_table(store) == expected


def digest(id):
    data = id.encode() if isinstance(id, str) else id.to_bytes(8, "little", signed=True)
    value = xxhash.xxh64_intdigest(data, 42)
    return value - 2**64 if value >= 2**63 else value


def test_files_are_laid_out_for_a_night(tmp_path, monkeypatch):
    monkeypatch.setattr(ratings, "choose_blocks", lambda n_ratings: 4)
    store = DeltaRsStore(str(tmp_path))
    inputs = [(f"u{n % 701}", n % 97, 1.0, n) for n in range(30_000)]
    upsert(store, rows_of(inputs, "texts", "integers"))
    upsert(store, rows_of([("u3", 3, 5.0, 10**6)], "texts", "integers"))
    files = sorted(Path(store.location(ratings.TABLE)).rglob("*.parquet"))
    assert len(files) == 5, "four blocks, one of them written again"
    for file in files:
        found = pq.ParquetFile(file)
        rows = found.read().to_pylist()
        order = [(row["user_key"], row["user_id"], row["item_id"]) for row in rows]
        assert order == sorted(order)
        block = int(file.parent.name.removeprefix("user_block="))
        for row in rows:
            hashed = digest(row["user_id"])
            assert hashed % 4 == block
            assert row["user_key"] == block * ratings.USER_KEYS + (hashed >> 32) % ratings.USER_KEYS
        columns = {
            found.schema.column(n).name: found.metadata.row_group(0).column(n)
            for n in range(len(found.schema))
        }
        assert not columns["rated_at"].has_dictionary_page
        assert columns["user_key"].has_dictionary_page
        assert columns["user_key"].has_offset_index
    log = "".join(path.read_text() for path in tmp_path.glob("ratings/_delta_log/*.json"))
    assert '"u3"' not in log
    assert "1970-01-12" not in log, "no time of a rating in the statistics"


@pytest.mark.parametrize("first", [True, False], ids=["first ingest", "later ingest"])
def test_an_ingest_that_another_overtakes_writes_nothing(tmp_path, monkeypatch, first):
    """The other commits all it has between what ours reads of the table and what ours writes."""
    store = DeltaRsStore(str(tmp_path))
    base = {} if first else {(1, 10): (3.0, 150, 1)}
    if not first:
        upsert(store, rows_of([(1, 10, 3.0, 150)], "integers", "integers"))
    theirs = rows_of([(1, 10, 5.0, 200), (2, 10, 4.0, 100)], "integers", "integers")
    ours = [(1, 10, 1.0, 100), (1, 11, 2.0, 100), (1, 11, 2.0, 100)]
    original = upserting._reader

    def overtaken(*arguments):
        monkeypatch.undo()
        assert upsert(DeltaRsStore(str(tmp_path)), theirs)[0] == 2
        return original(*arguments)

    monkeypatch.setattr(upserting, "_reader", overtaken)
    with pytest.raises(ConflictError, match=r"table ratings.*run this job again"):
        upsert(store, rows_of(ours, "integers", "integers"))
    after = 1 if first else 2
    state = base | {(1, 10): (5.0, 200, after), (2, 10): (4.0, 100, after)}
    assert in_table(store) == state
    assert upsert(store, rows_of(ours, "integers", "integers"))[0] == 1
    assert in_table(store) == state | {(1, 11): (2.0, 100, after + 1)}
