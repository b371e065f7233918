"""What a night cannot take less than: its tables read and written, with one row in each.

    python benchmarks/floor.py --turns 12

Every turn reads a row from each of the seven tables that a night of deletions has to look at, then
deletes a row of the ratings and writes one into each table that has to change, and one into
`models` at the end. What need not wait for another thing is done side by side. Nothing is computed,
no table is large, and the settings are those of a small night, so that what a turn takes is Spark's
and Delta's own share of a night.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.settings import SMALL_QUERIES
from unlearn_spark.tables import factors, models, ratings, receipts, tombstones
from unlearn_spark.tables.delta_spark import SparkStore
from unlearn_spark.tables.store import TableSpec

RATINGS_SPEC = TableSpec(
    pa.schema([("user_id", pa.int64()), ("user_block", pa.int32())]),
    partition_by=("user_block",),
    deletion_vectors=True,
)
SPECS = {
    ratings.TABLE: RATINGS_SPEC,
    models.TABLE: models.SPEC,
    tombstones.TABLE: tombstones.SPEC,
    receipts.TABLE: receipts.SPEC,
    factors.factor_table("user"): factors.factor_spec(pa.int64()),
    factors.factor_table("item"): factors.factor_spec(pa.int64()),
    factors.LEDGER: factors.LEDGER_SPEC,
    factors.RATING_CHANGES: factors.RATING_CHANGES_SPEC,
}
REPLACED = {
    factors.factor_table("user"): "block = 0",
    factors.factor_table("item"): "block = 0",
    factors.LEDGER: "side = 'user' AND block = 0",
}
APPENDED = (receipts.TABLE, factors.RATING_CHANGES)


def one_row(table: str) -> pa.Table:
    """A row of that table: block 0, side user, all else null."""
    schema = SPECS[table].schema
    row: dict[str, Any] = {"block": 0, "side": "user"}
    return pa.Table.from_pylist([row], schema=schema)


def prepare(store: SparkStore, turns: int) -> None:
    """The tables, with a rating for every turn to delete."""
    for table, spec in SPECS.items():
        store.create(table, spec)
        if table != ratings.TABLE:
            store.append(table, one_row(table))
    store.append(
        ratings.TABLE, store.spark.range(turns).selectExpr("id AS user_id", "0 AS user_block")
    )


def read(store: SparkStore) -> None:
    """A row of each table that a night looks at; of `models` first, which names the versions."""

    def look(table: str) -> None:
        store.read(table).first()

    look(models.TABLE)
    others = set(SPECS) - {models.TABLE, receipts.TABLE}
    run_concurrently({table: partial(look, table) for table in others})


def write(store: SparkStore, turn: int) -> None:
    """The commits of a night, the models table's last."""

    def is_gone(user_ids: pa.Array) -> pa.Array:
        return pc.equal(user_ids, turn)

    def delete() -> int:
        store.delete(ratings.TABLE, "user_block = 0", ("user_id",), is_gone)
        return 0

    writes: dict[str, Callable[[], int]] = {ratings.TABLE: delete}
    for table, predicate in REPLACED.items():
        writes[table] = partial(store.replace_where, table, store.frame(one_row(table)), predicate)
    for table in APPENDED:
        writes[table] = partial(store.append, table, one_row(table))
    run_concurrently(writes)
    store.append(models.TABLE, one_row(models.TABLE))


@click.command()
@click.option("--turns", default=12)
def main(turns: int) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    raw: dict[str, list[float]] = {"read": [], "write": []}
    with tempfile.TemporaryDirectory(prefix="unlearn-bench-") as root:
        store = SparkStore(spark, root)
        prepare(store, turns)
        with session_conf(spark, SMALL_QUERIES):
            for turn in range(turns):
                raw["read"].append(common.timed(partial(read, store)))
                raw["write"].append(common.timed(partial(write, store, turn)))
        spark.stop()
    late = {name: statistics.median(seconds[turns // 2 :]) for name, seconds in raw.items()}
    common.table(
        ["", "first turn, s", "later half, median, s"],
        [[name, seconds[0], late[name]] for name, seconds in raw.items()],
    )
    common.save("floor", {"raw": raw})


if __name__ == "__main__":
    main()
