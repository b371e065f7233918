"""Small data, requests, and what an outside reader (delta-rs) finds in the tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.tables import models, receipts
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.factors import MODEL_TABLES
from unlearn_spark.tables.store import TIMESTAMP

TAU = 2e-2
SETTINGS: dict[str, Any] = {"rank": 4, "reg_param": 0.1, "tol": 5e-3, "alpha": 2.0, "tau": TAU}

EPOCH = 1_500_000_000
ASKED_AT = 1_700_000_000

Rating = tuple[str, str, float, int]
"""user_id, item_id, rating, rated_at in seconds."""


def data_set(seed: int = 0, users: int = 60, items: int = 30, n: int = 700) -> list[Rating]:
    """Ratings of n pairs: rank 2 and noise."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(users, 2)), random.normal(size=(items, 2))
    rows = []
    for pair in random.permutation(users * items)[:n].tolist():
        user, item = divmod(pair, items)
        value = 3 + x[user] @ y[item] * 0.5 + random.normal() * 0.3
        rows.append((f"u{user}", f"i{item}", round(float(value), 2), EPOCH + pair))
    return rows


def as_table(rows: Iterable[Rating]) -> pa.Table:
    """Ratings as an input."""
    users, items, values, times = zip(*rows, strict=True)
    moments = pa.array(times, pa.timestamp("s", tz="UTC"))
    return pa.table({"user_id": users, "item_id": items, "rating": values, "rated_at": moments})


def requests(*rows: tuple[Any, ...], at: int = ASKED_AT) -> pa.Table:
    """Requests (request_id, scope, user_id, item_id, from_ts, to_ts), the last ones optional."""
    names = ["request_id", "scope", "user_id", "item_id", "from_ts", "to_ts"]
    full = [(*row, *[None] * (len(names) - len(row))) for row in rows]
    columns: dict[str, Any] = dict(zip(names, zip(*full, strict=True), strict=True))
    for name in names:
        is_time = name.endswith("_ts")
        values = pa.array(columns[name], pa.timestamp("s", tz="UTC") if is_time else pa.string())
        columns[name] = values.cast(TIMESTAMP) if is_time else values
    columns["requested_at"] = pa.array([at] * len(rows), pa.timestamp("s", tz="UTC"))
    return pa.table(columns)


# --- an outside reader ----------------------------------------------------------------------------


def stored_pairs(root: Any) -> set[tuple[Any, Any]]:
    """(user_id, item_id) of the newest ratings."""
    rows = DeltaRsStore(str(root)).read("ratings", columns=["user_id", "item_id"]).to_pylist()
    assert len({tuple(row.values()) for row in rows}) == len(rows)
    return {(row["user_id"], row["item_id"]) for row in rows}


def factors(root: Any, side: str) -> dict[Any, np.ndarray]:
    """By id the factors of the published model."""
    store = DeltaRsStore(str(root))
    model = models.published(store)
    rows = store.read(f"{side}_factors", getattr(model, f"{side}_factors_version"))
    return {row["id"]: np.array(row["factors"]) for row in rows.to_pylist()}


def answers(root: Any) -> dict[str, int]:
    """By request_id of the published receipts: ratings_removed."""
    store = DeltaRsStore(str(root))
    version = models.published(store).receipts_version
    rows = [] if version is None else receipts.read(store, version).to_pylist()
    assert len({row["request_id"] for row in rows}) == len(rows)
    return {row["request_id"]: row["ratings_removed"] for row in rows}


def files_by_block(root: Any, table: str, version: int) -> dict[tuple[str, ...], set[str]]:
    """By partition the names of the data files of a table's version."""
    found: dict[tuple[str, ...], set[str]] = {}
    for file in DeltaRsStore(str(root)).files(table, version):
        found.setdefault(tuple(file.partition.values()), set()).add(file.path)
    return found


def end_of(root: Any) -> dict[str, Any]:
    """What a job leaves for readers: contents, apart from times, Delta versions and file names."""
    store = DeltaRsStore(str(root))
    found: dict[str, Any] = {"pairs": stored_pairs(root)}
    model = models.newest(store)
    if model is not None:
        found["model"] = (model.model_version, model.parent, model.kind, model.settings)
        found["certificate"] = model.certificate
        found["answers"] = answers(root)
        for table in MODEL_TABLES:
            rows = store.read(table, getattr(model, f"{table}_version"))
            names = [name for name in rows.column_names if not pa.types.is_list(rows[name].type)]
            order = pc.sort_indices(
                rows.select(names), sort_keys=[(name, "ascending") for name in names]
            )
            found[table] = rows.take(order).to_pylist()
    return found


def newest_versions(root: Any) -> dict[str, int]:
    """By table its newest Delta version."""
    store = DeltaRsStore(str(root))
    return {
        path.parent.name: store.version(path.parent.name)
        for path in sorted(Path(root).glob("*/_delta_log"))
    }
