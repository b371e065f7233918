"""One night's work: from pending requests and new ratings to the next published version."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from unlearn_spark.core.rounds import Work
from unlearn_spark.core.solver import solver_of
from unlearn_spark.errors import ConflictError, InputError
from unlearn_spark.spark.arrow import list_column
from unlearn_spark.spark.frames import aggregates_of, gram_of, materialise, session_parallelism
from unlearn_spark.spark.night.changes import MOST_NAMED, Changes, collect_changes, find_news
from unlearn_spark.spark.night.rounds import Frontier
from unlearn_spark.spark.settings import SMALL_QUERIES
from unlearn_spark.spark.training.training import fit_factors
from unlearn_spark.tables import factors, models, ratings, receipts
from unlearn_spark.tables.models import Sizes
from unlearn_spark.tables.session_conf import session_conf
from unlearn_spark.tables.sql import block_of, in_blocks

if TYPE_CHECKING:
    from concurrent.futures import Future

    from pyspark.sql import DataFrame

    from unlearn_spark.config import ResolvedUnlearn, Settings
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

MODEL_TABLES = ("user_factors", "item_factors", "ledger", "rating_blocks", "rating_changes")
"""Those that a model version replaces or changes."""

NEAR_SHARE = 0.5
"""Of all rows: a night whose changes lie in blocks with more opens the whole ledger at once."""

FEW_BYTES = 8 * 2**20
"""Re-solved factors of a side of no more bytes are sent to every task that writes factors."""


@dataclass(frozen=True)
class Tonight:
    """What a night starts from, whichever way it is done: the published model is of these `sizes`,
    `n_ratings` will be left, and it was `started` by `time.perf_counter`. `unlearn` are the
    settings of that name for this model."""

    store: Store
    settings: Settings
    unlearn: ResolvedUnlearn
    model: ModelVersion
    changes: Changes
    sizes: Sizes
    n_ratings: int
    progress: Callable[[str], None]
    kind: str
    started: float

    def retained(self) -> DataFrame:
        """user_id, item_id, rating: what the model may know in the morning."""
        news = self.changes.news
        rows = ratings.retained(
            self.store, news.ratings_version, news.tombstones_version, self.model.receipts_version
        )
        return rows.select("user_id", "item_id", "rating")

    def metrics(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Of the published version, with the figures of the job."""
        return {
            **figures,
            "training_sweeps": self.model.training_sweeps,
            "seconds": time.perf_counter() - self.started,
        }


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
    started, checkpoint = time.perf_counter(), settings.execution.checkpoint
    with session_conf(store.spark, SMALL_QUERIES):
        model = models.published(store)
        news = find_news(store, model, checkpoint)
    unlearn = settings.unlearn.resolved(model.reached)
    idle = {"model_version": model.model_version, "requests": 0, "ratings_removed": 0}
    if not news.n_requests and (kind == "unlearn" or not news.may_add):
        return idle
    night, done = None, None
    with session_conf(store.spark, SMALL_QUERIES if news.is_small else {}):
        found: dict[str, Any] = run_concurrently(
            {
                "changes": partial(collect_changes, store, model, news, checkpoint),
                "sizes": partial(models.sizes, store, model),
                "logs": partial(read_logs, store, model),
            }
        )
        changes: Changes = found["changes"]
        if not news.n_requests and not changes.n_added:
            return idle
        progress(
            f"{news.n_requests} requests take {changes.n_removed} ratings out; "
            f"{changes.n_added} new or corrected ratings come in"
        )
        if changes.without_ratings:
            progress(_idle_requests(changes.without_ratings))
        sizes: Sizes = found["sizes"]
        n_ratings = sizes.ratings + changes.net
        if n_ratings <= 0:
            raise InputError(
                "these requests remove every rating of the model, which leaves nothing to publish; "
                "ingest other ratings first"
            )
        tonight = Tonight(
            store, settings, unlearn, model, changes, sizes, n_ratings, progress, kind, started
        )
        # An old one is refused before anything is written.
        ledger = factors.read_ledger(store, model.ledger_version)
        # A night mostly waits, and a job that dies after this finds the same work again.
        deletion = ThreadPoolExecutor(1).submit(_delete_ratings, store, changes)
        if changes.are_large(sizes.ratings):
            progress("these are many: sweeping everything from the published factors")
        else:
            night = Night(tonight, ledger)
            if night.work():
                done = night.publish(deletion)
    version, figures = done or _sweep(tonight, night, deletion)
    failed = {} if version.certificate["holds"] else {"exit_code": 1}
    if failed:
        progress(
            f"the certificate does not hold: residual {figures['max_residual']:.2e} is over tau = "
            f"{unlearn.tau:.2e} after als.max_sweeps = {model.als.max_sweeps} sweeps; "
            "train anew with more"
        )
    return {
        **failed,
        "model_version": version.model_version,
        "parent": model.model_version,
        **figures,
        "tau": unlearn.tau,
        "seconds": time.perf_counter() - started,
    }


