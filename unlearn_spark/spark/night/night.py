"""Runs a night: from pending requests and new ratings to the next published version.

Each step is a function of the result before it (`nightly`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unlearn_spark import nightly
from unlearn_spark.core.rounds import Work, run_rounds
from unlearn_spark.core.solver import solver_of
from unlearn_spark.nightly import Tonight
from unlearn_spark.spark import factors, ratings
from unlearn_spark.spark.frames import session_parallelism
from unlearn_spark.spark.night.changed_model import ChangedModel, change_model
from unlearn_spark.spark.night.changes import collect_changes, find_news
from unlearn_spark.spark.night.commit import commit_rounds, commit_sweeps
from unlearn_spark.spark.night.rounds import Frontier, Placing, Resolved, open_ledger
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.settings import SMALL_QUERIES
from unlearn_spark.spark.training.training import FitResult, fit_factors
from unlearn_spark.tables import models

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import Settings
    from unlearn_spark.tables.delta_spark import SparkStore


def run_night(
    store: SparkStore, settings: Settings, progress: Callable[[str], None], *, kind: str
) -> dict[str, Any]:
    """Put pending requests and new ratings into the published model, and publish the next version.

    Parameters
    ----------
    kind
        `unlearn`: do nothing if no request is pending. `update`: do nothing if, in addition, no
        rating is new.

    Returns
    -------
    dict
        The figures of the job.

    Raises
    ------
    TableMissingError
        There is no published model.
    InputError
        No rating would remain, or the published model names no ratings.
    ConflictError
        Another job wrote or published meanwhile; nothing became visible.
    """
    started, checkpoint = time.perf_counter(), settings.execution.checkpoint
    with session_conf(store.spark, SMALL_QUERIES):
        model = models.published(store)
        news = find_news(store, model)
    if not news.n_requests and (kind == "unlearn" or not news.may_add):
        return nightly.idle(model, started)

    resolved, published = None, None
    with session_conf(store.spark, SMALL_QUERIES if news.is_small else {}):
        changes = collect_changes(store, model, news, checkpoint)
        counts = changes.counts
        if not counts.n_requests and not counts.n_added:
            return nightly.idle(model, started)
        tonight = Tonight.of(store, settings, model, news, counts, progress, kind, started)
        nightly.announce(tonight)
        if not tonight.sweeps_at_once:
            changed = change_model(store, model, changes, checkpoint)
            resolved = resolve(store, tonight, changed)
            if resolved.is_done:
                published = commit_rounds(store, tonight, changes, changed, resolved)
    if published is None:
        warm = factors.read_factors(store, model)
        if resolved is not None:
            progress("the disturbance is wide: sweeping everything from the present factors")
            warm = resolved.factors(changed)
        fitted = sweep_everything(store, tonight, warm)
        before = None if resolved is None else resolved.rounds
        published = commit_sweeps(store, tonight, changes, fitted, before)
        fitted.release()
    return nightly.report(tonight, *published)


def resolve(store: SparkStore, tonight: Tonight, changed: ChangedModel) -> Resolved:
    """Put the changes into the ledger, and re-solve disturbed rows in rounds until no bound is over
    tau. Give up when whole sweeps look cheaper."""
    model, unlearn = tonight.model, tonight.unlearn
    parallelism = session_parallelism(store.spark)
    solver, n_rows = solver_of(model.als), sum(changed.n_rows.values())
    placing = Placing.of(solver.rank, parallelism, n_rows, changed.n_blocks)
    thresholds = tonight.thresholds(changed.n_blocks)
    pages = open_ledger(
        placing,
        solver,
        thresholds,
        factors.read_ledger(store, model.ledger_version),
        changed.touched,
        store.read(factors.RATING_CHANGES, model.rating_changes_version),
        changed.new_changes,
        changed.version,
        changed.gram_changes,
        force=unlearn.direct_rows == "resolve",
        checkpoint=tonight.settings.execution.checkpoint,
    )
    frontier = Frontier(
        solver=solver,
        placing=placing,
        thresholds=thresholds,
        rows={side: changed.vectors(side) for side in changed.published},
        chunks=store.read(factors.RATING_BLOCKS, model.rating_blocks_version),
        pages=pages,
        execution=tonight.settings.execution,
        work=Work(solver.rank, tonight.n_ratings, n_rows),
        grams=changed.grams_now,
    )
    end = run_rounds(
        frontier,
        max_rounds=unlearn.max_rounds,
        training_sweeps=model.training_sweeps,
        part_ratings=tonight.settings.execution.part_ratings,
        progress=tonight.progress,
    )
    frontier.release()
    return Resolved(frontier, end)


def sweep_everything(
    store: SparkStore, tonight: Tonight, warm: tuple[DataFrame, DataFrame]
) -> FitResult:
    """Sweep all rows over the retained ratings, starting from `warm` (user and item factors), then
    scan every row's residual (Unlearn-ALS: Xu et al. 2023, arXiv 2302.06676)."""
    model = tonight.model
    retained = ratings.retained(
        store, tonight.ratings_version, tonight.tombstones_version, model.receipts_version
    )
    return fit_factors(
        retained.select("user_id", "item_id", "rating"),
        model.als.model_copy(update={"tol": tonight.unlearn.mark}),
        tonight.settings.execution,
        warm_start=warm,
        floors=model.floors,
        on_sweep=lambda report: tonight.progress(report.line()),
    )
