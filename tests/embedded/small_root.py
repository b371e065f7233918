"""A small published model under a fresh root, made by textbook NumPy and delta-rs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import nnls

from unlearn_spark.config import AlsSettings
from unlearn_spark.embedded.ids import user_keys, xxhash64
from unlearn_spark.tables import factors, models, ratings, receipts, tombstones
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion

SIDES = ("user", "item")
MOMENT = datetime(2020, 1, 1, tzinfo=UTC)


def dense_residual(x, others, values, als, every_other=None, floor=0.0):
    """||A x - b|| / max(||b||, floor) of one row with A written out: the textbook's formula."""
    m, r = np.asarray(others, np.float64), np.asarray(values, np.float64)
    a, b = equations(m, r, als, every_other)
    gradient = a @ np.asarray(x, np.float64) - b
    if als.nonnegative:
        gradient = np.where(np.asarray(x) > 0, gradient, np.minimum(gradient, 0))
    return np.linalg.norm(gradient) / max(np.linalg.norm(b), floor)


def equations(m, r, als, every_other=None):
    """A and b of a row that has ratings r of the other side's rows m."""
    if als.implicit_prefs:
        confidence, liked = als.alpha * np.abs(r), r > 0
        y = np.asarray(every_other, np.float64)
        a = y.T @ y + m.T @ np.diag(confidence) @ m
        a += als.reg_param * liked.sum() * np.eye(m.shape[1])
        return a, m.T @ ((1 + confidence) * liked)
    return m.T @ m + als.reg_param * len(r) * np.eye(m.shape[1]), m.T @ r


def solve(a, b, nonnegative):
    """The x of A x = b, or the x >= 0 with the least x'Ax/2 - b'x."""
    if not nonnegative:
        return np.linalg.solve(a, b)
    root = np.linalg.cholesky(a)
    return nnls(root.T, np.linalg.solve(root, b))[0]


@dataclass(frozen=True)
class Small:
    """What a test wants to know of a root.

    Attributes
    ----------
    store, model
        The tables, and the newest published version.
    users, items : (n,)
        Ids of every rating's rows.
    values : float32 (n,)
    vectors
        By side and id, float32 (rank,).
    """

    store: DeltaRsStore
    model: ModelVersion
    users: NDArray
    items: NDArray
    values: NDArray[np.float32]
    vectors: Mapping[str, Mapping[object, NDArray[np.float32]]]

    def residuals(self) -> dict[tuple[str, object], float]:
        """The residual of every factor row, by side and id."""
        ids = {"user": self.users, "item": self.items}
        found = {}
        for side, other in (SIDES, SIDES[::-1]):
            y = self.vectors[other]
            for id, x in self.vectors[side].items():
                mine = (ids[side] == id) & np.isin(ids[other], list(y))
                m = np.array([y[o] for o in ids[other][mine]]).reshape(-1, len(x))
                found[side, id] = dense_residual(
                    x,
                    m,
                    self.values[mine],
                    self.model.als,
                    list(y.values()),
                    self.model.floors[side],
                )
        return found

    def with_vectors(self, side: str, changed: Mapping[object, object]) -> Small:
        """Another factor table of a side: some vectors replaced, or left out (None)."""
        kept = {**self.vectors[side], **changed}
        kept = {id: x for id, x in kept.items() if x is not None}
        version = write_vectors(self.store, side, list(kept), list(kept.values()))
        model = replace(self.model, **{f"{side}_factors_version": version})
        return replace(self, model=model, vectors={**self.vectors, side: kept})


def build(
    root: Path,
    als: AlsSettings,
    users: Sequence[object],
    items: Sequence[object],
    values: Sequence[float],
    sweeps: int = 40,
    tau: float = 2e-2,
    times: Sequence[datetime | None] | None = None,
) -> Small:
    """Store ratings, fit them by plain alternation, and publish."""
    store = DeltaRsStore(str(root))
    of = {"user": np.array(users), "item": np.array(items)}
    r = np.array(values, np.float32)
    write_ratings(store, users, items, values, times)
    rng = np.random.default_rng(5)
    known = {side: np.unique(of[side]) for side in SIDES}
    x = {side: np.abs(rng.normal(size=(len(known[side]), als.rank))) for side in SIDES}
    place = {side: np.searchsorted(known[side], of[side]) for side in SIDES}
    for _ in range(sweeps):
        for side, other in (SIDES, SIDES[::-1]):
            for row in range(len(known[side])):
                mine = place[side] == row
                a, b = equations(x[other][place[other][mine]], r[mine], als, x[other])
                x[side][row] = solve(a, b, als.nonnegative)
    vectors = {
        side: dict(zip(known[side].tolist(), x[side].astype(np.float32), strict=True))
        for side in SIDES
    }
    model = ModelVersion(
        model_version=1,
        kind="train",
        ratings_version=store.version(ratings.TABLE),
        ratings_ingest_id=1,
        user_factors_version=write_vectors(store, "user", *_split(vectors["user"])),
        item_factors_version=write_vectors(store, "item", *_split(vectors["item"])),
        ledger_version=0,
        rating_blocks_version=0,
        settings={"als": als.model_dump(), "layouts": {}},
        metrics={"users": len(known["user"]), "items": len(known["item"]), "ratings": len(r)},
        certificate={
            "tau": tau,
            "max_residual": tau,
            "holds": True,
            "evidence": "scan",
            "floor": {"user": 0.01, "item": 0.02},
        },
    )
    small = Small(store, model, of["user"], of["item"], r, vectors)
    entries = [(side, str(id), bound) for (side, id), bound in small.residuals().items()]
    model = replace(model, ledger_version=write_ledger(store, entries))
    return replace(small, model=models.publish(store, model))


