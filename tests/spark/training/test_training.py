"""Blocked training against a textbook ALS in float64, and the promises of a fit."""

import itertools

import numpy as np
import pytest

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.solver import MESSAGE_BYTES
from unlearn_spark.errors import InputError
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.training.training import fit_factors


def small_ratings(seed, n_users=40, n_items=25, share=0.3):
    """(user, item, rating) with gaps, a few non-positive values and one lonely user."""
    random = np.random.default_rng(seed)
    users, items = np.nonzero(random.random((n_users, n_items)) < share)
    values = np.round(random.normal(3.0, 1.5, len(users)), 1).astype(np.float32)
    lonely = (np.append(users, n_users), np.append(items, 0), np.append(values, np.float32(4)))
    return lonely


def textbook(users, items, values, x, y, settings, sweeps):
    """Plain alternation in float64, one dense solve a row; returns (x, y) with x solved last."""

    def solve(rows, others, fixed, out):
        gram = fixed.T @ fixed
        for row in np.unique(rows):
            mine = rows == row
            m, r = fixed[others[mine]], values[mine].astype(np.float64)
            if settings.implicit_prefs:
                c, p = settings.alpha * np.abs(r), r > 0
                a = gram + (m.T * c) @ m + settings.reg_param * p.sum() * np.eye(m.shape[1])
                b = m.T @ ((1 + c) * p)
            else:
                a = m.T @ m + settings.reg_param * len(r) * np.eye(m.shape[1])
                b = m.T @ r
            out[row] = np.linalg.solve(a, b)
        return out

    for _ in range(sweeps):
        x = solve(users, items, y, x.copy())
        y = solve(items, users, x, y.copy())
    return x, y


def frame(spark, users, items, values, kind):
    convert = (lambda i: f"id-{i}") if kind == "string" else int
    rows = [
        (convert(u), convert(i), float(r)) for u, i, r in zip(users, items, values, strict=True)
    ]
    return spark.createDataFrame(rows, f"user_id {kind}, item_id {kind}, rating float")


def predictions(result):
    x = {row.id: np.array(row.factors) for row in result.user_factors.collect()}
    y = {row.id: np.array(row.factors) for row in result.item_factors.collect()}
    key = sorted(x), sorted(y)
    return key, np.array([x[i] for i in key[0]]) @ np.array([y[i] for i in key[1]]).T


FEW = [(1, "bigint"), (3, "bigint")]
MORE = [(2, "string"), (60, "bigint")]


