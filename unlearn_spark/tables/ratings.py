"""The ratings table, one row per (user, item).

The table is partitioned by `user_block`, and files are sorted by `user_key`, a second hash of the
user. No two blocks share a key, so a reader with the keys of some users skips every file and page
without them. Delta's statistics hold no id and no rating, because the log outlives the rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from unlearn_spark.errors import ConflictError
from unlearn_spark.tables.store import TIMESTAMP, TableSpec, outdated

TABLE = "ratings"

COLUMNS = ("user_id", "item_id", "rating", "rated_at", "user_block", "user_key", "ingest_id")

USER_KEYS = 1024
"""Values of `user_key` in a block."""
ROWS_PER_BLOCK = 65_536
"""Ratings of a block, of which a deletion rewrites the file."""
MAX_USER_BLOCKS = 1024
USER_BLOCKS = "unlearn.blocksOfUserKeys"
"""Key of the number of user blocks, in the metadata of column `user_block`."""

PAGE_ROWS = 5000
"""Most rows of a Parquet page: few values of `user_key`, so that little is read for some users."""


def choose_blocks(n_ratings: int) -> int:
    """One block per `ROWS_PER_BLOCK`, rounded up to a power of two, at most `MAX_USER_BLOCKS`."""
    wanted = max(1, -(-n_ratings // ROWS_PER_BLOCK))
    return min(MAX_USER_BLOCKS, 1 << (wanted - 1).bit_length())


def spec(id_types: Mapping[str, pa.DataType], n_blocks: int) -> TableSpec:
    """The table for ids of these types (user_id and item_id: string or int64), cut into blocks."""
    return TableSpec(
        pa.schema(
            [
                pa.field("user_id", id_types["user_id"]),
                pa.field("item_id", id_types["item_id"]),
                pa.field("rating", pa.float32()),
                pa.field("rated_at", TIMESTAMP),
                pa.field("user_block", pa.int32(), metadata={USER_BLOCKS: str(n_blocks)}),
                pa.field("user_key", pa.int32()),
                pa.field("ingest_id", pa.int64()),
            ]
        ),
        partition_by=("user_block",),
        skipping=("user_key", "ingest_id"),
        deletion_vectors=True,
    )


def user_blocks(metadata: Mapping[str, object]) -> int:
    """The number of user blocks, from the metadata of the column `user_block`.

    Raises
    ------
    InputError
        An earlier version of this software made the table.
    """
    if USER_BLOCKS not in metadata:
        raise outdated(TABLE)
    return int(str(metadata[USER_BLOCKS]))


def ingest_of(version: int) -> int:
    """The `ingest_id` of the rows that an ingest commits as this Delta version.

    Every ingest commits, so versions number the ingests from 1. No number is used twice, even if
    all rows of the last ingest were deleted since.
    """
    return version + 1


def next_ingest(version: int | None) -> int:
    """The `ingest_id` of rows that are written after a Delta version (None: the first rows)."""
    return ingest_of(0 if version is None else version + 1)


def changed_meanwhile() -> ConflictError:
    """The error of a job that finds another version of the table than the one it read."""
    return ConflictError("table ratings: ratings were ingested meanwhile; run this job again")
