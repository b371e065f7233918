"""Hypothesis draws whole sequences of jobs on real tables, embedded, and judges every step.

After each: the ratings are those of the plain reference, every ledger bound is at least the true
residual (computed row by row in float64), and the certificate holds.
"""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import unlearn_spark
from contract.nights import answers
from contract.reference import Reference, Request, residuals
from unlearn_spark.errors import InputError
from unlearn_spark.recommender import silent
from unlearn_spark.tables import models
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.store import TIMESTAMP

USERS, ITEMS = 7, 6
DAY = 86_400
TAU = 2e-2

KINDS = {
    "explicit": {},
    "implicit": {"implicit_prefs": True, "alpha": 2.0},
    "nonnegative": {"nonnegative": True},
}

users = st.integers(1, USERS).map(lambda number: f"u{number}")
items = st.integers(1, ITEMS).map(lambda number: 100 + number)
days = st.integers(1, 8)
rating = st.tuples(users, items, st.integers(1, 5), st.none() | days)


@st.composite
def request(draw):
    """A request without a name; a Request's name is its place in the sequence."""
    scope = draw(st.sampled_from(["user", "user", "item", "rating", "window", "reinstate"]))
    by_item = scope == "item" or (scope == "reinstate" and draw(st.booleans()))
    user = None if by_item else draw(users)
    item = draw(items) if by_item or scope == "rating" else None
    start = draw(days) if scope == "window" else None
    end = start + draw(st.integers(1, 4)) if scope == "window" else None
    return Request("", scope, user, item, start, end, draw(days))


step = st.one_of(
    st.tuples(st.just("ask"), st.lists(request(), min_size=1, max_size=3)),
    st.tuples(st.just("rate"), st.lists(rating, min_size=1, max_size=4)),
    st.tuples(st.just("night"), st.sampled_from(["unlearn", "update"])),
    st.tuples(st.just("roll back"), st.integers(1, 3)),
)


