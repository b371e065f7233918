"""Draws rows by the hash of their ids: the same ones for the same rows, and on Spark too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.embedded.ids import xxhash64_of
from unlearn_spark.embedded.portions import portions
from unlearn_spark.embedded.ratings import PAIR
from unlearn_spark.tables import ratings
from unlearn_spark.tables.delta_rs import DeltaRsStore


def by_hash(rows: pa.Table, n: int, names: Sequence[str], seed: int | None = None) -> pa.Table:
    """The n rows (all, if these are fewer) with the smallest hashes of the named columns and the
    seed, in the order of these; between equal hashes, by the columns."""
    hashes = xxhash64_of([rows[name] for name in names], seed)
    if n < len(hashes):
        kept = np.flatnonzero(hashes <= np.partition(hashes, n)[n])
        rows, hashes = rows.take(pa.array(kept)), hashes[kept]
    keyed = pa.table({"hash": hashes, **{name: rows[name] for name in names}})
    order = pc.sort_indices(keyed, [(name, "ascending") for name in keyed.column_names])
    return rows.take(order[:n])


def sample_ratings(store: DeltaRsStore, n: int) -> pa.Table:
    """Up to n ratings (user_id, item_id, rating, rated_at) from all over the newest table."""
    columns = (*PAIR, "rating", "rated_at")
    with store.reading(ratings.TABLE, columns=columns) as reader:
        parts = [by_hash(portion, n, PAIR) for portion in portions(reader)]
        return by_hash(pa.concat_tables([reader.schema.empty_table(), *parts]), n, PAIR)