def _idle_requests(names: Sequence[str]) -> str:
    """A line about requests that covered no rating: of somebody else, or written otherwise?"""
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    number = f"{MOST_NAMED} or more" if len(names) == MOST_NAMED else str(len(names))
    return f"{number} of the requests cover no rating (check their ids and times): {shown}"


def _sweep(
    tonight: Tonight, night: Night | None, deletion: Future[int]
) -> tuple[ModelVersion, dict[str, Any]]:
    """Whole accelerated sweeps over the retained ratings, a scan of every row, and publishing.

    They start from the published factors, or from where the loop of `night` gave up.
    """
    store, model, changes = tonight.store, tonight.model, tonight.changes
    if night is None:
        warm = models.read_factors(store, model)
    else:
        tonight.progress("the disturbance is wide: sweeping everything from the present factors")
        warm = night.factors()
        night.bases.result()
    fitted = fit_factors(
        tonight.retained(),
        model.als.model_copy(update={"tol": tonight.unlearn.mark}),
        tonight.settings.execution,
        warm_start=warm,
        floors=model.floors,
        on_sweep=lambda report: tonight.progress(report.line()),
    )
    summary, layouts = fitted.summary, fitted.encoded.layouts
    n_blocks = {side: layouts[side].n_blocks for side in SIDES}
    before = night.frontier if night is not None else None
    figures = {
        **changes.figures,
        "rows_resolved": {side: layouts[side].n_rows for side in SIDES},
        "blocks_written": n_blocks,
        "blocks_total": n_blocks,
        "rounds": before.rounds if before is not None else 0,
        "sweeps": summary.sweeps,
        "work_sweeps": summary.sweeps + (before.work.sweeps if before is not None else 0.0),
        "max_residual": summary.max_residual,
    }
    n_rows = summary.users + summary.items
    version = publishing.publish_fit(
        store,
        fitted.to_publish(),
        model.als,
        kind=tonight.kind,
        parent=model,
        tau=tonight.unlearn.tau,
        ratings_version=changes.news.ratings_version,
        ratings_ingest_id=changes.news.ingest_id,
        tombstones_version=changes.news.tombstones_version,
        writes={
            "ratings_version": deletion.result,
            **_receipts_write(store, model, changes, n_rows, summary.max_residual),
        },
        metrics=tonight.metrics(figures),
    )
    fitted.release()
    return version, figures


def restore(store: Store, model: ModelVersion) -> dict[str, int]:
    """Put the model's own tables back to what the published version names.

    They differ after a job that died between its writes, and after a rollback. Returns the Delta
    version of each table to write upon.
    """
    tasks = {}
    for table in MODEL_TABLES:
        wanted = getattr(model, f"{table}_version")
        if wanted is not None:
            tasks[f"{table}_version"] = partial(store.restore, table, wanted)
    return run_concurrently(tasks)


def read_logs(store: Store, model: ModelVersion) -> None:
    """Have Delta read the logs of the model's own tables, and keep what it found.

    Every plan over such a table waits for that once, and there is time for it, one by one, while
    the changes are collected.
    """
    for table in MODEL_TABLES:
        version = getattr(model, f"{table}_version")
        if version is not None:
            store.read(table, version).where("block < 0").count()


