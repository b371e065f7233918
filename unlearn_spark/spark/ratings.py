"""The ratings table on Spark: read, delete and upsert ratings, quickly by user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import to_arrow_type

from unlearn_spark.errors import InputError
from unlearn_spark.spark import requests
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.sql import block_of, one_of
from unlearn_spark.tables import ratings as table
from unlearn_spark.tables.ratings import COLUMNS, TABLE, USER_KEYS
from unlearn_spark.tables.requests import rules_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion

_PRUNING_LIMIT = 256
"""Most values in a list of blocks or keys; a longer list would skip little. The session hands lists
of this length to Parquet (`spark.sql.parquet.pushdown.inFilterThreshold`)."""

MOST_PAIRS = 1_000_000
"""Most pairs that one commit deletes, because the driver holds them; one block may have more."""

SMALL_PAGES = {
    "parquet.page.row.count.limit": str(table.PAGE_ROWS),
    # Few times repeat, and their large dictionary would be read for any page.
    "parquet.enable.dictionary#rated_at": "false",
}
"""Session settings that let a night read little of a file (Delta hands on no writer options)."""

BROADCAST_ROWS = 2_000_000
"""Most ids or pairs to broadcast; more are joined by a shuffle."""

# --- reading --------------------------------------------------------------------------------


def read(store: SparkStore, version: int | None = None) -> DataFrame:
    """The table at a Delta version; None: the newest.

    Columns: user_id, item_id (string or bigint), rating float, rated_at timestamp (null: unknown),
    user_block int, user_key int, ingest_id bigint.
    """
    return store.read(TABLE, version)


def retained(
    store: SparkStore,
    version: int,
    tombstones_version: int | None,
    receipts_version: int | None,
) -> DataFrame:
    """The ratings of a version that no request covers: what a model may learn from.

    The other versions are as for `rules_of`.
    """
    rules = rules_of(store, tombstones_version, receipts_version)
    return requests.retained(read(store, version), rules)


def fitted(store: SparkStore, model: ModelVersion) -> DataFrame:
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


def with_fitted(store: SparkStore, model: ModelVersion, rows: DataFrame) -> DataFrame:
    """Add `fitted` (boolean) to rows of the table: whether the model was fitted to them.

    Rows may be of a later version of the table: what was written since has a later `ingest_id`.
    """
    known = F.col("ingest_id") <= (model.ratings_ingest_id or 0)
    rules = rules_of(store, model.tombstones_version, model.receipts_version)
    if rules is None:
        return rows.withColumn("fitted", known)
    marked = requests.with_requests(rows, rules)
    known &= F.size("request_ids") == 0
    return marked.withColumn("fitted", known).drop("request_ids")


def newest_ingest(store: SparkStore, version: int | None = None) -> int:
    """The largest ingest_id in the table, 0 when it is empty."""
    row = read(store, version).agg(F.max("ingest_id")).first()
    return int(row[0]) if row is not None and row[0] is not None else 0


def since(store: SparkStore, ingest_id: int, version: int | None = None) -> DataFrame:
    """The rows written by ingests after `ingest_id`."""
    return read(store, version).where(F.col("ingest_id") > ingest_id)


def covering(store: SparkStore, ids: DataFrame, version: int | None = None) -> DataFrame:
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
    return rows.join(_broadcast_if_few(ids, n_ids), names, "left_semi").select(*COLUMNS)


def user_blocks(store: SparkStore) -> int:
    """Number of partitions of the table, as chosen by the first ingest."""
    return table.user_blocks(store.column_metadata(TABLE, "user_block"))


# --- deleting -------------------------------------------------------------------------------


def delete(store: SparkStore, pairs: DataFrame, version: int) -> int:
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


def _checked(store: SparkStore, *expected: int) -> int:
    """The newest version of the table. Raises ConflictError unless it is one of the expected."""
    version = store.version(TABLE)
    if version not in expected:
        raise table.changed_meanwhile()
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


def id_types(store: SparkStore) -> dict[str, T.DataType] | None:
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
    store: SparkStore, good: DataFrame, n_good: int, types: dict[str, T.DataType]
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
    store: SparkStore, good: DataFrame, n_good: int, types: dict[str, T.DataType]
) -> tuple[int, int | None]:
    if not store.exists(TABLE):
        if n_good == 0:
            return 0, None
        version = _create(store, good, types, table.choose_blocks(n_good))
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


def _numbered(rows: DataFrame, version: int | None) -> DataFrame:
    """The table's columns, for rows that are written after a version (None: the first ones)."""
    ingest_id = F.lit(table.next_ingest(version)).cast("bigint")
    return rows.withColumn("ingest_id", ingest_id).select(*COLUMNS)


def _changes(newest: DataFrame, stored: DataFrame, blocks: Sequence[int] | None) -> DataFrame:
    """The rows that are new or beat the stored rating of their pair."""
    if blocks is not None:
        stored = stored.where(F.col("user_block").isin(list(blocks)))
    keys = ["user_block", "user_key", "user_id", "item_id"]
    known = stored.select(
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


def _create(store: SparkStore, good: DataFrame, types: dict[str, T.DataType], n_blocks: int) -> int:
    """Create the table with its first rows, in one commit; return its version.

    A job that dies creates nothing, and of two first ingests at the same time one fails.
    """
    id_types = {name: to_arrow_type(kind) for name, kind in types.items()}
    rows = _numbered(_newest(good, n_blocks), None)
    return store.create_with(TABLE, table.spec(id_types, n_blocks), rows)


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
