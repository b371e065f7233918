"""Runs a night in this process: from pending requests and new ratings to the next version.

The steps are those of `unlearn_spark.nightly`, each a function of the result before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from unlearn_spark import nightly
from unlearn_spark.config import Settings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.bounds import gram
from unlearn_spark.core.ledger_page import Page, Summary
from unlearn_spark.core.rounds import Work, run_rounds
from unlearn_spark.core.solver import solver_of
from unlearn_spark.core.threads import shared_out
from unlearn_spark.core.training import Progress
from unlearn_spark.embedded import ratings as rating_rows
from unlearn_spark.embedded import training
from unlearn_spark.embedded.changed_model import ChangedModel, change_model
from unlearn_spark.embedded.changes import Changes, collect_changes, find_news
from unlearn_spark.embedded.model import (
    ChunkReader,
    FactorRows,
    Norms,
    factor_batches,
    ledger_table,
    run_writes,
    write_whole_model,
)
from unlearn_spark.embedded.rounds import Frontier, open_ledger
from unlearn_spark.embedded.train import retained_batches, warm_start
from unlearn_spark.nightly import Rounds, Tonight
from unlearn_spark.tables import factors, models
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion


def run_night(
    store: DeltaRsStore, settings: Settings, threads: int, progress: Progress, *, kind: str
) -> dict[str, Any]:
    """Put pending requests and new ratings into the published model, and publish the next version.

    Parameters
    ----------
    kind
        `unlearn`: do nothing if no request is pending. `update`: do nothing if, in addition, no
        rating is new.

    Raises
    ------
    TableMissingError
        There is no published model.
    InputError
        No rating would remain, or the published model names no ratings.
    ConflictError
        Another job wrote or published meanwhile; nothing became visible.
    """
    started = time.perf_counter()
    model = models.published(store)
    news = find_news(store, model)
    if not news.n_requests and (kind == "unlearn" or not news.may_add):
        return nightly.idle(model, started)
    changes = collect_changes(store, model, news)
    if not news.n_requests and not changes.counts.n_added:
        return nightly.idle(model, started)
    tonight = Tonight.of(store, settings, model, news, changes.counts, progress, kind, started)
    nightly.announce(tonight)
    warm, tried = None, None
    if not tonight.sweeps_at_once:
        changed = change_model(store, model, changes, threads)
        resolved = resolve(store, tonight, changed, threads)
        if resolved.end is not None:
            return nightly.report(
                tonight, *commit_rounds(store, tonight, changes, changed, resolved, threads)
            )
        progress("the disturbance is wide: sweeping everything from the present factors")
        warm, tried = resolved.present(changed), resolved.rounds
    fitted = sweep_everything(store, tonight, warm, threads)
    return nightly.report(tonight, *commit_sweeps(store, tonight, changes, fitted, tried, threads))


@dataclass(frozen=True)
class Resolved:
    """A changed model after its rounds.

    Attributes
    ----------
    frontier
        Present factors and ledger entries, and the work done.
    end
        By side: its summary; None if the rounds gave up.
    """

    frontier: Frontier
    end: Mapping[str, Summary] | None

    @property
    def rounds(self) -> Rounds:
        """What the rounds did, for the figures of the job."""
        end = self.end or {}
        return Rounds(
            self.frontier.rounds,
            self.frontier.work.sweeps,
            max((side.worst for side in end.values()), default=np.inf),
            {side: found.solved for side, found in end.items()},
        )

    def rows(self, changed: ChangedModel, side: str) -> FactorRows:
        """The rows of a side that have ratings, with their present factors."""
        before = changed.sides[side].rows
        now = FactorRows(before.ids, before.slots, before.n_ratings, self.frontier.factors[side])
        return now.of(now.n_ratings > 0)

    def present(self, changed: ChangedModel) -> training.Warm:
        """By side: ids and present factors of the rows that have ratings."""
        rows = {side: self.rows(changed, side) for side in SIDES}
        return {side: (each.ids, each.factors) for side, each in rows.items()}


def resolve(store: DeltaRsStore, tonight: Tonight, changed: ChangedModel, threads: int) -> Resolved:
    """Put the changes into the ledger, and re-solve disturbed rows in rounds until no bound is over
    tau. Give up when whole sweeps look cheaper."""
    model, unlearn = tonight.model, tonight.unlearn
    solver = solver_of(model.als, threads)
    pages = open_ledger(store, model, changed, solver, force=unlearn.direct_rows == "resolve")
    grams = {}
    if model.als.implicit_prefs:
        grams = {side: gram(each.present.factors) for side, each in changed.sides.items()}
    frontier = Frontier(
        solver,
        tonight.thresholds(changed.n_blocks),
        ChunkReader(store, model.rating_blocks_version, threads),
        pages,
        {side: each.rows.slots for side, each in changed.sides.items()},
        {side: each.rows.factors for side, each in changed.sides.items()},
        grams,
        Work(solver.rank, tonight.n_ratings, sum(len(page.slots) for page in pages.values())),
    )
    end = run_rounds(
        frontier,
        max_rounds=unlearn.max_rounds,
        training_sweeps=model.training_sweeps,
        part_ratings=tonight.settings.execution.part_ratings,
        progress=tonight.progress,
    )
    return Resolved(frontier, end)


def sweep_everything(
    store: DeltaRsStore, tonight: Tonight, warm: training.Warm | None, threads: int
) -> training.Fitted:
    """Sweep all rows over the retained ratings, starting from `warm` (None: the published factors),
    then scan every row's residual (Unlearn-ALS: Xu et al. 2023, arXiv 2302.06676)."""
    model = tonight.model
    with retained_batches(store, tonight.basis) as batches:
        return training.fit(
            batches,
            model.als.model_copy(update={"tol": tonight.unlearn.mark}),
            threads,
            warm=warm_start(store, model) if warm is None else warm,
            floors=model.floors,
            on_sweep=lambda report: tonight.progress(report.line()),
        )