class Night:
    """The published model with tonight's changes put in, and the loop that mends it."""

    def __init__(self, tonight: Tonight, ledger: DataFrame) -> None:
        store, settings, model = tonight.store, tonight.settings, tonight.model
        self.store, self.settings, self.model = store, settings, model
        self.tonight, self.changes, self.ledger = tonight, tonight.changes, ledger
        self.als = model.als
        self.layouts = {side: dict(model.settings["layouts"][side]) for side in SIDES}
        self.version = publishing.next_version(model)
        # What this night reads it names by version: only its writes have to wait for this.
        self.bases = ThreadPoolExecutor(1).submit(restore, store, model)
        self.published = dict(zip(SIDES, models.read_factors(store, model), strict=True))
        self.touched: dict[str, DataFrame] = run_concurrently(
            {side: partial(self._touched, side) for side in SIDES}
        )
        counts = (
            F.expr("count_if(is_new) - count_if(NOT is_new AND n_ratings <= 0)"),
            F.coalesce(F.max("slot"), F.lit(0)),
        )
        found: dict[str, Any] = run_concurrently(
            {
                "sizes": lambda: aggregates_of(self.touched, *counts),
                "slotted": lambda: self._kept(self._slotted()),
                "parallelism": lambda: session_parallelism(store.spark),
            }
        )
        sizes, slotted = found["sizes"], found["slotted"]
        before = {"user": tonight.sizes.users, "item": tonight.sizes.items}
        self.n_rows = {side: before[side] + sizes[side][0] for side in SIDES}
        for side in SIDES:
            self.layouts[side]["n_slots"] = max(self.layouts[side]["n_slots"], sizes[side][1] + 1)
        changed = [
            slotted.select(
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
        self.rows = {side: self._rows(side) for side in SIDES}
        gram_changes: dict[str, Any] = dict.fromkeys(SIDES)
        grams: dict[str, NDArray[np.float64]] = {}
        if self.als.implicit_prefs:
            for side, rows in self.published.items():
                left = self.touched[side].where("n_ratings <= 0")
                gram_changes[side] = -gram_of(left, self.als.rank)
                if self.changes.n_added:
                    gram_changes[side] += gram_of(self._new_rows(side), self.als.rank)
                grams[side] = gram_of(rows, self.als.rank)
        self.frontier = Frontier(
            solver=solver_of(self.als),
            rows={side: self._vectors(side) for side in SIDES},
            chunks=store.read(factors.RATING_BLOCKS, model.rating_blocks_version),
            settings=tonight.unlearn,
            execution=settings.execution,
            parallelism=found["parallelism"],
            n_blocks={side: self.layouts[side]["n_blocks"] for side in SIDES},
            floors=model.floors,
            work=Work(self.als.rank, tonight.n_ratings, sum(self.n_rows.values())),
            progress=tonight.progress,
            grams=grams,
            training_sweeps=model.training_sweeps,
        )
        self.gram_changes = gram_changes

    def _kept(self, frame: DataFrame) -> DataFrame:
        return materialise(frame, self.settings.execution.checkpoint)

    @staticmethod
    def _in(blocks: Mapping[str, Collection[int]] | None, side: str, rows: DataFrame) -> DataFrame:
        """Rows of a side in these blocks; None: all."""
        return rows if blocks is None else rows.where(in_blocks(blocks[side]))

    def _touched(self, side: str) -> DataFrame:
        """Rows whose ratings change, new ones among them: the columns of the factor table, with as
        `n_ratings` how many they have now, none where they leave; and is_new."""
        deltas = self.changes.pairs.groupBy(F.col(f"{side}_id").alias("id")).agg(
            F.sum("change").alias("delta")
        )
        published = self._in(self.changes.blocks, side, self.published[side])
        rows = published.join(F.broadcast(deltas), "id").withColumn("is_new", F.lit(False))
        if self.changes.n_added:
            known = F.broadcast(rows.select("id"))
            unknown = deltas.where("delta > 0").join(known, "id", "left_anti")
            placed = self._placed(side, unknown, published)
            rows = rows.unionByName(self._begun(side, placed).withColumn("is_new", F.lit(True)))
        n_ratings = (F.col("n_ratings") + F.col("delta")).cast("int")
        return self._kept(rows.withColumn("n_ratings", n_ratings).drop("delta"))

    def _placed(self, side: str, unknown: DataFrame, published: DataFrame) -> DataFrame:
        """Ids that the model does not know (id, delta), behind the published rows of their
        block."""
        n_blocks = self.layouts[side]["n_blocks"]
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

    def _begun(self, side: str, rows: DataFrame) -> DataFrame:
        """New rows with the factors that they start from."""
        rank, seed, nonnegative = self.als.rank, self.als.seed, self.als.nonnegative

        def begin(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
            for batch in batches:
                hashes = batch.column("hash").to_numpy()
                y = initial_factors(hashes, rank, seed, side, nonnegative)
                columns = {name: batch.column(name) for name in batch.schema.names[:-1]}
                yield from pa.table({**columns, "factors": list_column(y)}).to_batches()

        kinds = [f"{field.name} {field.dataType.simpleString()}" for field in rows.schema.fields]
        hashed = rows.withColumn("hash", F.xxhash64("id"))
        return hashed.mapInArrow(begin, ", ".join([*kinds, "factors array<float>"]))

    def _new_rows(self, side: str) -> DataFrame:
        """The new rows of a side in the columns of the factor table."""
        return self.touched[side].where("is_new").drop("is_new")

    def _rows(self, side: str) -> DataFrame:
        """Published rows and the new ones, in the columns of the factor table, with as many ratings
        as they have now; none where they leave. Not kept: most nights need a few columns or blocks
        of it."""
        now = self.touched[side].where("NOT is_new").select("slot", F.col("n_ratings").alias("now"))
        rows = self.published[side].join(F.broadcast(now), "slot", "left")
        rows = rows.withColumn("n_ratings", F.coalesce("now", "n_ratings"))
        return self._with_new(side, rows.select("id", "block", "slot", "n_ratings", "factors"))

    def _vectors(self, side: str) -> DataFrame:
        """slot, factors of the published rows, of those that leave as well, and of the new ones."""
        return self._with_new(side, self.published[side].select("slot", "factors"))

    def _with_new(self, side: str, rows: DataFrame) -> DataFrame:
        """Some columns of published rows, and the same of the new ones."""
        if not self.changes.n_added:
            return rows
        return rows.unionByName(self._new_rows(side).select(*rows.columns))

    def _slotted(self) -> DataFrame:
        """Tonight's pairs by slot."""
        pairs = self.changes.pairs
        for side in SIDES:
            names = self.touched[side].select(
                F.col("id").alias(f"{side}_id"),
                F.col("slot").alias(f"{side}_slot"),
            )
            pairs = pairs.join(names, f"{side}_id")
        return pairs.drop("user_id", "item_id")

    def work(self) -> bool:
        """Push, and run the loop; False where whole sweeps are the cheaper way."""
        frontier, store, model = self.frontier, self.store, self.model
        frontier.open(
            self.ledger,
            self.touched,
            store.read(factors.RATING_CHANGES, model.rating_changes_version),
            self.new_changes,
            self.version,
            self.gram_changes,
            self._near(),
        )
        end = frontier.run()
        if end is None:
            return False
        self.worst = max(end[side].worst for side in SIDES)
        if frontier.near is not None:
            self.worst = max(self.worst, model.certificate["max_residual"])
        self.n_solved = {side: end[side].solved for side in SIDES}
        self.blocks = {
            side: sorted({*self.changes.blocks[side], *end[side].solved_blocks}) for side in SIDES
        }
        return True

    def _near(self) -> dict[str, list[int]] | None:
        """The blocks of tonight's changes, if it is likely that no others need be looked at."""
        model, unlearn, blocks = self.model, self.tonight.unlearn, self.changes.blocks
        solves = unlearn.direct_rows == "resolve" or self.changes.n_added
        if solves or self.als.implicit_prefs or model.certificate["max_residual"] > unlearn.tau:
            return None
        opened = sum(
            self.n_rows[side] * len(blocks[side]) / self.layouts[side]["n_blocks"] for side in SIDES
        )
        return blocks if opened <= NEAR_SHARE * sum(self.n_rows.values()) else None

    def _present(self, side: str) -> DataFrame:
        """The rows that have ratings."""
        return self.rows[side].where("n_ratings > 0")

    def factors(self) -> tuple[DataFrame, DataFrame]:
        """User and item factors (id, factors) as they are now."""
        users, items = (
            self.frontier.current(side, self._present(side).select("id", "slot", "factors"))
            for side in SIDES
        )
        return users, items

    # --- publishing ----------------------------------------------------------------------------

    def publish(self, deletion: Future[int]) -> tuple[ModelVersion, dict[str, Any]]:
        """Write what changed and make it visible; the version, and the figures of the job.

        Raises
        ------
        ConflictError
            Another job wrote to one of the tables meanwhile.
        """
        store, changes, tau = self.store, self.changes, self.tonight.unlearn.tau
        n_solved = sum(self.n_solved.values())
        bases = self.bases.result()
        written = run_concurrently(
            {
                **self._partial_writes(),
                **_receipts_write(store, self.model, changes, n_solved, self.worst),
            }
        )
        for name, version in written.items():
            # Writing nothing over nothing makes no commit.
            if name in bases and version not in (bases[name], bases[name] + 1):
                raise ConflictError(
                    f"table {name.removesuffix('_version')}: another job wrote to it meanwhile; "
                    "run this job again"
                )
        figures = {
            **changes.figures,
            "rows_resolved": self.n_solved,
            "blocks_written": {side: len(self.blocks[side]) for side in SIDES},
            "blocks_total": {side: self.layouts[side]["n_blocks"] for side in SIDES},
            "rounds": self.frontier.rounds,
            "sweeps": 0,
            "work_sweeps": self.frontier.work.sweeps,
            "max_residual": self.worst,
        }
        before = {
            f"{table}_version": getattr(self.model, f"{table}_version")
            for table in (*MODEL_TABLES, "receipts")
        }
        model = models.ModelVersion(
            **{**before, **written},
            model_version=self.version,
            parent=self.model.model_version,
            kind=self.tonight.kind,
            ratings_version=deletion.result(),
            ratings_ingest_id=changes.news.ingest_id,
            tombstones_version=changes.news.tombstones_version,
            settings={**self.model.settings, "layouts": self.layouts},
            metrics={
                **self.tonight.metrics(figures),
                **asdict(Sizes(self.n_rows["user"], self.n_rows["item"], self.tonight.n_ratings)),
            },
            certificate={
                "tau": tau,
                "max_residual": self.worst,
                "holds": self.worst <= tau,
                "evidence": "ledger",
                "floor": self.model.floors,
                "reached": self.model.reached,
            },
        )
        return models.publish(store, model), figures

    def _partial_writes(self) -> dict[str, Callable[[], int]]:
        store = self.store
        writes: dict[str, Callable[[], int]] = {}
        for side in SIDES:
            if self.blocks[side]:
                rows = self._in(self.blocks, side, self._present(side))
                few = 4 * self.als.rank * self.n_solved[side] <= FEW_BYTES
                writes[f"{side}_factors_version"] = partial(
                    factors.replace_factor_blocks,
                    store,
                    side,
                    self.frontier.current(side, rows, few=few),
                    self.blocks[side],
                    gathered=few and not self.changes.n_added,
                )
        writes["ledger_version"] = lambda: factors.replace_ledger(
            store, self.frontier.entries(), self.frontier.near, self.model.floors
        )
        writes["rating_changes_version"] = lambda: store.append(
            factors.RATING_CHANGES, self.new_changes
        )
        return writes


def _delete_ratings(store: Store, changes: Changes) -> int:
    """Delete what the requests cover; returns the version of the ratings without it."""
    version = changes.news.ratings_version
    if changes.stored is None:
        return version
    return ratings.delete(store, changes.stored, version)


def _receipts_write(
    store: Store, model: ModelVersion, changes: Changes, n_solved: int, worst: float
) -> dict[str, Callable[[], int]]:
    """The write that answers tonight's requests, if there are any."""
    if not changes.news.n_requests:
        return {}
    assert changes.news.pending is not None
    assert changes.removed is not None
    counted = changes.removed.groupBy("request_id").agg(F.count(F.lit(1)).alias("ratings_removed"))
    rows = changes.news.pending.join(counted, "request_id", "left").select(
        "request_id",
        F.lit(publishing.next_version(model)).cast("long").alias("model_version"),
        F.coalesce("ratings_removed", F.lit(0)).cast("long").alias("ratings_removed"),
        F.lit(n_solved).cast("long").alias("rows_resolved"),
        F.lit(float(worst)).alias("max_residual"),
        F.current_timestamp().alias("honoured_at"),
        F.lit(None).cast("timestamp").alias("purged_at"),
    )
    return {"receipts_version": lambda: receipts.append(store, model, rows)}
