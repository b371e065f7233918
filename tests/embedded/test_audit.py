"""The embedded audit: clean models agree with NumPy, and every kind of damage is found."""

from __future__ import annotations

import math
from dataclasses import replace

import pyarrow as pa
import pytest

from embedded import small_root
from embedded.small_root import build, random_ratings
from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded import audit as module
from unlearn_spark.embedded.audit import audit
from unlearn_spark.tables import factors, ratings

SETTINGS = {"rank": 4, "reg_param": 0.3}
MODES = {
    "explicit": AlsSettings(**SETTINGS),
    "implicit": AlsSettings(**SETTINGS, implicit_prefs=True, alpha=2.0),
    "nonnegative": AlsSettings(**SETTINGS, nonnegative=True),
}


@pytest.fixture(scope="module")
def explicit(tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("explicit"), MODES["explicit"], *random_ratings(), sweeps=10
    )


@pytest.fixture(scope="module")
def implicit(tmp_path_factory):
    return build(tmp_path_factory.mktemp("implicit"), MODES["implicit"], *random_ratings())


def largest(small):
    residuals = small.residuals()
    return {
        side: pytest.approx(max(r for (of, _), r in residuals.items() if of == side), rel=1e-9)
        for side in ("user", "item")
    }


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("cut", [None, 7], ids=["whole", "cut"])
@pytest.mark.parametrize("mode", MODES)
def test_every_residual_is_the_textbooks_however_the_work_is_cut(
    tmp_path, monkeypatch, mode, cut, threads
):
    if cut is not None:  # rows and portions that span several steps
        monkeypatch.setattr(module, "SLICE_RATINGS", cut)
        monkeypatch.setattr(module, "STEP_BYTES", 8 * 4 * 3)
        monkeypatch.setattr("unlearn_spark.embedded.portions.portions.__defaults__", (cut,))
    small = build(tmp_path, MODES[mode], *random_ratings(), sweeps=4, tau=1e3)
    seen = {}
    compare = module._compare

    def spy(rows, residuals, ledger):
        for side in residuals:
            ids = rows[side].ids.to_pylist()
            seen.update({(side, id): r for id, r in zip(ids, residuals[side], strict=True)})
        return compare(rows, residuals, ledger)

    monkeypatch.setattr(module, "_compare", spy)
    found = audit(small.store, small.model, threads)
    expected = small.residuals()
    assert seen == {key: pytest.approx(r, rel=1e-9) for key, r in expected.items()}
    assert found.max_residual == largest(small)
    assert found.holds
    assert found.ledger_holds
    assert found.rows == {"user": 40, "item": 25}
    assert found.floor == {"user": 0.01, "item": 0.02}
    assert (found.rows_without_ratings, found.ratings_without_rows) == (0, 0)


def of(small):
    return small.store, small.model


@pytest.mark.parametrize(
    "vector",
    [None, [1.0], [1.0, None, 1.0, 1.0], [1.0, math.nan, 1.0, 1.0], [math.inf] * 4],
    ids=["null", "short", "missing number", "NaN", "infinite"],
)
def test_a_vector_that_is_none_is_never_good(explicit, vector):
    ids, vectors = list(explicit.vectors["item"]), list(explicit.vectors["item"].values())
    vectors[ids.index(3)] = vector
    version = small_root.write_vectors(explicit.store, "item", ids, vectors)
    found = audit(explicit.store, replace(explicit.model, item_factors_version=version), 1)
    assert found.max_residual["item"] == math.inf
    assert found.ledger_below >= 1
    assert found.rows["item"] == 25
    of_other_length = vector is None or len(vector) == 1
    n_ratings = (explicit.items == 3).sum()
    assert found.ratings_without_rows == (n_ratings if of_other_length else 0)


def test_two_rows_of_one_id_are_never_good(explicit):
    ids, vectors = list(explicit.vectors["user"]), list(explicit.vectors["user"].values())
    version = small_root.write_vectors(
        explicit.store, "user", [*ids, "u5"], [*vectors, explicit.vectors["user"]["u5"]]
    )
    found = audit(explicit.store, replace(explicit.model, user_factors_version=version), 1)
    assert found.max_residual["user"] == math.inf
    assert found.rows["user"] == 41
    assert (found.ledger_missing, found.ledger_extra) == (1, 0)
    assert found.max_residual["item"] == largest(explicit)["item"]


def test_missing_repeated_and_foreign_ledger_entries_are_counted(explicit):
    entries = small_root.ledger_of(*of(explicit))
    changed = [*entries[2:], entries[5], ("user", "nobody", 1.0), ("shop", "u1", 1.0)]
    version = small_root.write_ledger(explicit.store, changed)
    found = audit(explicit.store, replace(explicit.model, ledger_version=version), 1)
    assert (found.ledger_missing, found.ledger_extra, found.ledger_below) == (2, 3, 0)


def test_later_ratings_are_not_the_models(explicit):
    before = audit(*of(explicit), 1)
    assert before.holds
    version = small_root.write_ratings(explicit.store, ["u1", "new"], [24, 3], [5.0, 5.0])
    later = replace(explicit.model, ratings_version=version)
    assert audit(explicit.store, later, 1).holds
    found = audit(explicit.store, replace(later, ratings_ingest_id=2), 1)
    assert found.ratings_without_rows == 1
    assert found.max_residual["user"] > 10 * before.max_residual["user"]


def test_a_pair_that_is_stored_twice_counts_twice(tmp_path):
    users, items, values = random_ratings()
    small = build(
        tmp_path, MODES["explicit"], [*users, users[0]], [*items, items[0]], [*values, 9.0]
    )
    assert audit(*of(small), 1).max_residual == largest(small)


@pytest.mark.parametrize("kind", ["explicit", "implicit"])
def test_the_order_of_stored_rows_does_not_matter(request, kind):
    small = request.getfixturevalue(kind)
    before = audit(*of(small), 1)
    versions = {}
    for name in ("ratings", "user_factors", "item_factors", "ledger"):
        rows = small.store.read(name, getattr(small.model, f"{name}_version"))
        backwards = rows.take(pa.array(range(rows.num_rows)[::-1]))
        versions[f"{name}_version"] = small.store.overwrite(name, backwards)
    assert audit(small.store, replace(small.model, **versions), 3) == before


def test_integer_and_text_ids(tmp_path):
    users, items, values = random_ratings()
    numbers = [int(user[1:]) for user in users]
    small = build(tmp_path, MODES["implicit"], numbers, [f"i,{item}" for item in items], values)
    found = audit(*of(small), 1)
    assert found.holds
    assert found.max_residual == largest(small)


def test_a_model_without_rows_and_ratings_is_empty(explicit):
    nothing = {
        f"{side}_factors_version": explicit.store.overwrite(
            factors.factor_table(side),
            explicit.store.read(factors.factor_table(side)).slice(0, 0),
        )
        for side in ("user", "item")
    }
    version = explicit.store.overwrite(
        ratings.TABLE, explicit.store.read(ratings.TABLE).slice(0, 0)
    )
    ledger = small_root.write_ledger(explicit.store, [])
    model = replace(explicit.model, **nothing, ratings_version=version, ledger_version=ledger)
    found = audit(explicit.store, model, 2)
    assert found.holds
    assert found.rows == {"user": 0, "item": 0}
    assert found.max_residual == {"user": 0.0, "item": 0.0}
