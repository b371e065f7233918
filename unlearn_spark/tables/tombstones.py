"""The tombstones table: every accepted deletion request, append-only, ids as strings."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark.tables.store import TIMESTAMP, TableSpec

if TYPE_CHECKING:
    from unlearn_spark.tables.store import Store

TABLE = "tombstones"
TEXTS = ("request_id", "scope", "user_id", "item_id")
TIMES = ("from_ts", "to_ts", "requested_at")
SPEC = TableSpec(
    pa.schema(
        [
            *[pa.field(name, pa.string()) for name in TEXTS],
            *[pa.field(name, TIMESTAMP) for name in TIMES],
            pa.field("accepted_at", TIMESTAMP),
        ]
    )
)


def exists(store: Store) -> bool:
    """Whether any request was ever accepted."""
    return store.exists(TABLE)


def read(store: Store, version: int | None = None) -> pa.Table:
    """Tombstones (columns as in `SPEC`) at a Delta version; None: the newest."""
    return store.arrow(TABLE, version)


def version(store: Store) -> int | None:
    """The newest Delta version, or None if there is no table."""
    return store.version(TABLE) if exists(store) else None


def append(store: Store, accepted: pa.Table) -> int:
    """Add requests that are not there yet; return the newest Delta version.

    Parameters
    ----------
    accepted
        The columns of a request; a null `requested_at` becomes the current time.
    """
    now = pa.scalar(datetime.now(UTC), TIMESTAMP)
    columns = {name: accepted[name].cast(SPEC.schema.field(name).type) for name in TEXTS + TIMES}
    columns["requested_at"] = pc.fill_null(columns["requested_at"], now)
    columns["accepted_at"] = pa.repeat(now, accepted.num_rows)
    # An append would not see what a concurrent job accepted.
    store.insert(TABLE, pa.table(columns, schema=SPEC.schema), "t.request_id = s.request_id")
    return store.version(TABLE)
