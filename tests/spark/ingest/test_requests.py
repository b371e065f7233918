"""Which ratings a request covers, on Spark.

Proves: every scope at its edges; reinstatement; a plain Python reading of the rules agrees.
"""

from __future__ import annotations

import datetime as dt
import random

import pyarrow as pa
import pytest

from unlearn_spark.spark import requests
from unlearn_spark.tables import tombstones
from unlearn_spark.tables.requests import SCOPES, effective, rules

SCHEMA = (
    "request_id string, scope string, user_id string, item_id string, "
    "from_ts timestamp, to_ts timestamp, requested_at timestamp"
)
RATINGS = "user_id {0}, item_id {0}, rating float, rated_at timestamp"


def at(second):
    return None if second is None else dt.datetime.fromtimestamp(second, dt.UTC)


def tombs(*rows):
    """Rows (request_id, scope, user_id, item_id, from, to, requested_at), times in seconds."""
    names = (*tombstones.TEXTS, *tombstones.TIMES)
    found = [dict(zip(names, (*r[:4], *map(at, r[4:])), strict=True)) for r in rows]
    return pa.Table.from_pylist(found, schema=tombstones.SPEC.schema)


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
        scope = rng.choice(SCOPES)
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
    table = tombs(*rows)
    for guard in (True, False):
        expected = {(r[0], r[1], t[0]) for r in ratings for t in rows if _covers(rows, t, r, guard)}
        found = requests.covered(frame, rules(effective(table), guard)).collect()
        assert {(str(r.user_id), str(r.item_id), r.request_id) for r in found} == expected
        assert len(found) == len(expected) > 10
        kept = requests.retained(frame, rules(effective(table), guard))
        assert kept.columns == frame.columns
        covered_pairs = {(u, i) for u, i, _ in expected}
        assert {(str(r.user_id), str(r.item_id)) for r in kept.collect()} == {
            r[:2] for r in ratings
        } - covered_pairs


def test_a_part_of_the_requests_still_knows_what_was_lifted(spark):
    table = tombs(
        ("a", "user", "1", None, None, None, 10),
        ("back", "reinstate", "1", None, None, None, 20),
        ("b", "user", "2", None, None, None, 10),
        ("tie", "reinstate", "2", None, None, None, 10),
    )
    whole = effective(table)
    lifted = [moment is not None for moment in whole["reinstated_at"].to_pylist()]
    assert dict(zip(whole["request_id"].to_pylist(), lifted, strict=True)) == {
        "a": True,
        "b": False,
    }
    rows = [(u, 1, 1.0, at(s)) for u in (1, 2) for s in (10, 30)]
    frame = spark.createDataFrame(rows, RATINGS.format("bigint"))
    found = requests.covered(frame, rules(whole.slice(0, 1), guard=False)).collect()
    assert [(r.user_id, r.rated_at) for r in found] == [(1, dt.datetime(1970, 1, 1, 0, 0, 10))]
