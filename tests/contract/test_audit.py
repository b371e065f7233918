"""Audits of published models: clean ones agree with NumPy, and every kind of damage is found.

The models are made by NumPy and delta-rs alone (`small_root`), so an audit is compared with
neither engine's own work.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from embedded import small_root
from embedded.small_root import build, random_ratings

import unlearn_spark
from unlearn_spark.config import AlsSettings
from unlearn_spark.errors import InputError
from unlearn_spark.recommender import silent
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

SETTINGS = {"rank": 4, "reg_param": 0.3}
MODES = {
    "explicit": AlsSettings(**SETTINGS),
    "implicit": AlsSettings(**SETTINGS, implicit_prefs=True, alpha=2.0),
    "nonnegative": AlsSettings(**SETTINGS, nonnegative=True),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`small(mode)`: a published model of 40 users and 25 items under a root of its own."""
    made = {}

    def of(mode):
        if mode not in made:
            root = tmp_path_factory.mktemp(mode)
            # An explicit model is within tau sooner, while rounding is nothing to its residuals.
            sweeps = 10 if mode == "explicit" else 40
            made[mode] = build(root, MODES[mode], *random_ratings(), sweeps=sweeps)
        return made[mode]

    return of


@pytest.fixture
def audit(engine, request):
    """`audit(small)`: the model as the engine judges it."""
    if engine == "spark":
        request.getfixturevalue("spark")

    def run(given, model=None):
        shop = unlearn_spark.open(given.store.root, engine, progress=silent)
        return shop.engine.audit(model or given.model)

    return run


def largest(given):
    residuals = given.residuals()
    return {
        side: pytest.approx(max(r for (of, _), r in residuals.items() if of == side), rel=1e-9)
        for side in ("user", "item")
    }


def with_ledger(given, entries):
    return replace(given.model, ledger_version=small_root.write_ledger(given.store, entries))


# --- the cases -----------------------------------------------------------------------------------


def clean(given, audit):
    found = audit(given)
    assert found.max_residual == largest(given)
    assert found.holds
    assert found.ledger_holds
    assert found.rows == {"user": 40, "item": 25}
    assert found.floor == {"user": 0.01, "item": 0.02}
    assert (found.rows_without_ratings, found.ratings_without_rows) == (0, 0)


def changed_and_lost_rows(given, audit):
    shifted = given.vectors["user"]["u3"] + np.float32(0.5)
    broken = given.with_vectors("user", {"u3": shifted, "u7": None})
    found = audit(broken)
    residuals = broken.residuals()
    assert found.max_residual == largest(broken)
    assert found.max_residual["user"] > 3 * found.tau
    assert found.rows == {"user": 39, "item": 25}
    assert found.ratings_without_rows == (given.users == "u7").sum() > 0
    assert (found.ledger_missing, found.ledger_extra) == (0, 1)
    bounds = {
        (side, id): bound for side, id, bound in small_root.ledger_of(given.store, given.model)
    }
    below = sum(bounds[side, str(id)] * 1.000001 < r for (side, id), r in residuals.items())
    assert found.ledger_below == below > 0
    assert not found.holds
    # The version that was published is read at its own Delta versions, and is as good as before.
    assert audit(given).holds


def rows_of_one_id(given, audit):
    ids, vectors = list(given.vectors["user"]), list(given.vectors["user"].values())
    version = small_root.write_vectors(
        given.store, "user", [*ids, "u5"], [*vectors, given.vectors["user"]["u5"]]
    )
    found = audit(given, replace(given.model, user_factors_version=version))
    assert found.max_residual["user"] == math.inf
    assert found.rows["user"] == 41
    assert not found.holds


def a_row_without_ratings(given, audit):
    lonely = given.with_vectors("user", {"nobody": np.zeros(4, np.float32)})
    found = audit(lonely)
    assert found.rows_without_ratings == 1
    assert found.ledger_missing == 1
    assert found.max_residual == largest(given)  # 0 A x = 0 holds
    assert not found.holds


def a_negative_row(given, audit):
    assert math.isfinite(audit(given).max_residual["user"])
    damaged = given.with_vectors("user", {"u1": -np.ones(4, np.float32)})
    assert audit(damaged).max_residual["user"] == math.inf


def vectors_that_are_none(given, audit):
    ids, vectors = list(given.vectors["item"]), list(given.vectors["item"].values())
    for vector in (None, [1.0], [1.0, math.nan, 1.0, 1.0], [math.inf] * 4):
        vectors[ids.index(3)] = vector
        version = small_root.write_vectors(given.store, "item", ids, vectors)
        found = audit(given, replace(given.model, item_factors_version=version))
        assert found.max_residual["item"] == math.inf
        assert not found.holds


def a_bound_below_the_residual(given, audit):
    entries = small_root.ledger_of(given.store, given.model)
    worst = max(range(len(entries)), key=lambda at: entries[at][2])
    side, id, bound = entries[worst]

    def found(entry):
        lowered = [*entries[:worst], (side, id, entry), *entries[worst + 1 :]]
        return audit(given, with_ledger(given, lowered))

    assert found(bound * 0.99).failures == ["1 ledger bounds are below the residual"]
    assert found(bound * (1 - 1e-7)).holds  # rounding


