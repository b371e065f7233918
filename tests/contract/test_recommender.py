"""The product in Python: what is forgotten and predicted, tables in memory, progress, misuse."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

import unlearn_spark
from unlearn_spark.errors import InputError, SettingsError, TableMissingError
from unlearn_spark.recommender import Result

PAIRS = [(u, f"i{i}") for u in range(12) for i in range(8) if (u + i) % 3]
SETTINGS = {"rank": 2, "tol": 5e-3, "tau": 2e-2}


def ratings(pairs=PAIRS):
    values = [1.0 + (3 * u + 5 * int(i[1:])) % 5 for u, i in pairs]
    users, items = zip(*pairs, strict=True)
    return pa.table({"user_id": users, "item_id": items, "rating": values})


@pytest.fixture
def trained(engine, request, tmp_path):
    """A small model."""
    if engine == "spark":
        request.getfixturevalue("spark")
    lines: list[str] = []
    shop = unlearn_spark.open(tmp_path / "tables", engine, progress=lines.append, **SETTINGS)
    shop.ingest_ratings(ratings())
    shop.train()
    shop.lines = lines
    return shop


@pytest.mark.on_both(slow=True)
def test_what_is_forgotten_and_predicted(trained):
    night = trained.forget(users=[3, 99], items=["i5"], pairs=[(4, "i1")])
    gone = [p for p in PAIRS if p[0] == 3 or p[1] == "i5" or p == (4, "i1")]
    assert (night.requests, night.ratings_removed) == (4, len(gone))
    assert len(night.requests_without_ratings) == 1
    left = trained.table("ratings")
    found = set(zip(left["user_id"].to_pylist(), left["item_id"].to_pylist(), strict=True))
    assert found == set(PAIRS) - set(gone)
    assert trained.audit().tombstoned_ratings_found == 0

    scores = trained.predict([5, "6", 99, 5, 3], ["i1", "i0", "i1", "nothing", "i1"])
    users, items = (trained.table(name).to_pylist() for name in ("user_factors", "item_factors"))
    vectors = {row["id"]: np.array(row["factors"], np.float32) for row in users + items}
    expected = [vectors[5] @ vectors["i1"], vectors[6] @ vectors["i0"]]
    np.testing.assert_allclose(scores[:2], expected, rtol=1e-6)
    assert np.isnan(scores[2:]).all()

    sample = trained.engine.sample(5)
    assert sample.equals(trained.engine.sample(7).slice(0, 5))
    some = zip(sample["user_id"].to_pylist(), sample["item_id"].to_pylist(), strict=True)
    assert set(some) < found

    with pytest.raises(InputError, match="forget: 1 of 2 ids are not in the form of the table's"):
        trained.forget(users=["ada", 5])
    assert trained.unlearn().requests == 1  # user 5's


def test_an_id_that_no_row_can_have_changes_nothing(trained):
    before = trained.model().model_version
    with pytest.raises(InputError, match=r"1 requests is usable; .*not an integer as in the table"):
        trained.forget(users=["ada"])
    assert trained.model().model_version == before
    assert not trained.store.exists("tombstones")
    with pytest.raises(InputError, match="forget: name users, items or pairs"):
        trained.forget()


def test_ids_may_be_arrays(trained):
    night = trained.forget(users=np.array([3, 4]), items=pa.array(["i1"]).to_pylist())
    assert night.requests == 3
    assert not set(trained.table("ratings")["user_id"].to_pylist()) & {3, 4}
    scores = trained.predict(np.array([5, 6]), ["i0", "i2"])
    assert (scores.dtype, scores.shape) == (np.float64, (2,))


@pytest.mark.on_both(slow=True)
def test_tables_of_memory_are_ratings_and_requests(shop):
    given = ratings()
    assert shop.ingest_ratings(given).ratings_written == len(PAIRS)
    again = shop.ingest_ratings(given.to_pandas())
    assert (again.ratings_written, again.superseded) == (0, len(PAIRS))
    asked = pa.table({"request_id": ["a"], "scope": ["user"], "user_id": [3]})
    assert shop.ingest_tombstones(asked).accepted == 1
    assert shop.ingest_tombstones(asked.to_pandas()).duplicates == 1


def test_figures_of_a_job_are_attributes_and_a_mapping(trained):
    found = trained.audit()
    assert found.holds is found["holds"] is True
    assert dict(found) == {name: getattr(found, name) for name in found}
    assert len(found) == len(list(found))
    assert found.engine == "embedded"
    with pytest.raises(AttributeError, match="there is no figure rmse; there are model_version, "):
        found.rmse  # noqa: B018
    assert repr(Result({"a": 1})) == "Result({'a': 1})"


def test_progress_is_told_line_by_line(trained, tmp_path, capsys):
    assert trained.lines[0] == (
        f"the given table: {len(PAIRS)} ratings read, {len(PAIRS)} written, 0 superseded, "
        "0 quarantined"
    )
    assert sum("sweep" in line for line in trained.lines) >= trained.model().metrics["sweeps"]
    assert capsys.readouterr() == ("", "")
    unlearn_spark.open(tmp_path / "other", "embedded").ingest_ratings(ratings())
    assert "ratings read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"root": "x", "rnk": 3}, "unknown setting rnk; did you mean rank?"),
        ({"root": "x", "colour": 3}, "unknown setting colour; there are tau, lower_mark, "),
        ({"root": "x", "als": {"rnk": 3}}, "unknown setting als.rnk; did you mean als.rank?"),
        ({"root": "x", "rank": 0}, "als.rank = 0 is not usable"),
        ({"root": "x", "als": 3}, "als = 3 is not usable"),
        ({"root": "x", "execution": {"threads": 0}}, "execution.threads = 0 is not usable"),
        ({"root": "x", "engine": "flink"}, "execution.engine = 'flink' is not usable"),
        ({"root": "x", "catalog": "a.b"}, "give root or catalog, not both"),
        ({}, "no place for the tables: give root or catalog"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_misuse_is_said_when_opening(arguments, says):
    with pytest.raises(SettingsError) as refused:
        unlearn_spark.open(**arguments)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_misuse_of_methods_is_said(shop, tmp_path):
    with pytest.raises(TableMissingError, match="run job ingest_ratings first"):
        shop.train()
    with pytest.raises(TableMissingError, match="run job train first"):
        shop.model()
    path = tmp_path / "ratings.csv"
    with pytest.raises(InputError, match="no such file"):
        shop.ingest_ratings(path)
    path.write_text("user_id,item_id,rating\n1,2,3\n")
    with pytest.raises(SettingsError, match="--format: say which of movielens, csv, parquet"):
        shop.ingest_ratings(path)
    with pytest.raises(InputError, match="predict: 2 users and 1 items; give pairs"):
        shop.predict([1, 2], [3])
    with pytest.raises(SettingsError, match="exactly one of --input and --split"):
        shop.evaluate()
    assert not (tmp_path / "tables").exists()
