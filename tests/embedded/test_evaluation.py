"""Held-out metrics of the embedded engine against plain Python, and the split of pairs."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from embedded.small_root import build, random_ratings, request
from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded.evaluation import evaluate, evaluate_split, split_by_hash
from unlearn_spark.errors import InputError
from unlearn_spark.tables import ratings

ALS = AlsSettings(rank=4, reg_param=0.3)
K = 5


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build(tmp_path_factory.mktemp("evaluated"), ALS, *random_ratings())


def table(rows):
    users, items, values = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "rating": pa.array(values, pa.float32()),
        }
    )


def expected(vectors, rows, seen, min_rating=None, k=K):
    """The metrics one rating and one user at a time; ids as text."""
    x = {str(id): vector for id, vector in vectors["user"].items()}
    y = {str(id): (id, vector) for id, vector in vectors["item"].items()}
    errors = [float(np.float32(r)) - x[u] @ y[i][1] for u, i, r in rows if u in x and i in y]
    relevant: dict[str, set[str]] = {}
    for u, i, r in rows:
        if min_rating is None or float(np.float32(r)) >= min_rating:
            relevant.setdefault(u, set()).add(i)
    scores = []
    for u, wanted in relevant.items():
        listed = []
        if u in x:
            best = sorted((-(x[u] @ v), id, i) for i, (id, v) in y.items() if (u, i) not in seen)
            listed = [i for *_, i in best[:k]]
        hits = [i in wanted for i in listed]
        reachable = min(k, len(wanted))
        found = np.cumsum(hits)
        scores.append(
            (
                sum(hit / math.log2(p + 2) for p, hit in enumerate(hits))
                / sum(1 / math.log2(p + 2) for p in range(reachable)),
                sum(hits) / k,
                sum(hits) / len(wanted),
                sum(f * hit / (p + 1) for p, (f, hit) in enumerate(zip(found, hits, strict=True)))
                / reachable,
            )
        )
    means = dict(zip(("ndcg", "precision", "recall", "map"), np.mean(scores, axis=0), strict=True))
    return {
        "rmse": pytest.approx(math.sqrt(np.mean(np.square(errors))), rel=1e-6),
        "mae": pytest.approx(np.mean(np.abs(errors)), rel=1e-6),
        **{f"{name}_at_{k}": pytest.approx(mean) for name, mean in means.items()},
        "users": len(relevant),
        "ratings": len(rows),
        "ratings_known": len(errors),
    }


def held_out_of(small, seed=0, share=0.3):
    """Unrated pairs, some with foreign ids, one of them twice."""
    rng = np.random.default_rng(seed)
    rated = seen_of(small)
    rows = [
        (str(u), str(i), float(np.float32(rng.normal())))
        for u in [*small.vectors["user"], "nobody"]
        for i in [*small.vectors["item"], 777]
        if (str(u), str(i)) not in rated and rng.random() < share
    ]
    return [*rows, rows[0]]


def seen_of(small):
    return {(str(u), str(i)) for u, i in zip(small.users, small.items, strict=True)}


@pytest.mark.parametrize("min_rating", [None, 0.2])
def test_metrics_of_a_published_model(small, min_rating):
    rows = held_out_of(small)
    found = evaluate(small.store, small.model, table(rows), K, min_rating, threads=2)
    assert found == expected(small.vectors, rows, seen_of(small), min_rating)


def test_a_threshold_is_compared_with_the_stored_rating_as_it_is(small):
    rows = [("u1", "3", 3.3), ("u2", "3", 3.5)]  # float32(3.3) < 3.3
    found = evaluate(small.store, small.model, table(rows), K, 3.3, threads=1)
    assert found["users"] == 1


def test_held_out_ids_in_the_tables_types_and_few_users(small):
    rows = [row for row in held_out_of(small) if row[0] in ("u3", "u20") and row[1] != "777"]
    columns = table(rows)
    typed = columns.set_column(1, "item_id", columns["item_id"].cast(pa.int64()))
    found = evaluate(small.store, small.model, typed, K, None, threads=1)
    assert found == expected(small.vectors, rows, seen_of(small))


def test_a_rating_that_a_request_covers_may_be_recommended(tmp_path):
    small = build(tmp_path, ALS, *random_ratings())
    rows = held_out_of(small)
    request(small.store, "r", "user", user="u3")
    seen = {pair for pair in seen_of(small) if pair[0] != "u3"}
    found = evaluate(small.store, small.model, table(rows), K, None, threads=1)
    assert found == expected(small.vectors, rows, seen)


def test_a_model_that_knows_none_of_the_pairs(small):
    rows = [("nobody", "3", 1.0), ("u1", "777", 2.0)]
    found = evaluate(small.store, small.model, table(rows), K, None, threads=1)
    assert (found["rmse"], found["mae"], found["ratings_known"]) == (None, None, 0)
    assert (found["users"], found["recall_at_5"]) == (2, 0.0)


def test_nothing_to_measure(small):
    with pytest.raises(InputError, match="there are no held-out ratings; give some"):
        evaluate(small.store, small.model, table([]), K, None, threads=1)
    with pytest.raises(InputError, match="there are no held-out items to compare with"):
        evaluate(small.store, small.model, table([("u1", "3", 1.0)]), K, 9.0, threads=1)
    with pytest.raises(InputError, match="0 recommendations were asked for"):
        evaluate(small.store, small.model, table([("u1", "3", 1.0)]), 0, None, threads=1)


# --- the split -----------------------------------------------------------------------------------


def drawn(user, item, seed):
    """pmod(xxhash64(user, item, seed), 2^30) as Spark computes it."""
    xxhash = pytest.importorskip("xxhash")
    hashed = 42
    for data in (user.encode(), item.to_bytes(8, "little"), seed.to_bytes(4, "little")):
        hashed = xxhash.xxh64_intdigest(data, hashed)
    return int(np.uint64(hashed).view(np.int64)) % 2**30


def test_a_pairs_side_is_decided_by_its_hash():
    users, items, values = random_ratings()
    rows = pa.table({"user_id": users, "item_id": items, "rating": values})
    train, held_out = split_by_hash(rows, 0.25, 7)
    assert train.num_rows + held_out.num_rows == len(users)
    assert 0.15 < held_out.num_rows / len(users) < 0.35
    for part, below in ((train, False), (held_out, True)):
        pairs = zip(part["user_id"].to_pylist(), part["item_id"].to_pylist(), strict=True)
        assert all((drawn(u, i, 7) < 2**30 // 4) == below for u, i in pairs)
    for fraction in (0, 1, -0.5, math.nan):
        with pytest.raises(InputError, match=f"fraction is {fraction}; give one between 0 and 1"):
            split_by_hash(rows, fraction, 0)


def test_a_split_is_fitted_and_measured(tmp_path):
    small = build(tmp_path, ALS, *random_ratings())
    request(small.store, "r", "user", user="u3")
    lines: list[str] = []
    als = AlsSettings(rank=3, reg_param=0.1, max_sweeps=4)
    found = evaluate_split(small.store, als, 0.2, 1, K, None, lines.append, threads=2)
    stored = small.store.read(ratings.TABLE).to_pylist()
    rows = [
        (row["user_id"], str(row["item_id"]), row["rating"])
        for row in stored
        if row["user_id"] != "u3"
    ]
    outside = [row for row in rows if drawn(row[0], int(row[1]), 1) < int(0.2 * 2**30)]
    assert found["ratings"] == len(outside)
    assert found["ratings_fitted"] == len(rows) - len(outside)
    assert found["sweeps"] == len(lines) == 4
    assert 0 < found["max_residual"] < 1
    assert 0 < found["rmse"] < 10
    assert small.store.version("models") == 1  # created, and one version

    from unlearn_spark.embedded.training import fit

    inside = [row for row in rows if row not in outside]
    typed = table(inside)
    typed = typed.set_column(1, "item_id", typed["item_id"].cast(pa.int64()))
    fitted = fit(typed, als, 1)
    vectors = {
        side: dict(zip(fitted.ids[side].to_pylist(), fitted.factors[side], strict=True))
        for side in ("user", "item")
    }
    measured = expected(vectors, outside, {row[:2] for row in inside})
    assert {name: found[name] for name in measured} == measured
