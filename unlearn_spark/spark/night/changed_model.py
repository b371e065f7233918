"""Puts a night's changes into the published model: rows with changed ratings, new and gone rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark import publishing
from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.spark import factors
from unlearn_spark.spark.arrow import list_column
from unlearn_spark.spark.frames import aggregates_of, gram_of, materialise
from unlearn_spark.spark.sql import block_of, in_blocks

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import AlsSettings
    from unlearn_spark.spark.night.changes import Changes
    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion


@dataclass(frozen=True)
class ChangedModel:
    """A published model and what a night changes in it, before any row is re-solved.

    Attributes
    ----------
    version
        The number of the version to publish.
    layouts
        By side: `n_blocks`, and `n_slots` including the slots of new rows.
    published
        By side: the factor table of the published version.
    touched
        By side: the rows whose ratings change, and new rows. The columns of the factor table, with
        the new `n_ratings` (0: the row leaves), and is_new.
    new_changes
        The changed ratings by slot, once for each side, in the columns of `rating_changes`.
    n_rows
        By side: the new number of rows.
    adds
        Whether there may be new rows.
    grams, gram_changes
        By side: float64 (rank, rank), the published X'X, and its change because rows leave or come.
        Empty in explicit mode.
    """

    version: int
    layouts: dict[str, dict[str, int]]
    published: dict[str, DataFrame]
    touched: dict[str, DataFrame]
    new_changes: DataFrame
    n_rows: dict[str, int]
    adds: bool
    grams: dict[str, NDArray[np.float64]]
    gram_changes: dict[str, NDArray[np.float64]]

    @property
    def n_blocks(self) -> dict[str, int]:
        """By side: the number of blocks."""
        return {side: layout["n_blocks"] for side, layout in self.layouts.items()}

    @property
    def grams_now(self) -> dict[str, NDArray[np.float64]]:
        """By side: X'X with new rows and without gone ones; empty in explicit mode."""
        return {side: gram + self.gram_changes[side] for side, gram in self.grams.items()}

    def vectors(self, side: str) -> DataFrame:
        """slot, factors of all published rows, also those that leave, and of the new rows."""
        return self._with_new(side, self.published[side].select("slot", "factors"))

    def present(self, side: str) -> DataFrame:
        """The rows that have ratings after the changes, in the columns of the factor table; not
        cached, because most nights read few of its columns or blocks."""
        now = self.touched[side].where("NOT is_new").select("slot", F.col("n_ratings").alias("now"))
        rows = self.published[side].join(F.broadcast(now), "slot", "left")
        rows = rows.withColumn("n_ratings", F.coalesce("now", "n_ratings"))
        rows = rows.select("id", "block", "slot", "n_ratings", "factors")
        return self._with_new(side, rows).where("n_ratings > 0")

    def _with_new(self, side: str, rows: DataFrame) -> DataFrame:
        """Some columns of published rows, and the same columns of the new rows."""
        if not self.adds:
            return rows
        return rows.unionByName(self.touched[side].where("is_new").select(*rows.columns))


def change_model(
    store: SparkStore, model: ModelVersion, changes: Changes, checkpoint: str
) -> ChangedModel:
    """Find the rows whose ratings change, and give new rows their slots and starting factors.

    `checkpoint` is `execution.checkpoint`.
    """
    als, version = model.als, publishing.next_version(model)
    layouts = {side: dict(model.settings["layouts"][side]) for side in SIDES}
    published = dict(zip(SIDES, factors.read_factors(store, model), strict=True))
    touched = run_concurrently(
        {
            side: partial(
                _touched, side, published[side], changes, layouts[side]["n_blocks"], als, checkpoint
            )
            for side in SIDES
        }
    )
    counts = (
        F.expr("count_if(is_new) - count_if(NOT is_new AND n_ratings <= 0)"),
        F.coalesce(F.max("slot"), F.lit(0)),
    )
    found: dict[str, Any] = run_concurrently(
        {
            "sizes": lambda: aggregates_of(touched, *counts),
            "slotted": lambda: materialise(_slotted(changes.pairs, touched), checkpoint),
        }
    )
    before = {"user": model.sizes.users, "item": model.sizes.items}
    for side in SIDES:
        largest = found["sizes"][side][1]
        layouts[side]["n_slots"] = max(layouts[side]["n_slots"], largest + 1)
    by_side = [
        _changes_of(side, found["slotted"], layouts[side]["n_blocks"], version) for side in SIDES
    ]
    grams: dict[str, NDArray[np.float64]] = {}
    gram_changes: dict[str, NDArray[np.float64]] = {}
    if als.implicit_prefs:
        for side in SIDES:
            grams[side] = gram_of(published[side], als.rank)
            change = -gram_of(touched[side].where("n_ratings <= 0"), als.rank)
            if changes.counts.n_added:
                change += gram_of(touched[side].where("is_new"), als.rank)
            gram_changes[side] = change
    return ChangedModel(
        version=version,
        layouts=layouts,
        published=published,
        touched=touched,
        new_changes=by_side[0].unionByName(by_side[1]),
        n_rows={side: before[side] + found["sizes"][side][0] for side in SIDES},
        adds=bool(changes.counts.n_added),
        grams=grams,
        gram_changes=gram_changes,
    )


