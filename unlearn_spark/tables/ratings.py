"""The ratings table, one row per (user, item): read, delete and insert ratings, quickly by user.

The table is partitioned by `user_block`, and files are sorted by `user_key`, a second hash of the
user. No two blocks share a key, so a reader with the keys of some users skips every file and page
without them. Delta's statistics hold no id and no rating, because the log outlives the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.tables import receipts, requests, tombstones
from unlearn_spark.tables.session_conf import session_conf
from unlearn_spark.tables.sql import block_of, one_of
from unlearn_spark.tables.store import Store, TableSpec, outdated

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from unlearn_spark.tables.models import ModelVersion

TABLE = "ratings"

USER_KEYS = 1024
"""Values of `user_key` in a block."""
ROWS_PER_BLOCK = 1_000_000
MAX_USER_BLOCKS = 256
USER_BLOCKS = "unlearn.blocksOfUserKeys"
"""Key of the number of user blocks: in the metadata of column `user_block`, or in the properties of
a table that an earlier version of this software made."""

_PRUNING_LIMIT = 256
"""Most values in a list of blocks or keys; a longer list would skip little. The session hands lists
of this length to Parquet (`spark.sql.parquet.pushdown.inFilterThreshold`)."""

MOST_PAIRS = 1_000_000
"""Most pairs that one commit deletes, because the driver holds them; one block may have more."""

SMALL_PAGES = {
    # A page holds few values of `user_key`, so that little is read for some users.
    "parquet.page.row.count.limit": "5000",
    # Few times repeat, and their large dictionary would be read for any page.
    "parquet.enable.dictionary#rated_at": "false",
}
"""Session settings that let a night read little of a file (Delta hands on no writer options)."""

BROADCAST_ROWS = 2_000_000
"""Most ids or pairs to broadcast; more are joined by a shuffle."""

_COLUMNS = (
    "user_id",
    "item_id",
    "rating",
    "rated_at",
    "user_block",
    "user_key",
    "ingest_id",
)


# --- reading --------------------------------------------------------------------------------


def read(store: Store, version: int | None = None) -> DataFrame:
    """The table at a Delta version; None: the newest.

    Columns: user_id, item_id (string or bigint), rating float, rated_at timestamp (null: unknown),
    user_block int, user_key int, ingest_id bigint.
    """
    return store.read(TABLE, version)


def retained(
    store: Store,
    version: int | None,
    tombstones_version: int | None,
    receipts_version: int | None,
) -> DataFrame:
    """The ratings that no request covers: what a model may learn from.

    `version` is that of the ratings (None: the newest); the others are as for `without_asked`.
    """
    return without_asked(store, read(store, version), tombstones_version, receipts_version)


def without_asked(
    store: Store, rows: DataFrame, tombstones_version: int | None, receipts_version: int | None
) -> DataFrame:
    """Rows of the table without those that a request covers.

    Parameters
    ----------
    tombstones_version
        As from `tombstones.version`; None: there are no requests.
    receipts_version
        Delta version of the receipts that the published model names; None: there are none. A
        request without a receipt covers what it names even if it was lifted since.
    """
    if tombstones_version is None:
        return rows
    return requests.retained(rows, asked(store, tombstones_version, receipts_version), guard=False)


def asked(store: Store, tombstones_version: int, receipts_version: int | None) -> DataFrame:
    """The requests (`requests.effective`) at a version of the tombstones; those without a receipt
    at `receipts_version` are pending."""
    done = None if receipts_version is None else receipts.read(store, receipts_version)
    return requests.effective(tombstones.read(store, tombstones_version), done)


def fitted(store: Store, model: ModelVersion) -> DataFrame:
    """The rows that a model version was fitted to, at the versions that it names.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    if model.ratings_version is None:
        raise InputError(
            f"model version {model.model_version} names no ratings; train a model here first"
        )
    rows = read(store, model.ratings_version)
    return with_fitted(store, model, rows).where("fitted").drop("fitted")


def with_fitted(store: Store, model: ModelVersion, rows: DataFrame) -> DataFrame:
    """Add `fitted` (boolean) to rows of the table: whether the model was fitted to them.

    Rows may be of a later version of the table: what was written since has a later `ingest_id`.
    """
    known = F.col("ingest_id") <= (model.ratings_ingest_id or 0)
    if model.tombstones_version is None:
        return rows.withColumn("fitted", known)
    every = asked(store, model.tombstones_version, model.receipts_version)
    marked = requests.with_requests(rows, every, guard=False)
    known &= F.size("request_ids") == 0
    return marked.withColumn("fitted", known).drop("request_ids")


