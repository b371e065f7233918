"""The quarantine table: what ingestion refused, and why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from unlearn_spark.tables.relational import query
from unlearn_spark.tables.store import TIMESTAMP, TableSpec

if TYPE_CHECKING:
    from unlearn_spark.tables.store import Store

TABLE = "quarantine"

MOST_KEPT = 1_000_000
"""Most refused rows of one ingestion that are kept, because they pass through the driver. The
figures of a job count them all."""

SPEC = TableSpec(
    pa.schema(
        [
            pa.field("source", pa.string()),
            pa.field("raw", pa.string()),
            pa.field("reason", pa.string()),
            # The ids that could be read, so that quarantined rows can be erased as well.
            pa.field("user_id", pa.string()),
            pa.field("item_id", pa.string()),
            pa.field("quarantined_at", TIMESTAMP),
        ]
    ),
)


def add(store: Store, source: str, rows: pa.Table) -> int:
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
    known = store.arrow(TABLE, columns=["source", "raw", "reason"])
    fresh = query(
        """
        SELECT $source AS source, rows.*, CAST($now AS TIMESTAMPTZ) AS quarantined_at
        FROM rows WHERE NOT EXISTS (
            FROM known WHERE known.source = $source
            AND known.raw IS NOT DISTINCT FROM rows.raw AND known.reason = rows.reason
        )
        """,
        {"source": source, "now": datetime.now(UTC).isoformat()},
        rows=rows.select(["raw", "reason", "user_id", "item_id"]),
        known=known,
    )
    if not fresh.num_rows:
        return store.version(TABLE)
    return store.append(TABLE, fresh.cast(SPEC.schema))
