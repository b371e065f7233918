"""Publish a model version: an engine writes its tables first, this module the row of models last.

Nothing is visible before that last commit, so a job may die anywhere. The next job starts from the
published version, and its writes replace whatever was left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from unlearn_spark.core.training import TrainingSummary
from unlearn_spark.errors import InputError
from unlearn_spark.tables import models, ratings, tombstones
from unlearn_spark.tables.models import ModelVersion

if TYPE_CHECKING:
    from unlearn_spark.config import AlsSettings
    from unlearn_spark.tables.store import Store


@dataclass(frozen=True)
class Basis:
    """What a new model may learn from: the ratings of a version that no request covers.

    Attributes
    ----------
    parent
        The newest published version; None before the first training.
    ratings_version, tombstones_version
        The newest Delta versions; None: there are no requests.
    receipts_version
        Delta version of the receipts that the parent names; None: there are none.
    """

    parent: ModelVersion | None
    ratings_version: int
    tombstones_version: int | None
    receipts_version: int | None


def basis(store: Store) -> Basis:
    """What a model that is fitted now may learn from. Raises TableMissingError without ratings."""
    store.require(ratings.TABLE)
    parent = models.newest(store)
    return Basis(
        parent,
        store.version(ratings.TABLE),
        tombstones.version(store),
        parent.receipts_version if parent else None,
    )


@dataclass(frozen=True)
class Fit:
    """A freshly fitted model, apart from its tables.

    Attributes
    ----------
    layouts
        By side: `n_blocks` and `n_slots`.
    floors
        By side: the least denominator of a residual (`floor_of`).
    summary
        How the training went.
    """

    layouts: Mapping[str, Mapping[str, int]]
    floors: Mapping[str, float]
    summary: TrainingSummary


def publish_fit(
    store: Store,
    fit: Fit,
    written: Mapping[str, int],
    als: AlsSettings,
    *,
    kind: str,
    basis: Basis,
    ratings_ingest_id: int,
    tau: float | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> ModelVersion:
    """Make a freshly fitted model visible.

    Parameters
    ----------
    written
        The Delta versions of the tables that were written, under the names of `ModelVersion`'s
        fields; they win over those of `basis`.
    kind, ratings_ingest_id
        Fields of the new `ModelVersion`.
    basis
        What the model was fitted to.
    tau
        The residual that the certificate promises; None: `als.tol`.
    metrics
        Further metrics, which win over those of the training.

    Raises
    ------
    ConflictError
        Another job published meanwhile.
    """
    summary = fit.summary
    tau = als.tol if tau is None else tau
    # Without a sweep there is no reached residual from which a later night could derive tau.
    reached = {"reached": summary.max_residual} if summary.sweeps else {}
    parent = basis.parent
    versions: dict[str, Any] = {
        "ratings_version": basis.ratings_version,
        "tombstones_version": basis.tombstones_version,
        "receipts_version": basis.receipts_version,
        **written,
    }
    return models.publish(
        store,
        ModelVersion(
            model_version=next_version(parent),
            kind=kind,
            parent=parent.model_version if parent else None,
            ratings_ingest_id=ratings_ingest_id,
            settings={"als": als.model_dump(), "layouts": fit.layouts},
            metrics={
                "users": summary.users,
                "items": summary.items,
                "ratings": summary.ratings,
                "sweeps": summary.sweeps,
                "converged": summary.converged,
                "objective": summary.objective,
                "max_residual": summary.max_residual,
                "seconds": summary.seconds,
                "history": [report["max_residual"] for report in summary.history],
                **(metrics or {}),
            },
            certificate={
                "tau": tau,
                "max_residual": summary.max_residual,
                "holds": summary.max_residual <= tau,
                "evidence": "scan",
                "floor": fit.floors,
                **reached,
            },
            **versions,
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
