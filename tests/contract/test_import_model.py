"""A model that was trained elsewhere, taken over from each format, and forgetting from it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded.small_root import equations

import unlearn_spark
from unlearn_spark.config import AlsSettings
from unlearn_spark.errors import InputError, TableMissingError
from unlearn_spark.recommender import silent

ALS = AlsSettings(rank=4, reg_param=0.1)
SETTINGS = {"reg_param": 0.1, "tol": 5e-3, "tau": 2e-2}
USERS, ITEMS = 40, 20
SIDES = ("user", "item")


@pytest.fixture(scope="module")
def ratings():
    """40 users x 20 items, two in five pairs rated; integer ids, as MLlib needs."""
    random = np.random.default_rng(6)
    stars = 3 + random.normal(size=(USERS, 2)) @ random.normal(size=(2, ITEMS))
    stars += 0.3 * random.normal(size=stars.shape)
    user, item = np.nonzero(random.random(stars.shape) < 0.4)
    return pa.table({"user_id": user, "item_id": item, "rating": stars[user, item].round(2)})


@pytest.fixture(scope="module")
def factors(ratings):
    """By side a matrix float32 (n, 4): a few rounds of alternation, which ends with users."""
    of = {side: ratings[f"{side}_id"].to_numpy() for side in SIDES}
    values = ratings["rating"].to_numpy().astype(np.float32)
    random = np.random.default_rng(1)
    found = {"user": None, "item": random.normal(size=(ITEMS, 4))}
    for side, other in [*[SIDES, SIDES[::-1]] * 3, SIDES]:
        rows = []
        for row in range(USERS if side == "user" else ITEMS):
            mine = of[side] == row
            rows.append(
                np.linalg.solve(*equations(found[other][of[other][mine]], values[mine], ALS))
            )
        found[side] = np.array(rows, np.float32).astype(float)
    return {side: matrix.astype(np.float32) for side, matrix in found.items()}


@pytest.fixture(scope="module")
def saved(factors, tmp_path_factory):
    """By format a folder with the model."""
    folder = tmp_path_factory.mktemp("saved")
    arrays = {}
    for side, matrix in factors.items():
        ids, lists = np.arange(len(matrix)), pa.array(matrix.tolist(), pa.list_(pa.float32()))
        (folder / "mllib" / f"{side}Factors").mkdir(parents=True)
        part = pa.table({"id": pa.array(ids, pa.int32()), "features": lists})
        pq.write_table(part, folder / "mllib" / f"{side}Factors" / "part-00000.snappy.parquet")
        (folder / "parquet").mkdir(exist_ok=True)
        table = pa.table({"id": ids, "factors": lists})
        pq.write_table(table, folder / "parquet" / f"{side}_factors.parquet")
        arrays |= {f"{side}_ids": ids.astype(str), f"{side}_factors": matrix}
    (folder / "npz").mkdir()
    np.savez(folder / "npz" / "factors.npz", **arrays)
    return {name: folder / name for name in ("mllib", "parquet", "npz")}


@pytest.fixture
def opened(engine, request, tmp_path):
    """Empty tables on the engine, and the lines of progress."""
    if engine == "spark":
        request.getfixturevalue("spark")
    lines: list[str] = []
    root = tmp_path / "tables"
    return unlearn_spark.open(root, engine, progress=lines.append, **SETTINGS), lines


def stored(shop, side):
    """The factors of a side as they are published, float32 (n, rank), by id."""
    rows = sorted(shop.table(f"{side}_factors").to_pylist(), key=lambda row: row["id"])
    return np.array([row["factors"] for row in rows], np.float32)


@pytest.mark.on_both(slow=True)
def test_a_model_is_taken_over_as_it_is(opened, ratings, factors, saved):
    shop, lines = opened
    with pytest.raises(TableMissingError, match="run job ingest_ratings first"):
        shop.import_model(saved["npz"], "npz")
    shop.ingest_ratings(ratings)
    with pytest.raises(InputError, match="has no user_factors or"):
        shop.import_model(saved["mllib"], "parquet")
    with pytest.raises(InputError, match="no such file"):
        shop.import_model("gone", "npz")
    assert not shop.store.exists("models")

    found = shop.import_model(saved["npz"], "npz")
    assert any("als.rank = 32 is not used: the factors have 4" in line for line in lines)
    assert any("Run with --converge" in line for line in lines)
    published = shop.model()
    assert (published.kind, published.model_version, published.parent) == ("import", 1, None)
    assert published.als.rank == 4
    assert not published.certificate["holds"]
    assert (found.model_version, found.users, found["items"]) == (1, USERS, ITEMS)
    assert (found.sweeps, found.converged) == (0, False)
    assert found.max_residual == published.certificate["max_residual"] > 5e-3
    assert found.rows_over_tau["user"] == 0  # they were solved last
    assert found.rows_over_tau["item"] > 0
    assert found.factors_without_ratings == {"user": 0, "item": 0}
    for side in SIDES:
        np.testing.assert_array_equal(stored(shop, side), factors[side])


@pytest.mark.on_both(slow=True)
@pytest.mark.parametrize("form", ["mllib", "parquet"])
def test_other_formats_give_the_same_model(opened, ratings, factors, saved, form):
    shop, _ = opened
    shop.ingest_ratings(ratings)
    shop.import_model(saved[form], form)
    for side in SIDES:
        np.testing.assert_array_equal(stored(shop, side), factors[side])


@pytest.mark.on_both(slow=True)
def test_an_imported_model_forgets(opened, ratings, saved):
    shop, _ = opened
    shop.ingest_ratings(ratings)
    taken = shop.import_model(saved["mllib"], "mllib", converge=True)
    assert taken.converged
    assert taken.sweeps > 1
    assert taken.max_residual <= 5e-3 < taken.residual_before
    assert taken.rows_over_tau == {"user": 0, "item": 0}
    assert taken.rows_without_factors == {"user": 0, "item": 0}
    assert shop.audit().holds

    night = shop.forget(users=[7])
    assert night.ratings_removed == ratings["user_id"].to_pylist().count(7) > 0
    assert night.max_residual <= 2e-2
    audited = shop.audit()
    assert audited.holds
    assert audited.tombstoned_ratings_found == 0

    # Importing again does not bring back who was forgotten: the file still has that user's row.
    again = shop.import_model(saved["mllib"], "mllib")
    assert again.factors_without_ratings == {"user": 1, "item": 0}
    assert again.users == USERS - 1
    assert 7 not in shop.table("user_factors")["id"].to_pylist()
    assert shop.unlearn().requests == 0


@pytest.mark.spark
def test_what_mllib_saves_is_read_embedded(spark, ratings, tmp_path):
    from pyspark.ml.recommendation import ALS

    als = ALS(
        rank=3,
        maxIter=1,
        userCol="user_id",
        itemCol="item_id",
        numUserBlocks=1,
        numItemBlocks=1,
        seed=3,
    )
    model = als.fit(spark.createDataFrame(ratings).coalesce(1))
    model.save(str(tmp_path / "model"))
    shop = unlearn_spark.open(tmp_path / "tables", "embedded", progress=silent)
    shop.ingest_ratings(ratings)
    shop.import_model(tmp_path / "model", "mllib")
    for side, rows in (("user", model.userFactors), ("item", model.itemFactors)):
        matrix = [row.features for row in sorted(rows.collect())]
        np.testing.assert_array_equal(stored(shop, side), np.array(matrix, np.float32))
