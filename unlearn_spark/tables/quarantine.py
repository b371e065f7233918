"""The quarantine table: what ingestion refused, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.tables.store import Store, TableSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

TABLE = "quarantine"

SPEC = TableSpec(
    schema=T.StructType(
        [
            T.StructField("source", T.StringType()),
            T.StructField("raw", T.StringType()),
            T.StructField("reason", T.StringType()),
            # The ids that could be read, so that quarantined rows can be erased as well.
            T.StructField("user_id", T.StringType()),
            T.StructField("item_id", T.StringType()),
            T.StructField("quarantined_at", T.TimestampType()),
        ]
    )
)


def add(store: Store, source: str, rows: DataFrame) -> int:
    """Add refused rows that are not there yet; return the Delta version that holds them.

    Parameters
    ----------
    source
        The input, as the user named it.
    rows
        raw, reason, user_id, item_id: strings. Source, text and reason identify a row, so reading
        an input again adds nothing.
    """
    store.create(TABLE, SPEC)
    known = store.read(TABLE).where(F.col("source") == source)
    known = known.select("raw", "reason").distinct().toDF("known_raw", "known_reason")
    is_known = F.col("raw").eqNullSafe(F.col("known_raw")) & (
        F.col("reason") == F.col("known_reason")
    )
    fresh = rows.withColumn("source", F.lit(source)).join(known, is_known, "left_anti")
    fresh = fresh.withColumn("quarantined_at", F.current_timestamp())
    return store.append(TABLE, fresh.select(*SPEC.schema.names))
