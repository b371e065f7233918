"""Factor rows, their ledger and the rating blocks they solve, as Delta tables.

No table is partitioned by id. A whole model overwrites them all. A night replaces only the factor
blocks that changed, and every other block keeps its very files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BinaryType,
    DataType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    StringType,
    StructField,
    StructType,
)

from unlearn_spark.tables.session_conf import session_conf
from unlearn_spark.tables.sql import bound_expression, in_blocks
from unlearn_spark.tables.store import TableSpec, outdated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyspark.sql import DataFrame

    from unlearn_spark.tables.store import Store

LEDGER = "ledger"
RATING_BLOCKS = "rating_blocks"
RATING_CHANGES = "rating_changes"

CHUNKS_PER_FILE = 64
"""Chunks in one file; each is a row group, so the ratings of one row are read with few others."""


def factor_table(side: str) -> str:
    """The name `user_factors` or `item_factors`."""
    return f"{side}_factors"


def _fields(*pairs: tuple[str, DataType]) -> StructType:
    return StructType([StructField(name, kind) for name, kind in pairs])


def factor_spec(id_type: DataType) -> TableSpec:
    """One row per user or item: its vector and how many ratings it solves."""
    return TableSpec(
        _fields(
            ("id", id_type),
            ("block", IntegerType()),
            ("slot", IntegerType()),
            ("n_ratings", IntegerType()),
            ("factors", ArrayType(FloatType())),
        ),
        partition_by=("block",),
        skipping=("slot",),
    )


LEDGER_SPEC = TableSpec(
    _fields(
        ("side", StringType()),
        ("id", StringType()),
        ("block", IntegerType()),
        ("slot", IntegerType()),
        ("chunk", IntegerType()),
        ("n_ratings", IntegerType()),
        ("bound", DoubleType()),
        ("gradient_norm", DoubleType()),
        ("b_norm", DoubleType()),
        ("factor_norm", DoubleType()),
    ),
    partition_by=("side", "block"),
    skipping=("slot",),
)
"""bound >= ||A x - b|| / max(||b||, floor) of the row, with its side's floor (`floor_of`).
`gradient_norm` is an upper bound of the numerator, `b_norm` a lower bound of ||b||."""

RATING_BLOCKS_SPEC = TableSpec(
    _fields(
        ("side", StringType()),
        ("block", IntegerType()),
        ("chunk", IntegerType()),
        ("slots", BinaryType()),
        ("counts", BinaryType()),
        ("others", BinaryType()),
        ("values", BinaryType()),
    ),
    partition_by=("side", "block"),
    skipping=("chunk",),
)
"""The ratings that a model solves, packed by row on both sides (`core.blocks.RatingBlock`)."""

RATING_CHANGES_SPEC = TableSpec(
    _fields(
        ("side", StringType()),
        ("block", IntegerType()),
        ("slot", IntegerType()),
        ("other_slot", IntegerType()),
        ("value", FloatType()),
        ("change", IntegerType()),
        ("model_version", LongType()),
    ),
    partition_by=("side",),
    skipping=("block", "model_version"),
)
"""What changed since the rating blocks were packed: change -1 removes the pair, +1 adds it. A night
changes few ratings; packing them anew would rewrite every block that they touch."""


def _placed(rows: DataFrame, *partition: str, within: str, n_tasks: int | None = None) -> DataFrame:
    """Rows for one file per partition value, sorted inside; `n_tasks` None: as many tasks as the
    session's shuffles have."""
    columns = [F.col(name) for name in partition]
    placed = rows.repartition(*columns) if n_tasks is None else rows.repartition(n_tasks, *columns)
    return placed.sortWithinPartitions(*partition, within)


def write_factors(store: Store, side: str, rows: DataFrame) -> int:
    """Replace the factor rows of a side by these; return the Delta version."""
    table = factor_table(side)
    spec = factor_spec(rows.schema["id"].dataType)
    store.create(table, spec)
    return store.overwrite(table, _placed(rows.select(*spec.schema.names), "block", within="slot"))


def replace_factor_blocks(
    store: Store, side: str, rows: DataFrame, blocks: list[int], *, gathered: bool
) -> int:
    """Replace the named blocks by `rows`, which may leave some of them empty.

    Parameters
    ----------
    gathered
        All rows of a block already lie in one Spark partition, as they do when the table's own
        files are read (each is one row group). Then no row is moved to make one file a block.
    """
    rows = rows.select(*factor_spec(rows.schema["id"].dataType).schema.names)
    if gathered:
        rows = rows.sortWithinPartitions("block", "slot")
    else:
        rows = _placed(rows, "block", within="slot", n_tasks=len(blocks))
    return store.replace_where(factor_table(side), rows, in_blocks(blocks))


def _with_bounds(entries: DataFrame, floors: Mapping[str, float]) -> DataFrame:
    """Ledger rows from entries: side, id, block, slot, chunk, n_ratings and the norms."""
    floor = F.when(F.col("side") == "user", floors["user"]).otherwise(floors["item"])
    return entries.withColumn("bound", bound_expression(floor)).select(*LEDGER_SPEC.schema.names)


def ledger_rows(rows: DataFrame, side: str, floors: Mapping[str, float]) -> DataFrame:
    """Ledger entries of freshly scanned factor rows of a side."""
    id = F.col("id").cast("string")
    return _with_bounds(rows.withColumns({"side": F.lit(side), "id": id}), floors)


def write_ledger(store: Store, rows: DataFrame) -> int:
    """Replace the ledger by rows from `ledger_rows`."""
    store.create(LEDGER, LEDGER_SPEC)
    return store.overwrite(LEDGER, _placed(rows, "side", "block", within="slot"))


def read_ledger(store: Store, version: int | None) -> DataFrame:
    """The ledger at a Delta version.

    Raises
    ------
    InputError
        It has the layout of an earlier version of this software.
    """
    ledger = store.read(LEDGER, version)
    if not set(LEDGER_SPEC.schema.names) <= set(ledger.columns):
        raise outdated(LEDGER)
    return ledger


def replace_ledger(store: Store, entries: DataFrame, floors: Mapping[str, float]) -> int:
    """Replace the ledger by a night's entries.

    Parameters
    ----------
    entries
        side, id, block, slot, chunk, n_ratings, gradient_norm, b_norm, factor_norm. All entries of
        a block lie in one Spark partition, so none is moved to make one file a block.
    floors
        By side: the least denominator of a residual (`floor_of`).
    """
    rows = _with_bounds(entries, floors).sortWithinPartitions("side", "block", "slot")
    return store.overwrite(LEDGER, rows)


def write_rating_blocks(store: Store, chunks: DataFrame) -> int:
    """Replace the packed ratings."""
    store.create(RATING_BLOCKS, RATING_BLOCKS_SPEC)
    placed = _placed(chunks, "side", "block", within="chunk")
    with session_conf(store.spark, SMALL_ROW_GROUPS):
        return store.overwrite(RATING_BLOCKS, placed, max_records_per_file=CHUNKS_PER_FILE)


def clear_rating_changes(store: Store) -> int:
    """Empty the changes, because the packed ratings contain them."""
    store.create(RATING_CHANGES, RATING_CHANGES_SPEC)
    return store.overwrite(RATING_CHANGES, store.frame([], RATING_CHANGES_SPEC.schema))


SMALL_ROW_GROUPS = {"parquet.block.size": str(256 * 1024), "parquet.page.size.row.check.min": "1"}
"""Session settings (Delta hands Parquet no writer options) that make every chunk a row group with
statistics of its own, so that a reader skips the others."""
