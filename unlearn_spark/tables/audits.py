"""The audits table: what each full scan of a published version found."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pyspark.sql.types import (
    BooleanType,
    DoubleType,
    LongType,
    StructField,
    StructType,
    TimestampType,
)

from unlearn_spark.tables.store import TableSpec

if TYPE_CHECKING:
    from unlearn_spark.tables.store import Store

TABLE = "audits"

SPEC = TableSpec(
    StructType(
        [
            StructField("model_version", LongType()),
            StructField("audited_at", TimestampType()),
            StructField("max_residual_user", DoubleType()),
            StructField("max_residual_item", DoubleType()),
            StructField("tau", DoubleType()),
            StructField("ledger_holds", BooleanType()),
            StructField("tombstoned_ratings_found", LongType()),
            StructField("holds", BooleanType()),
        ]
    ),
)


def append(
    store: Store,
    model_version: int,
    *,
    max_residual: dict[str, float],
    tau: float,
    ledger_holds: bool,
    tombstoned_ratings_found: int,
    holds: bool,
) -> int:
    """Add an audit that ends at this moment; return the Delta version that holds it.

    Parameters
    ----------
    max_residual
        By side: the largest relative residual of its rows.
    """
    store.create(TABLE, SPEC)
    row = (
        model_version,
        datetime.now(UTC),
        max_residual["user"],
        max_residual["item"],
        tau,
        ledger_holds,
        tombstoned_ratings_found,
        holds,
    )
    return store.append(TABLE, store.frame([row], SPEC.schema))