class World:
    """A root, and what a plain reading of the rules says of it."""

    def __init__(self, root, kind, direct, max_rounds):
        self.root, self.reference = root, Reference()
        self.shop = unlearn_spark.open(
            root,
            "embedded",
            progress=silent,
            rank=2,
            reg_param=0.1,
            tol=TAU / 4,
            tau=TAU,
            direct_rows=direct,
            max_rounds=max_rounds,
            user_blocks=2,
            item_blocks=2,
            execution={"threads": 1},
            **KINDS[kind],
        )
        self.names = itertools.count(1)
        self.in_model = {}  # by version: the ratings that it solves
        self.honoured = {}  # by version: the requests with a receipt

    def rate(self, rows):
        names, values, times = [row[:2] for row in rows], [row[2] for row in rows], []
        times = pa.array([None if row[3] is None else row[3] * DAY for row in rows], pa.int64())
        table = {
            "user_id": [name[0] for name in names],
            "item_id": pa.array([name[1] for name in names], pa.int64()),
            "rating": pa.array(values, pa.float32()),
            "rated_at": times.cast(pa.timestamp("s", tz="UTC")),
        }
        try:
            self.shop.ingest_ratings(pa.table(table))
        finally:
            self.reference.ingest(rows)

    def ask(self, wanted):
        named = [replace(each, name=f"r{next(self.names)}") for each in wanted]
        moments = {
            "from_ts": [each.start for each in named],
            "to_ts": [each.end for each in named],
            "requested_at": [each.at for each in named],
        }
        table = {
            "request_id": [each.name for each in named],
            "scope": [each.scope for each in named],
            "user_id": pa.array([each.user for each in named], pa.string()),
            "item_id": pa.array([each.item for each in named], pa.int64()).cast(pa.string()),
        }
        for name, values in moments.items():
            seconds = pa.array([None if v is None else v * DAY for v in values], pa.int64())
            table[name] = seconds.cast(pa.timestamp("s", tz="UTC")).cast(TIMESTAMP)
        assert self.shop.ingest_tombstones(pa.table(table)).accepted == len(named)
        self.reference.asked += named

    def train(self):
        self.shop.train()
        self.reference.train()
        self.published()

    def night(self, kind):
        """Run a night; the reference says whether it has anything to do."""
        pending = [
            each.name
            for each in self.reference.asked
            if each.scope != "reinstate" and each.name not in self.reference.receipts
        ]
        if pending and not self.reference.remaining():
            with pytest.raises(InputError, match="remove every rating"):
                getattr(self.shop, kind)()
            return
        before = models.published(DeltaRsStore(str(self.root)))
        done = getattr(self.shop, kind)()
        assert done.requests == len(pending)
        if not pending and kind == "unlearn":
            assert models.published(DeltaRsStore(str(self.root))) == before
            return
        self.reference.night()
        self.published()

    def roll_back(self, back):
        """Go back so many versions, as far as nothing that was forgotten comes back."""
        newest = max(self.in_model)
        target = max(1, newest - back)
        honoured = len(self.honoured[newest]) > len(self.honoured[target])
        if target == newest or honoured:
            with pytest.raises(InputError, match=r"newest already|forgot"):
                self.shop.rollback(target)
            return
        assert self.shop.rollback(target).model_version == newest + 1
        self.reference.in_model = dict(self.in_model[target])
        self.published()

    def published(self):
        version = models.published(DeltaRsStore(str(self.root))).model_version
        self.in_model[version] = dict(self.reference.in_model)
        self.honoured[version] = set(self.reference.receipts)

    def check(self):
        """What an outside reader finds is what the reference says, and the promises are kept."""
        store, reference = DeltaRsStore(str(self.root)), self.reference
        rows = store.read("ratings").to_pylist()
        stored = {(row["user_id"], row["item_id"]): row["rating"] for row in rows}
        assert len(stored) == len(rows)
        assert stored == {pair: value for pair, (value, _) in reference.stored.items()}
        model = models.published(store)
        assert set(answers(self.root)) == set(reference.receipts)
        vectors = {}
        for place, side in enumerate(("user", "item")):
            version = getattr(model, f"{side}_factors_version")
            kept = store.read(f"{side}_factors", version).to_pylist()
            vectors[side] = {row["id"]: np.array(row["factors"], float) for row in kept}
            counts = dict.fromkeys((pair[place] for pair in reference.in_model), 0)
            for pair in reference.in_model:
                counts[pair[place]] += 1
            assert {row["id"]: row["n_ratings"] for row in kept} == counts
        true = residuals(reference.in_model, vectors, model.als, model.floors)
        ledger = store.read("ledger", model.ledger_version).to_pylist()
        bounds = {(row["side"], row["id"]): row["bound"] for row in ledger}
        assert bounds.keys() == {(side, str(id)) for side, id in true}
        for (side, id), residual in true.items():
            # The scan is in float64 too, over factors that are float32.
            assert residual <= bounds[side, str(id)] * (1 + 1e-6) + 1e-9
        promised = model.certificate
        assert promised["holds"]
        assert max(bounds.values()) <= promised["max_residual"] * (1 + 1e-9) + 1e-12
        assert promised["max_residual"] <= promised["tau"] <= TAU


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    direct=st.sampled_from(["resolve", "threshold"]),
    max_rounds=st.sampled_from([1, 40, 40]),
    first=st.lists(rating, min_size=6, max_size=25),
    steps=st.lists(step, min_size=2, max_size=7),
)
def test_every_sequence_of_jobs_keeps_the_promises(kind, direct, max_rounds, first, steps):
    sequence(kind, direct, max_rounds, first, steps)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(KINDS)),
    direct=st.sampled_from(["resolve", "threshold"]),
    max_rounds=st.sampled_from([1, 40, 40]),
    first=st.lists(rating, min_size=6, max_size=25),
    steps=st.lists(step, min_size=2, max_size=12),
)
def test_many_more_sequences_keep_the_promises(kind, direct, max_rounds, first, steps):
    sequence(kind, direct, max_rounds, first, steps)


def sequence(kind, direct, max_rounds, first, steps):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "root", kind, direct, max_rounds)
        world.rate(first)
        world.train()
        world.check()
        for name, given in [*steps, ("night", "update")]:
            if name == "ask":
                world.ask(given)
                continue
            if name == "rate":
                world.rate(given)
                continue
            world.night(given) if name == "night" else world.roll_back(given)
            world.check()
