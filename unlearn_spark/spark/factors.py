"""Factor rows, their ledger and the rating blocks they solve, read and written on Spark."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type

from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.sql import bound_expression, in_blocks
from unlearn_spark.tables.factors import (
    LEDGER,
    LEDGER_SPEC,
    RATING_BLOCKS,
    RATING_BLOCKS_SPEC,
    RATING_CHANGES,
    RATING_CHANGES_SPEC,
    factor_spec,
    factor_table,
)
from unlearn_spark.tables.store import outdated

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyspark.sql import DataFrame

    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion

CHUNKS_PER_FILE = 64
"""Chunks in one file; each is a row group, so the ratings of one row are read with few others."""

SMALL_ROW_GROUPS = {"parquet.block.size": str(256 * 1024), "parquet.page.size.row.check.min": "1"}
"""Session settings (Delta hands Parquet no writer options) that make every chunk a row group with
statistics of its own, so that a reader skips the others."""


def read_factors(store: SparkStore, model: ModelVersion) -> tuple[DataFrame, DataFrame]:
    """User and item factors of a version: id, block, slot, n_ratings, factors array<float>."""
    return (
        store.read("user_factors", model.user_factors_version),
        store.read("item_factors", model.item_factors_version),
    )


def _placed(rows: DataFrame, *partition: str, within: str, n_tasks: int | None = None) -> DataFrame:
    """Rows for one file per partition value, sorted inside; `n_tasks` None: as many tasks as the
    session's shuffles have."""
    columns = [F.col(name) for name in partition]
    placed = rows.repartition(*columns) if n_tasks is None else rows.repartition(n_tasks, *columns)
    return placed.sortWithinPartitions(*partition, within)


def write_factors(store: SparkStore, side: str, rows: DataFrame) -> int:
    """Replace the factor rows of a side by these; return the Delta version."""
    table = factor_table(side)
    spec = factor_spec(to_arrow_type(rows.schema["id"].dataType))
    store.create(table, spec)
    return store.overwrite(table, _placed(rows.select(*spec.schema.names), "block", within="slot"))


def replace_factor_blocks(
    store: SparkStore, side: str, rows: DataFrame, blocks: list[int], *, gathered: bool
) -> int:
    """Replace the named blocks by `rows`, which may leave some of them empty.

    Parameters
    ----------
    gathered
        All rows of a block already lie in one Spark partition, as they do when the table's own
        files are read (each is one row group). Then no row is moved to make one file a block.
    """
    rows = rows.select("id", "block", "slot", "n_ratings", "factors")
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


def write_ledger(store: SparkStore, rows: DataFrame) -> int:
    """Replace the ledger by rows from `ledger_rows`."""
    store.create(LEDGER, LEDGER_SPEC)
    return store.overwrite(LEDGER, _placed(rows, "side", "block", within="slot"))


def read_ledger(store: SparkStore, version: int | None) -> DataFrame:
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


def replace_ledger(store: SparkStore, entries: DataFrame, floors: Mapping[str, float]) -> int:
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


def write_rating_blocks(store: SparkStore, chunks: DataFrame) -> int:
    """Replace the packed ratings."""
    store.create(RATING_BLOCKS, RATING_BLOCKS_SPEC)
    placed = _placed(chunks, "side", "block", within="chunk")
    with session_conf(store.spark, SMALL_ROW_GROUPS):
        return store.overwrite(RATING_BLOCKS, placed, max_records_per_file=CHUNKS_PER_FILE)


def clear_rating_changes(store: SparkStore) -> int:
    """Empty the changes, because the packed ratings contain them."""
    store.create(RATING_CHANGES, RATING_CHANGES_SPEC)
    return store.overwrite(RATING_CHANGES, RATING_CHANGES_SPEC.schema.empty_table())
