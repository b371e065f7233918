"""Nights of deletions and updates on real tables, each checked by the independent scan."""

import csv
from dataclasses import replace

import numpy as np
import pytest

from unlearn_spark.core import rounds
from unlearn_spark.core.rounds import Policy
from unlearn_spark.spark.night.rounds import Frontier
from unlearn_spark.tables import models, ratings, receipts

TAU = 2e-2
COMMON = ["als.rank=4", "als.reg_param=0.1", "als.tol=5e-3", "als.alpha=2.0", f"unlearn.tau={TAU}"]


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return str(path)


@pytest.fixture
def nights(tmp_path, run_job, store):
    """A function that runs a job on this root and returns its JSON."""

    def job(name, *arguments, sets=()):
        options = [word for value in [*COMMON, *sets] for word in ("--set", value)]
        done = run_job(name, "--root", store.root, *options, *arguments)
        assert done.exit_code == 0, done.stderr
        return done.json

    return job


def data_set(seed=0, users=60, items=30, n=700):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(users, 2)), random.normal(size=(items, 2))
    for pair in random.permutation(users * items)[:n]:
        user, item = divmod(int(pair), items)
        value = 3 + x[user] @ y[item] * 0.5 + random.normal() * 0.3
        yield f"u{user}", f"i{item}", round(value, 2), 1_500_000_000 + int(pair)


def requests(path, rows):
    header = "request_id,scope,user_id,item_id,from_ts,to_ts,requested_at"
    return write(path, header, [(*row, 1_700_000_000) for row in rows])


def files_by_block(store, version, table="user_factors"):
    rows = store.read(table, version).selectExpr("block", "_metadata.file_name AS file")
    return {(row.block, row.file) for row in rows.distinct().collect()}


@pytest.mark.slow
@pytest.mark.parametrize("implicit", [False, True])
def test_nights_in_a_row_keep_the_certificate(spark, store, nights, tmp_path, implicit):
    sets = [f"als.implicit_prefs={str(implicit).lower()}", "als.user_blocks=16"]

    def job(name, *arguments, more=()):
        return nights(name, *arguments, sets=[*sets, *more])

    header = "user_id,item_id,rating,rated_at"
    rows = list(data_set())
    job("ingest_ratings", "--input", write(tmp_path / "r.csv", header, rows), "--format", "csv")
    job("train")
    first = models.published(store)
    assert job("unlearn")["requests"] == 0
    assert models.published(store) == first

    pair = next(row for row in rows if row[0] not in ("u5", "u9"))
    asked = [
        ("a", "user", "u5", "", "", ""),
        ("b", "rating", pair[0], pair[1], "", ""),
        ("c", "window", "u9", "", 1_500_000_000, 1_500_000_290),
        ("d", "user", "nobody", "", "", ""),
        ("e", "user", "u5", "", "", ""),  # overlaps with a
    ]
    job("ingest_tombstones", "--input", requests(tmp_path / "t1.csv", asked))
    night = job("unlearn")
    gone = {row[:2] for row in rows if row[0] == "u5" or row[:2] == pair[:2]}
    gone |= {row[:2] for row in rows if row[0] == "u9" and row[3] < 1_500_000_290}
    assert night["requests"] == 5
    assert night["ratings_removed"] == len(gone)
    assert night["max_residual"] <= TAU
    answers = {r.request_id: r.ratings_removed for r in receipts_of(store)}
    assert answers["d"] == 0
    assert answers["a"] == answers["e"] == sum(row[0] == "u5" for row in rows)
    left = {(r.user_id, r.item_id) for r in ratings.read(store).collect()}
    assert left == {row[:2] for row in rows} - gone
    assert job("audit")["holds"]
    if not implicit:
        published = models.published(store)
        before = files_by_block(store, first.user_factors_version)
        after = files_by_block(store, published.user_factors_version)
        rewritten = {block for block, _ in after - before}
        assert len(rewritten) <= night["blocks_written"]["user"]

    # The last rating of an item, a whole item, new users, and a corrected value, the same night.
    asked = [("f", "item", "", "i7", "", ""), ("g", "user", "u11", "", "", "")]
    job("ingest_tombstones", "--input", requests(tmp_path / "t2.csv", asked))
    late = [
        ("new-user", "i3", 4.0, 1_710_000_000),
        ("new-user", "new-item", 2.0, 1_710_000_000),
        ("u20", "new-item", 3.5, 1_710_000_000),
        (rows[3][0], rows[3][1], 1.0, 1_710_000_000),
        ("u5", "i3", 5.0, 1_710_000_000),  # refused: that user asked to be forgotten
    ]
    source = write(tmp_path / "n.csv", header, late)
    taken = job("ingest_ratings", "--input", source, "--format", "csv")
    assert taken["quarantined"] >= 1
    night = job("update")
    assert night["requests"] == 2
    audit = job("audit")
    assert audit["holds"]
    assert audit["tombstoned_ratings_found"] == 0
    items = {r.id for r in store.read("item_factors").collect()}
    assert "i7" not in items
    assert "new-item" in items

    # Many at once, and a loop that is not allowed to do it in rounds: everything is swept.
    asked = [(f"m{n}", "user", f"u{n}", "", "", "") for n in range(21, 40)]
    job("ingest_tombstones", "--input", requests(tmp_path / "t3.csv", asked))
    night = job("unlearn", more=["unlearn.max_rounds=1"])
    assert night["sweeps"] > 0
    assert job("audit")["holds"]
    assert store.read("rating_changes").count() == 0