def newest_ingest(store: Store, version: int | None = None) -> int:
    """The largest ingest_id in the table, 0 when it is empty."""
    row = read(store, version).agg(F.max("ingest_id")).first()
    return int(row[0]) if row is not None and row[0] is not None else 0


def since(store: Store, ingest_id: int, version: int | None = None) -> DataFrame:
    """The rows written by ingests after `ingest_id`."""
    return read(store, version).where(F.col("ingest_id") > ingest_id)


def covering(store: Store, ids: DataFrame, version: int | None = None) -> DataFrame:
    """The rows whose ids are among `ids`, read only from the user blocks that may hold them.

    Parameters
    ----------
    ids
        Columns user_id, item_id or both (then pairs), in the table's types or as strings.
    """
    rows = read(store, version)
    names: list[str] = [name for name in ("user_id", "item_id") if name in ids.columns]
    for name in names:
        if isinstance(ids.schema[name].dataType, T.StringType):
            id = requests.typed_id(F.col(name), rows.schema[name].dataType)
        else:
            id = F.col(name).cast(rows.schema[name].dataType)
        ids = ids.withColumn(name, id)
    ids = ids.select(*names).dropna().distinct()
    if "user_id" in names:
        keys = ids.select(*_hashes(F.col("user_id"), user_blocks(store)))
        may_hold, n_ids = _pruning_condition(keys)
        if may_hold is not None:
            rows = rows.where(may_hold)
    else:
        n_ids = ids.count()
    return rows.join(_broadcast_if_few(ids, n_ids), names, "left_semi").select(*_COLUMNS)


def user_blocks(store: Store) -> int:
    """Number of partitions of the table, as chosen by the first ingest."""
    chosen = read(store).schema["user_block"].metadata.get(USER_BLOCKS)
    if chosen is None:
        properties = store.spark.sql(f"SHOW TBLPROPERTIES {store.name(TABLE)}")
        row = properties.where(F.col("key") == USER_BLOCKS).first()
        if row is None:
            # In this old layout blocks share keys, so a search by key would miss rows.
            raise outdated(TABLE)
        chosen = row["value"]
    return int(chosen)


# --- deleting -------------------------------------------------------------------------------


def delete(store: Store, pairs: DataFrame, version: int) -> int:
    """Remove pairs (user_id, item_id in the table's types) from the newest `version`; return the
    Delta version afterwards.

    A Python function finds the pairs, so that Delta's log holds only its name and the blocks. The
    function carries the pairs, which pass through the driver `MOST_PAIRS` at a time, so a larger
    deletion takes several commits. Rows are only marked in deletion vectors.

    Raises
    ------
    ConflictError
        There are pairs, and `version` is not the newest version or another job commits meanwhile.
    """
    keyed = pairs.select("user_id", "item_id").distinct()
    block = block_of("user_id", user_blocks(store)).alias("user_block")
    keyed = keyed.select(block, "user_id", "item_id").persist()
    try:
        counts = keyed.groupBy("user_block").count().collect()
        for blocks in _batches({row["user_block"]: row["count"] for row in counts}):
            condition = one_of("user_block", blocks)
            found = keyed.where(condition).toArrow()
            among = _among(found.column("user_id"), found.column("item_id"))
            _checked(store, version)
            store.delete(TABLE, condition, ("user_id", "item_id"), among)
            version = _checked(store, version, version + 1)
    finally:
        keyed.unpersist()
    return version


def _batches(counts: Mapping[int, int]) -> Iterator[list[int]]:
    """Group blocks with `counts` pairs: at most `MOST_PAIRS` pairs together, or one block."""
    batch: list[int] = []
    for block in sorted(counts):
        if batch and sum(counts[b] for b in batch) + counts[block] > MOST_PAIRS:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def _checked(store: Store, *expected: int) -> int:
    """The newest version of the table. Raises ConflictError unless it is one of the expected."""
    version = store.version(TABLE)
    if version not in expected:
        raise ConflictError("table ratings: ratings were ingested meanwhile; run this job again")
    return version


