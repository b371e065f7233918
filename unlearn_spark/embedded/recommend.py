"""The job recommend in this process: the best items of all users, or of some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlearn_spark.embedded.export import export
from unlearn_spark.embedded.ids import user_keys, xxhash64
from unlearn_spark.embedded.model import read_factors
from unlearn_spark.embedded.portions import portions
from unlearn_spark.embedded.ratings import PAIR, in_blocks, retained, user_blocks
from unlearn_spark.embedded.score import (
    Best,
    Vectors,
    named,
    pairs_by_query,
    predict_pairs,
    top_n,
)
from unlearn_spark.errors import InputError
from unlearn_spark.tables import ratings, recommendations, requests, tombstones
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion

if TYPE_CHECKING:
    from unlearn_spark.core.training import Progress

FEW_USERS = 10_000
"""The ratings of so many users are looked up; for more, all are read."""


def recommend(
    store: DeltaRsStore,
    model: ModelVersion,
    top: int,
    users: Sequence[str] | None,
    exclude_seen: bool,
    output: str | None,
    progress: Progress,
    threads: int,
) -> dict[str, Any]:
    """Write the best items of all users, or of some (ids as text), as `Engine.recommend`.

    Raises
    ------
    InputError
        `top` is below 1, or the model has none of the users.
    """
    queries, candidates = (read_vectors(store, model, side).by_id() for side in ("user", "item"))
    unknown: list[str] = []
    if users is not None:
        queries, unknown = named(queries, users)
        if not len(queries):
            raise InputError(
                f"--users {','.join(users)}: none is in model version {model.model_version}; "
                "name users that have ratings"
            )
        if unknown:
            progress(f"not in model version {model.model_version}: {', '.join(unknown)}")
    excluded = None
    if exclude_seen and model.ratings_version is None:
        progress(f"model version {model.model_version} names no ratings; no item counts as seen")
    elif exclude_seen:
        asked = None if users is None else queries.ids
        excluded = pairs_by_query(queries, candidates, seen_pairs(store, model, asked))
    tally = {"users": 0, "rows": 0}
    schema = recommendations.spec(queries.ids.type, candidates.ids.type).schema

    def batches() -> Iterator[pa.RecordBatch]:
        for found in top_n(queries, candidates, top, excluded, threads):
            tally["users"] += int(np.count_nonzero(found.counts))
            tally["rows"] += len(found.chosen)
            yield _rows(found, queries, candidates, model.model_version, schema)

    rows = pa.RecordBatchReader.from_batches(schema, batches())
    if output is None:
        spec = recommendations.spec(queries.ids.type, candidates.ids.type)
        store.create(recommendations.TABLE, spec)
        store.overwrite(recommendations.TABLE, rows)
        output = store.location(recommendations.TABLE)
    else:
        export(rows, output)
    return {**tally, "output": output, **({"unknown_users": unknown} if unknown else {})}


def read_vectors(store: DeltaRsStore, model: ModelVersion, side: str) -> Vectors:
    """The factor rows of a side."""
    rows = read_factors(store, model, side)
    return Vectors(rows.ids, rows.factors)


def predict(store: DeltaRsStore, model: ModelVersion, pairs: pa.Table) -> NDArray[np.float64]:
    """Predicted ratings of pairs (user_id, item_id), float64 (n,); NaN where the model lacks the
    user or the item. Ids of another type than the model's are compared as text."""
    users, items = (read_vectors(store, model, side) for side in ("user", "item"))
    rows = users.rows_of(pairs["user_id"]), items.rows_of(pairs["item_id"])
    return predict_pairs(users, items, *rows).astype(np.float64)


def seen_pairs(
    store: DeltaRsStore, model: ModelVersion, users: pa.Array | None
) -> Iterator[pa.Table]:
    """(user_id, item_id) of the ratings that the model was fitted to, at least those of some users
    (None: of all), a portion at a time.

    A rating that a request covers does not count as seen: its item may be recommended.
    """
    rules = requests.rules_of(store, tombstones.version(store), model.receipts_version)
    columns = PAIR if rules is None else (*PAIR, "rated_at")
    where = None
    if users is not None and len(users) <= FEW_USERS:
        blocks, keys = (np.unique(part) for part in user_keys(xxhash64(users), user_blocks(store)))
        where = f"{in_blocks(blocks.tolist())} AND user_key IN ({', '.join(map(str, keys))})"
    with store.reading(ratings.TABLE, model.ratings_version, columns, where) as reader:
        for portion in portions(reader):
            yield retained(portion, rules)


def _rows(
    found: Best, queries: Vectors, candidates: Vectors, model_version: int, schema: pa.Schema
) -> pa.RecordBatch:
    """Rows of the table of recommendations."""
    columns = [
        queries.ids.take(pa.array(found.queries)),
        pa.array(found.places.astype(np.int32)),
        candidates.ids.take(pa.array(found.chosen)),
        pa.array(found.scores),
        pa.array(np.full(len(found.chosen), model_version)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)