@pytest.mark.slow
def test_a_first_night_that_sweeps_everything(store, nights, tmp_path):
    header = "user_id,item_id,rating,rated_at"
    rows = list(data_set(1))
    nights("ingest_ratings", "--input", write(tmp_path / "r.csv", header, rows), "--format", "csv")
    nights("train")
    asked = [(f"m{n}", "user", f"u{n}", "", "", "") for n in range(5, 25)]
    asked += [("none", "user", "nobody", "", "", "")]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    night = nights("unlearn", sets=["unlearn.max_rounds=1", "unlearn.tau=6e-3"])
    assert night["sweeps"] > 0
    assert nights("audit")["holds"]
    # A request that removes nothing still gets its answer, and nothing else changes.
    nights(
        "ingest_tombstones",
        "--input",
        requests(tmp_path / "t2.csv", [("later", "user", "nobody", "", "", "")]),
    )
    night = nights("unlearn")
    assert (night["requests"], night["ratings_removed"], night["rounds"]) == (1, 0, 0)
    assert {r.request_id: r.ratings_removed for r in receipts_of(store)}["later"] == 0


@pytest.mark.slow
def test_a_large_night_is_swept_at_once(store, nights, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "POLICY", Policy(large_changes=100))
    rows = list(data_set(8))
    trained(nights, tmp_path, rows)
    asked = [(f"m{n}", "user", f"u{n}", "", "", "") for n in range(5, 20)]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    late = [("new-user", "i2", 5.0, 1_700_001_000), ("new-user", "new-item", 1.0, 1_700_001_000)]
    source = write(tmp_path / "n.csv", "user_id,item_id,rating,rated_at", late)
    nights("ingest_ratings", "--input", source, "--format", "csv")
    gone = [row for row in rows if ("user", row[0]) in {scope[1:3] for scope in asked}]
    night = nights("unlearn")
    assert (night["rounds"], night["ratings_removed"], night["ratings_added"]) == (0, len(gone), 2)
    assert night["sweeps"] == night["work_sweeps"] > 0
    assert not {row[0] for row in gone} & ids(store, "user")
    assert "new-item" in ids(store, "item")
    answers = {r.request_id: r.ratings_removed for r in receipts_of(store)}
    assert sum(answers.values()) == len(gone)
    audit = nights("audit")
    assert audit["holds"]
    assert audit["tombstoned_ratings_found"] == 0
    assert ratings.read(store).count() == len(rows) + 2 - len(gone)
    # A small night goes on from its ledger.
    asked = [("one", "user", "u30", "", "", "")]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t2.csv", asked))
    assert nights("unlearn")["rounds"] > 0
    assert nights("audit")["holds"]


