"""Write a model version: its tables first, its row of the models table last.

Nothing is visible before that last commit, so a job may die anywhere. The next job starts from the
published version, and its writes replace whatever was left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.core.training import TrainingSummary
from unlearn_spark.errors import InputError
from unlearn_spark.tables import factors, models
from unlearn_spark.tables.models import ModelVersion

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import AlsSettings
    from unlearn_spark.tables.store import Store


@dataclass(frozen=True)
class WholeModel:
    """A freshly fitted model, which replaces everything stored of the one before.

    Attributes
    ----------
    rows
        By side: id, block, slot, chunk, n_ratings, gradient_norm, b_norm, factor_norm, factors.
    chunks
        The packed ratings of both sides.
    layouts
        By side: `n_blocks` and `n_slots`.
    floors
        By side: the least denominator of a residual (`floor_of`).
    summary
        How the training went.
    """

    rows: Mapping[str, DataFrame]
    chunks: DataFrame
    layouts: Mapping[str, Mapping[str, int]]
    floors: Mapping[str, float]
    summary: TrainingSummary


def write_whole_model(
    store: Store, model: WholeModel, more: Mapping[str, Callable[[], int]] | None = None
) -> dict[str, int]:
    """Replace factors, ledger and packed ratings by those of a whole new model.

    Parameters
    ----------
    more
        Further writes to run at the same time, under the fields that take their versions.

    Returns
    -------
    dict
        The Delta version of each table, under the names of `ModelVersion`'s fields.
    """
    rows = model.rows
    ledger = factors.ledger_rows(rows["user"], "user", model.floors).unionByName(
        factors.ledger_rows(rows["item"], "item", model.floors)
    )
    # Not beside other writes: small row groups are a setting of the whole session.
    written = {"rating_blocks_version": factors.write_rating_blocks(store, model.chunks)}
    return written | run_concurrently(
        {
            "user_factors_version": lambda: factors.write_factors(store, "user", rows["user"]),
            "item_factors_version": lambda: factors.write_factors(store, "item", rows["item"]),
            "ledger_version": lambda: factors.write_ledger(store, ledger),
            "rating_changes_version": lambda: factors.clear_rating_changes(store),
            **(more or {}),
        }
    )


def warm_start(store: Store, wanted: int | str | None) -> tuple[DataFrame, DataFrame] | None:
    """User and item factors of the version that `als.warm_start` names; None if it names none."""
    if wanted is None:
        return None
    version = models.published(store, None if wanted == "latest" else int(wanted))
    return models.read_factors(store, version)


def publish_fit(
    store: Store,
    fitted: WholeModel,
    als: AlsSettings,
    *,
    kind: str,
    parent: ModelVersion | None,
    ratings_version: int,
    ratings_ingest_id: int,
    tau: float | None = None,
    writes: Mapping[str, Callable[[], int]] | None = None,
    **more: Any,
) -> ModelVersion:
    """Write a freshly fitted model and make it visible.

    Parameters
    ----------
    kind, parent, ratings_version, ratings_ingest_id, more
        Fields of the new `ModelVersion`; `more` may hold `metrics` to add.
    tau
        The residual that the certificate promises; None: `als.tol`.
    writes
        As `more` of `write_whole_model`; the versions that they return override the arguments.

    Raises
    ------
    ConflictError
        Another job published meanwhile.
    """
    summary = fitted.summary
    tau = als.tol if tau is None else tau
    # Without a sweep there is no reached residual from which a later night could derive tau.
    reached = {"reached": summary.max_residual} if summary.sweeps else {}
    written = write_whole_model(store, fitted, writes)
    metrics = {
        "users": summary.users,
        "items": summary.items,
        "ratings": summary.ratings,
        "sweeps": summary.sweeps,
        "converged": summary.converged,
        "objective": summary.objective,
        "max_residual": summary.max_residual,
        "seconds": summary.seconds,
        "history": [report["max_residual"] for report in summary.history],
        **more.pop("metrics", {}),
    }
    return models.publish(
        store,
        ModelVersion(
            model_version=next_version(parent),
            kind=kind,
            parent=parent.model_version if parent else None,
            ratings_ingest_id=ratings_ingest_id,
            settings={
                "als": als.model_dump(),
                "layouts": fitted.layouts,
            },
            metrics=metrics,
            certificate={
                "tau": tau,
                "max_residual": summary.max_residual,
                "holds": summary.max_residual <= tau,
                "evidence": "scan",
                "floor": fitted.floors,
                **reached,
            },
            **{
                "ratings_version": ratings_version,
                "tombstones_version": parent.tombstones_version if parent else None,
                "receipts_version": parent.receipts_version if parent else None,
                **written,
                **more,
            },
        ),
    )


def next_version(parent: ModelVersion | None) -> int:
    """The number after the parent's; versions count from 1."""
    return 1 if parent is None else parent.model_version + 1


def roll_back(store: Store, model_version: int) -> ModelVersion:
    """Publish an earlier version again, as the newest. Nothing is copied or deleted.

    Raises
    ------
    InputError
        That version does not exist, is the newest already, or was published before a deletion
        was honoured: going back would bring the deleted ratings back.
    """
    head = models.published(store)
    target = models.published(store, model_version)
    if target.model_version == head.model_version:
        raise InputError(f"model version {model_version} is the newest already; nothing to do")
    forgotten = [
        version.model_version
        for version in models.versions(store)
        if version.model_version > model_version and version.metrics.get("requests", 0) > 0
    ]
    if forgotten:
        raise InputError(
            f"model version {model_version} still knows ratings that version {forgotten[0]} "
            f"forgot; roll back to {forgotten[-1]} or later, or train anew"
        )
    metrics: dict[str, Any] = {**target.metrics, "rolled_back_to": model_version, "requests": 0}
    return models.publish(
        store,
        replace(
            target,
            model_version=next_version(head),
            parent=head.model_version,
            kind="rollback",
            # What was honoured stays honoured.
            receipts_version=head.receipts_version,
            metrics=metrics,
            # Stored because it may derive from the kind, which changes here.
            certificate={**target.certificate, "reached": target.reached},
        ),
    )
