"""Random histories of ratings, requests, reinstatements and re-ratings against a plain reading of
the rules: what remains in the table, and what a model may know, whichever way a night takes.

Every history has users and items of its own, and all of them go through the same jobs together, so
that two nights try forty histories. The ids of the two sides are of different types.
"""

from __future__ import annotations

import csv
import random
import shutil
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from contract.reference import Reference, Request
from unlearn_spark.core import rounds
from unlearn_spark.core.rounds import Policy
from unlearn_spark.tables import models, receipts
from unlearn_spark.tables.delta_rs import DeltaRsStore

TAU = 2e-2
RANK, REG_PARAM, ALPHA = 2, 0.1, 2.0
DAY = 86_400

HISTORIES = 40
KINDS = {"text": lambda name: f"u-{name}", "integer": int}


# --- random histories -----------------------------------------------------------------------------


class Histories:
    """Draws ratings and requests of many small worlds: two users and three items each."""

    def __init__(self, seed, user_kind, item_kind):
        self.random = random.Random(seed)
        self.named = {"user": KINDS[user_kind], "item": KINDS[item_kind]}
        self.n_requests = 0

    def _id(self, side, history):
        number = self.random.randrange(2 if side == "user" else 3)
        return self.named[side](10 * history + number + 1)

    def ratings(self, most):
        rows = [
            (
                self._id("user", history),
                self._id("item", history),
                self.random.randrange(1, 6),
                self.random.choice([None, *range(1, 9)]),
            )
            for history in range(HISTORIES)
            for _ in range(self.random.randrange(most + 1))
        ]
        # Of the same pair at the same time the later line wins, which the reference's order says.
        return rows

    def requests(self, share):
        drawn = []
        for history in range(HISTORIES):
            if self.random.random() > share:
                continue
            scope = self.random.choice(["user", "item", "rating", "window", "reinstate"])
            user = self._id("user", history) if scope != "item" else None
            item = self._id("item", history) if scope in ("item", "rating") else None
            if scope == "reinstate" and self.random.random() < 0.4:
                user, item = None, self._id("item", history)
            start = self.random.randrange(1, 8) if scope == "window" else None
            end = start + self.random.randrange(1, 5) if scope == "window" else None
            self.n_requests += 1
            name, at = f"r{self.n_requests}", self.random.randrange(1, 9)
            drawn.append(Request(name, scope, user, item, start, end, at))
        return drawn


def background(named):
    """Ratings that nobody asks about, so that the model never is of a few rows alone."""
    draw = np.random.default_rng(0)
    return [
        (named["user"](1000 + u), named["item"](1000 + i), int(draw.integers(1, 6)), 1)
        for u in range(12)
        for i in range(8)
        if draw.random() < 0.6
    ]


# --- through the jobs -----------------------------------------------------------------------------


@dataclass
class World:
    """The jobs on one root beside the reference."""

    run_job: object
    root: str
    folder: object
    sets: list[str]
    reference: Reference
    files: Counter = field(default_factory=Counter)

    def job(self, name, *arguments, sets=()):
        words = [word for value in (*self.sets, *sets) for word in ("--set", value)]
        done = self.run_job(name, "--root", self.root, *words, *arguments)
        assert done.exit_code == 0, done.stderr
        return done.json

    def _file(self, header, rows):
        path = self.folder / f"{len(list(self.folder.glob('*.csv')))}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([header.split(","), *rows])
        return path

    def ingest(self, rows):
        lines = [(u, i, v, "" if t is None else t * DAY) for u, i, v, t in rows]
        path = self._file("user_id,item_id,rating,rated_at", lines)
        report = self.job("ingest_ratings", "--input", path, "--format", "csv")
        parts = ("ratings_written", "superseded", "quarantined")
        assert report["ratings_read"] == len(rows) == sum(report[part] for part in parts)
        self.reference.ingest(rows)

    def ask(self, requests):
        seconds = [None if r.start is None else (r.start * DAY, r.end * DAY) for r in requests]
        lines = [
            (r.name, r.scope, r.user or "", r.item or "", *(span or ("", "")), r.at * DAY)
            for r, span in zip(requests, seconds, strict=True)
        ]
        header = "request_id,scope,user_id,item_id,from_ts,to_ts,requested_at"
        report = self.job("ingest_tombstones", "--input", self._file(header, lines))
        assert report["accepted"] == len(requests)
        self.reference.asked += requests


