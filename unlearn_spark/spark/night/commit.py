"""A night's last step: delete the ratings, write what changed, and publish the version.

The row of the models table is written last. If a job dies before that, readers see nothing of it
and the next night finds the same work again (see `changes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from unlearn_spark import nightly
from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.spark import factors, ratings
from unlearn_spark.spark.sql import in_blocks
from unlearn_spark.spark.training.writes import write_fit
from unlearn_spark.tables.factors import MODEL_TABLES
from unlearn_spark.tables.store import conflict

if TYPE_CHECKING:
    from unlearn_spark.nightly import Rounds, Tonight
    from unlearn_spark.spark.night.changed_model import ChangedModel
    from unlearn_spark.spark.night.changes import Changes
    from unlearn_spark.spark.night.rounds import Resolved
    from unlearn_spark.spark.training.training import FitResult
    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion

FEW_BYTES = 8 * 2**20
"""Spark broadcasts a side's re-solved factors up to this size to the tasks that write factors."""


def commit_rounds(
    store: SparkStore,
    tonight: Tonight,
    changes: Changes,
    changed: ChangedModel,
    resolved: Resolved,
) -> tuple[ModelVersion, dict[str, Any]]:
    """Publish a model whose rounds are done; return the version and the figures of the job.

    Raises
    ------
    ConflictError
        Another job wrote to one of the tables meanwhile; nothing became visible.
    """
    rounds = resolved.rounds
    blocks = {
        side: sorted({*changes.blocks[side], *resolved.solved_blocks[side]}) for side in SIDES
    }
    bases = restore(store, tonight.model)
    written = run_concurrently(
        {
            "ratings_version": _deletion(store, changes),
            **_partial_writes(store, tonight, changed, resolved, blocks),
            **nightly.receipts_write(
                tonight, changes.removed, sum(rounds.solved.values()), rounds.worst
            ),
        }
    )
    for name, delta_version in written.items():
        # Our own write adds one Delta version, or none if it writes nothing over nothing.
        if name in bases and delta_version not in (bases[name], bases[name] + 1):
            raise conflict(name.removesuffix("_version"))
    return nightly.publish_rounds(tonight, rounds, changed.layouts, changed.n_rows, blocks, written)


def commit_sweeps(
    store: SparkStore,
    tonight: Tonight,
    changes: Changes,
    fitted: FitResult,
    before: Rounds | None,
) -> tuple[ModelVersion, dict[str, Any]]:
    """Publish a model after whole sweeps; return the version and the figures of the job.

    `before` are the rounds that gave up before the sweeps, if there were any.
    """
    summary = fitted.summary
    writes = {
        "ratings_version": _deletion(store, changes),
        **nightly.receipts_write(
            tonight, changes.removed, summary.users + summary.items, summary.max_residual
        ),
    }
    written = write_fit(store, fitted, writes)
    return nightly.publish_sweeps(tonight, fitted.fit, before, written)


def restore(store: SparkStore, model: ModelVersion) -> dict[str, int]:
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


def _deletion(store: SparkStore, changes: Changes) -> Callable[[], int]:
    """A function that deletes the covered ratings and returns the version without them."""
    version, stored = changes.news.ratings_version, changes.stored
    return lambda: version if stored is None else ratings.delete(store, stored, version)


def _partial_writes(
    store: SparkStore,
    tonight: Tonight,
    changed: ChangedModel,
    resolved: Resolved,
    blocks: Mapping[str, list[int]],
) -> dict[str, Callable[[], int]]:
    """By field of `ModelVersion`: a function that writes its table and returns the new version, for
    these factor blocks, the ledger and tonight's rating changes."""
    frontier, solved = resolved.frontier, resolved.rounds.solved
    writes: dict[str, Callable[[], int]] = {}
    for side in SIDES:
        if blocks[side]:
            rows = changed.present(side).where(in_blocks(blocks[side]))
            few = 4 * tonight.model.als.rank * solved[side] <= FEW_BYTES
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
