"""The tombstones table: every accepted deletion request, append-only, ids as strings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.tables.store import Store, TableSpec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

TABLE = "tombstones"
TEXTS = ("request_id", "scope", "user_id", "item_id")
TIMES = ("from_ts", "to_ts", "requested_at")
SPEC = TableSpec(
    schema=T.StructType(
        [
            *[T.StructField(name, T.StringType()) for name in TEXTS],
            *[T.StructField(name, T.TimestampType()) for name in TIMES],
            T.StructField("accepted_at", T.TimestampType()),
        ]
    )
)


def exists(store: Store) -> bool:
    """Whether any request was ever accepted."""
    return store.exists(TABLE)


def read(store: Store, version: int | None = None) -> DataFrame:
    """Tombstones (columns as in `SPEC`) at a Delta version; None: the newest."""
    return store.read(TABLE, version)


def version(store: Store) -> int | None:
    """The newest Delta version, or None if there is no table."""
    return store.version(TABLE) if exists(store) else None


def append(store: Store, accepted: DataFrame) -> int:
    """Add requests that are not there yet; return the newest Delta version.

    Parameters
    ----------
    accepted
        The columns of a request; a null `requested_at` becomes the current time.
    """
    now = F.current_timestamp()
    accepted = accepted.withColumn("requested_at", F.coalesce("requested_at", now))
    accepted = accepted.withColumn("accepted_at", now).select(*SPEC.schema.names)
    # A merge that only inserts: a blind append would not see what a concurrent job accepted.
    insert = ["WHEN NOT MATCHED THEN INSERT *"]
    store.merge(TABLE, accepted, "t.request_id = s.request_id", insert)
    return store.version(TABLE)
