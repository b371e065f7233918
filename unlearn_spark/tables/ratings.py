"""The ratings table: one row per (user, item), found quickly by user, and how rows get into it.

Partitioned by `user_block`; inside a block files are sorted by `user_key`, a second hash of the
user. No two blocks share a key: the keys of some users, wherever they are, let readers skip all
files and all pages of a file that have none of them. No id and no rating is in Delta's statistics,
because the log outlives the rows.
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
from unlearn_spark.tables.sql import one_of
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
"""Where the number of user blocks stands: in the metadata of column `user_block`, or as a property
of the table, where later versions of this software did not make it."""

_PRUNING_LIMIT = 256
"""Most values in a list of blocks or keys; a longer list would skip little. The session hands lists
of this length to Parquet (`spark.sql.parquet.pushdown.inFilterThreshold`)."""

MOST_PAIRS = 1_000_000
"""Most pairs that a function carries to the tasks that delete them, some ten megabytes; more only
where a single block has more."""

SMALL_PAGES = {
    # Some users' ratings are a few pages of each file: those of five or so values of `user_key`.
    "parquet.page.row.count.limit": "5000",
    # Hardly two times are alike: their dictionary, a megabyte a file, would be read for any page.
    "parquet.enable.dictionary#rated_at": "false",
}
"""How Parquet writes the files, so that a night reads little of them. (Delta hands none of a
writer's own options to it.)"""

BROADCAST_ROWS = 2_000_000
"""Most ids or pairs to be sent whole to every task; more meet the table by a shuffle."""

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
    """The table at a Delta version, or (None) as it is now.

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
    """The table without what was asked to be forgotten: what a model may learn.

    Parameters
    ----------
    version
        Delta version of the ratings; None: as they are now.
    tombstones_version, receipts_version
        See `without_asked`.
    """
    return without_asked(store, read(store, version), tombstones_version, receipts_version)


def without_asked(
    store: Store, rows: DataFrame, tombstones_version: int | None, receipts_version: int | None
) -> DataFrame:
    """Rows of the table without those that a request covers.

    Parameters
    ----------
    tombstones_version
        As from `tombstones.version`; None: nothing was ever asked.
    receipts_version
        Delta version of the receipts, as the model names it that is published at the time; None:
        no request is done. One that is not covers what it names even if it was lifted since.
    """
    if tombstones_version is None:
        return rows
    return requests.retained(rows, asked(store, tombstones_version, receipts_version), guard=False)


def asked(store: Store, tombstones_version: int, receipts_version: int | None) -> DataFrame:
    """The requests (`requests.effective`) of a version of the tombstones; those without a receipt
    in a version of the receipts are pending."""
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
    """Rows of the table with `fitted` (boolean): are they among those that the model was fitted to?

    Also of a later version of the table: what was written since has a later `ingest_id`.
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
    """The rows that later ingests than `ingest_id` wrote."""
    return read(store, version).where(F.col("ingest_id") > ingest_id)


def covering(store: Store, ids: DataFrame, version: int | None = None) -> DataFrame:
    """The rows whose ids are among `ids`, reading no other user blocks than needed.

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
        near, n_ids = _near(ids.select(*_places(F.col("user_id"), user_blocks(store))))
        if near is not None:
            rows = rows.where(near)
    else:
        n_ids = ids.count()
    return rows.join(_hinted(ids, n_ids), names, "left_semi").select(*_COLUMNS)


def user_blocks(store: Store) -> int:
    """Number of partitions of the table, as chosen by the first ingest."""
    chosen = read(store).schema["user_block"].metadata.get(USER_BLOCKS)
    if chosen is None:
        properties = store.spark.sql(f"SHOW TBLPROPERTIES {store.name(TABLE)}")
        row = properties.where(F.col("key") == USER_BLOCKS).first()
        if row is None:
            # Blocks share keys: what it holds would be looked for in vain.
            raise outdated(TABLE)
        chosen = row["value"]
    return int(chosen)


# --- deleting -------------------------------------------------------------------------------


def delete(store: Store, pairs: DataFrame, version: int) -> int:
    """Remove pairs (user_id, item_id in the table's types) from the newest `version`; returns the
    Delta version afterwards.

    A Python function finds the pairs, of which Delta's log has the name alone; the log's predicate
    names blocks. The function carries the pairs, which pass through the driver, `MOST_PAIRS` at a
    time: a larger deletion takes several commits. Rows are marked in deletion vectors; their bytes
    go with `purge`.

    Raises
    ------
    ConflictError
        There are pairs, and the table has another newest version, or got one meanwhile.
    """
    keyed = pairs.select("user_id", "item_id").distinct()
    block = _places(F.col("user_id"), user_blocks(store))[0]
    keyed = keyed.select(block, "user_id", "item_id").persist()
    try:
        counts = keyed.groupBy("user_block").count().collect()
        for blocks in _batches({row["user_block"]: row["count"] for row in counts}):
            found = keyed.where(one_of("user_block", blocks)).toArrow()
            among = _among(found.column("user_id"), found.column("item_id"))
            _checked(store, version)
            condition = one_of("user_block", blocks)
            store.delete(TABLE, condition, ("user_id", "item_id"), among)
            version = _checked(store, version, version + 1)
    finally:
        keyed.unpersist()
    return version


def _batches(counts: Mapping[int, int]) -> Iterator[list[int]]:
    """Blocks with `counts` pairs each, of `MOST_PAIRS` together or a single one."""
    batch: list[int] = []
    for block in sorted(counts):
        if batch and sum(counts[b] for b in batch) + counts[block] > MOST_PAIRS:
            yield batch
            batch = []
        batch.append(block)
    if batch:
        yield batch


def _checked(store: Store, *expected: int) -> int:
    """The newest version of the table, which must be one of the expected."""
    version = store.version(TABLE)
    if version not in expected:
        raise ConflictError("table ratings: ratings were ingested meanwhile; run this job again")
    return version


def _among(
    user_ids: pa.ChunkedArray, item_ids: pa.ChunkedArray
) -> Callable[[pa.Array, pa.Array], pa.Array]:
    """A function of user and item ids (arrays of n): which pairs are among these?"""
    users, items = user_ids.unique(), item_ids.unique()

    def code(user_ids: pa.Array, item_ids: pa.Array) -> pa.Array:
        user, item = pc.index_in(user_ids, users), pc.index_in(item_ids, items)
        return pc.add(pc.multiply(user.cast("int64"), len(items)), item.cast("int64"))

    codes = code(user_ids, item_ids)

    def is_among(user_ids: pa.Array, item_ids: pa.Array) -> pa.Array:
        return pc.is_in(code(user_ids, item_ids), codes)  # a foreign id has no code

    return is_among


def _pair_condition(blocks: Sequence[int] | None) -> str:
    """SQL for: a row t of the table is that of a pair s, in one of these blocks (None: any).

    Delta writes this text into the log: column names, and numbers of blocks. Those as ranges of
    keys, because two merges into different partitions would go on side by side.
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
    """One row a pair: (user_block, user_key, user_id, item_id, rating, rated_at), sorted so.

    One exchange by block serves the grouping and the layout of the files.
    """
    keys = ("user_block", "user_key", "user_id", "item_id")
    placed = good.select(
        *_places(F.col("user_id"), n_blocks),
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
        pair with one time the larger wins).
    n_good
        Their number.
    types
        Of user_id and item_id, where the table is to be made.

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
    # A pass over the input to spare blocks of the table, which a few blocks do not repay.
    blocks = (
        None
        if n_blocks <= 4
        else _few(good.select(*_places(F.col("user_id"), n_blocks)), "user_block")[0]["user_block"]
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
    """The table's columns, with the `ingest_id` of what is written upon a version (none: -1).

    Every ingest commits, so versions number ingests, from 1: no number is used twice, also when all
    rows of the last ingest were deleted since.
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
    """SQL for: a rating replaces that of its pair. It is later, or as late and another."""
    later = f"{old}rated_at IS NULL AND {new}rated_at IS NOT NULL OR {new}rated_at > {old}rated_at"
    other = f"{new}rated_at <=> {old}rated_at AND {new}rating <> {old}rating"
    return f"({later} OR {other})"


def _create(store: Store, good: DataFrame, types: dict[str, T.DataType], n_blocks: int) -> int:
    """Make the table of the first rows, in one commit; returns its version.

    A job that dies has made nothing, and of two first ingests at the same time one fails.
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
    """The power of two next above one block per million rows, at most 256."""
    wanted = max(1, -(-n_ratings // ROWS_PER_BLOCK))
    return min(MAX_USER_BLOCKS, 1 << (wanted - 1).bit_length())


def _places(user_id: Column, n_blocks: int) -> list[Column]:
    """user_block and user_key, from independent parts of the hash of the id in its stored type."""
    hashed = F.xxhash64(user_id)
    block = F.pmod(hashed, F.lit(n_blocks)).cast("int")
    within = F.pmod(F.shiftright(hashed, 32), F.lit(USER_KEYS)).cast("int")
    return [block.alias("user_block"), (block * USER_KEYS + within).alias("user_key")]


def _hinted(rows: DataFrame, n_rows: int) -> DataFrame:
    # Without the hint all ratings of their blocks would be sorted to meet the few.
    return F.broadcast(rows) if n_rows <= BROADCAST_ROWS else rows


def _near(rows: DataFrame) -> tuple[str | None, int]:
    """An SQL condition by which blocks and pages without the users of these rows are skipped, and
    how many rows they are. No condition where it would skip little."""
    terms = []
    few, n_rows = _few(rows, "user_block", "user_key")
    for column, found in few.items():
        if found is not None:
            terms.append(one_of(column, found))
    return " AND ".join(terms) or None, n_rows


def _few(rows: DataFrame, *columns: str) -> tuple[dict[str, list[int] | None], int]:
    """The distinct values of int columns, or None when they are too many to help; and the number
    of rows."""
    values = [F.collect_set(column) for column in columns]
    few = [F.when(F.size(found) <= _PRUNING_LIMIT, found) for found in values]
    row = rows.agg(*few, F.count(F.lit(1))).first()
    assert row is not None
    *found_sets, n_rows = row
    return {
        name: None if found is None else sorted(found)
        for name, found in zip(columns, found_sets, strict=True)
    }, int(n_rows)
