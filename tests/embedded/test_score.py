"""Recommendations of the embedded engine against brute force, and their exports."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from embedded import small_root
from embedded.small_root import build, random_ratings
from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded import recommend as module
from unlearn_spark.embedded import score
from unlearn_spark.embedded.ids import xxhash64_of
from unlearn_spark.embedded.recommend import recommend
from unlearn_spark.embedded.sampling import sample_ratings
from unlearn_spark.embedded.score import Vectors, pairs_by_query, predict_pairs, top_n
from unlearn_spark.errors import InputError
from unlearn_spark.tables import ratings, recommendations

ALS = AlsSettings(rank=4, reg_param=0.3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build(tmp_path_factory.mktemp("scored"), ALS, *random_ratings())


def brute_force(small, users, n, seen):
    """user, rank, item and score of the best items, one user at a time."""
    rows = []
    for user in users:
        x = small.vectors["user"][user]
        scored = sorted(
            (-float(np.float32(x @ y)), item)
            for item, y in small.vectors["item"].items()
            if (user, item) not in seen
        )
        rows += [(user, rank, i, -s) for rank, (s, i) in enumerate(scored[:n], start=1)]
    return rows


def seen_of(small):
    return set(zip(small.users.tolist(), small.items.tolist(), strict=True))


def run(small, top, users=None, exclude_seen=True, output=None, model=None, threads=2):
    messages: list[str] = []
    found = recommend(
        small.store,
        model or small.model,
        top,
        users,
        exclude_seen,
        None if output is None else str(output),
        messages.append,
        threads,
    )
    return found, messages


def written(small):
    table = small.store.read(recommendations.TABLE).to_pydict()
    assert set(table.pop("model_version")) <= {1}
    return sorted(zip(*table.values(), strict=True))


def near(rows):
    return [(user, rank, item, pytest.approx(s, rel=1e-5)) for user, rank, item, s in sorted(rows)]


# --- scoring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [1, 4, 60])
def test_top_n_over_blocks_equals_brute_force(monkeypatch, n, threads):
    monkeypatch.setattr(score, "QUERY_ROWS", 5)
    rng = np.random.default_rng(n)
    queries = Vectors(pa.array(range(23)), rng.integers(-1, 2, (23, 3)).astype(np.float32))
    ids = pa.array([f"i{number:02d}" for number in range(50)])
    candidates = Vectors(ids, rng.integers(-1, 2, (50, 3)).astype(np.float32))
    users, items = rng.integers(0, 23, 300), rng.integers(0, 50, 300)
    users[:50], items[:50] = 7, range(50)  # nothing is left for user 7
    pairs = pa.table(
        {
            "user_id": [*users.tolist(), 99, 3],
            "item_id": [*(f"i{item:02d}" for item in items), "i00", "none"],
        }
    )
    halves = iter([pairs.slice(0, 100), pairs.slice(100)])
    excluded = pairs_by_query(queries, candidates, halves)
    seen = set(zip(users.tolist(), items.tolist(), strict=True))
    found = []
    for part in top_n(queries, candidates, n, excluded, threads):
        entries = zip(part.queries, part.places, part.chosen, part.scores, strict=True)
        found += [tuple(value.item() for value in entry) for entry in entries]
    expected = []
    for q, x in enumerate(queries.factors):
        scored = sorted((-float(x @ y), c) for c, y in enumerate(candidates.factors))
        left = [(c, -s) for s, c in scored if (q, c) not in seen][:n]
        expected += [(q, place, c, s) for place, (c, s) in enumerate(left, start=1)]
    assert found == expected


def test_top_n_refuses_none_and_bears_no_rows():
    one = Vectors(pa.array([1]), np.ones((1, 2), np.float32))
    none = Vectors(pa.array([], pa.int64()), np.ones((0, 2), np.float32))
    with pytest.raises(InputError, match="0 recommendations were asked for; ask for 1 or more"):
        next(top_n(one, one, 0))
    assert list(top_n(none, one, 2)) == []
    (empty,) = top_n(one, none, 2, pairs_by_query(one, none, iter([])))
    assert empty.counts.tolist() == [0]


def test_predictions_are_products_and_unknown_ones_are_nan(monkeypatch):
    monkeypatch.setattr(score, "PRODUCT_BYTES", 4 * 3 * 2)
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    users, items = Vectors(pa.array(range(6)), x), Vectors(pa.array(range(4)), y)
    u, i = np.array([0, 5, -1, 2, 3, 3]), np.array([0, 3, 1, -1, 2, 0])
    found = predict_pairs(users, items, u, i)
    assert found.dtype == np.float32
    expected = [
        math.nan if a < 0 or b < 0 else float(x[a] @ y[b]) for a, b in zip(u, i, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_ids_of_another_type_are_compared_as_text():
    numbers = Vectors(pa.array([7, 10, -3]), np.ones((3, 1), np.float32))
    texts = pa.chunked_array([["10", "07", None], ["-3", "7", "x", "7"]])
    assert numbers.rows_of(texts).tolist() == [1, -1, -1, 2, 0, -1, 0]
    words = Vectors(pa.array(["7", "x"]), np.ones((2, 1), np.float32))
    assert words.rows_of(pa.array([7, 8, None])).tolist() == [0, -1, -1]
    assert words.rows_of(pa.array(["x", None])).tolist() == [1, -1]


# --- the job -------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [True, False])
def test_the_table_has_the_best_items_of_all_users(small, exclude):
    found, messages = run(small, 3, exclude_seen=exclude)
    users = list(small.vectors["user"])
    expected = brute_force(small, users, 3, seen_of(small) if exclude else set())
    assert written(small) == near(expected)
    location = small.store.location(recommendations.TABLE)
    assert found == {"users": 40, "rows": len(expected), "output": location}
    assert messages == []
    log = "".join(path.read_text() for path in Path(location).glob("_delta_log/*.json"))
    assert "u17" not in log


@pytest.mark.parametrize("few", [10, 0], ids=["looked up", "all read"])
def test_named_users(small, monkeypatch, few):
    monkeypatch.setattr(module, "FEW_USERS", few)
    found, messages = run(small, 2, users=["u9", "nobody", "u10", "U9"])
    expected = brute_force(small, ["u9", "u10"], 2, seen_of(small))
    assert written(small) == near(expected)
    assert found["users"] == 2
    assert found["unknown_users"] == ["nobody", "U9"]
    assert messages == ["not in model version 1: nobody, U9"]
    with pytest.raises(InputError, match="--users a,b: none is in model version 1; name users"):
        run(small, 2, users=["a", "b"])


def test_users_with_integer_ids_are_named_as_text(tmp_path):
    users, items, values = random_ratings()
    numbers = [int(user[1:]) for user in users]
    numbered = build(tmp_path, ALS, numbers, [f"i{item}" for item in items], values)
    found, _ = run(numbered, 1, users=["3", "03", "1e1"])
    assert written(numbered) == near(brute_force(numbered, [3], 1, seen_of(numbered)))
    assert found["unknown_users"] == ["03", "1e1"]


def test_a_rating_that_a_request_covers_does_not_count_as_seen(tmp_path):
    small = build(tmp_path, ALS, *random_ratings())
    small_root.request(small.store, "r", "user", user="u4")
    run(small, 30)
    seen = {(user, item) for user, item in seen_of(small) if user != "u4"}
    assert written(small) == near(brute_force(small, list(small.vectors["user"]), 30, seen))


def test_ratings_after_the_models_version_do_not_count_as_seen(tmp_path):
    small = build(tmp_path, ALS, *random_ratings())
    best = brute_force(small, ["u4"], 1, seen_of(small))
    small_root.write_ratings(small.store, ["u4"], [best[0][2]], [5.0])
    run(small, 1, users=["u4"])
    assert written(small) == near(best)
    version = small.store.version(ratings.TABLE)
    run(small, 1, users=["u4"], model=replace(small.model, ratings_version=version))
    assert written(small) != near(best)


def test_a_model_that_names_no_ratings_has_seen_nothing(small):
    unnamed = replace(small.model, ratings_version=None)
    _, messages = run(small, 2, model=unnamed)
    assert written(small) == near(brute_force(small, list(small.vectors["user"]), 2, set()))
    assert messages == ["model version 1 names no ratings; no item counts as seen"]


def test_predictions_of_a_published_model(small):
    pairs = pa.table({"user_id": ["u3", "x", "u4"], "item_id": ["2", "2", "777"]})
    found = module.predict(small.store, small.model, pairs)
    assert found.dtype == np.float64
    expected = small.vectors["user"]["u3"] @ small.vectors["item"][2]
    np.testing.assert_allclose(found, [expected, math.nan, math.nan], rtol=1e-5)


@pytest.mark.parametrize("rows", [4_000_000, 50], ids=["one portion", "many portions"])
def test_a_sample_has_the_ratings_with_the_smallest_hashes(small, monkeypatch, rows):
    monkeypatch.setattr("unlearn_spark.embedded.portions.portions.__defaults__", (rows,))
    table = small.store.read(ratings.TABLE, columns=["user_id", "item_id", "rating", "rated_at"])
    hashes = xxhash64_of([table["user_id"], table["item_id"]])
    for n in (0, 1, 100, 10_000):
        found = sample_ratings(small.store, n)
        assert found.equals(table.take(pa.array(np.argsort(hashes)[:n])))


# --- exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["best.csv", "best.parquet", "best", "deep/er/best.CSV"])
def test_exports_are_directories_of_each_format(small, tmp_path, name):
    target = tmp_path / name
    found, _ = run(small, 3, output=target)
    assert found["output"] == str(target)
    expected = near(brute_force(small, list(small.vectors["user"]), 3, seen_of(small)))
    if target.suffix:
        assert (target / "_SUCCESS").exists()
        (part,) = target.glob("part-*")
        assert not list(target.parent.glob(".*"))
    if target.suffix.lower() == ".csv":
        with part.open(newline="") as lines:
            header, *rows = csv.reader(lines)
        assert header == ["user_id", "rank", "item_id", "score", "model_version"]
        rows = [(u, int(rank), int(i), float(s)) for u, rank, i, s, _ in rows]
    else:
        table = pq.read_table(part) if target.suffix else None
        if table is None:
            run(small, 3, output=target)  # replaces
            table = pa.table(DeltaTable(str(target)).to_pyarrow_table())
        assert table.schema.names == ["user_id", "rank", "item_id", "score", "model_version"]
        rows = [tuple(row.values())[:4] for row in table.to_pylist()]
    assert sorted(rows) == expected


def test_csv_keeps_every_id_as_it_is(tmp_path):
    odd = ["plain", " spaced ", 'quo"ted', "com,ma", "new\nline", "ünï"]
    users = [user for user in odd for _ in range(3)]
    small = build(tmp_path / "root", ALS, users, [1, 2, 3] * len(odd), range(1, len(users) + 1))
    run(small, 1, exclude_seen=False, output=tmp_path / "x.csv")
    (part,) = (tmp_path / "x.csv").glob("part-*")
    with part.open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert sorted(row[0] for row in rows[1:]) == sorted(odd)
    assert part.read_bytes().count(b'"') == 2 * 3 + 2  # only ids that need it are quoted
    found = duckdb.sql(f"SELECT user_id FROM read_csv('{part}')").fetchall()
    assert sorted(found) == sorted((id,) for id in odd)


def test_an_export_that_fails_leaves_nothing(small, tmp_path, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setitem(module.export.__globals__["_WRITERS"], "csv", broken)
    with pytest.raises(ZeroDivisionError):
        run(small, 1, output=tmp_path / "x.csv")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_only_spark_can_write(small):
    with pytest.raises(InputError, match=r"dbfs:/x\.csv: only Spark reaches it; run with --engine"):
        run(small, 1, output="dbfs:/x.csv")