@pytest.mark.parametrize(
    ("implicit", "cuts"),
    [
        (False, FEW),
        pytest.param(True, FEW, marks=pytest.mark.slow),
        pytest.param(False, MORE, marks=pytest.mark.slow),
        pytest.param(True, MORE, marks=pytest.mark.slow),
    ],
    ids=["explicit", "implicit", "explicit, other cuts", "implicit, other cuts"],
)
def test_blocked_fit_equals_the_textbook_for_any_blocks_and_ids(spark, implicit, cuts):
    users, items, values = small_ratings(1)
    settings = AlsSettings(
        rank=4,
        reg_param=0.1,
        implicit_prefs=implicit,
        alpha=2.0,
        memory=0,
        max_sweeps=3,
        tol=1e-12,
        dtype="float64",
    )
    hashes = spark.range(25).selectExpr("xxhash64(id)").toPandas().to_numpy().ravel()
    y = initial_factors(hashes, 4, settings.seed, "item").astype(np.float64)
    x, y = textbook(users, items, values, np.zeros((41, 4)), y, settings, 3)
    for blocks, kind in cuts:
        result = fit_factors(
            frame(spark, users, items, values, kind),
            settings.model_copy(update={"user_blocks": blocks, "item_blocks": blocks}),
            # One part is swept within one task, several by cogroups.
            ExecutionSettings(part_ratings=-(-len(values) // min(blocks, 4))),
        )
        assert {layout.n_parts for layout in result.encoded.layouts.values()} == {min(blocks, 4)}
        (ids, _), scores = predictions(result)
        assert result.summary.sweeps == 3
        if kind == "bigint":  # the start follows the id, so a string id starts elsewhere
            np.testing.assert_allclose(scores, x[ids] @ y.T, rtol=2e-4, atol=2e-4)
        objectives = [report["objective"] for report in result.summary.history]
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(objectives))
        result.release()


def test_a_side_of_several_messages_is_swept_alike_in_one_task_and_in_many(spark):
    """Factors travel in rows of `MESSAGE_BYTES`; here both sides take two of them."""
    random = np.random.default_rng(5)
    n, rank = MESSAGE_BYTES // (4 * 32) + 100, 32
    users = np.repeat(np.arange(n), 4)
    items = (users + np.tile([0, 1, 7, 50], n)) % n
    ratings = frame(spark, users, items, random.normal(3, 1, len(users)), "bigint").persist()
    found = []
    for part_ratings in (len(users), len(users) // 2):
        result = fit_factors(
            ratings,
            AlsSettings(rank=rank, reg_param=0.1, max_sweeps=3, tol=1e-12),
            ExecutionSettings(part_ratings=part_ratings),
        )
        found.append(predictions(result))
        result.release()
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-3)


def test_it_converges_to_rows_that_solve_their_equations(spark):
    users, items, values = small_ratings(2)
    result = fit_factors(
        frame(spark, users, items, values, "bigint"),
        AlsSettings(rank=3, reg_param=0.1, tol=1e-3, max_sweeps=300),
    )
    assert result.summary.converged
    assert result.summary.max_residual <= 1e-3
    assert result.summary.ratings == len(values)
    assert result.rows["user"].count() == len(np.unique(users))
    # The stored norms against the equations written out.
    y = {row.id: np.array(row.factors) for row in result.item_factors.collect()}
    for row in result.rows["user"].collect():
        mine = users == row.id
        m = np.array([y[i] for i in items[mine]])
        r = values[mine].astype(np.float64)
        b = m.T @ r
        gradient = m.T @ (m @ row.factors) + 0.1 * len(r) * np.array(row.factors) - b
        assert row.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-6, abs=1e-9)
        assert row.b_norm == pytest.approx(np.linalg.norm(b), rel=1e-9)
    # Starting from itself there is nothing to do; a new user gets factors, a vanished one leaves.
    kept = users != 3
    again = fit_factors(
        frame(
            spark,
            np.append(users[kept], 99),
            np.append(items[kept], 2),
            np.append(values[kept], 3.0),
            "bigint",
        ),
        AlsSettings(rank=3, reg_param=0.1, tol=1e-3, max_sweeps=300),
        warm_start=(result.user_factors, result.item_factors),
    )
    ids = {row.id for row in again.user_factors.collect()}
    assert 99 in ids
    assert 3 not in ids
    assert again.summary.sweeps < result.summary.sweeps
    with pytest.raises(InputError, match="rank"):
        fit_factors(
            frame(spark, users, items, values, "bigint"),
            AlsSettings(rank=5),
            warm_start=(result.user_factors, result.item_factors),
        )
    result.release()
    again.release()


@pytest.mark.slow
def test_noiseless_low_rank_data_is_recovered(spark):
    random = np.random.default_rng(4)
    truth = random.normal(size=(30, 2)) @ random.normal(size=(20, 2)).T
    users, items = np.nonzero(random.random(truth.shape) < 0.7)
    result = fit_factors(
        frame(spark, users, items, truth[users, items], "bigint"),
        AlsSettings(rank=2, reg_param=1e-7, tol=1e-5, max_sweeps=200, dtype="float64"),
    )
    _, scores = predictions(result)
    assert np.abs(scores - truth).max() < 1e-2 * np.abs(truth).max()
    result.release()


def test_no_ratings_is_said(spark):
    empty = spark.createDataFrame([], "user_id bigint, item_id bigint, rating float")
    with pytest.raises(InputError, match="no ratings"):
        fit_factors(empty, AlsSettings())


def test_settings_of_a_step_leave_the_session_as_it_was(spark):
    ours = {"spark.sql.shuffle.partitions": "3", "spark.unlearn.of.nobody": "7"}
    before = {key: spark.conf.get(key, None) for key in ours}
    with session_conf(spark, {"spark.sql.warehouse.dir": "forbidden to change", **ours}):
        assert {key: spark.conf.get(key) for key in ours} == ours
        assert spark.conf.get("spark.sql.warehouse.dir") != "forbidden to change"
    assert {key: spark.conf.get(key, None) for key in ours} == before
    with pytest.raises(RuntimeError), session_conf(spark, ours):
        raise RuntimeError
    assert {key: spark.conf.get(key, None) for key in ours} == before