# --- the commit -----------------------------------------------------------------------------------


def commit_rounds(
    store: DeltaRsStore,
    tonight: Tonight,
    changes: Changes,
    changed: ChangedModel,
    resolved: Resolved,
    threads: int,
) -> tuple[ModelVersion, dict[str, Any]]:
    """Delete the ratings, write what changed, and publish; return the version and the figures of
    the job.

    Raises
    ------
    ConflictError
        Another job wrote to one of the tables meanwhile; nothing became visible.
    """
    model, rounds = tonight.model, resolved.rounds
    blocks = {side: _blocks_written(changed, resolved, side) for side in SIDES}
    bases = restore(store, model, threads)

    def write_factors(side: str) -> int:
        rows = resolved.rows(changed, side)
        n_blocks = changed.n_blocks[side]
        rows = rows.of(np.isin(rows.slots % np.int32(n_blocks), blocks[side]))
        predicate = f"block IN ({', '.join(map(str, blocks[side]))})"
        return store.replace_where(
            factors.factor_table(side),
            factor_batches(rows, n_blocks),
            predicate,
            bases[f"{side}_factors_version"],
        )

    writes: dict[str, Callable[[], int]] = {
        "ratings_version": _deletion(store, tonight, changes, threads),
        **{
            f"{side}_factors_version": partial(write_factors, side)
            for side in SIDES
            if blocks[side]
        },
        "ledger_version": lambda: store.overwrite(
            factors.LEDGER,
            ledger_of(changed, resolved.frontier.pages, model),
            bases["ledger_version"],
        ),
        "rating_changes_version": lambda: store.append_to(
            factors.RATING_CHANGES, changed.new_changes, bases["rating_changes_version"]
        ),
        **nightly.receipts_write(
            tonight, changes.removed, sum(rounds.solved.values()), rounds.worst
        ),
    }
    written = run_writes(writes, threads)
    n_rows = {side: len(page.slots) for side, page in resolved.frontier.pages.items()}
    return nightly.publish_rounds(tonight, rounds, changed.layouts, n_rows, blocks, written)


def commit_sweeps(
    store: DeltaRsStore,
    tonight: Tonight,
    changes: Changes,
    fitted: training.Fitted,
    tried: Rounds | None,
    threads: int,
) -> tuple[ModelVersion, dict[str, Any]]:
    """Delete the ratings, write the whole model, and publish; return the version and the figures of
    the job. `tried` are the rounds that gave up before the sweeps, if there were any."""
    summary = fitted.summary
    more = {
        "ratings_version": _deletion(store, tonight, changes, threads),
        **nightly.receipts_write(
            tonight, changes.removed, summary.users + summary.items, summary.max_residual
        ),
    }
    written = write_whole_model(store, fitted.to_store(), threads, more)
    return nightly.publish_sweeps(tonight, fitted.fit, tried, written)


def restore(store: DeltaRsStore, model: ModelVersion, threads: int) -> dict[str, int]:
    """Restore the model's own tables to the versions that the published model names.

    They differ after a rollback, and after a job that died between its writes. Returns the Delta
    version of each table after that.
    """
    wanted = {table: getattr(model, f"{table}_version") for table in factors.MODEL_TABLES}
    names = [table for table, version in wanted.items() if version is not None]
    versions = shared_out(lambda table: store.restore(table, wanted[table]), names, threads)
    return {f"{table}_version": version for table, version in zip(names, versions, strict=True)}


def _blocks_written(changed: ChangedModel, resolved: Resolved, side: str) -> list[int]:
    """The factor blocks of a side with rows that were solved, come, leave or lose a rating."""
    assert resolved.end is not None
    touched = changed.sides[side].touched % np.int32(changed.n_blocks[side])
    return sorted({*touched.tolist(), *resolved.end[side].solved_blocks})


def ledger_of(changed: ChangedModel, pages: Mapping[str, Page], model: ModelVersion) -> pa.Table:
    """The ledger after the rounds, as its table holds it."""
    tables = []
    for side in SIDES:
        page, rows = pages[side], changed.sides[side].present
        if not np.array_equal(page.slots, rows.slots):
            raise ValueError("ledger rows and factor rows differ; the ledger is damaged")
        norms = Norms(page.gradient_norm, page.b_norm, page.factor_norm)
        tables.append(
            ledger_table(
                side,
                rows.ids,
                page.slots,
                page.chunks,
                page.n_ratings,
                norms,
                changed.n_blocks[side],
                model.floors[side],
            )
        )
    return pa.concat_tables(tables)


def _deletion(
    store: DeltaRsStore, tonight: Tonight, changes: Changes, threads: int
) -> Callable[[], int]:
    """A function that deletes the covered ratings and returns the version without them."""
    return partial(rating_rows.delete, store, changes.stored, tonight.ratings_version, threads)
