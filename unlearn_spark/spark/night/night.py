"""Runs a night: from pending requests and new ratings to the next published version.

Each step is a function of the result before it::

    news --> changes --> changed model --> rounds --+--> commit
                             |                      | (gave up)
                             +--> whole sweeps <----+--> commit
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unlearn_spark.core.rounds import Work, run_rounds, sweeps_at_once
from unlearn_spark.core.solver import solver_of
from unlearn_spark.errors import InputError
from unlearn_spark.spark.frames import session_parallelism
from unlearn_spark.spark.night.changed_model import ChangedModel, change_model
from unlearn_spark.spark.night.changes import collect_changes, find_news
from unlearn_spark.spark.night.commit import commit_rounds, commit_sweeps
from unlearn_spark.spark.night.page_tasks import Thresholds
from unlearn_spark.spark.night.rounds import Frontier, Mended, Placing, open_ledger
from unlearn_spark.spark.night.tonight import Tonight
from unlearn_spark.spark.settings import SMALL_QUERIES
from unlearn_spark.spark.training.training import FitResult, fit_factors
from unlearn_spark.tables import factors, models, ratings
from unlearn_spark.tables.session_conf import session_conf

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import Settings
    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store


def run_night(
    store: Store, settings: Settings, progress: Callable[[str], None], *, kind: str
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
        news = find_news(store, model, checkpoint)
    idle = {"model_version": model.model_version, "requests": 0, "ratings_removed": 0}
    if not news.n_requests and (kind == "unlearn" or not news.may_add):
        return idle

    mended, published = None, None
    with session_conf(store.spark, SMALL_QUERIES if news.is_small else {}):
        changes = collect_changes(store, model, news, checkpoint)
        if not news.n_requests and not changes.n_added:
            return idle
        unlearn, sizes = settings.unlearn.resolved(model.reached), models.sizes(store, model)
        tonight = Tonight(store, settings, unlearn, model, sizes, changes, progress, kind, started)
        _announce(tonight)
        if not sweeps_at_once(changes.n_removed + changes.n_added, sizes.ratings):
            changed = change_model(store, model, changes, sizes, checkpoint)
            mended = mend(tonight, changed)
            if mended.is_done:
                published = commit_rounds(tonight, changed, mended)
    if published is None:
        warm = models.read_factors(store, model)
        if mended is not None:
            progress("the disturbance is wide: sweeping everything from the present factors")
            warm = mended.factors(changed)
        fitted = sweep_everything(tonight, warm)
        published = commit_sweeps(tonight, fitted, mended)
        fitted.release()
    return _report(tonight, *published)


def mend(tonight: Tonight, changed: ChangedModel) -> Mended:
    """Put the changes into the ledger, and re-solve disturbed rows in rounds until no bound is over
    tau. Give up when whole sweeps look cheaper."""
    store, model, unlearn = tonight.store, tonight.model, tonight.unlearn
    parallelism = session_parallelism(store.spark)
    solver, n_rows = solver_of(model.als), sum(changed.n_rows.values())
    placing = Placing.of(solver.rank, parallelism, n_rows, changed.n_blocks)
    # In implicit mode every move disturbs every row through the Gram matrix. To solve a row before
    # it is over tau would make work for all others.
    mark = unlearn.tau if model.als.implicit_prefs else unlearn.mark
    thresholds = Thresholds(changed.n_blocks, unlearn.tau, mark, model.floors)
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
    return Mended(frontier, end)


def sweep_everything(tonight: Tonight, warm: tuple[DataFrame, DataFrame]) -> FitResult:
    """Sweep all rows over the retained ratings, starting from `warm` (user and item factors), then
    scan every row's residual (Unlearn-ALS: Xu et al. 2023, arXiv 2302.06676)."""
    model, news = tonight.model, tonight.changes.news
    retained = ratings.retained(
        tonight.store, news.ratings_version, news.tombstones_version, model.receipts_version
    )
    return fit_factors(
        retained.select("user_id", "item_id", "rating"),
        model.als.model_copy(update={"tol": tonight.unlearn.mark}),
        tonight.settings.execution,
        warm_start=warm,
        floors=model.floors,
        on_sweep=lambda report: tonight.progress(report.line()),
    )


def _announce(tonight: Tonight) -> None:
    """Report how much the night has to do.

    Raises
    ------
    InputError
        No rating would remain.
    """
    changes = tonight.changes
    tonight.progress(
        f"{changes.news.n_requests} requests take {changes.n_removed} ratings out; "
        f"{changes.n_added} new or corrected ratings come in"
    )
    names = changes.without_ratings
    if names:  # their ids may be misspelt
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        tonight.progress(
            f"{len(names)} of the requests cover no rating (check their ids and times): {shown}"
        )
    if tonight.n_ratings <= 0:
        raise InputError(
            "these requests remove every rating of the model, which leaves nothing to publish; "
            "ingest other ratings first"
        )


def _report(tonight: Tonight, version: ModelVersion, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the job, with exit code 1 if the certificate does not hold."""
    model, unlearn = tonight.model, tonight.unlearn
    failed = {} if version.certificate["holds"] else {"exit_code": 1}
    if failed:
        tonight.progress(
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
        "seconds": time.perf_counter() - tonight.started,
    }
