"""Deletion requests: how they get into the table, and which ratings they cover.

Proves: each format and each fault; duplicates and conflicts by `request_id`; every scope at its
edges; reinstatement; and that a plain Python reading of the rules agrees.
"""

from __future__ import annotations

import datetime as dt
import json
import random

import pytest

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion.requests import CONFLICT, ingest_requests
from unlearn_spark.tables import quarantine, requests, tombstones

HEADER = "request_id,scope,user_id,item_id,from_ts,to_ts,requested_at"
SCHEMA = (
    "request_id string, scope string, user_id string, item_id string, "
    "from_ts timestamp, to_ts timestamp, requested_at timestamp"
)
RATINGS = "user_id {0}, item_id {0}, rating float, rated_at timestamp"


def at(second):
    return None if second is None else dt.datetime.fromtimestamp(second, dt.UTC)


def tombs(spark, *rows):
    """Rows (request_id, scope, user_id, item_id, from, to, requested_at), times in seconds."""
    return spark.createDataFrame([(*r[:4], *map(at, r[4:])) for r in rows], SCHEMA)


def test_requests_are_validated_and_known_by_their_id(store, tmp_path):
    lines = {
        "r1,user,7,,,,2024-01-01T00:00:00Z": None,
        "r2,Item,,9,,,1704067200": None,
        "r3,rating,7,9,,,": None,
        "r4,window,7,,2023-01-01,2023-02-01,2024-01-01": None,
        "r5,reinstate,7,,,,2024-06-01": None,
        "r1,user,7,,,,2024-01-01": "duplicate",
        "r1,user,8,,,,2024-01-01": CONFLICT,
        ",user,7,,,,": "request_id is missing",
        "b1,everything,7,,,,": "scope is none of user, item, rating, window, reinstate",
        "b2,,7,,,,": "scope is missing",
        "b3,user,,,,,": "user_id is missing for this scope",
        "b4,rating,7,,,,": "item_id is missing for this scope",
        "b5,window,7,,2023-01-01,,": "to_ts is missing for this scope",
        "b6,window,7,,2023-02-01,2023-02-01,": "from_ts is not before to_ts",
        "b7,user,7,,,,soon": "requested_at is neither ISO 8601 nor seconds since 1970",
        "b8,reinstate,,,,,": "reinstate needs user_id or item_id",
        "b9,user,7,9,,,": "item_id does not belong to this scope",
        "b10,user,7": "wrong number of columns",
    }
    path = tmp_path / "requests.csv"
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    report = ingest_requests(store, str(path))
    assert (report.read, report.accepted, report.duplicates, report.quarantined) == (18, 5, 1, 12)
    assert report.version == tombstones.version(store)
    found = {r.request_id: r for r in tombstones.read(store).collect()}
    assert set(found) == {"r1", "r2", "r3", "r4", "r5"}
    assert (found["r2"].scope, found["r2"].user_id, found["r2"].item_id) == ("item", None, "9")
    assert found["r1"].requested_at == found["r2"].requested_at == dt.datetime(2024, 1, 1)
    assert found["r3"].requested_at == found["r3"].accepted_at  # none given: made now
    held = {r.raw: r.reason for r in store.read(quarantine.TABLE).collect()}
    assert held == {raw: why for raw, why in lines.items() if why not in (None, "duplicate")}

    again = ingest_requests(store, str(path))
    assert (again.accepted, again.duplicates, again.quarantined) == (0, 6, 12)
    assert again.version == report.version


def test_formats_of_requests(spark, store, tmp_path):
    lines = tmp_path / "requests.jsonl"
    lines.write_text(
        json.dumps({"request_id": "j1", "scope": "user", "user_id": 7, "requested_at": 1704067200})
        + '\n\nnot json\n{"scope": "user", "user_id": "7"}\n'
    )
    report = ingest_requests(store, str(lines))
    assert (report.read, report.accepted, report.quarantined) == (3, 1, 2)
    assert tombstones.read(store).first().user_id == "7"
    frame = spark.createDataFrame(
        [("p1", "rating", 7, 9, at(5)), ("j1", "user", 7, None, at(1704067200))],
        "request_id string, scope string, user_id int, item_id bigint, requested_at timestamp",
    )
    frame.write.parquet(str(tmp_path / "requests.parquet"))
    frame.write.format("delta").save(str(tmp_path / "requests"))
    report = ingest_requests(store, str(tmp_path / "requests.parquet"))
    assert (report.accepted, report.duplicates) == (1, 1)
    report = ingest_requests(store, str(tmp_path / "requests"))
    assert (report.accepted, report.duplicates) == (0, 2)