def _split(vectors):
    return list(vectors), list(vectors.values())


def write_ratings(store, users, items, values, times=None) -> int:
    """Append ratings, in a new table if there is none."""
    ids = {"user_id": pa.array(users), "item_id": pa.array(items)}
    new = not store.exists(ratings.TABLE)
    blocks, keys = user_keys(xxhash64(ids["user_id"]), 2)
    spec = ratings.spec({name: column.type for name, column in ids.items()}, 2)
    rows = pa.table(
        {
            **ids,
            "rating": pa.array(values, pa.float32()),
            "rated_at": pa.array(times or [MOMENT] * len(values), pa.timestamp("us", "UTC")),
            "user_block": blocks,
            "user_key": keys,
            "ingest_id": pa.array(np.full(len(values), 1 if new else 2)),
        },
        schema=spec.schema,
    )
    # Spark's deletion vectors are not for delta-rs to write.
    store.create(ratings.TABLE, replace(spec, deletion_vectors=False))
    return store.append(ratings.TABLE, rows)


def write_vectors(store, side, ids, vectors) -> int:
    """Replace a factor table; a vector may be None, of another length, or hold None."""
    column = pa.array(ids)
    schema = factors.factor_spec(column.type).schema
    blocks = (xxhash64(column) % 2).astype(np.int32)
    lists = [None if x is None else list(x) for x in vectors]
    n = len(ids)
    rows = pa.table(
        {
            "id": column,
            "block": blocks,
            "slot": pa.array(np.arange(n), pa.int32()),
            "n_ratings": pa.array(np.ones(n), pa.int32()),
            "factors": pa.array(lists, pa.list_(pa.float32())),
        },
        schema=schema,
    )
    table = factors.factor_table(side)
    store.create(table, factors.factor_spec(column.type))
    return store.overwrite(table, rows)


def write_ledger(store, entries) -> int:
    """Replace the ledger by (side, id, bound)."""
    schema = factors.LEDGER_SPEC.schema
    rows = [
        dict.fromkeys(schema.names, 0) | {"side": side, "id": id, "bound": bound}
        for side, id, bound in entries
    ]
    store.create(factors.LEDGER, factors.LEDGER_SPEC)
    return store.overwrite(factors.LEDGER, pa.Table.from_pylist(rows, schema=schema))


def ledger_of(store, model) -> list[tuple[str, str, float]]:
    """The ledger's (side, id, bound)."""
    table = store.read(factors.LEDGER, model.ledger_version, ["side", "id", "bound"])
    return [tuple(row.values()) for row in table.to_pylist()]


def request(store, request_id, scope, user=None, item=None, at=MOMENT) -> int:
    """Add a deletion request; return the version of the tombstones."""
    blank = {field.name: None for field in tombstones.SPEC.schema}
    store.create(tombstones.TABLE, tombstones.SPEC)
    named = {"request_id": request_id, "scope": scope, "user_id": user, "item_id": item}
    row = {**blank, **named, "requested_at": at}
    return tombstones.append(store, pa.Table.from_pylist([row], schema=tombstones.SPEC.schema))


def honour(store, model, *request_ids) -> ModelVersion:
    """The model as if it had honoured these requests."""
    rows = [
        dict.fromkeys(receipts.SPEC.schema.names) | {"request_id": id, "model_version": 1}
        for id in request_ids
    ]
    table = pa.Table.from_pylist(rows, schema=receipts.SPEC.schema)
    return replace(
        model,
        receipts_version=receipts.append(store, model, table),
        tombstones_version=tombstones.version(store),
    )


def random_ratings(seed=11, n_users=40, n_items=25, rank=4, share=0.4):
    """Users u0, u1, ..., items 0, 1, ... and ratings of low rank with noise."""
    rng = np.random.default_rng(seed)
    rated = rng.random((n_users, n_items)) < share
    rated[:, 0] |= ~rated.any(axis=1)
    stars = rng.normal(size=(n_users, rank)) @ rng.normal(size=(rank, n_items))
    stars += 0.2 * rng.normal(size=stars.shape)
    u, i = np.nonzero(rated)
    return [f"u{each}" for each in u], i.tolist(), stars[u, i].round(3).tolist()