def _among(
    user_ids: pa.ChunkedArray, item_ids: pa.ChunkedArray
) -> Callable[[pa.Array, pa.Array], pa.Array]:
    """A function of user and item ids (arrays of n) that tells which pairs are among these."""
    users, items = user_ids.unique(), item_ids.unique()

    def code(user_ids: pa.Array, item_ids: pa.Array) -> pa.Array:
        user, item = pc.index_in(user_ids, users), pc.index_in(item_ids, items)
        return pc.add(pc.multiply(user.cast("int64"), len(items)), item.cast("int64"))

    codes = code(user_ids, item_ids)

    def is_among(user_ids: pa.Array, item_ids: pa.Array) -> pa.Array:
        return pc.is_in(code(user_ids, item_ids), codes)  # a foreign id has no code

    return is_among


def _pair_condition(blocks: Sequence[int] | None) -> str:
    """SQL for: row t of the table has the pair of row s, in one of these blocks (None: any).

    Delta writes this text into the log, so it holds only column names and blocks. Blocks are
    written as ranges of keys, because two merges into different partitions would not conflict.
    """
    names = ("user_block", "user_key", "user_id", "item_id")
    condition = " AND ".join(f"t.{name} = s.{name}" for name in names)
    if blocks is None:
        return condition
    ranges = [f"t.user_key BETWEEN {b * USER_KEYS} AND {(b + 1) * USER_KEYS - 1}" for b in blocks]
    return f"{condition} AND ({' OR '.join(ranges)})"


# --- ingesting ------------------------------------------------------------------------------


def id_types(store: Store) -> dict[str, T.DataType] | None:
    """Types of the table's user_id and item_id, string or bigint; None before the first ingest."""
    if not store.exists(TABLE):
        return None
    schema = read(store).schema
    return {name: schema[name].dataType for name in ("user_id", "item_id")}


def _newest(good: DataFrame, n_blocks: int) -> DataFrame:
    """The newest row of each pair: user_block, user_key, user_id, item_id (sorted by these),
    rating, rated_at.

    One exchange by block serves the grouping and the layout of the files.
    """
    keys = ("user_block", "user_key", "user_id", "item_id")
    placed = good.select(
        *_hashes(F.col("user_id"), n_blocks),
        "user_id",
        "item_id",
        F.struct("rated_at", "position", F.col("rating").cast("float").alias("rating")).alias("it"),
    )
    newest = placed.repartition(n_blocks, "user_block").groupBy(*keys).agg(F.max("it").alias("it"))
    newest = newest.select(*keys, F.col("it.rating"), F.col("it.rated_at"))
    return newest.sortWithinPartitions(*keys)


def upsert(
    store: Store, good: DataFrame, n_good: int, types: dict[str, T.DataType]
) -> tuple[int, int | None]:
    """Write the rows that are the newest of their pair, in the input and in the table.

    Parameters
    ----------
    good
        user_id and item_id in the types of the table, rating, rated_at, position (of two rows of a
        pair with the same time, the larger wins).
    n_good
        The number of these rows.
    types
        Types of user_id and item_id, used if the table has to be created.

    Returns
    -------
    tuple
        How many rows were written, and the table's version afterwards (None: there is no table).

    Raises
    ------
    ConflictError
        Another job wrote ratings meanwhile; none of these is written.
    """
    with session_conf(store.spark, SMALL_PAGES):
        return _upsert(store, good, n_good, types)


def _upsert(
    store: Store, good: DataFrame, n_good: int, types: dict[str, T.DataType]
) -> tuple[int, int | None]:
    if not store.exists(TABLE):
        if n_good == 0:
            return 0, None
        version = _create(store, good, types, _choose_blocks(n_good))
        return read(store, version).count(), version
    version = store.version(TABLE)
    if n_good == 0:
        return 0, version
    n_blocks = user_blocks(store)
    newest = _newest(good, n_blocks)
    # Finding the input's blocks takes a pass over it, which few blocks do not repay.
    blocks = (
        None
        if n_blocks <= 4
        else _few(good.select(*_hashes(F.col("user_id"), n_blocks)), "user_block")[0]["user_block"]
    )
    changes = _changes(newest, read(store, version), blocks)
    changes = _numbered(changes, version).persist()
    try:
        if changes.count() == 0:
            return 0, version
        updated = ("rating", "rated_at", "ingest_id")
        changed_blocks = _few(changes, "user_block")[0]["user_block"]
        _checked(store, version)
        # A merge even where all pairs are new: a blind append would not see a concurrent ingest.
        written = store.merge(
            TABLE,
            changes,
            _pair_condition(changed_blocks),
            [
                f"WHEN MATCHED AND {_beats('s.', 't.')} THEN UPDATE SET "
                + ", ".join(f"t.{name} = s.{name}" for name in updated),
                "WHEN NOT MATCHED THEN INSERT *",
            ],
        )
    finally:
        changes.unpersist()
    return written, store.version(TABLE)


