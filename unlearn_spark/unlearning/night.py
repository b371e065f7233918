"""One night's work: from pending requests and new ratings to the next published version.

What changes is computed from the ratings version that the published model names, never from the
newest: a job that died after deleting rows finds the same work again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark import publishing
from unlearn_spark.als import encoding
from unlearn_spark.als.encoding import SideLayout
from unlearn_spark.als.initial import initial_factors
from unlearn_spark.als.spark import list_column, matrix_of, other_side, session_parallelism
from unlearn_spark.als.training import (
    Encoded,
    Sweeper,
    finish_rows,
    largest_residual,
    solver_of,
    start_iterate,
)
from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.tables import factors, models, ratings, receipts, tombstones
from unlearn_spark.unlearning import requests
from unlearn_spark.unlearning.frontier import LEDGER_COLUMNS, SIDES, Frontier, Work, bound
from unlearn_spark.unlearning.ledger import gram

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import Settings
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store


@dataclass(frozen=True)
class Changes:
    """What a night has to do.

    Attributes
    ----------
    pending
        Requests without a receipt.
    removed
        user_id, item_id, request_id: one row for each rating and request, in the model or not.
    pairs
        user_id, item_id, value, change (-1 leaves the model, +1 enters it).
    ratings_version, ingest_id, tombstones_version
        The state of the tables that this was computed from.
    """

    pending: DataFrame | None
    removed: DataFrame | None
    pairs: DataFrame
    n_requests: int
    n_removed: int
    n_added: int
    ratings_version: int
    ingest_id: int
    tombstones_version: int | None


def collect_changes(store: Store, model: ModelVersion) -> Changes:
    """Pending requests, the ratings that they take out of the model, and the new ratings."""
    if model.ratings_version is None:
        raise InputError(f"model version {model.model_version} names no ratings; train it here")
    ratings_version = store.version(ratings.TABLE)
    tombstones_version = tombstones.version(store)
    known = ratings.read(store, model.ratings_version).where(
        F.col("ingest_id") <= (model.ratings_ingest_id or 0)
    )
    newest = ratings.newest_ingest(store, ratings_version)
    columns = ["user_id", "item_id", "rating", "rated_at"]
    added = ratings.since(store, model.ratings_ingest_id or 0, ratings_version).select(columns)
    pending = removed = None
    n_requests = 0
    leaving = known.select("user_id", "item_id", "rating").limit(0)
    if tombstones_version is not None:
        every = tombstones.read(store, tombstones_version)
        if model.tombstones_version is not None:
            known = requests.retained(known, tombstones.read(store, model.tombstones_version))
        pending = requests.effective(every)
        done = receipts.read(store, model)
        if done is not None:
            pending = pending.join(done.select("request_id"), "request_id", "left_anti")
        pending = pending.persist()
        n_requests = pending.count()
        added = requests.retained(added, every)
        if n_requests:
            # Also what a job that died after deleting has deleted already: it counts all the same.
            stored = ratings.read(store, ratings_version).select(columns)
            before = ratings.read(store, model.ratings_version).select(columns)
            removed = (
                requests.covered(stored.unionByName(before), pending, guard=False)
                .select("user_id", "item_id", "request_id")
                .distinct()
                .persist()
            )
            leaving = (
                requests.covered(known.select(columns), pending, guard=False)
                .select("user_id", "item_id", "rating")
                .distinct()
            )
            added = added.join(removed.select("user_id", "item_id"), ["user_id", "item_id"], "anti")
    leaving = leaving.persist()
    replaced = (
        known.join(added.select("user_id", "item_id"), ["user_id", "item_id"], "left_semi")
        .join(leaving, ["user_id", "item_id"], "left_anti")
        .select("user_id", "item_id", "rating")
    )
    pairs = (
        leaving.unionByName(replaced)
        .withColumn("change", F.lit(-1))
        .unionByName(added.select("user_id", "item_id", "rating").withColumn("change", F.lit(1)))
        .withColumnRenamed("rating", "value")
        .persist()
    )
    counts = {row["change"]: row["count"] for row in pairs.groupBy("change").count().collect()}
    return Changes(
        pending,
        removed,
        pairs,
        n_requests,
        leaving.count(),
        counts.get(1, 0),
        ratings_version,
        newest,
        tombstones_version,
    )


def run_night(
    store: Store, settings: Settings, progress: Callable[[str], None], *, kind: str
) -> dict[str, Any]:
    """Fold everything pending into the published model and publish the next version.

    Parameters
    ----------
    kind
        `unlearn`: nothing happens without a pending request. `update`: nothing happens without
        pending requests or new ratings.

    Returns
    -------
    dict
        The figures of the job.

    Raises
    ------
    TableMissingError
        There is no published model.
    ConflictError
        Another job published meanwhile; nothing became visible.
    """
    started = time.perf_counter()
    model = models.published(store)
    changes = collect_changes(store, model)
    idle = not changes.n_requests and (kind == "unlearn" or not changes.pairs.limit(1).count())
    if idle:
        return {"model_version": model.model_version, "requests": 0, "ratings_removed": 0}
    progress(
        f"{changes.n_requests} requests take {changes.n_removed} ratings out; "
        f"{changes.n_added} new or corrected ratings come in"
    )
    bases = restore(store, model)
    night = Night(store, settings, model, changes, progress)
    figures = night.work()
    version = night.publish(kind, {**figures, "seconds": time.perf_counter() - started}, bases)
    failed = {} if version.certificate["holds"] else {"exit_code": 1}
    if failed:
        progress(
            f"the certificate does not hold: residual {night.worst:.2e} is over unlearn.tau after "
            f"als.max_sweeps = {night.als.max_sweeps} sweeps; train anew with more"
        )
    return {
        **failed,
        "model_version": version.model_version,
        "parent": model.model_version,
        **figures,
        "seconds": time.perf_counter() - started,
    }


def restore(store: Store, model: ModelVersion) -> dict[str, int]:
    """Put the model's own tables back to what the published version names.

    They differ after a job that died between its writes, and after a rollback. Returns the Delta
    version of each table to write upon.
    """
    bases = {}
    for table in ("user_factors", "item_factors", "ledger", "rating_blocks", "rating_changes"):
        wanted = getattr(model, f"{table}_version")
        if wanted is not None:
            bases[f"{table}_version"] = store.restore(table, wanted)
    return bases


class Night:
    """The published model with tonight's changes put in, and the loop that mends it."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        model: ModelVersion,
        changes: Changes,
        progress: Callable[[str], None],
    ) -> None:
        self.store, self.settings, self.model, self.changes = store, settings, model, changes
        self.als = model.als
        self.layouts = {side: dict(model.settings["layouts"][side]) for side in SIDES}
        self.version = publishing.next_version(model)
        published = dict(zip(SIDES, models.read_factors(store, model), strict=True))
        self.rows: dict[str, DataFrame] = {}
        self.gone: dict[str, DataFrame] = {}
        self.touched: dict[str, DataFrame] = {}
        gram_changes: dict[str, Any] = dict.fromkeys(SIDES)
        grams: dict[str, NDArray[np.float64]] = {}
        for side in SIDES:
            column = f"{side}_id"
            deltas = (
                changes.pairs.groupBy(F.col(column).alias("id"))
                .agg(F.sum("change").alias("delta"))
                .persist()
            )
            base = published[side].withColumn("is_new", F.lit(False))
            fresh = self._new_rows(side, published[side], deltas)
            rows = (
                base.unionByName(fresh)
                .join(F.broadcast(deltas), "id", "left")
                .withColumn("n_ratings", (F.col("n_ratings") + F.coalesce("delta", F.lit(0))))
                .withColumn("n_ratings", F.col("n_ratings").cast("int"))
                .persist()
            )
            self.touched[side] = rows.where(F.col("delta").isNotNull())
            self.gone[side] = self.touched[side].where("n_ratings <= 0")
            self.rows[side] = rows.where("n_ratings > 0")
            last = rows.agg(F.max("slot")).first()
            assert last is not None
            self.layouts[side]["n_slots"] = max(
                self.layouts[side]["n_slots"], int(last[0] or 0) + 1
            )
            if self.als.implicit_prefs:
                came = self.rows[side].where("is_new")
                left = self.gone[side].where("NOT is_new")
                gram_changes[side] = gram_of(came, self.als.rank) - gram_of(left, self.als.rank)
                grams[side] = gram_of(published[side], self.als.rank)
        self.tonight = self._slotted().persist()
        changed = [
            self.tonight.select(
                F.lit(side).alias("side"),
                F.pmod(f"{side}_slot", F.lit(self.layouts[side]["n_blocks"]))
                .cast("int")
                .alias("block"),
                F.col(f"{side}_slot").alias("slot"),
                F.col(f"{other_side(side)}_slot").alias("other_slot"),
                "value",
                "change",
                F.lit(self.version).cast("long").alias("model_version"),
            )
            for side in SIDES
        ]
        self.new_changes = changed[0].unionByName(changed[1])
        stored = store.read(factors.RATING_CHANGES, model.rating_changes_version)
        totals = [rows.agg(F.sum("n_ratings"), F.count(F.lit(1))).first() for rows in self._sides()]
        self.n_ratings = int(totals[0][0] or 0) if totals[0] else 0
        n_rows = sum(int(total[1]) for total in totals if total)
        self.frontier = Frontier(
            solver=solver_of(self.als),
            factors={side: self.rows[side].select("slot", "factors") for side in SIDES},
            chunks=store.read(factors.RATING_BLOCKS, model.rating_blocks_version),
            changes=stored.unionByName(self.new_changes),
            ledger=self._ledger(),
            settings=settings.unlearn,
            execution=settings.execution,
            parallelism=session_parallelism(store.spark),
            work=Work(self.als.rank, self.n_ratings, n_rows),
            progress=progress,
            grams=grams,
        )
        self.gram_changes = gram_changes
        self.swept: dict[str, DataFrame] | None = None
        self.encoded: Encoded | None = None
        self.progress = progress

    def _sides(self) -> list[DataFrame]:
        return [self.rows[side] for side in SIDES]

    def _new_rows(self, side: str, published: DataFrame, deltas: DataFrame) -> DataFrame:
        """Rows for ids that the model does not know, placed after the others of their block."""
        n_blocks = self.layouts[side]["n_blocks"]
        rank, seed, nonnegative = self.als.rank, self.als.seed, self.als.nonnegative
        places = published.groupBy("block").agg(F.max("slot").alias("last"))
        unknown = deltas.where("delta > 0").join(published.select("id"), "id", "left_anti")
        unknown = unknown.select(
            "id",
            F.pmod(F.xxhash64("id"), F.lit(n_blocks)).cast("int").alias("block"),
            F.xxhash64("id").alias("hash"),
        )
        order = F.row_number().over(Window.partitionBy("block").orderBy("id"))
        placed = unknown.join(places, "block", "left").select(
            "id",
            "block",
            (F.coalesce(F.col("last"), F.col("block") - F.lit(n_blocks)) + order * F.lit(n_blocks))
            .cast("int")
            .alias("slot"),
            "hash",
        )
        schema = published.schema
        start = ", ".join(
            f"{name} {schema[name].dataType.simpleString()}"
            for name in ("id", "block", "slot", "n_ratings", "factors")
        )

        def begin(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
            for batch in batches:
                y = initial_factors(batch.column("hash").to_numpy(), rank, seed, side, nonnegative)
                yield from pa.table(
                    {
                        **{name: batch.column(name) for name in ("id", "block", "slot")},
                        "n_ratings": pa.array(np.zeros(len(y), np.int32)),
                        "factors": list_column(y),
                    }
                ).to_batches()

        return placed.mapInArrow(begin, start).withColumn("is_new", F.lit(True))

    def _slotted(self) -> DataFrame:
        """Tonight's pairs by slot, with the factors of both rows."""
        pairs = self.changes.pairs
        for side in SIDES:
            names = self.touched[side].select(
                F.col("id").alias(f"{side}_id"),
                F.col("slot").alias(f"{side}_slot"),
                F.col("factors").alias(f"{side}_factors"),
            )
            pairs = pairs.join(names, f"{side}_id")
        return pairs.drop("user_id", "item_id")

    def _ledger(self) -> DataFrame:
        """Both sides' entries, with new rows that must be solved and without rows that left."""
        stored = self.store.read(factors.LEDGER, self.model.ledger_version).select(
            "side", "slot", "chunk", "gradient_norm", "b_norm", "factor_norm"
        )
        sides = []
        for side in SIDES:
            mine = stored.where(F.col("side") == side).drop("side")
            rows = self.rows[side].select("slot", "block", "n_ratings").join(mine, "slot", "left")
            sides.append(
                rows.select(
                    F.lit(side).alias("side"),
                    "slot",
                    "block",
                    F.coalesce("chunk", F.lit(-1)).alias("chunk"),
                    "n_ratings",
                    F.coalesce("gradient_norm", F.lit(float("inf"))).alias("gradient_norm"),
                    F.coalesce("b_norm", F.lit(0.0)).alias("b_norm"),
                    F.coalesce("factor_norm", F.lit(1.0)).alias("factor_norm"),
                )
            )
        return sides[0].unionByName(sides[1]).select(*LEDGER_COLUMNS)

    def work(self) -> dict[str, Any]:
        """Push, run the loop, and sweep everything if the loop was not the cheaper way."""
        frontier = self.frontier
        if self.n_ratings == 0:
            raise InputError(
                "these requests remove every rating of the model, which leaves nothing to publish; "
                "ingest other ratings first"
            )
        frontier.push_changes(self.tonight, self.gram_changes)
        sweeps = 0
        if not frontier.run():
            sweeps = self._sweep()
        tau = self.settings.unlearn.tau
        if self.swept is None:
            state = frontier.summary(tau)
            worst = max(state[side]["worst"] or 0.0 for side in SIDES)
            solved = {side: self._solved_slots(side).distinct().count() for side in SIDES}
            blocks = {side: self._changed_blocks(side) for side in SIDES}
        else:
            worst = max(largest_residual(rows) for rows in self.swept.values())
            solved = {side: self.swept[side].count() for side in SIDES}
            blocks = {side: list(range(self.layouts[side]["n_blocks"])) for side in SIDES}
        self.blocks, self.worst = blocks, worst
        return {
            "requests": self.changes.n_requests,
            "ratings_removed": self.changes.n_removed,
            "ratings_added": self.changes.n_added,
            "rows_resolved": solved,
            "blocks_written": {side: len(blocks[side]) for side in SIDES},
            "blocks_total": {side: self.layouts[side]["n_blocks"] for side in SIDES},
            "rounds": frontier.rounds,
            "sweeps": sweeps,
            "work_sweeps": frontier.work.sweeps,
            "max_residual": worst,
        }

    def _solved_slots(self, side: str) -> DataFrame:
        moved = self.frontier.solved[side]
        return self.rows[side].limit(0).select("slot") if moved is None else moved.select("slot")

    def _changed_blocks(self, side: str) -> list[int]:
        """Blocks with a row that was re-solved, came, left, or has another number of ratings."""
        slots = self._solved_slots(side).unionByName(self.touched[side].select("slot"))
        blocks = slots.select(
            F.pmod("slot", F.lit(self.layouts[side]["n_blocks"])).cast("int").alias("block")
        )
        return sorted(row["block"] for row in blocks.distinct().collect())

    def _sweep(self) -> int:
        """Whole accelerated sweeps from where the loop stopped, and a scan of every row."""
        frontier = self.frontier
        self.progress("the disturbance is wide: sweeping everything from the present factors")
        layouts, parts, names = {}, {}, {}
        for side in SIDES:
            n_blocks = self.layouts[side]["n_blocks"]
            n_parts = encoding.choose_parts(
                self.n_ratings,
                n_blocks,
                self.settings.execution.part_ratings,
                frontier.parallelism,
            )
            layout = SideLayout(
                side, self.rows[side].count(), n_blocks, n_parts, self.layouts[side]["n_slots"]
            )
            every = frontier.ledger.where(F.col("side") == side)
            layouts[side] = layout
            parts[side] = (
                frontier.ratings_of(side, every, layout.keys).repartition(n_parts, "key").persist()
            )
            names[side] = self.rows[side].select("id", "n_ratings", "block", "slot")
        encoded = Encoded(layouts, names, parts, self.n_ratings)
        als = self.als.model_copy(
            update={"tol": self.settings.unlearn.lower_mark * self.settings.unlearn.tau}
        )
        sweeper = Sweeper(
            encoded, als, self.settings.execution, lambda report: self.progress(report.line())
        )
        warm = names[encoded.anchor].join(frontier.current(encoded.anchor), "slot")
        anchor, other, _ = sweeper.run(start_iterate(encoded, als, warm.select("id", "factors")))
        self.swept = finish_rows(
            encoded, als, {encoded.anchor: anchor, other_side(encoded.anchor): other}
        )
        self.encoded = encoded
        sweeps = len(sweeper.reports)
        n_rows = sum(layout.n_rows for layout in layouts.values())
        frontier.work.add(2 * self.n_ratings * sweeps, n_rows * sweeps)
        return sweeps

    # --- publishing ----------------------------------------------------------------------------

    def publish(self, kind: str, metrics: dict[str, Any], bases: dict[str, int]) -> ModelVersion:
        """Write what changed and make it visible.

        Raises
        ------
        ConflictError
            Another job wrote to one of the tables meanwhile.
        """
        store, changes, tau = self.store, self.changes, self.settings.unlearn.tau
        if self.swept is not None and self.encoded is not None:
            written = publishing.write_whole_model(
                store, self.swept, publishing.chunks_of(self.encoded)
            )
        else:
            written = publishing.write_together(self._partial_writes())
        for name, version in written.items():
            if version != bases[name] + 1:
                raise ConflictError(
                    f"table {name.removesuffix('_version')}: another job wrote to it meanwhile; "
                    "run this job again"
                )
        if changes.n_requests:
            written["receipts_version"] = self._write_receipts()
        ratings_version = changes.ratings_version
        if changes.removed is not None and changes.removed.limit(1).count():
            if store.version(ratings.TABLE) == ratings_version:
                pairs = changes.removed.select("user_id", "item_id")
                ratings_version = ratings.delete(store, pairs)
            if ratings_version > changes.ratings_version + 1 or (
                store.version(ratings.TABLE) != ratings_version
            ):
                raise ConflictError(
                    "table ratings: ratings were ingested meanwhile; run this job again"
                )
        return models.publish(
            store,
            models.ModelVersion(
                **{
                    **{
                        f"{table}_version": getattr(self.model, f"{table}_version")
                        for table in (
                            "user_factors",
                            "item_factors",
                            "ledger",
                            "rating_blocks",
                            "rating_changes",
                            "receipts",
                        )
                    },
                    **written,
                },
                model_version=self.version,
                parent=self.model.model_version,
                kind=kind,
                ratings_version=ratings_version,
                ratings_ingest_id=changes.ingest_id,
                tombstones_version=changes.tombstones_version,
                settings={**self.model.settings, "layouts": self.layouts},
                metrics=metrics,
                certificate={
                    "tau": tau,
                    "max_residual": self.worst,
                    "holds": self.worst <= tau,
                    "evidence": "ledger" if self.swept is None else "scan",
                },
            ),
        )

    def _partial_writes(self) -> dict[str, Callable[[], int]]:
        store = self.store
        writes: dict[str, Callable[[], int]] = {}
        identities = []
        for side in SIDES:
            rows = self.rows[side].select("id", "block", "slot", "n_ratings")
            identities.append(
                rows.withColumn("side", F.lit(side)).select(
                    "side", "slot", F.col("id").cast("string").alias("id")
                )
            )
            if self.blocks[side]:
                changed = rows.where(F.col("block").isin(self.blocks[side])).join(
                    self.frontier.current(side), "slot"
                )
                writes[f"{side}_factors_version"] = _writer(store, side, changed, self.blocks[side])
        ledger = self.frontier.ledger.join(
            identities[0].unionByName(identities[1]), ["side", "slot"]
        ).withColumns({"bound": bound(), "drift_mark": F.lit(0.0)})
        writes["ledger_version"] = lambda: factors.write_ledger(store, ledger, whole=True)
        writes["rating_changes_version"] = lambda: store.append(
            factors.RATING_CHANGES, self.new_changes
        )
        return writes

    def _write_receipts(self) -> int:
        changes = self.changes
        assert changes.pending is not None
        assert changes.removed is not None
        counted = changes.removed.groupBy("request_id").agg(
            F.count(F.lit(1)).alias("ratings_removed")
        )
        resolved = sum(self._solved_slots(side).distinct().count() for side in SIDES)
        rows = changes.pending.join(counted, "request_id", "left").select(
            "request_id",
            F.lit(self.version).cast("long").alias("model_version"),
            F.coalesce("ratings_removed", F.lit(0)).cast("long").alias("ratings_removed"),
            F.lit(resolved).cast("long").alias("rows_resolved"),
            F.lit(float(self.worst)).alias("max_residual"),
            F.current_timestamp().alias("honoured_at"),
            F.lit(None).cast("timestamp").alias("purged_at"),
        )
        return receipts.append(self.store, self.model, rows)


def _writer(store: Store, side: str, rows: DataFrame, blocks: list[int]) -> Callable[[], int]:
    return lambda: factors.replace_factor_blocks(store, side, rows, blocks)


def gram_of(rows: DataFrame, rank: int) -> NDArray[np.float64]:
    """X'X of factor rows, float64 (rank, rank); only partial sums reach the driver."""

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        total = np.zeros((rank, rank))
        for batch in batches:
            total += gram(matrix_of(batch.column("factors"), rank))
        yield pa.RecordBatch.from_arrays([pa.array([total.tobytes()], pa.binary())], ["gram"])

    parts = rows.select("factors").mapInArrow(add_up, "gram binary").collect()
    return sum(
        (np.frombuffer(row["gram"]).reshape(rank, rank) for row in parts), np.zeros((rank, rank))
    )
