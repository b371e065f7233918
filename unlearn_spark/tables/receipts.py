"""The receipts table: what each honoured request removed, and what the model promised then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa

from unlearn_spark.tables.store import TIMESTAMP, TableSpec

if TYPE_CHECKING:
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

TABLE = "receipts"

_OF_THE_NIGHT = {"comment": "of the whole night that honoured the request"}

SPEC = TableSpec(
    pa.schema(
        [
            pa.field("request_id", pa.string()),
            pa.field("model_version", pa.int64()),
            pa.field("ratings_removed", pa.int64()),
            # The requests of a night share its work.
            pa.field("rows_resolved", pa.int64(), metadata=_OF_THE_NIGHT),
            pa.field("max_residual", pa.float64(), metadata=_OF_THE_NIGHT),
            pa.field("honoured_at", TIMESTAMP),
            pa.field("purged_at", TIMESTAMP),
        ]
    ),
)


def read(store: Store, version: int) -> pa.Table:
    """Receipts at the Delta version that a model names.

    Columns: request_id; model_version that honoured it; ratings_removed by this request;
    rows_resolved and max_residual of the whole night; honoured_at, purged_at (timestamps).
    """
    return store.arrow(TABLE, version)


def append(store: Store, model: ModelVersion, rows: pa.Table) -> int:
    """Replace the table by the receipts of `model` and these rows; return the Delta version.

    One commit, so that nothing mixes in that a dead job left or another job writes meanwhile.
    """
    store.create(TABLE, SPEC)
    rows = rows.select(SPEC.schema.names).cast(SPEC.schema)
    if model.receipts_version is not None:
        earlier = read(store, model.receipts_version)
        rows = pa.concat_tables([earlier.select(SPEC.schema.names).cast(SPEC.schema), rows])
    return store.overwrite(TABLE, rows)