def bounds_that_are_no_numbers(given, audit):
    entries = small_root.ledger_of(given.store, given.model)
    for bound in (math.nan, None):
        changed = [(*entries[0][:2], bound), *entries[1:]]
        found = audit(given, with_ledger(given, changed))
        assert found.failures == ["1 ledger bounds are below the residual"]


def a_ledger_of_other_rows(given, audit):
    entries = small_root.ledger_of(given.store, given.model)
    changed = [*entries[2:], ("user", "nobody", 1.0), ("shop", "u1", 1.0)]
    found = audit(given, with_ledger(given, changed))
    assert (found.ledger_missing, found.ledger_extra, found.ledger_below) == (2, 2, 0)
    assert not found.holds


def ratings_that_should_be_gone(given, audit):
    store = given.store
    small_root.request(store, "done", "user", user="u7")
    small_root.request(store, "done too", "item", item="4")
    small_root.request(store, "waiting", "user", user="u8")
    found = audit(given, small_root.honour(store, given.model, "done", "done too"))
    left = ((given.users == "u7") | (given.items == 4)).sum()
    assert found.tombstoned_ratings_found == left > 0
    # Their rows are in the factor tables still, and what u8 asked for is not in the model either.
    assert found.rows_without_ratings == 3
    assert not found.holds
    assert any("honoured requests" in clause for clause in found.failures)


def a_model_that_names_no_ratings(given, audit):
    with pytest.raises(InputError, match="version 1 names no ratings"):
        audit(given, replace(given.model, ratings_version=None))


CASES = [  # a case, the model, and whether the default tests run it on Spark
    (clean, "explicit", False),
    (clean, "implicit", True),
    (clean, "nonnegative", False),
    (changed_and_lost_rows, "explicit", True),
    (changed_and_lost_rows, "implicit", False),
    (rows_of_one_id, "explicit", False),
    (a_row_without_ratings, "explicit", False),
    (a_negative_row, "nonnegative", False),
    (vectors_that_are_none, "explicit", False),
    (a_bound_below_the_residual, "explicit", False),
    (bounds_that_are_no_numbers, "explicit", False),
    (a_ledger_of_other_rows, "explicit", False),
    (a_model_that_names_no_ratings, "explicit", False),
    (ratings_that_should_be_gone, "explicit", True),
]


def cases():
    for engine in ("embedded", "spark"):
        for case, mode, by_default in CASES:
            marks = [pytest.mark.spark] if engine == "spark" else []
            if engine == "spark" and not by_default:
                marks.append(pytest.mark.slow)
            yield pytest.param(
                engine, case, mode, id=f"{engine}: {case.__name__}, {mode}", marks=marks
            )


@pytest.mark.parametrize(("engine", "case", "mode"), cases())
def test_an_audit_finds(small, audit, case, mode, tmp_path):
    if case is ratings_that_should_be_gone:  # its requests would stay for the other cases
        given = build(tmp_path, MODES[mode], *random_ratings())
    else:
        given = small(mode)
    case(given, audit)


@pytest.mark.on_both
def test_the_job_writes_evidence_and_fails_a_model_that_does_not_hold(run_job, engine, tmp_path):
    given = build(tmp_path, MODES["explicit"], *random_ratings())
    store, root = given.store, ("--root", given.store.root)
    result = run_job("audit", *root)
    assert result.exit_code == 0, result.stderr
    assert result.json == {
        "model_version": 1,
        "max_residual": largest(given),
        "ledger_holds": True,
        "tombstoned_ratings_found": 0,
        "tau": 2e-2,
        "floor": given.model.floors,
        "holds": True,
        "rows": {"user": 40, "item": 25},
        "rows_without_ratings": 0,
        "ratings_without_rows": 0,
        "engine": engine,
    }
    entries = small_root.ledger_of(store, given.model)
    halved = [(side, id, bound / 2) for side, id, bound in entries]
    damaged = replace(with_ledger(given, halved), model_version=2, parent=1)
    models.publish(store, damaged)
    failed = run_job("audit", *root)
    assert failed.exit_code == 1
    assert failed.json["model_version"] == 2
    assert failed.json["max_residual"] == largest(given)
    assert (failed.json["ledger_holds"], failed.json["holds"]) == (False, False)
    (line,) = [line for line in failed.stderr.splitlines() if "fails" in line]
    assert line == "model version 2 fails: 65 ledger bounds are below the residual"
    assert run_job("audit", *root, "--model-version", 1).json == result.json

    evidence = DeltaRsStore(given.store.root).read("audits").to_pylist()
    assert Counter(row["model_version"] for row in evidence) == {1: 2, 2: 1}
    (row,) = [row for row in evidence if row["model_version"] == 2]
    assert row.pop("audited_at") is not None
    assert row == {
        "model_version": 2,
        "max_residual_user": result.json["max_residual"]["user"],
        "max_residual_item": result.json["max_residual"]["item"],
        "tau": 2e-2,
        "ledger_holds": False,
        "tombstoned_ratings_found": 0,
        "holds": False,
    }
