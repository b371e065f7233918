"""A night's last step: delete the ratings, write what changed, and publish the version.

The row of the models table is written last. If a job dies before that, readers see nothing of it
and the next night finds the same work again (see `changes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F

from unlearn_spark import publishing
from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.errors import ConflictError
from unlearn_spark.tables import factors, models, ratings, receipts
from unlearn_spark.tables.models import Sizes
from unlearn_spark.tables.sql import in_blocks

if TYPE_CHECKING:
    from unlearn_spark.spark.night.changed_model import ChangedModel
    from unlearn_spark.spark.night.rounds import Mended
    from unlearn_spark.spark.night.tonight import Tonight
    from unlearn_spark.spark.training.training import FitResult
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

MODEL_TABLES = ("user_factors", "item_factors", "ledger", "rating_blocks", "rating_changes")
"""The tables that a new model version replaces or changes."""

FEW_BYTES = 8 * 2**20
"""Spark broadcasts a side's re-solved factors up to this size to the tasks that write factors."""


def commit_rounds(
    tonight: Tonight, changed: ChangedModel, mended: Mended
) -> tuple[ModelVersion, dict[str, Any]]:
    """Publish a model whose rounds are done; return the version and the figures of the job.

    Raises
    ------
    ConflictError
        Another job wrote to one of the tables meanwhile; nothing became visible.
    """
    store, model, changes = tonight.store, tonight.model, tonight.changes
    worst, n_solved = mended.worst, mended.n_solved
    blocks = {side: sorted({*changes.blocks[side], *mended.solved_blocks[side]}) for side in SIDES}
    bases = restore(store, model)
    writes = {
        "ratings_version": _deletion(tonight),
        **_partial_writes(tonight, changed, mended, blocks),
        **_receipts_write(tonight, sum(n_solved.values()), worst),
    }
    written = run_concurrently(writes)
    for name, delta_version in written.items():
        # Our own write adds one Delta version, or none if it writes nothing over nothing.
        if name in bases and delta_version not in (bases[name], bases[name] + 1):
            raise ConflictError(
                f"table {name.removesuffix('_version')}: another job wrote to it meanwhile; "
                "run this job again"
            )
    figures = {
        **changes.figures,
        "rows_resolved": n_solved,
        "blocks_written": {side: len(blocks[side]) for side in SIDES},
        "blocks_total": changed.n_blocks,
        "rounds": mended.frontier.rounds,
        "sweeps": 0,
        "work_sweeps": mended.frontier.work.sweeps,
        "max_residual": worst,
    }
    before = {
        f"{table}_version": getattr(model, f"{table}_version")
        for table in (*MODEL_TABLES, "receipts")
    }
    sizes = Sizes(changed.n_rows["user"], changed.n_rows["item"], tonight.n_ratings)
    version = models.ModelVersion(
        **{**before, **written},
        model_version=changed.version,
        parent=model.model_version,
        kind=tonight.kind,
        ratings_ingest_id=changes.news.ingest_id,
        tombstones_version=changes.news.tombstones_version,
        settings={**model.settings, "layouts": changed.layouts},
        metrics={**tonight.metrics(figures), **asdict(sizes)},
        certificate={
            "tau": tonight.unlearn.tau,
            "max_residual": worst,
            "holds": worst <= tonight.unlearn.tau,
            "evidence": "ledger",
            "floor": model.floors,
            "reached": model.reached,
        },
    )
    return models.publish(store, version), figures


def commit_sweeps(
    tonight: Tonight, fitted: FitResult, mended: Mended | None
) -> tuple[ModelVersion, dict[str, Any]]:
    """Publish a model after whole sweeps; return the version and the figures of the job.

    `mended` are the rounds that gave up before the sweeps, if there were any.
    """
    store, model, changes, summary = tonight.store, tonight.model, tonight.changes, fitted.summary
    whole = fitted.to_publish()
    n_blocks = {side: whole.layouts[side]["n_blocks"] for side in SIDES}
    figures = {
        **changes.figures,
        "rows_resolved": {"user": summary.users, "item": summary.items},
        "blocks_written": n_blocks,
        "blocks_total": n_blocks,
        "rounds": mended.frontier.rounds if mended else 0,
        "sweeps": summary.sweeps,
        "work_sweeps": summary.sweeps + (mended.frontier.work.sweeps if mended else 0.0),
        "max_residual": summary.max_residual,
    }
    n_rows = summary.users + summary.items
    version = publishing.publish_fit(
        store,
        whole,
        model.als,
        kind=tonight.kind,
        parent=model,
        tau=tonight.unlearn.tau,
        ratings_version=changes.news.ratings_version,
        ratings_ingest_id=changes.news.ingest_id,
        tombstones_version=changes.news.tombstones_version,
        writes={
            "ratings_version": _deletion(tonight),
            **_receipts_write(tonight, n_rows, summary.max_residual),
        },
        metrics=tonight.metrics(figures),
    )
    return version, figures


def restore(store: Store, model: ModelVersion) -> dict[str, int]:
    """Restore the model's own tables to the versions that the published model names.

    They differ after a rollback, and after a job that died between its writes. Returns the Delta
    version of each table after that.
    """
    tasks = {}
    for table in MODEL_TABLES:
        wanted = getattr(model, f"{table}_version")
        if wanted is not None:
            tasks[f"{table}_version"] = partial(store.restore, table, wanted)
    return run_concurrently(tasks)


def _deletion(tonight: Tonight) -> Callable[[], int]:
    """A function that deletes the covered ratings and returns the version without them."""
    store, changes = tonight.store, tonight.changes
    version, stored = changes.news.ratings_version, changes.stored
    return lambda: version if stored is None else ratings.delete(store, stored, version)


def _partial_writes(
    tonight: Tonight, changed: ChangedModel, mended: Mended, blocks: dict[str, list[int]]
) -> dict[str, Callable[[], int]]:
    """By field of `ModelVersion`: a function that writes its table and returns the new version, for
    these factor blocks, the ledger and tonight's rating changes."""
    store, frontier = tonight.store, mended.frontier
    writes: dict[str, Callable[[], int]] = {}
    for side in SIDES:
        if blocks[side]:
            rows = changed.present(side).where(in_blocks(blocks[side]))
            few = 4 * tonight.model.als.rank * mended.n_solved[side] <= FEW_BYTES
            writes[f"{side}_factors_version"] = partial(
                factors.replace_factor_blocks,
                store,
                side,
                frontier.current(side, rows, few=few),
                blocks[side],
                gathered=few and not changed.adds,
            )
    writes["ledger_version"] = lambda: factors.replace_ledger(
        store, frontier.entries(), tonight.model.floors
    )
    writes["rating_changes_version"] = lambda: store.append(
        factors.RATING_CHANGES, changed.new_changes
    )
    return writes


def _receipts_write(tonight: Tonight, n_solved: int, worst: float) -> dict[str, Callable[[], int]]:
    """A function that writes the receipts of tonight's requests; empty if there are no requests."""
    changes, model = tonight.changes, tonight.model
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
    return {"receipts_version": lambda: receipts.append(tonight.store, model, rows)}
