"""Both engines draw the same pairs: for the comparison with retraining, and to hold ratings out."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

import unlearn_spark
from unlearn_spark.embedded import evaluation
from unlearn_spark.recommender import silent

SETTINGS = {"rank": 2, "reg_param": 0.1, "tol": 3e-3, "tau": 1e-2}


@pytest.fixture
def forgotten(tmp_path):
    """A root whose newest model has forgotten a user and ten pairs, and held-out ratings."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), rng.normal(size=(20, 2))
    u, i = np.nonzero(rng.random((40, 20)) < 0.6)
    order = rng.permutation(len(u))
    u, i = u[order], i[order]
    table = pa.table(
        {
            "user_id": [f"u{n}" for n in u],
            "item_id": i,
            "rating": (3 + np.einsum("nk,nk->n", x[u], y[i]) / 2).round(2),
        }
    )
    rows = table.slice(40)
    shop = unlearn_spark.open(tmp_path / "tables", "embedded", progress=silent, **SETTINGS)
    shop.ingest_ratings(rows)
    shop.train()
    some = rows.slice(0, 10).to_pylist()
    shop.forget(users=["u3"], pairs=[(row["user_id"], row["item_id"]) for row in some])
    held_out = tmp_path / "held.csv"
    lines = [f"{row['user_id']},{row['item_id']},{row['rating']}" for row in table.to_pylist()[:40]]
    held_out.write_text("user_id,item_id,rating\n" + "\n".join(lines) + "\n")
    return tmp_path / "tables", held_out


def flat(figures, path=()):
    """Every number of nested figures, by its path."""
    if isinstance(figures, dict):
        for key, value in figures.items():
            yield from flat(value, (*path, key))
    elif isinstance(figures, list):
        for place, value in enumerate(figures):
            yield from flat(value, (*path, place))
    else:
        yield path, figures


@pytest.mark.spark
@pytest.mark.slow
def test_a_night_is_compared_alike(spark, forgotten):
    root, held_out = forgotten
    found = {}
    for engine in ("embedded", "spark"):
        shop = unlearn_spark.open(root, engine, progress=silent)
        audit = shop.audit(retrain=True, seeds=1, held_out=str(held_out))
        assert audit.holds
        found[engine] = dict(flat(audit["comparison"]))
    one, two = found.values()
    assert one.keys() == two.keys()
    for path, value in one.items():
        if isinstance(value, int | str | None):  # versions, sizes of samples, sweeps, None
            assert two[path] == value, path
        else:  # both solve to a residual of `tol`
            assert math.isclose(two[path], value, rel_tol=0.02, abs_tol=0.02), path


@pytest.mark.spark
def test_the_same_pairs_are_held_out(spark):
    from unlearn_spark.spark.metrics import split_by_hash

    rng = np.random.default_rng(1)
    pairs = np.unique(rng.integers(0, 50, (400, 2)), axis=0)
    table = pa.table(
        {
            "user_id": [f"user é {n}" for n in pairs[:, 0]],
            "item_id": pairs[:, 1],
            "rating": np.ones(len(pairs), np.float32),
        }
    )
    for seed in (0, 7):
        own = evaluation.split_by_hash(table, 0.3, seed)
        other = split_by_hash(spark.createDataFrame(table), 0.3, seed)
        for mine, theirs in zip(own, other, strict=True):
            assert mine.num_rows > 50
            assert sorted(map(repr, mine.to_pylist())) == sorted(
                map(repr, theirs.toArrow().to_pylist())
            )
