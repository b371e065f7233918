"""The comparison with retraining: its parts against NumPy, and a whole one on real tables."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from embedded.small_root import equations
from unlearn_spark import recommender
from unlearn_spark.audit import figures, membership
from unlearn_spark.audit.figures import DELETED, NEIGHBOURING, RANDOM, REACH, UNSEEN
from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded import training
from unlearn_spark.embedded.comparison import comparison
from unlearn_spark.embedded.comparison.comparison import direct_step, objective_of
from unlearn_spark.embedded.comparison.deletion import Deletion
from unlearn_spark.embedded.comparison.sample import draw_sample, score_sample
from unlearn_spark.embedded.ids import xxhash64_of
from unlearn_spark.embedded.score import Vectors
from unlearn_spark.errors import InputError
from unlearn_spark.tables import models

RANK = 3
USERS, ITEMS = 12, 8


def textbook_objective(x, y, rated, r, als):
    """x (m, k), y (n, k), rated bool (m, n), r (m, n): every term written out."""
    s = x @ y.T
    if als.implicit_prefs:
        liked = rated & (r > 0)
        confidence = 1 + als.alpha * np.abs(r) * rated
        data = (confidence * (liked - s) ** 2).sum()
    else:
        liked = rated
        data = ((r - s) ** 2 * rated).sum()
    penalty = (liked.sum(1) * (x**2).sum(1)).sum() + (liked.sum(0) * (y**2).sum(1)).sum()
    return data + als.reg_param * penalty


def model_of(x, y, users=range(USERS)):
    """A model with rows of some users and of all items."""
    users = list(users)
    return {
        "user": Vectors(pa.array(users), x[users].astype(np.float32)),
        "item": Vectors(pa.array([f"i{i}" for i in range(ITEMS)]), y.astype(np.float32)),
    }


@pytest.fixture(params=[False, True], ids=["explicit", "implicit"])
def world(request):
    """Ratings of 12 users and 8 items; all of user 0's and two of user 1's are deleted."""
    als = AlsSettings(
        rank=RANK, reg_param=0.2, implicit_prefs=request.param, alpha=1.5, dtype="float64"
    )
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(USERS, RANK)), rng.normal(size=(ITEMS, RANK))
    r = rng.normal(size=(USERS, ITEMS)).round(2)
    known = rng.random((USERS, ITEMS)) < 0.5
    known[0, :4], known[1, :3] = True, True
    gone = np.zeros_like(known)
    gone[0] = known[0]
    gone[1, :2] = True
    retained = known & ~gone

    def rows(mask):
        u, i = np.nonzero(mask)
        items = [f"i{each}" for each in i]
        return pa.table({"user_id": u, "item_id": items, "rating": r[u, i].astype(np.float32)})

    deletion = Deletion(
        before=None,
        after=SimpleNamespace(als=als),
        known=rows(known).select(["user_id", "item_id"]),
        retained=rows(retained),
        deleted=rows(gone).select(["user_id", "item_id"]),
    )
    return SimpleNamespace(
        als=als,
        x=x.astype(np.float32).astype(float),
        y=y.astype(np.float32).astype(float),
        r=r.astype(np.float32).astype(float),
        known=known,
        gone=gone,
        retained=retained,
        # Users and items without a retained rating do not count.
        u=retained.any(1),
        i=retained.any(0),
        deletion=deletion,
        encoded=training.encode(deletion.retained.to_batches(), als),
    )


def test_objective_agrees_with_numpy(world, monkeypatch):
    monkeypatch.setattr(comparison, "PIECE_RATINGS", 5)
    u, i = world.u, world.i
    part = (world.retained[u][:, i], world.r[u][:, i], world.als)
    for users in (range(USERS), [n for n in range(USERS) if n != 5]):
        model = model_of(world.x, world.y, users)
        # The missing rows of others are zeros.
        x = np.where(np.isin(np.arange(USERS), users)[:, None], world.x, 0)
        found = objective_of(world.encoded, model, world.als, 2)
        assert found == pytest.approx(textbook_objective(x[u], world.y[i], *part), rel=1e-5)


def test_direct_step_agrees_with_numpy(world):
    before = model_of(world.x, world.y, [n for n in range(USERS) if n != 5])
    stepped = direct_step(world.encoded, world.deletion, before, 2)
    exist = world.u & (np.arange(USERS) != 5)
    new_x, new_y = world.x.copy(), world.y.copy()
    new_x[1] = solved(world, world.y, world.i, world.retained[1], world.r[1])
    for item in np.flatnonzero(world.gone.any(0) & world.i):
        rated, r = world.retained[:, item], world.r[:, item]
        new_y[item] = solved(world, new_x, exist, rated, r)
    assert stepped["user"].ids.to_pylist() == np.flatnonzero(exist).tolist()
    assert stepped["item"].ids.to_pylist() == [f"i{n}" for n in np.flatnonzero(world.i)]
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(stepped["user"].factors, new_x[exist], **close)
    np.testing.assert_allclose(stepped["item"].factors, new_y[world.i], **close)
    assert not np.allclose(new_x[1], world.x[1])


def solved(world, others, exist, rated, r):
    """One row's normal equations written out, on the other side's rows that exist."""
    both = rated & exist
    return np.linalg.solve(*equations(others[both], r[both], world.als, others[exist]))


def test_the_sample_and_its_scores_agree_with_numpy(world):
    sample = draw_sample(world.deletion)
    pairs = {}
    for row in sample.pairs.to_pylist():
        pair = (row["user_id"], int(row["item_id"][1:]))
        pairs.setdefault(row["kind"], []).append((*pair, row["matched"]))
    assert {row[:2] for row in pairs[DELETED]} == {tuple(p) for p in np.argwhere(world.gone)}
    matched = [row for row in pairs[DELETED] if row[2]]
    assert sorted(row[0] for row in matched) == sorted(row[0] for row in pairs[UNSEEN])
    assert matched
    assert not any(world.known[row[:2]] for row in pairs[UNSEEN])
    assert all(row[2] for row in pairs[UNSEEN])
    affected = world.retained & ((np.arange(USERS) == 1)[:, None] | world.gone.any(0))
    assert {row[:2] for row in pairs[NEIGHBOURING]} == {tuple(p) for p in np.argwhere(affected)}
    assert {row[:2] for row in pairs[RANDOM]} == {
        (a, b) for a in np.flatnonzero(world.u) for b in np.flatnonzero(world.i)
    }
    found = [(row["kind"], str(row["user_id"]), row["item_id"]) for row in sample.pairs.to_pylist()]
    assert found == sorted(found)

    scores = score_sample(sample, model_of(world.x, world.y, [n for n in range(USERS) if n != 5]))
    u = sample.pairs["user_id"].to_numpy()
    i = np.array([int(item[1:]) for item in sample.pairs["item_id"].to_pylist()])
    without = np.where((np.arange(USERS) == 5)[:, None], 0, world.x)
    panel = world.u & (np.arange(USERS) != 5)
    expected = membership.attack_features(without[u], world.y[i], world.x[panel], world.y[world.i])
    np.testing.assert_allclose(scores.features, expected, rtol=1e-6, atol=1e-6)
    assert scores.scorable.tolist() == (u != 5).tolist()
    assert scores.kind.tolist() == [row[0] for row in found]


def test_a_match_is_the_nearest_in_popularity_that_was_never_rated():
    """60 items of falling popularity; user 0 rated some around a deleted one."""
    rows = [(user, item) for item in range(60) for user in range(1, 100 - item)]
    mine = [*range(10, 30), 35]
    known = pa.table(
        {
            "user_id": [u for u, _ in rows] + [0] * len(mine),
            "item_id": [i for _, i in rows] + mine,
        }
    )
    gone = pa.table({"user_id": [0, 0, 0], "item_id": [12, 22, 35]})
    values = pa.array(np.ones(known.num_rows, np.float32))
    keep = [
        not (u == 0 and i in (12, 22, 35)) for u, i in zip(*known.to_pydict().values(), strict=True)
    ]
    retained = known.append_column("rating", values).filter(pa.array(keep))
    pairs = draw_sample(Deletion(None, None, known, retained, gone)).pairs.to_pydict()
    counts = np.bincount(known["item_id"].to_numpy())
    hashes = xxhash64_of([pa.array(range(60))], figures.SAMPLE_SEED)
    order = np.lexsort((hashes, -counts)).tolist()
    expected = []
    for item in (12, 22, 35):
        place = order.index(item)
        free = [
            (abs(step), int(xxhash64_of([pa.array([0]), pa.array([match])])[0]), match)
            for step in range(-REACH, REACH + 1)
            if 0 <= place + step < 60 and (match := order[place + step]) not in mine
        ]
        expected.append(min(free)[2])
    unseen = [i for i, kind in zip(pairs["item_id"], pairs["kind"], strict=True) if kind == UNSEEN]
    assert sorted(unseen) == sorted(expected)


def test_a_sample_is_bounded_and_its_classes_may_be_empty():
    u, i = np.nonzero(np.ones((20, 20), bool))
    known = pa.table({"user_id": u, "item_id": i})
    retained = known.append_column("rating", pa.array(np.ones(400, np.float32)))
    retained = retained.filter(pa.array(u != 3))
    gone = known.filter(pa.array(u == 3))
    sample = draw_sample(Deletion(None, None, known, retained, gone), size=7)
    kinds = sample.pairs["kind"].to_pylist()
    counted = {kind: kinds.count(kind) for kind in (DELETED, UNSEEN, NEIGHBOURING, RANDOM)}
    assert counted == {DELETED: 7, UNSEEN: 0, NEIGHBOURING: 7, RANDOM: 7}
    assert not any(sample.pairs["matched"].to_pylist())


# --- the whole -----------------------------------------------------------------------------------


def test_a_night_is_compared_with_retraining(tmp_path, capsys):
    shop = recommender.open(
        tmp_path / "tables",
        "embedded",
        progress=(lines := []).append,
        rank=2,
        reg_param=0.1,
        tol=3e-2,
        tau=6e-2,
    )
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)), rng.normal(size=(20, 2))
    rows = [
        (f"u{u}", f"i{i}", round(3 + x[u] @ y[i] / 2, 2))
        for u, i in np.argwhere(rng.random((40, 20)) < 0.6)
    ]
    rng.shuffle(rows)
    rows = [(str(u), str(i), float(r)) for u, i, r in rows]
    held_out = tmp_path / "held.csv"
    text = "\n".join(["user_id,item_id,rating", *(f"{u},{i},{r}" for u, i, r in rows[:40])])
    held_out.write_text(text + "\n")
    users, items, values = zip(*rows[40:], strict=True)
    shop.ingest_ratings(pa.table({"user_id": users, "item_id": items, "rating": values}))
    shop.train()
    with pytest.raises(InputError, match="version 1 follows no trained version"):
        shop.audit(retrain=True)
    pairs = [row[:2] for row in rows[40:60]]
    night = shop.forget(users=["u3"], pairs=pairs)

    picture = tmp_path / "closeness.png"
    done = shop.audit(
        retrain=True, seeds=2, held_out=str(held_out), held_out_format="csv", plot=str(picture)
    )
    assert done.holds
    assert picture.read_bytes()[:4] == b"\x89PNG"
    found = done["comparison"]
    assert (found["before"], found["unlearned"]) == (1, 2)
    whole = sum(row[0] == "u3" for row in rows[40:])
    in_both = sum(user == "u3" for user, _ in pairs)
    assert found["ratings"]["deleted"] == night.ratings_removed == whole + 20 - in_both
    contestants = found["models"]
    assert list(contestants) == [
        "before",
        "rows_deleted",
        "direct_step",
        "warm_1",
        "warm_3",
        "warm_10",
        "unlearned",
        "retrained",
    ]
    # Plain sweeps never raise the objective, and every contestant starts from before.
    objectives = [
        contestants[name]["objective"] for name in ("before", "warm_1", "warm_3", "warm_10")
    ]
    assert objectives == sorted(objectives, reverse=True)
    assert contestants["direct_step"]["objective"] < contestants["before"]["objective"]
    assert contestants["rows_deleted"] == contestants["before"]
    assert [run["seed"] for run in contestants["retrained"]["runs"]] == [1, 2]
    assert all(run["converged"] for run in contestants["retrained"]["runs"])
    assert contestants["before"]["deleted_scorable"] == found["ratings"]["deleted"]
    assert contestants["unlearned"]["deleted_scorable"] == 20 - in_both
    assert contestants["unlearned"]["deleted_scorable"] == found["pairs"]["scorable_by_all"]
    assert all(0 < one["rmse"] < 2 for name, one in contestants.items() if name != "retrained")
    assert "rows_deleted" in capsys.readouterr().err
    assert lines[-1].startswith("retrained with seed 2: ")

    head = models.published(shop.store)
    models.publish(shop.store, replace(head, model_version=3, parent=2, kind="train"))
    models.publish(shop.store, replace(head, model_version=4, parent=3, kind="update"))
    with pytest.raises(InputError, match="version 4 removed nothing since version 3"):
        shop.audit(retrain=True)
    with pytest.raises(InputError, match=r"--held-out .*gone\.csv"):
        shop.audit(2, retrain=True, held_out=str(tmp_path / "gone.csv"))
