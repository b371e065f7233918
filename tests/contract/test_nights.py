"""Nights of deletions and updates on real tables, each checked by the independent scan and by an
outside reader of the tables."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from contract.nights import (
    SETTINGS,
    TAU,
    answers,
    as_table,
    data_set,
    factors,
    files_by_block,
    newest_versions,
    requests,
    stored_pairs,
)
from unlearn_spark.core import rounds
from unlearn_spark.core.rounds import Policy
from unlearn_spark.errors import InputError
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore

LATER = 1_710_000_000


def published(root):
    return models.published(DeltaRsStore(str(root)))


def holds(shop):
    found = shop.audit()
    return found.holds and found.ledger_holds and found.tombstoned_ratings_found == 0


def trained(open_shop, rows, root=None, **settings):
    shop = open_shop(root, **{**SETTINGS, **settings})
    shop.ingest_ratings(as_table(rows))
    shop.train()
    return shop


@pytest.mark.on_both(slow=True)
@pytest.mark.parametrize("implicit", [False, True])
def test_nights_in_a_row_keep_the_certificate(open_shop, tmp_path, implicit):
    root, rows = tmp_path / "tables", data_set()
    shop = trained(open_shop, rows, implicit_prefs=implicit, user_blocks=16)
    first, before = published(root), newest_versions(root)
    for idle in (shop.unlearn(), shop.update()):
        assert (idle.model_version, idle.requests) == (1, 0)
    assert newest_versions(root) == before

    pair = next(row for row in rows if row[0] not in ("u5", "u9"))
    early = 1_500_000_000, 1_500_000_290
    asked = requests(
        ("a", "user", "u5"),
        ("b", "rating", *pair[:2]),
        ("c", "window", "u9", None, *early),
        ("d", "user", "nobody"),
        ("e", "user", "u5"),  # overlaps with a
    )
    shop.ingest_tombstones(asked)
    night = shop.unlearn()
    gone = {row[:2] for row in rows if row[0] == "u5" or row[:2] == pair[:2]}
    gone |= {row[:2] for row in rows if row[0] == "u9" and row[3] < early[1]}
    assert (night.requests, night.ratings_removed) == (5, len(gone))
    assert night.requests_without_ratings == ["d"]
    assert night.max_residual <= TAU
    of_u5 = sum(row[0] == "u5" for row in rows)
    assert answers(root) == {"a": of_u5, "b": 1, "c": len(gone) - of_u5 - 1, "d": 0, "e": of_u5}
    assert stored_pairs(root) == {row[:2] for row in rows} - gone
    assert holds(shop)
    if not implicit:
        second = published(root)
        for side in ("user", "item"):
            table, field = f"{side}_factors", f"{side}_factors_version"
            old = files_by_block(root, table, getattr(first, field))
            new = files_by_block(root, table, getattr(second, field))
            rewritten = {block for block in old if old[block] != new.get(block)}
            assert len(rewritten) == night.blocks_written[side]
        packed = "rating_blocks"
        assert second.rating_blocks_version == first.rating_blocks_version
        assert files_by_block(root, packed, first.rating_blocks_version) == files_by_block(
            root, packed, second.rating_blocks_version
        )

    # The last rating of an item, a whole item, new users, and a corrected value, the same night.
    shop.ingest_tombstones(requests(("f", "item", None, "i7"), ("g", "user", "u11")))
    late = [
        ("new-user", "i3", 4.0, LATER),
        ("new-user", "new-item", 2.0, LATER),
        ("u20", "new-item", 3.5, LATER),
        (rows[3][0], rows[3][1], 1.0, LATER),
        ("u5", "i3", 5.0, LATER),  # refused: that user asked to be forgotten
    ]
    refused = [row for row in late if row[0] in ("u5", "u11") or row[1] == "i7"]
    assert shop.ingest_ratings(as_table(late)).quarantined == len(refused)
    assert shop.update().requests == 2
    assert holds(shop)
    items = factors(root, "item")
    assert "i7" not in items
    assert "new-item" in items

    # Many at once, and a loop that is not allowed to do it in rounds: everything is swept.
    shop.ingest_tombstones(requests(*[(f"m{n}", "user", f"u{n}") for n in range(21, 40)]))
    hasty = open_shop(root, **{**SETTINGS, "max_rounds": 1})
    assert hasty.unlearn().sweeps > 0
    assert holds(shop)
    assert not {f"u{n}" for n in range(21, 40)} & set(factors(root, "user"))
    store = DeltaRsStore(str(root))
    assert store.read("rating_changes", published(root).rating_changes_version).num_rows == 0


@pytest.mark.on_both(slow=True)
def test_only_the_blocks_of_a_deletion_are_written_anew(engine, open_shop, tmp_path):
    """Many blocks, one rating gone, and a tau that no other row gets over."""
    root, rows = tmp_path / "tables", data_set(7, users=200, items=60, n=3000)
    shop = trained(open_shop, rows, user_blocks=32, item_blocks=16)
    first = published(root)
    patient = open_shop(root, **{**SETTINGS, "tau": 0.9})
    night = patient.forget(pairs=[rows[0][:2]])
    assert night.blocks_written == {"user": 1, "item": 1}
    assert night.blocks_total == {"user": 32, "item": 16}
    second = published(root)
    tables = {
        "user_factors": 1,
        "item_factors": 1,
        "rating_blocks": 0,
        # Spark marks the rows in a deletion vector instead.
        "ratings": 1 if engine == "embedded" else 0,
    }
    for table, written in tables.items():
        versions = [getattr(model, f"{table}_version") for model in (first, second)]
        old, new = (files_by_block(root, table, version) for version in versions)
        assert old.keys() == new.keys()
        assert sum(old[block] != new[block] for block in old) == written, table
    assert holds(shop)


@pytest.mark.on_both(slow=True)
def test_a_night_that_gives_its_rounds_up_sweeps_everything(open_shop, tmp_path):
    root, rows = tmp_path / "tables", data_set(1)
    shop = trained(open_shop, rows)
    asked = [(f"m{n}", "user", f"u{n}") for n in range(5, 25)] + [("none", "user", "nobody")]
    shop.ingest_tombstones(requests(*asked))
    hasty = open_shop(root, **{**SETTINGS, "max_rounds": 1, "tau": 6e-3})
    assert hasty.unlearn().sweeps > 0
    assert holds(shop)
    # A request that removes nothing still gets its answer, and nothing else changes.
    before = published(root)
    shop.ingest_tombstones(requests(("later", "user", "nobody")))
    night = shop.unlearn()
    assert (night.requests, night.ratings_removed, night.rounds) == (1, 0, 0)
    assert answers(root)["later"] == 0
    after = published(root)
    for table in ("ratings", "user_factors", "item_factors", "rating_blocks"):
        name = f"{table}_version"
        assert files_by_block(root, table, getattr(before, name)) == files_by_block(
            root, table, getattr(after, name)
        )


@pytest.mark.on_both(slow=True)
def test_a_large_night_is_swept_at_once(open_shop, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "POLICY", Policy(large_share=0.05))
    root, rows = tmp_path / "tables", data_set(8)
    shop = trained(open_shop, rows)
    users = [f"u{n}" for n in range(5, 20)]
    shop.ingest_tombstones(requests(*[(f"r-{user}", "user", user) for user in users]))
    late = [("new-user", "i2", 5.0, LATER), ("new-user", "new-item", 1.0, LATER)]
    shop.ingest_ratings(as_table(late))
    gone = [row for row in rows if row[0] in users]
    night = shop.unlearn()
    assert (night.rounds, night.ratings_removed, night.ratings_added) == (0, len(gone), 2)
    assert night.sweeps == night.work_sweeps > 0
    assert not set(users) & set(factors(root, "user"))
    assert "new-item" in factors(root, "item")
    assert sum(answers(root).values()) == len(gone)
    assert holds(shop)
    assert len(stored_pairs(root)) == len(rows) + 2 - len(gone)
    # A small night goes on from its ledger.
    assert shop.forget(users=["u30"]).rounds > 0
    assert holds(shop)


@pytest.mark.on_both(slow=True)
def test_nights_by_bounds_solve_what_is_over_tau(open_shop, tmp_path):
    root, rows, low = tmp_path / "tables", data_set(9), 1e-3
    trained(open_shop, rows, user_blocks=16, item_blocks=16, tol=low / 10)

    def forget(pair, tau):
        shop = open_shop(root, **{**SETTINGS, "direct_rows": "threshold", "tau": tau})
        night = shop.forget(pairs=[pair])
        audit = shop.audit()
        assert (audit.holds, audit.ledger_holds) == (True, True)
        assert max(audit.max_residual.values()) <= night.max_residual <= tau
        return night

    assert forget(rows[0][:2], low).rounds > 0
    # So loose that none gets over it, the changes of the first night among them.
    assert forget(rows[1][:2], 0.9).rounds == 0
    quiet = published(root)
    assert quiet.sizes.ratings == len(rows) - 2
    # A request that covers nothing is answered.
    assert forget(("nobody", rows[0][1]), 0.9).requests == 1
    assert sorted(answers(root).values()) == [0, 1, 1]
    # A lower tau than the version promises: an entry over it may lie anywhere.
    assert quiet.certificate["max_residual"] > low
    assert forget(rows[2][:2], low).rounds > 0


@pytest.mark.on_both(slow=True)
def test_the_only_rater_of_many_items_takes_them_along(open_shop, tmp_path):
    root = tmp_path / "tables"
    alone = [("solo", f"rare{n}", 4.0, 1_600_000_000) for n in range(6)]
    rows = [*data_set(2), *alone, ("solo", "i1", 3.0, 1_600_000_000)]
    shop = trained(open_shop, rows)
    assert "rare0" in factors(root, "item")
    assert shop.forget(users=["solo"]).ratings_removed == 7
    assert "solo" not in factors(root, "user")
    items = set(factors(root, "item"))
    assert not {row[1] for row in alone} & items
    assert "i1" in items
    assert holds(shop)


@pytest.mark.on_both(slow=True)
def test_a_user_who_comes_back_is_learnt_from_the_new_ratings_alone(open_shop, tmp_path):
    root = tmp_path / "tables"
    shop = trained(open_shop, data_set(3))
    shop.ingest_tombstones(requests(("go", "user", "u4")))
    shop.unlearn()
    assert "u4" not in factors(root, "user")
    shop.ingest_tombstones(requests(("back", "reinstate", "u4"), at=1_700_000_500))
    late = [("u4", "i2", 5.0, LATER), ("u4", "i3", 1.0, LATER)]
    taken = shop.ingest_ratings(as_table(late))
    assert (taken.ratings_written, taken.quarantined) == (2, 0)
    assert shop.update().ratings_added == 2
    store, model = DeltaRsStore(str(root)), published(root)
    rows = store.read("user_factors", model.user_factors_version).to_pylist()
    assert [row["n_ratings"] for row in rows if row["id"] == "u4"] == [2]
    assert holds(shop)


@pytest.mark.on_both(slow=True)
def test_the_same_request_twice_is_honoured_once(open_shop, tmp_path):
    root = tmp_path / "tables"
    shop = trained(open_shop, data_set(4))
    asked = ("same", "user", "u6")
    assert shop.ingest_tombstones(requests(asked, asked)).accepted == 1
    shop.unlearn()
    before, versions = published(root), newest_versions(root)
    assert shop.ingest_tombstones(requests(asked)).accepted == 0
    assert shop.unlearn().requests == 0
    assert published(root) == before
    assert list(answers(root)) == ["same"]
    assert newest_versions(root) == versions


@pytest.mark.on_both(slow=True)
@pytest.mark.parametrize("side", ["user", "item"])
def test_everything_of_a_side_is_refused_in_one_line(open_shop, tmp_path, side):
    root, rows = tmp_path / "tables", data_set(5, users=6, items=5, n=20)
    shop = trained(open_shop, rows)
    before = published(root)
    names = sorted({row[0 if side == "user" else 1] for row in rows})
    with pytest.raises(InputError, match="remove every rating"):
        shop.forget(**{f"{side}s": names})
    assert published(root) == before
    assert stored_pairs(root) == {row[:2] for row in rows}


@pytest.mark.on_both(slow=True)
def test_a_night_does_not_depend_on_blocks_or_on_the_order_of_requests(open_shop, tmp_path):
    rows = data_set(6)
    asked = [(f"q{n}", "user", f"u{n}") for n in (3, 8, 13)]
    asked += [("pair", "rating", *rows[0][:2]), ("i", "item", None, "i9")]
    found = []
    for turn, blocks in enumerate((2, 16)):
        root = tmp_path / f"tables-{turn}"
        step = 1 if turn else -1
        settings = {"tol": 1e-6, "tau": 1e-5, "max_sweeps": 300}
        sizes = {"user_blocks": blocks, "item_blocks": blocks}
        shop = trained(open_shop, rows[::step], root, **settings, **sizes)
        shop.ingest_tombstones(requests(*asked[::step]))
        assert shop.unlearn().max_residual <= 1e-5
        found.append(factors(root, "user"))
    assert found[0].keys() == found[1].keys()
    for user, row in found[0].items():
        np.testing.assert_allclose(row, found[1][user], atol=2e-3)


@pytest.mark.on_both(slow=True)
def test_large_patches_are_what_is_over_tau_and_keep_the_certificate(
    engine, open_shop, monkeypatch
):
    module = "spark.night.rounds" if engine == "spark" else "embedded.rounds"
    frontier = importlib.import_module(f"unlearn_spark.{module}").Frontier
    chosen, original = [], frontier.resolve

    def resolve(self, patch, *arguments):
        chosen.extend(patch.values())
        return original(self, patch, *arguments)

    monkeypatch.setattr(frontier, "resolve", resolve)
    monkeypatch.setattr(rounds, "POLICY", Policy(patch_ratings=100))
    shop = trained(open_shop, data_set(6))
    night = shop.forget(users=["u3"])
    assert chosen[0] == "over_tau"
    assert night.sweeps == 0
    assert night.max_residual <= TAU
    audit = shop.audit()
    assert audit.holds
    assert max(audit.max_residual.values()) <= TAU


@pytest.mark.on_both(slow=True)
def test_a_night_goes_on_from_the_version_that_was_rolled_back_to(open_shop, tmp_path):
    """The tables still hold the versions in between as their newest."""
    root, rows = tmp_path / "tables", data_set(10)
    shop = trained(open_shop, rows)
    shop.ingest_ratings(as_table([("new-user", "i2", 5.0, LATER)]))
    assert shop.update().model_version == 2
    with_it = factors(root, "user")
    assert shop.rollback(1).model_version == 3
    assert with_it.keys() - factors(root, "user").keys() == {"new-user"}
    assert holds(shop)
    night = shop.forget(users=["u2"])
    assert (night.parent, night.model_version) == (3, 4)
    # What was ingested since the version that came back is news again.
    assert night.ratings_added == 1
    assert set(factors(root, "user")) == with_it.keys() - {"u2"}
    assert holds(shop)
    assert published(root).certificate["evidence"] == "ledger"
    with pytest.raises(InputError, match="forgot"):
        shop.rollback(2)
