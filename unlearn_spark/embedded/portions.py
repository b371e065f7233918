"""Large tables a portion at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

PORTION_ROWS = 4_000_000
"""Rows of a portion: many, because each looks up its ids in a table that it makes anew."""


def portions(reader: pa.RecordBatchReader, rows: int = PORTION_ROWS) -> Iterator[pa.Table]:
    """The rows of a reader in tables of about `rows`, none of them empty."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in reader:
        if not batch.num_rows:
            continue
        waiting.append(batch)
        size += batch.num_rows
        if size >= rows:
            yield pa.Table.from_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)
