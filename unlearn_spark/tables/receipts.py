"""The receipts table: what each honoured request removed, and what the model promised then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql.types import (
    DoubleType,
    LongType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from unlearn_spark.tables.store import TableSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

TABLE = "receipts"

_OF_THE_NIGHT = {"comment": "of the whole night that honoured the request"}

SPEC = TableSpec(
    StructType(
        [
            StructField("request_id", StringType()),
            StructField("model_version", LongType()),
            StructField("ratings_removed", LongType()),
            # The requests of a night share its work.
            StructField("rows_resolved", LongType(), metadata=_OF_THE_NIGHT),
            StructField("max_residual", DoubleType(), metadata=_OF_THE_NIGHT),
            StructField("honoured_at", TimestampType()),
            StructField("purged_at", TimestampType()),
        ]
    ),
)


def read(store: Store, version: int) -> DataFrame:
    """Receipts at the Delta version that a model names.

    Columns: request_id; model_version that honoured it; ratings_removed by this request;
    rows_resolved and max_residual of the whole night; honoured_at, purged_at (timestamps).
    """
    return store.read(TABLE, version)


def append(store: Store, model: ModelVersion, rows: DataFrame) -> int:
    """Replace the table by the receipts of `model` and these rows; return the Delta version.

    One commit, so that nothing mixes in that a dead job left or another job writes meanwhile.
    """
    store.create(TABLE, SPEC)
    rows = rows.select(*SPEC.schema.names)
    if model.receipts_version is not None:
        rows = read(store, model.receipts_version).unionByName(rows)
    return store.overwrite(TABLE, rows)
