"""The engines take turns on one root: what one writes, the other goes on from."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

import unlearn_spark
from contract.job_keys import KEYS
from unlearn_spark.recommender import silent
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

SETTINGS = {"rank": 4, "reg_param": 0.1, "tol": 1e-3, "tau": 1e-2, "seed": 3}


def ratings(seed=0, users=60, items=30, n=700, text=False):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(users, 2)), random.normal(size=(items, 2))
    pairs = random.permutation(users * items)[:n]
    user, item = np.divmod(pairs, items)
    values = 3 + 0.5 * np.einsum("ij,ij->i", x[user], y[item]) + 0.3 * random.normal(size=n)
    ids = [f"u{number}" for number in user] if text else user
    times = pa.array(1_500_000_000 + pairs, pa.timestamp("s", tz="UTC"))
    return pa.table({"user_id": ids, "item_id": item, "rating": values, "rated_at": times})


def factors(root, model):
    """By side and id the factors of a version, read by an outside reader."""
    store = DeltaRsStore(root)
    return {
        side: {
            row["id"]: np.array(row["factors"])
            for row in store.read(
                f"{side}_factors", getattr(model, f"{side}_factors_version")
            ).to_pylist()
        }
        for side in ("user", "item")
    }


def predictions(found):
    users, items = found["user"], found["item"]
    x = np.array([users[id] for id in sorted(users)])
    return x @ np.array([items[id] for id in sorted(items)]).T


@pytest.mark.spark
@pytest.mark.parametrize(
    ("first", "implicit"),
    [
        ("embedded", False),
        ("spark", True),
        pytest.param("embedded", True, marks=pytest.mark.slow),
        pytest.param("spark", False, marks=pytest.mark.slow),
    ],
)
def test_each_job_goes_on_from_the_other_engine(spark, tmp_path, first, implicit):
    engines = itertools.cycle(
        ["embedded", "spark"] if first == "embedded" else ["spark", "embedded"]
    )
    root = str(tmp_path / "tables")

    def shop():
        return unlearn_spark.open(
            root, next(engines), progress=silent, implicit_prefs=implicit, **SETTINGS
        )

    def said(job, result):
        assert KEYS[job] <= result.keys()
        return result

    given = ratings()
    late = ratings(seed=1, n=60)
    assert said("ingest_ratings", shop().ingest_ratings(given))["ratings_written"] == 700
    trained = said("train", shop().train())
    assert trained.converged
    requests = pa.table(
        {
            "request_id": ["a", "b"],
            "scope": ["user", "item"],
            "user_id": ["7", None],
            "item_id": [None, "3"],
        }
    )
    assert said("ingest_tombstones", shop().ingest_tombstones(requests))["accepted"] == 2
    night = said("unlearn", shop().unlearn())
    gone = {7}, {3}
    left = [
        row
        for row in given.to_pylist()
        if row["user_id"] not in gone[0] and row["item_id"] not in gone[1]
    ]
    assert night.ratings_removed == 700 - len(left)
    assert shop().audit().holds
    written = shop().ingest_ratings(late)
    assert written.quarantined == sum(
        row["user_id"] == 7 or row["item_id"] == 3 for row in late.to_pylist()
    )
    updated = said("update", shop().update())
    assert updated.ratings_added > 0
    found = said("audit", shop().audit())
    assert found.holds
    assert found.tombstoned_ratings_found == 0
    lists = said("recommend", shop().recommend(3))
    assert lists.rows == 3 * lists.users
    night = shop().forget(users=[9], pairs=[(left[0]["user_id"], left[0]["item_id"])])
    assert night.requests == 2
    assert shop().audit().holds

    store = DeltaRsStore(root)
    model = models.published(store)
    remaining = {(row["user_id"], row["item_id"]) for row in store.read("ratings").to_pylist()}
    assert not any(user in (7, 9) or item == 3 for user, item in remaining)
    known = factors(root, model)
    assert set(known["user"]) == {user for user, _ in remaining}
    assert set(known["item"]) == {item for _, item in remaining}


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize("implicit", [False, True])
def test_a_seed_gives_the_same_model_on_both_engines(spark, tmp_path, implicit):
    found = {}
    for engine in ("embedded", "spark"):
        root = str(tmp_path / engine)
        shop = unlearn_spark.open(
            root, engine, progress=silent, implicit_prefs=implicit, **SETTINGS
        )
        shop.ingest_ratings(ratings(text=True))
        shop.train()
        shop.forget(users=["u7"])
        found[engine] = shop.model(), factors(root, shop.model())
    one, two = (found[engine] for engine in ("embedded", "spark"))
    assert one[0].settings["layouts"] == two[0].settings["layouts"]
    assert one[0].floors == two[0].floors
    assert one[0].metrics["rows_resolved"] == two[0].metrics["rows_resolved"]
    np.testing.assert_allclose(predictions(one[1]), predictions(two[1]), rtol=1e-3, atol=1e-4)