def test_useless_requests_write_nothing(store, tmp_path):
    cases = {
        "none.csv": (HEADER + "\nb,user,,,,,\n", "none of its 1 requests is usable"),
        "other.csv": ("a,b\n1,2\n", "has no column request_id"),
        "empty.jsonl": ("", "is empty"),
        "header.csv": (HEADER + "\n", "has no requests"),
        "what.txt": ("x", "--format"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises((InputError, SettingsError), match=message):
            ingest_requests(store, str(tmp_path / name))
    assert not tombstones.exists(store)
    assert tombstones.version(store) is None
    assert not store.exists("quarantine")


def _covers(rows, tomb, rating, guard):
    """The rules once more, one rating and one request at a time."""
    _, scope, user, item, start, end, requested = tomb
    u, i, when = rating
    lifted = any(
        r[1] == "reinstate"
        and r[6] > requested
        and ((scope == "user" and r[2] == user) or (scope == "item" and r[3] == item))
        for r in rows
    )
    early = when is None or when <= requested
    if scope == "user":
        return u == user and (not lifted or (not guard and early))
    if scope == "item":
        return i == item and (not lifted or (not guard and early))
    if scope == "rating":
        return (u, i) == (user, item) and early
    if scope == "window":
        return u == user and when is not None and start <= when < end and early
    return False


@pytest.mark.parametrize("kind", ["bigint", "string"])
def test_coverage_agrees_with_the_rules_one_by_one(spark, kind):
    rng = random.Random(11)
    ids = [str(n) for n in range(1, 7)] + ["007", "x"]
    rows = []
    for n in range(36):
        scope = rng.choice(requests.SCOPES)
        user = rng.choice(ids) if scope != "item" else None
        item = rng.choice(ids) if scope in ("item", "rating") else None
        if scope == "reinstate" and rng.random() < 0.5:
            user, item = None, rng.choice(ids)
        start = rng.randrange(8)
        window = (start, start + 1 + rng.randrange(4)) if scope == "window" else (None, None)
        rows.append((f"r{n:02}", scope, user, item, *window, rng.randrange(10)))
    present = [n for n in ids if kind == "string" or (n.isdigit() and n != "007")]
    ratings = [
        (u, i, rng.choice([None, *range(10)]))
        for u in present
        for i in present
        if rng.random() < 0.8
    ]
    cast = str if kind == "string" else int
    frame = spark.createDataFrame(
        [(cast(u), cast(i), 1.0, at(s)) for u, i, s in ratings], RATINGS.format(kind)
    )
    table = tombs(spark, *rows)
    for guard in (True, False):
        expected = {(r[0], r[1], t[0]) for r in ratings for t in rows if _covers(rows, t, r, guard)}
        found = requests.covered(frame, table, guard).collect()
        assert {(str(r.user_id), str(r.item_id), r.request_id) for r in found} == expected
        assert len(found) == len(expected) > 10
        kept = requests.retained(frame, table, guard)
        assert kept.columns == frame.columns
        covered_pairs = {(u, i) for u, i, _ in expected}
        assert {(str(r.user_id), str(r.item_id)) for r in kept.collect()} == {
            r[:2] for r in ratings
        } - covered_pairs


def test_a_part_of_the_requests_still_knows_what_was_lifted(spark):
    table = tombs(
        spark,
        ("a", "user", "1", None, None, None, 10),
        ("back", "reinstate", "1", None, None, None, 20),
        ("b", "user", "2", None, None, None, 10),
        ("tie", "reinstate", "2", None, None, None, 10),
    )
    whole = requests.effective(table)
    assert {r.request_id: r.reinstated_at is not None for r in whole.collect()} == {
        "a": True,
        "b": False,
    }
    rows = [(u, 1, 1.0, at(s)) for u in (1, 2) for s in (10, 30)]
    frame = spark.createDataFrame(rows, RATINGS.format("bigint"))
    found = requests.covered(frame, whole.where("request_id = 'a'"), guard=False).collect()
    assert [(r.user_id, r.rated_at) for r in found] == [(1, dt.datetime(1970, 1, 1, 0, 0, 10))]