def _touched(
    side: str,
    published: DataFrame,
    changes: Changes,
    n_blocks: int,
    als: AlsSettings,
    checkpoint: str,
) -> DataFrame:
    """One side of `ChangedModel.touched`."""
    deltas = changes.pairs.groupBy(F.col(f"{side}_id").alias("id")).agg(
        F.sum("change").alias("delta")
    )
    published = published.where(in_blocks(changes.blocks[side]))
    rows = published.join(F.broadcast(deltas), "id").withColumn("is_new", F.lit(False))
    if changes.counts.n_added:
        known = F.broadcast(rows.select("id"))
        unknown = deltas.where("delta > 0").join(known, "id", "left_anti")
        placed = _placed(unknown, published, n_blocks)
        rows = rows.unionByName(_started(side, placed, als).withColumn("is_new", F.lit(True)))
    n_ratings = (F.col("n_ratings") + F.col("delta")).cast("int")
    return materialise(rows.withColumn("n_ratings", n_ratings).drop("delta"), checkpoint)


def _placed(unknown: DataFrame, published: DataFrame, n_blocks: int) -> DataFrame:
    """Give ids that the model does not know (id, delta) the slots after the last of their block."""
    places = published.groupBy("block").agg(F.max("slot").alias("last"))
    unknown = unknown.withColumn("block", block_of("id", n_blocks))
    order = F.row_number().over(Window.partitionBy("block").orderBy("id"))
    last = F.coalesce(F.col("last"), F.col("block") - F.lit(n_blocks))
    return unknown.join(places, "block", "left").select(
        "id",
        "block",
        (last + order * F.lit(n_blocks)).cast("int").alias("slot"),
        F.lit(0).alias("n_ratings"),
        "delta",
    )


def _started(side: str, rows: DataFrame, als: AlsSettings) -> DataFrame:
    """New rows with their starting factors."""
    rank, seed, nonnegative = als.rank, als.seed, als.nonnegative

    def start(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            hashes = batch.column("hash").to_numpy()
            y = initial_factors(hashes, rank, seed, side, nonnegative)
            columns = {name: batch.column(name) for name in batch.schema.names[:-1]}
            yield from pa.table({**columns, "factors": list_column(y)}).to_batches()

    kinds = [f"{field.name} {field.dataType.simpleString()}" for field in rows.schema.fields]
    hashed = rows.withColumn("hash", F.xxhash64("id"))
    return hashed.mapInArrow(start, ", ".join([*kinds, "factors array<float>"]))


def _slotted(pairs: DataFrame, touched: dict[str, DataFrame]) -> DataFrame:
    """The changed pairs by slot: user_slot, item_slot, value, change."""
    for side in SIDES:
        names = touched[side].select(
            F.col("id").alias(f"{side}_id"), F.col("slot").alias(f"{side}_slot")
        )
        pairs = pairs.join(names, f"{side}_id")
    return pairs.drop("user_id", "item_id")


def _changes_of(side: str, slotted: DataFrame, n_blocks: int, version: int) -> DataFrame:
    """The changed pairs as rows of one side, in the columns of `rating_changes`."""
    return slotted.select(
        F.lit(side).alias("side"),
        F.pmod(f"{side}_slot", F.lit(n_blocks)).cast("int").alias("block"),
        F.col(f"{side}_slot").alias("slot"),
        F.col(f"{other_side(side)}_slot").alias("other_slot"),
        "value",
        "change",
        F.lit(version).cast("long").alias("model_version"),
    )
