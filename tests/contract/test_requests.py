"""Deletion requests go in, on both engines.

Proves: each format and each fault; duplicates and conflicts by `request_id`, in an input and
against what was accepted; what is refused for good writes nothing.
"""

from __future__ import annotations

import datetime as dt
import json

import deltalake
import pyarrow as pa
import pyarrow.parquet
import pytest

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion.rules import CONFLICT, GIVEN_TABLE

HEADER = "request_id,scope,user_id,item_id,from_ts,to_ts,requested_at"

LINES = {
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
    "b11,user,7,,2023-01-01,,": "from_ts does not belong to this scope",
    "b12,user,7,,,,9e12": "requested_at is outside the years 1 to 9999 (are these milliseconds?)",
}


def counts(report) -> tuple[int, ...]:
    return tuple(report[name] for name in ("read", "accepted", "duplicates", "quarantined"))


@pytest.mark.on_both
def test_requests_are_validated_and_known_by_their_id(shop, tmp_path):
    path = tmp_path / "requests.csv"
    path.write_text("\n".join([HEADER, *LINES]) + "\n")
    report = shop.ingest_tombstones(path)
    assert counts(report) == (20, 5, 1, 14)
    assert report.tombstones_version == shop.store.version("tombstones")
    found = {row["request_id"]: row for row in shop.table("tombstones").to_pylist()}
    assert set(found) == {"r1", "r2", "r3", "r4", "r5"}
    assert [found["r2"][name] for name in ("scope", "user_id", "item_id")] == ["item", None, "9"]
    new_year = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    assert found["r1"]["requested_at"] == found["r2"]["requested_at"] == new_year
    assert found["r3"]["requested_at"] == found["r3"]["accepted_at"]  # none given: made now
    held = {row["raw"]: row["reason"] for row in shop.table("quarantine").to_pylist()}
    assert held == {raw: why for raw, why in LINES.items() if why not in (None, "duplicate")}

    again = shop.ingest_tombstones(path)
    assert counts(again) == (20, 0, 6, 14)
    assert again.tombstones_version == report.tombstones_version
    assert shop.table("quarantine").num_rows == 14


@pytest.mark.on_both
def test_formats_of_requests(shop, tmp_path):
    lines = tmp_path / "requests.jsonl"
    lines.write_text(
        json.dumps({"request_id": "j1", "scope": "user", "user_id": 7, "requested_at": 1704067200})
        + '\n\nnot json\n{"scope": "user", "user_id": "7"}\n[1]\n'
    )
    assert counts(shop.ingest_tombstones(lines)) == (4, 1, 0, 3)
    assert shop.table("tombstones")["user_id"].to_pylist() == ["7"]
    table = pa.table(
        {
            "request_id": ["p1", "j1"],
            "scope": ["rating", "user"],
            "user_id": pa.array([7, 7], pa.int32()),
            "item_id": [9, None],
            "requested_at": pa.array([5, 1704067200], pa.timestamp("s", "UTC")),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "requests.parquet")
    deltalake.write_deltalake(tmp_path / "requests", table)
    assert counts(shop.ingest_tombstones(tmp_path / "requests.parquet")) == (2, 1, 1, 0)
    for known in (tmp_path / "requests", table, table.to_pandas()):
        assert counts(shop.ingest_tombstones(known)) == (2, 0, 2, 0)
    other = table.set_column(2, "user_id", pa.array([8, 7]))
    assert counts(shop.ingest_tombstones(other)) == (2, 0, 1, 1)
    held = [row for row in shop.table("quarantine").to_pylist() if row["source"] == GIVEN_TABLE]
    assert [(row["reason"], row["user_id"], row["item_id"]) for row in held] == [
        (CONFLICT, "8", "9")
    ]
    assert '"request_id":"p1","scope":"rating","user_id":8,"item_id":9,' in held[0]["raw"]


@pytest.mark.on_both(slow=True)
def test_useless_requests_write_nothing(shop, tmp_path):
    cases = {
        "none.csv": (HEADER + "\nb,user,,,,,\n", "none of its 1 requests is usable"),
        "other.csv": ("a,b\n1,2\n", "has no column request_id"),
        "no-scope.csv": (
            "request_id,user_id\nr,1\n",
            "has no column scope (found: request_id, user",
        ),
        "empty.jsonl": ("", "is empty"),
        "not.jsonl": ("request_id,scope,user_id\nr,user,1\n", "is not a JSON object"),
        "header.csv": (HEADER + "\n", "has no requests"),
        "not.parquet": ("request_id\n", "cannot be read as parquet; check --format"),
        "what.txt": ("x", "--format"),
        "absent.csv": (None, "no such file or folder; check the path"),
    }
    for name, (text, message) in cases.items():
        path = tmp_path / name
        if text is not None:
            path.write_text(text)
        with pytest.raises((InputError, SettingsError)) as caught:
            shop.ingest_tombstones(path)
        assert str(caught.value).startswith(f"--input {path}: "), name
        assert message in str(caught.value), name
    assert not shop.store.exists("tombstones")
    assert not shop.store.exists("quarantine")


@pytest.mark.on_both
def test_ids_that_the_ratings_cannot_have_are_refused(shop):
    shop.ingest_ratings(pa.table({"user_id": [1], "item_id": ["a"], "rating": [1.0]}))
    with pytest.raises(InputError, match="user_id is not an integer as in the table"):
        shop.ingest_tombstones(
            pa.table({"request_id": ["r"], "scope": ["user"], "user_id": ["01"]})
        )
    items = pa.table({"request_id": ["r"], "scope": ["item"], "item_id": ["01"]})
    assert shop.ingest_tombstones(items).accepted == 1
