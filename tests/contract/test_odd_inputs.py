"""Inputs as other software writes them: what of each becomes ratings and requests.

Proves: one rule for white space, for bytes that are not UTF-8, for numbers as ids, for the case of
column names, for types and for paths, in all formats and on both engines.
"""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest

from contract.odd_inputs import (
    CSV,
    EMBEDDED_RATINGS,
    NEW_YEAR,
    RATINGS,
    REFUSED,
    REFUSED_REQUESTS,
    REQUESTS,
    Read,
    parquet,
    rated,
    text,
)
from unlearn_spark.errors import InputError, SettingsError


def parameters(cases):
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


def expected(pairs, reasons):
    return Read(sorted((str(user), str(item)) for user, item in pairs), sorted(reasons))


@pytest.mark.on_both
@pytest.mark.parametrize(("format", "write", "pairs", "reasons"), parameters(RATINGS))
def test_what_becomes_ratings(read, tmp_path, format, write, pairs, reasons):
    assert read(write(tmp_path), format) == expected(pairs, reasons)


@pytest.mark.parametrize(("format", "write", "pairs", "reasons"), parameters(EMBEDDED_RATINGS))
def test_what_becomes_ratings_in_one_process(read, tmp_path, format, write, pairs, reasons):
    assert read(write(tmp_path), format) == expected(pairs, reasons)


@pytest.mark.on_both
@pytest.mark.parametrize(("format", "write", "says"), parameters(REFUSED))
def test_what_is_refused(read, tmp_path, format, write, says):
    path = write(tmp_path)
    with pytest.raises(InputError) as caught:
        read(path, format)
    assert str(caught.value).startswith(f"--input {path}: ")
    assert says in str(caught.value)


@pytest.mark.on_both
def test_what_becomes_requests(shop, tmp_path):
    """All cases in one table: ids of requests are told apart by their first letter."""
    shop.ingest_ratings(pa.table(rated(1)))
    accepted, reasons = {}, {}
    for number, (name, write, good, bad) in enumerate(REQUESTS):
        path = write(tmp_path / str(number))
        report = shop.ingest_tombstones(path)
        assert (report.accepted, report.quarantined) == (len(good), len(bad)), name
        accepted |= good
        reasons[path] = sorted(bad)
    found = {row["request_id"]: row for row in shop.table("tombstones").to_pylist()}
    assert {id: row["user_id"] or row["item_id"] for id, row in found.items()} == accepted
    assert {row["scope"] for row in found.values()} == {"user", "item"}
    new_year = dt.datetime(2021, 1, 1, tzinfo=dt.UTC)
    assert found["q1"]["requested_at"] == new_year
    assert found["j14"]["requested_at"] == new_year + dt.timedelta(seconds=0.5)
    held = shop.table("quarantine").to_pylist()
    for path, why in reasons.items():
        assert sorted(row["reason"] for row in held if row["source"] == path) == why


@pytest.mark.on_both
def test_requests_before_any_ratings_keep_their_ids(shop, tmp_path):
    _, write, _, _ = REQUESTS[0]
    report = shop.ingest_tombstones(write(tmp_path))
    assert (report.accepted, report.quarantined) == (8, 2)
    users = set(shop.table("tombstones")["user_id"].to_pylist())
    assert {"42.0", "042", "+45", "abc"} < users


@pytest.mark.on_both
@pytest.mark.parametrize(("write", "says"), parameters(REFUSED_REQUESTS))
def test_requests_that_are_refused(shop, tmp_path, write, says):
    path = write(tmp_path)
    with pytest.raises((InputError, SettingsError)) as caught:
        shop.ingest_tombstones(path)
    assert str(caught.value).startswith(f"--input {path}: ")
    assert says in str(caught.value)
    assert not shop.store.exists("tombstones")


@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
@pytest.mark.parametrize("unit", ["ns", "us", "ms", "s", "seconds", "date"])
def test_times_of_every_unit(shop, tmp_path, unit, zone):
    if unit == "seconds":
        times = pa.array([NEW_YEAR, None])
    elif unit == "date":
        times = pa.array([dt.date(2021, 1, 1), None])
    else:
        times = pa.array([NEW_YEAR, None], pa.timestamp("s", zone)).cast(pa.timestamp(unit, zone))
    # What one column counts says nothing about another.
    others = {"exported": pa.array([0, 0], pa.timestamp("ns"))}
    shop.ingest_ratings(parquet(**rated(1, 2, rated_at=times, **others))(tmp_path), "parquet")
    rows = sorted(shop.table("ratings").to_pylist(), key=lambda row: row["user_id"])
    assert [row["rated_at"] for row in rows] == [dt.datetime(2021, 1, 1, tzinfo=dt.UTC), None]


@pytest.mark.on_both
def test_relative_paths_may_begin_like_a_scheme(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text(f"{CSV}ann,x,5\n", "10:30/r.csv")(tmp_path)
    assert read("10:30/r.csv", "csv").pairs == [("ann", "x")]