def _numbered(rows: DataFrame, version: int) -> DataFrame:
    """The table's columns, with the `ingest_id` of rows written after a version (-1: none).

    Every ingest commits, so versions number the ingests from 1. No number is used twice, even if
    all rows of the last ingest were deleted since.
    """
    return rows.withColumn("ingest_id", F.lit(version + 2).cast("bigint")).select(*_COLUMNS)


def _changes(newest: DataFrame, table: DataFrame, blocks: Sequence[int] | None) -> DataFrame:
    """The rows that are new or beat the table's rating of their pair."""
    if blocks is not None:
        table = table.where(F.col("user_block").isin(list(blocks)))
    keys = ["user_block", "user_key", "user_id", "item_id"]
    known = table.select(
        *keys,
        F.col("rating").alias("old_rating"),
        F.col("rated_at").alias("old_rated_at"),
        F.lit(True).alias("known"),
    )
    joined = newest.join(known, keys, "left")
    return joined.where(f"known IS NULL OR {_beats('', 'old_')}")


def _beats(new: str, old: str) -> str:
    """SQL for: the new rating replaces the old one, as it is later, or as late but different."""
    later = f"{old}rated_at IS NULL AND {new}rated_at IS NOT NULL OR {new}rated_at > {old}rated_at"
    other = f"{new}rated_at <=> {old}rated_at AND {new}rating <> {old}rating"
    return f"({later} OR {other})"


def _create(store: Store, good: DataFrame, types: dict[str, T.DataType], n_blocks: int) -> int:
    """Create the table with its first rows, in one commit; return its version.

    A job that dies creates nothing, and of two first ingests at the same time one fails.
    """
    schema = T.StructType(
        [
            T.StructField("user_id", types["user_id"]),
            T.StructField("item_id", types["item_id"]),
            T.StructField("rating", T.FloatType()),
            T.StructField("rated_at", T.TimestampType()),
            T.StructField("user_block", T.IntegerType(), metadata={USER_BLOCKS: n_blocks}),
            T.StructField("user_key", T.IntegerType()),
            T.StructField("ingest_id", T.LongType()),
        ]
    )
    spec = TableSpec(
        schema=schema,
        partition_by=("user_block",),
        skipping=("user_key", "ingest_id"),
        deletion_vectors=True,
    )
    return store.create_with(TABLE, spec, _numbered(_newest(good, n_blocks), -1))


def _choose_blocks(n_ratings: int) -> int:
    """One block per `ROWS_PER_BLOCK`, rounded up to a power of two, at most `MAX_USER_BLOCKS`."""
    wanted = max(1, -(-n_ratings // ROWS_PER_BLOCK))
    return min(MAX_USER_BLOCKS, 1 << (wanted - 1).bit_length())


def _hashes(user_id: Column, n_blocks: int) -> list[Column]:
    """user_block and user_key, from independent parts of the hash of the id in its stored type."""
    block = block_of(user_id, n_blocks)
    within = F.pmod(F.shiftright(F.xxhash64(user_id), 32), F.lit(USER_KEYS)).cast("int")
    return [block.alias("user_block"), (block * USER_KEYS + within).alias("user_key")]


def _broadcast_if_few(rows: DataFrame, n_rows: int) -> DataFrame:
    # Without the hint Spark would sort all ratings of the blocks for the join.
    return F.broadcast(rows) if n_rows <= BROADCAST_ROWS else rows


def _pruning_condition(rows: DataFrame) -> tuple[str | None, int]:
    """SQL by which readers skip blocks and pages without the users of these rows (None: it would
    skip little), and the number of rows."""
    terms = []
    few, n_rows = _few(rows, "user_block", "user_key")
    for column, found in few.items():
        if found is not None:
            terms.append(one_of(column, found))
    return " AND ".join(terms) or None, n_rows


def _few(rows: DataFrame, *columns: str) -> tuple[dict[str, list[int] | None], int]:
    """The distinct values of int columns (None: more than `_PRUNING_LIMIT`), and the number of
    rows."""
    values = [F.collect_set(column) for column in columns]
    few = [F.when(F.size(found) <= _PRUNING_LIMIT, found) for found in values]
    row = rows.agg(*few, F.count(F.lit(1))).first()
    assert row is not None
    *found_sets, n_rows = row
    return {
        name: None if found is None else sorted(found)
        for name, found in zip(columns, found_sets, strict=True)
    }, int(n_rows)