def residuals(pairs, users, items, implicit, floor):
    """||A x - b|| / max(||b||, floor) of the users, one by one from the definition."""
    gram = sum(np.outer(y, y) for y in items.values()) if implicit else 0
    for user, x in users.items():
        mine = {item: value for (owner, item), value in pairs.items() if owner == user}
        matrix, b = REG_PARAM * len(mine) * np.eye(RANK) + gram, np.zeros(RANK)
        for item, r in mine.items():
            y = items[item]
            matrix += (ALPHA * r if implicit else 1) * np.outer(y, y)
            b += (1 + ALPHA * r if implicit else r) * y
        yield np.linalg.norm(matrix @ x - b) / max(np.linalg.norm(b), floor)


def check(world, implicit):
    """What an outside reader sees is what the reference says."""
    store, reference = DeltaRsStore(world.root), world.reference
    table = store.read("ratings").to_pylist()
    found = {(row["user_id"], row["item_id"]): row["rating"] for row in table}
    assert len(found) == len(table)
    assert found == {pair: value for pair, (value, _) in reference.stored.items()}
    model = models.published(store)
    factors = {}
    for place, side in enumerate(("user", "item")):
        version = getattr(model, f"{side}_factors_version")
        kept = store.read(f"{side}_factors", version).to_pylist()
        factors[side] = {row["id"]: np.array(row["factors"], float) for row in kept}
        counts = Counter(pair[place] for pair in reference.in_model)
        assert {row["id"]: row["n_ratings"] for row in kept} == counts
    turned = {(item, user): value for (user, item), value in reference.in_model.items()}
    for pairs, side, other in (
        (reference.in_model, "user", "item"),
        (turned, "item", "user"),
    ):
        floor = model.floors[side]
        assert max(residuals(pairs, factors[side], factors[other], implicit, floor)) <= TAU * 1.01
    return model


@pytest.mark.on_both(slow=True)
@pytest.mark.parametrize(
    ("user_kind", "item_kind", "implicit"), [("text", "integer", False), ("integer", "text", True)]
)
def test_nights_keep_what_remains_and_nothing_else(
    run_job, tmp_path, monkeypatch, user_kind, item_kind, implicit
):
    draw = Histories(20 + implicit, user_kind, item_kind)
    settings = {"rank": RANK, "reg_param": REG_PARAM, "alpha": ALPHA, "tol": TAU / 4}
    settings["implicit_prefs"] = str(implicit).lower()
    sets = [f"als.{name}={value}" for name, value in settings.items()] + [f"unlearn.tau={TAU}"]
    world = World(run_job, str(tmp_path / "root"), tmp_path, sets, Reference())

    world.ingest(background(draw.named) + draw.ratings(6))
    world.ask(draw.requests(0.2))
    world.job("train")
    world.reference.train()
    check(world, implicit)
    world.ask(draw.requests(0.6))
    world.ingest(draw.ratings(2))
    world.ask(draw.requests(0.6))
    world.ingest(draw.ratings(2))

    pending = {r.name for r in world.reference.asked if r.scope != "reinstate"}
    world.reference.night()
    ways = {"rounds": np.inf, "at once": 0.0}
    for way, share in ways.items():
        with monkeypatch.context() as patch:
            policy = Policy(large_share=share, most_sweeps=1e9)
            patch.setattr(rounds, "POLICY", policy)
            copy = World(run_job, f"{world.root} {way}", tmp_path, sets, world.reference)
            shutil.copytree(world.root, copy.root)
            night = copy.job("unlearn", sets=["unlearn.max_rounds=200"])
        assert (night["sweeps"] > 0) == (way == "at once")
        assert night["requests"] == len(pending)
        model = check(copy, implicit)
        answers = receipts.read(DeltaRsStore(copy.root), model.receipts_version).to_pylist()
        assert {row["request_id"] for row in answers} == pending
        idle = sorted(row["request_id"] for row in answers if row["ratings_removed"] == 0)
        assert night["requests_without_ratings"] == idle

    # Go on from the night in rounds, by one that gives them up for whole sweeps.
    world.root = f"{world.root} rounds"
    world.ask(draw.requests(0.4))
    world.ingest(draw.ratings(1))
    world.job("update", sets=["unlearn.max_rounds=1", f"unlearn.tau={TAU / 2}"])
    world.reference.night()
    check(world, implicit)
    assert world.job("audit")["holds"]
    world.job("recommend", "--top", "2")
    listed = DeltaRsStore(world.root).read("recommendations", columns=["user_id"])
    users = {user for user, _ in world.reference.in_model}
    assert set(listed["user_id"].to_pylist()) == users