@pytest.mark.slow
def test_nights_by_bounds_solve_what_is_over_tau(store, nights, tmp_path):
    rows = list(data_set(9))
    low = 1e-3
    sets = ["als.user_blocks=16", "als.item_blocks=16", f"als.tol={low / 10}"]
    trained(nights, tmp_path, rows, sets)

    def forget(request, row, tau):
        asked = [(request, "rating", *row[:2], "", "")]
        nights("ingest_tombstones", "--input", requests(tmp_path / f"{request}.csv", asked))
        night = nights("unlearn", sets=["unlearn.direct_rows=threshold", f"unlearn.tau={tau}"])
        audit = nights("audit")
        assert (audit["holds"], audit["ledger_holds"]) == (True, True)
        largest = max(audit["max_residual"].values())
        assert largest <= night["max_residual"] <= tau
        return night

    assert forget("tight", rows[0], low)["rounds"] > 0
    # So loose that none gets over it, the changes of the first night among them.
    assert forget("loose", rows[1], 0.9)["rounds"] == 0
    quiet = models.published(store)
    sizes = models.sizes(store, quiet)
    assert sizes == models.sizes(store, replace(quiet, metrics={}))
    assert sizes.ratings == len(rows) - 2
    # A request that covers nothing is answered.
    assert forget("nobody", ("nobody", rows[0][1]), 0.9)["requests"] == 1
    assert {r.request_id: r.ratings_removed for r in receipts_of(store)}["nobody"] == 0
    # A lower tau than the version promises: an entry over it may lie anywhere.
    assert quiet.certificate["max_residual"] > low
    assert forget("lower", rows[2], low)["rounds"] > 0


def receipts_of(store):
    return receipts.read(store, models.published(store).receipts_version).collect()


def trained(job, path, rows, sets=()):
    header = "user_id,item_id,rating,rated_at"
    job("ingest_ratings", "--input", write(path / "r.csv", header, rows), "--format", "csv")
    job("train", sets=sets)


def ids(store, side):
    model = models.published(store)
    frame = models.read_factors(store, model)[0 if side == "user" else 1]
    return {row.id for row in frame.select("id").collect()}


@pytest.mark.slow
def test_the_only_rater_of_many_items_takes_them_along(store, nights, tmp_path):
    rows = list(data_set(2))
    alone = [("solo", f"rare{n}", 4.0, 1_600_000_000) for n in range(6)]
    trained(nights, tmp_path, [*rows, *alone, ("solo", "i1", 3.0, 1_600_000_000)])
    assert "rare0" in ids(store, "item")
    asked = [("q", "user", "solo", "", "", "")]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    night = nights("unlearn")
    assert night["ratings_removed"] == 7
    assert "solo" not in ids(store, "user")
    assert not {row[1] for row in alone} & ids(store, "item")
    assert "i1" in ids(store, "item")
    assert nights("audit")["holds"]


@pytest.mark.slow
def test_a_user_who_comes_back_is_learnt_from_the_new_ratings_alone(store, nights, tmp_path):
    rows = list(data_set(3))
    trained(nights, tmp_path, rows)
    asked = [("go", "user", "u4", "", "", "")]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    nights("unlearn")
    assert "u4" not in ids(store, "user")
    back = write(
        tmp_path / "back.csv",
        "request_id,scope,user_id,item_id,from_ts,to_ts,requested_at",
        [("back", "reinstate", "u4", "", "", "", 1_700_000_500)],
    )
    nights("ingest_tombstones", "--input", back)
    late = [("u4", "i2", 5.0, 1_700_001_000), ("u4", "i3", 1.0, 1_700_001_000)]
    source = write(tmp_path / "n.csv", "user_id,item_id,rating,rated_at", late)
    taken = nights("ingest_ratings", "--input", source, "--format", "csv")
    assert (taken["ratings_written"], taken["quarantined"]) == (2, 0)
    night = nights("update")
    assert night["ratings_added"] == 2
    model = models.published(store)
    users = models.read_factors(store, model)[0]
    (row,) = users.where("id = 'u4'").collect()
    assert row.n_ratings == 2
    audit = nights("audit")
    assert audit["holds"]
    assert audit["tombstoned_ratings_found"] == 0


