"""Factors that were trained elsewhere, here by textbook NumPy: kept or converged, and refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from embedded.small_root import build, equations, random_ratings, request
from unlearn_spark.config import Settings
from unlearn_spark.embedded.audit import audit
from unlearn_spark.embedded.importing import adopt_factors, import_factors
from unlearn_spark.errors import InputError, TableMissingError
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

RANK = 4
SETTINGS = {"reg_param": 0.3, "rank": RANK}
MODES = {
    "explicit": SETTINGS,
    "implicit": {**SETTINGS, "implicit_prefs": True, "alpha": 2.0},
    "nonnegative": {**SETTINGS, "nonnegative": True},
}


def als_of(**settings):
    return Settings.model_validate({"als": settings}).als


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """By mode a root with factors that solve its ratings."""
    roots = {}

    def of(mode):
        if mode not in roots:
            folder = tmp_path_factory.mktemp(mode)
            roots[mode] = build(folder, als_of(**MODES[mode]), *random_ratings(), sweeps=200)
        return roots[mode]

    return of


def ratings_of(small, values=None):
    return pa.table(
        {
            "user_id": small.users.tolist(),
            "item_id": small.items.tolist(),
            "rating": small.values if values is None else values,
        }
    ).to_batches()


def given_of(vectors):
    return {
        side: (pa.array(list(rows)), np.array(list(rows.values()), np.float32))
        for side, rows in vectors.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_factors_that_solve_the_equations_are_kept(solved, mode):
    small = solved(mode)
    als = als_of(**MODES[mode], tol=1e-4)
    adopted = adopt_factors(ratings_of(small), given_of(small.vectors), als, 2)
    summary = adopted.fitted.summary
    assert summary.converged
    assert summary.sweeps == 0
    assert summary.max_residual == adopted.residual_before < 1e-4
    assert adopted.without_factors == adopted.without_ratings == {"user": 0, "item": 0}
    assert adopted.rows_over(1e-4) == {"user": 0, "item": 0}
    assert sum(adopted.rows_over(0).values()) > 0
    for side, rows in small.vectors.items():
        ids, factors = adopted.fitted.ids[side].to_pylist(), adopted.fitted.factors[side]
        assert {id: x.tolist() for id, x in zip(ids, factors, strict=True)} == {
            id: x.tolist() for id, x in rows.items()
        }
    # The check can fail: another lambda is another model.
    other = als.model_copy(update={"reg_param": 0.6})
    wrong = adopt_factors(ratings_of(small), given_of(small.vectors), other)
    assert wrong.residual_before > 1e-2
    assert not wrong.fitted.summary.converged


def objective(small, vectors, als):
    """The two objectives, written out over all pairs."""
    known = {side: sorted(rows) for side, rows in vectors.items()}
    x, y = (np.array([vectors[s][id] for id in known[s]], np.float64) for s in ("user", "item"))
    r, seen = np.zeros((len(x), len(y))), np.zeros((len(x), len(y)), bool)
    at = (np.searchsorted(known["user"], small.users), np.searchsorted(known["item"], small.items))
    r[at], seen[at] = small.values, True
    if als.implicit_prefs:
        counted = seen & (r > 0)
        loss = ((1 + als.alpha * np.abs(r)) * (counted - x @ y.T) ** 2).sum()
    else:
        counted = seen
        loss = (seen * (r - x @ y.T) ** 2).sum()
    penalty = counted.sum(1) @ (x**2).sum(1) + counted.sum(0) @ (y**2).sum(1)
    return loss + als.reg_param * penalty


@pytest.mark.parametrize("mode", ["explicit", "implicit"])
def test_objective_of_factors_as_they_are(solved, mode):
    small, als = solved(mode), als_of(**MODES[mode])
    rng = np.random.default_rng(2)
    vectors = {
        side: {id: rng.normal(size=RANK).astype(np.float32) for id in rows}
        for side, rows in small.vectors.items()
    }
    adopted = adopt_factors(ratings_of(small), given_of(vectors), als)
    wanted = objective(small, vectors, als)
    assert adopted.fitted.summary.objective == pytest.approx(wanted, rel=1e-5)
    assert not adopted.fitted.summary.converged


def test_converging_starts_where_the_factors_are_and_new_rows_start_afresh(solved):
    small, als = solved("explicit"), als_of(**SETTINGS, tol=1e-5)
    vectors = {side: dict(rows) for side, rows in small.vectors.items()}
    for user in list(vectors["user"])[:7]:
        del vectors["user"][user]
    del vectors["item"][4]
    with pytest.raises(InputError, match=r"7 of 40 rated users and 1 of 25 .* --converge"):
        adopt_factors(ratings_of(small), given_of(vectors), als)
    partly = adopt_factors(ratings_of(small), given_of(vectors), als, converge=True)
    assert partly.without_factors == {"user": 7, "item": 1}
    summary = partly.fitted.summary
    assert summary.converged
    assert summary.sweeps > 1
    assert summary.max_residual <= als.tol < partly.residual_before

    fitted = partly.fitted
    complete = {
        side: dict(zip(fitted.ids[side].to_pylist(), fitted.factors[side], strict=True))
        for side in vectors
    }
    complete["user"]["stranger"] = np.ones(RANK, np.float32)
    scanned = []
    again = adopt_factors(
        ratings_of(small), given_of(complete), als, converge=True, on_scan=scanned.append
    )
    assert again.fitted.summary.sweeps == 1  # it starts where the first one ended
    assert scanned == [again.residual_before]
    assert again.without_ratings == {"user": 1, "item": 0}
    assert "stranger" not in again.fitted.ids["user"].to_pylist()


def test_factors_that_do_not_belong_are_refused(solved):
    small, als = solved("explicit"), als_of(**SETTINGS)
    given = given_of(small.vectors)
    far = {**given, "user": (pa.array([f"far{n}" for n in range(40)]), given["user"][1])}
    signs = {"user": (given["user"][0], np.abs(given["user"][1])), "item": given["item"]}
    negative = int((given["item"][1] < 0).any(axis=1).sum())
    for converge in (False, True):
        with pytest.raises(InputError, match="none of the 40 rated users has factors"):
            adopt_factors(ratings_of(small), far, als, converge=converge)
        positive = als.model_copy(update={"nonnegative": True})
        with pytest.raises(InputError, match=f"0 users and {negative} items have negative factors"):
            adopt_factors(ratings_of(small), signs, positive, converge=converge)
    with pytest.raises(InputError, match=r"ratings are all zero .* factors are not"):
        adopt_factors(ratings_of(small, np.zeros(len(small.values), np.float32)), given, als)


# --- the job -------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    """A function that writes factors to a file, and returns its path."""

    def having(vectors):
        arrays = {}
        for side, (ids, factors) in given_of(vectors).items():
            texts = np.array([str(id) for id in ids.to_pylist()])
            arrays |= {f"{side}_ids": texts, f"{side}_factors": factors}
        np.savez(tmp_path / "model.npz", **arrays)
        return str(tmp_path / "model.npz")

    return having


def run(store, path, converge, **settings):
    lines: list[str] = []
    found = import_factors(
        store, Settings.model_validate(settings), path, "npz", converge, lines.append, 2
    )
    return found, lines


def test_an_imported_model_is_published_and_audits_clean(tmp_path, file):
    small = build(tmp_path, als_of(**SETTINGS), *random_ratings())
    request(small.store, "r", "user", user="u3")
    path = file(small.vectors)
    als = {**SETTINGS, "rank": 9, "tol": 1e-4}
    found, lines = run(small.store, path, True, als=als)
    version = models.published(small.store)
    assert (version.kind, version.model_version, version.parent) == ("import", 2, 1)
    assert version.als.rank == RANK
    assert version.certificate["holds"]
    assert audit(small.store, version, 1).holds
    assert lines[:2] == [
        f"{path}: 40 users and 25 items of rank 4",
        "als.rank = 9 is not used: the factors have 4",
    ]
    assert lines[2].startswith("largest residual ")
    assert lines[-1].startswith("converged: largest residual ")
    assert list(found) == [
        "model_version",
        "rank",
        "users",
        "items",
        "ratings",
        "sweeps",
        "converged",
        "objective",
        "max_residual",
        "seconds",
        "sweep_seconds",
        "encode_seconds",
        "residual_before",
        "rows_without_factors",
        "factors_without_ratings",
        "rows_over_tau",
    ]
    assert found["users"] == 39
    assert found["factors_without_ratings"] == {"user": 1, "item": 0}
    assert found["max_residual"] <= 1e-4 < found["residual_before"]


def test_factors_that_are_kept_are_judged(tmp_path, file):
    small = build(tmp_path, als_of(**SETTINGS), *random_ratings(), sweeps=2)
    store = small.store
    path = file(small.vectors)
    found, lines = run(store, path, False, als=SETTINGS, unlearn={"tau": 1e-3})
    assert "residual_before" not in found
    assert (found["sweeps"], found["converged"]) == (0, False)
    over = small.residuals()
    floors = models.published(store).floors
    assert floors["user"] > 0
    assert found["rows_over_tau"]["item"] == 0  # solved last
    assert 0 < found["rows_over_tau"]["user"] <= sum(r > 1e-3 for r in over.values())
    assert "exceed unlearn.tau = 1.0e-03: the first night will re-solve them" in lines[-1]
    assert not models.published(store).certificate["holds"]
    found, lines = run(store, path, False, als=SETTINGS, unlearn={"tau": 1e3})
    assert lines[-1] == "no residual exceeds unlearn.tau = 1.0e+03: nights need no repair first"
    found, lines = run(store, path, True, als={**SETTINGS, "max_sweeps": 1}, unlearn={"tau": 1e-3})
    assert lines[-1].startswith("stopped at als.max_sweeps = 1 with residual ")


def test_without_ratings_there_is_nothing_to_import(tmp_path, file):
    path = file({side: {"a": np.ones(RANK)} for side in ("user", "item")})
    with pytest.raises(TableMissingError, match="run job ingest_ratings first"):
        run(DeltaRsStore(str(tmp_path / "none")), path, False)


def test_the_textbook_here_is_the_textbook():
    rng = np.random.default_rng(0)
    m, r = rng.normal(size=(5, 2)), rng.normal(size=5)
    a, b = equations(m, r, als_of(rank=2, reg_param=0.5))
    np.testing.assert_allclose(a, sum(np.outer(y, y) for y in m) + 2.5 * np.eye(2))
    np.testing.assert_allclose(b, sum(v * y for v, y in zip(r, m, strict=True)))