@pytest.mark.slow
def test_the_same_request_twice_is_honoured_once(store, nights, tmp_path):
    rows = list(data_set(4))
    trained(nights, tmp_path, rows)
    asked = [("same", "user", "u6", "", "", "")]
    first = nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked * 2))
    assert first["accepted"] == 1
    nights("unlearn")
    published = models.published(store)
    again = nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    assert again["accepted"] == 0
    assert nights("unlearn")["requests"] == 0
    assert models.published(store) == published
    assert [answer.request_id for answer in receipts_of(store)] == ["same"]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["user", "item"])
def test_everything_of_a_side_is_refused_in_one_line(store, nights, run_job, tmp_path, side):
    rows = list(data_set(5, users=6, items=5, n=20))
    trained(nights, tmp_path, rows)
    published = models.published(store)
    names = sorted({row[0 if side == "user" else 1] for row in rows})
    cells = [(name, "") if side == "user" else ("", name) for name in names]
    asked = [(f"q{n}", side, *cell, "", "") for n, cell in enumerate(cells)]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    refused = run_job("unlearn", "--root", store.root)
    assert "remove every rating" in refused.error
    assert models.published(store) == published


@pytest.mark.slow
def test_a_night_does_not_depend_on_blocks_or_on_the_order_of_requests(
    spark, nights, store, tmp_path
):
    rows = list(data_set(6))
    asked = [(f"q{n}", "user", f"u{n}", "", "", "") for n in (3, 8, 13)]
    asked += [("pair", "rating", rows[0][0], rows[0][1], "", ""), ("i", "item", "", "i9", "", "")]
    tight = ["als.tol=1e-6", "unlearn.tau=1e-5", "als.max_sweeps=300"]
    found = []
    for turn, blocks in enumerate((2, 16)):
        root = ["--root", f"{store.root}-{turn}"]

        def job(name, *arguments, sets=(), root=root):
            return nights(name, *arguments, *root, sets=sets)

        sets = [*tight, f"als.user_blocks={blocks}", f"als.item_blocks={blocks}"]
        trained(job, tmp_path, rows if turn else rows[::-1], sets)
        order = asked if turn else asked[::-1]
        job("ingest_tombstones", "--input", requests(tmp_path / f"t{turn}.csv", order))
        night = job("unlearn", sets=tight)
        assert night["max_residual"] <= 1e-5
        factors = spark.read.format("delta").load(f"{store.root}-{turn}/user_factors")
        found.append({row.id: np.array(row.factors) for row in factors.collect()})
    assert found[0].keys() == found[1].keys()
    for user, row in found[0].items():
        np.testing.assert_allclose(row, found[1][user], atol=2e-3)


@pytest.mark.slow
def test_large_patches_are_what_is_over_tau_and_keep_the_certificate(nights, tmp_path, monkeypatch):
    chosen = []

    def resolve(self, patch, *arguments):
        chosen.extend(patch.values())
        return original(self, patch, *arguments)

    original = Frontier.resolve
    monkeypatch.setattr(Frontier, "resolve", resolve)
    monkeypatch.setattr(rounds, "POLICY", Policy(patch_ratings=100))
    trained(nights, tmp_path, list(data_set(6)))
    asked = [("q", "user", "u3", "", "", "")]
    nights("ingest_tombstones", "--input", requests(tmp_path / "t.csv", asked))
    night = nights("unlearn")
    assert chosen[0] == "over_tau"
    assert night["sweeps"] == 0
    assert night["max_residual"] <= TAU
    audit = nights("audit")
    assert audit["holds"]
    assert max(audit["max_residual"].values()) <= TAU
