"""What a night is on either engine: its inputs, what it reports, and how its result is published.

    news --> changes --> changed model --> rounds --+--> tables --> publish_rounds
                             |                      | (gave up)
                             +--> whole sweeps <----+--> tables --> publish_sweeps

An engine finds the news, changes the model and writes the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from unlearn_spark import publishing
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.ledger_page import Thresholds
from unlearn_spark.core.rounds import sweeps_at_once
from unlearn_spark.errors import InputError
from unlearn_spark.tables import models, receipts, requests, tombstones
from unlearn_spark.tables.factors import MODEL_TABLES
from unlearn_spark.tables.models import ModelVersion, Sizes

if TYPE_CHECKING:
    from unlearn_spark.config import ResolvedUnlearn, Settings
    from unlearn_spark.publishing import Fit
    from unlearn_spark.tables.store import Store

MOST_NAMED = 1000
"""Largest number of requests without ratings that a job lists; all of them get receipts."""


@dataclass(frozen=True)
class Counts:
    """How much a night changes.

    Attributes
    ----------
    n_requests
        Pending requests.
    without_ratings
        The first `MOST_NAMED` request_ids that cover no rating, in order.
    n_removed, n_added
        The number of ratings that requests take out of the model, and of new or corrected ratings.
    net
        The change of the model's number of ratings.
    """

    n_requests: int
    without_ratings: Sequence[str]
    n_removed: int
    n_added: int
    net: int

    @property
    def figures(self) -> dict[str, Any]:
        """These figures under the names of the job's JSON."""
        return {
            "requests": self.n_requests,
            "requests_without_ratings": list(self.without_ratings),
            "ratings_removed": self.n_removed,
            "ratings_added": self.n_added,
        }


class News(Protocol):
    """The newest versions of the tables and the newest ingest, as an engine's night found them."""

    @property
    def ratings_version(self) -> int: ...

    @property
    def ingest_id(self) -> int: ...

    @property
    def tombstones_version(self) -> int | None: ...


@dataclass(frozen=True)
class Tonight:
    """The inputs of a night, in rounds or in whole sweeps.

    Attributes
    ----------
    unlearn
        The `unlearn` settings, resolved for this model.
    model
        The published version.
    ratings_version, ingest_id, tombstones_version
        The Delta versions and the newest ingest that were read.
    kind
        `unlearn` or `update`.
    started
        When the job started, by `time.perf_counter`.
    """

    store: Store
    settings: Settings
    unlearn: ResolvedUnlearn
    model: ModelVersion
    counts: Counts
    ratings_version: int
    ingest_id: int
    tombstones_version: int | None
    progress: Callable[[str], None]
    kind: str
    started: float

    @classmethod
    def of(
        cls,
        store: Store,
        settings: Settings,
        model: ModelVersion,
        news: News,
        counts: Counts,
        progress: Callable[[str], None],
        kind: str,
        started: float,
    ) -> Tonight:
        """The inputs of a night that has found its changes."""
        return cls(
            store,
            settings,
            settings.unlearn.resolved(model.reached),
            model,
            counts,
            news.ratings_version,
            news.ingest_id,
            news.tombstones_version,
            progress,
            kind,
            started,
        )

    @property
    def sweeps_at_once(self) -> bool:
        """Whether the night skips the rounds."""
        n_changes = self.counts.n_removed + self.counts.n_added
        return sweeps_at_once(n_changes, self.model.sizes.ratings)

    def thresholds(self, n_blocks: Mapping[str, int]) -> Thresholds:
        """What decides which rows a round works on; `n_blocks` by side."""
        # In implicit mode every move disturbs every row through the Gram matrix. To solve a row
        # before it is over tau would make work for all others.
        implicit = self.model.als.implicit_prefs
        mark = self.unlearn.tau if implicit else self.unlearn.mark
        return Thresholds(n_blocks, self.unlearn.tau, mark, self.model.floors)

    @property
    def basis(self) -> publishing.Basis:
        """What whole sweeps may learn from."""
        return publishing.Basis(
            self.model, self.ratings_version, self.tombstones_version, self.model.receipts_version
        )

    @property
    def n_ratings(self) -> int:
        """The number of ratings that the next version is fitted to."""
        return self.model.sizes.ratings + self.counts.net

    def metrics(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics to publish: the figures of the job, its training sweeps and its duration."""
        return {
            **figures,
            "training_sweeps": self.model.training_sweeps,
            "seconds": time.perf_counter() - self.started,
        }


@dataclass(frozen=True)
class Rounds:
    """What a night's rounds did.

    Attributes
    ----------
    rounds, work_sweeps
        Their number, and their arithmetic in sweeps.
    worst
        The largest bound at the end.
    solved
        By side: the number of rows that were re-solved.
    """

    rounds: int
    work_sweeps: float
    worst: float
    solved: Mapping[str, int]


def unanswered(
    store: Store, model: ModelVersion, tombstones_version: int | None
) -> tuple[pa.Table, pa.Table]:
    """What the published model does not know of the requests at a version (None: there are none).

    Returns
    -------
    pending
        Requests without a receipt, in the columns of `requests.effective`.
    lifts
        Reinstatements since the model, which may let in ratings that it left out, in the columns
        of the tombstones.
    """
    if tombstones_version is None:
        return requests.EFFECTIVE.empty_table(), tombstones.SPEC.schema.empty_table()
    every = tombstones.read(store, tombstones_version)
    done = None if model.receipts_version is None else receipts.read(store, model.receipts_version)
    known = requests.effective(every, done)
    lifts = every.filter(pc.equal(every["scope"], requests.LIFT))
    if tombstones_version == model.tombstones_version:
        lifts = lifts.slice(0, 0)
    elif model.tombstones_version is not None and lifts.num_rows:
        earlier = tombstones.read(store, model.tombstones_version)["request_id"]
        lifts = lifts.filter(pc.invert(pc.is_in(lifts["request_id"], earlier.combine_chunks())))
    return known.filter(known["pending"]), lifts


def idle(model: ModelVersion, started: float) -> dict[str, Any]:
    """The figures of a job that finds nothing to do: those of the published version stay."""
    layouts = model.settings["layouts"]
    return {
        "model_version": model.model_version,
        "parent": model.parent,
        **Counts(0, (), 0, 0, 0).figures,
        "rows_resolved": dict.fromkeys(SIDES, 0),
        "blocks_written": dict.fromkeys(SIDES, 0),
        "blocks_total": {side: layouts[side]["n_blocks"] for side in SIDES},
        "rounds": 0,
        "sweeps": 0,
        "work_sweeps": 0.0,
        "max_residual": model.certificate["max_residual"],
        "tau": model.certificate["tau"],
        "seconds": time.perf_counter() - started,
    }


def announce(tonight: Tonight) -> None:
    """Report how much the night has to do.

    Raises
    ------
    InputError
        No rating would remain.
    """
    counts = tonight.counts
    tonight.progress(
        f"{counts.n_requests} requests take {counts.n_removed} ratings out; "
        f"{counts.n_added} new or corrected ratings come in"
    )
    names = counts.without_ratings
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


def receipts_write(
    tonight: Tonight, removed: Mapping[str, int], n_solved: int, worst: float
) -> dict[str, Callable[[], int]]:
    """By field of `ModelVersion`: a function that writes the receipts of tonight's requests; empty
    if there are no requests.

    Parameters
    ----------
    removed
        By request_id of every pending request: the number of ratings that it covers.
    n_solved, worst
        The rows that were re-solved, and the largest bound or residual at the end.
    """
    if not removed:
        return {}
    night = {
        "model_version": publishing.next_version(tonight.model),
        "rows_resolved": n_solved,
        "max_residual": float(worst),
        "honoured_at": datetime.now(UTC),
    }
    rows = [{"request_id": id, "ratings_removed": n, **night} for id, n in removed.items()]
    table = pa.Table.from_pylist(rows, schema=receipts.SPEC.schema)
    return {"receipts_version": lambda: receipts.append(tonight.store, tonight.model, table)}


def publish_rounds(
    tonight: Tonight,
    rounds: Rounds,
    layouts: Mapping[str, Mapping[str, int]],
    n_rows: Mapping[str, int],
    blocks: Mapping[str, Sequence[int]],
    written: Mapping[str, int],
) -> tuple[ModelVersion, dict[str, Any]]:
    """Publish a model whose rounds are done; return the version and the figures of the job.

    Parameters
    ----------
    layouts, n_rows
        By side: blocks and slots, and the number of rows, of the new version.
    blocks
        By side: the blocks of factors that were written.
    written
        The Delta versions of the tables that changed, under the names of `ModelVersion`'s fields.

    Raises
    ------
    ConflictError
        Another job published meanwhile; nothing became visible.
    """
    store, model = tonight.store, tonight.model
    figures = {
        **tonight.counts.figures,
        "rows_resolved": dict(rounds.solved),
        "blocks_written": {side: len(blocks[side]) for side in SIDES},
        "blocks_total": {side: layouts[side]["n_blocks"] for side in SIDES},
        "rounds": rounds.rounds,
        "sweeps": 0,
        "work_sweeps": rounds.work_sweeps,
        "max_residual": rounds.worst,
    }
    before = {
        f"{table}_version": getattr(model, f"{table}_version")
        for table in (*MODEL_TABLES, "receipts")
    }
    sizes = Sizes(n_rows["user"], n_rows["item"], tonight.n_ratings)
    known: dict[str, Any] = {**before, "ratings_version": tonight.ratings_version, **written}
    version = ModelVersion(
        **known,
        model_version=publishing.next_version(model),
        parent=model.model_version,
        kind=tonight.kind,
        ratings_ingest_id=tonight.ingest_id,
        tombstones_version=tonight.tombstones_version,
        settings={**model.settings, "layouts": layouts},
        metrics={**tonight.metrics(figures), **asdict(sizes)},
        certificate={
            "tau": tonight.unlearn.tau,
            "max_residual": rounds.worst,
            "holds": rounds.worst <= tonight.unlearn.tau,
            "evidence": "ledger",
            "floor": model.floors,
            "reached": model.reached,
        },
    )
    return models.publish(store, version), figures


def publish_sweeps(
    tonight: Tonight, fit: Fit, before: Rounds | None, written: Mapping[str, int]
) -> tuple[ModelVersion, dict[str, Any]]:
    """Publish a model after whole sweeps; return the version and the figures of the job.

    Parameters
    ----------
    before
        The rounds that gave up before the sweeps, if there were any.
    written
        As for `publish_rounds`.

    Raises
    ------
    ConflictError
        Another job published meanwhile; nothing became visible.
    """
    model, summary = tonight.model, fit.summary
    n_blocks = {side: fit.layouts[side]["n_blocks"] for side in SIDES}
    figures = {
        **tonight.counts.figures,
        "rows_resolved": {"user": summary.users, "item": summary.items},
        "blocks_written": n_blocks,
        "blocks_total": n_blocks,
        "rounds": before.rounds if before else 0,
        "sweeps": summary.sweeps,
        "work_sweeps": summary.sweeps + (before.work_sweeps if before else 0.0),
        "max_residual": summary.max_residual,
    }
    version = publishing.publish_fit(
        tonight.store,
        fit,
        written,
        model.als,
        kind=tonight.kind,
        basis=tonight.basis,
        ratings_ingest_id=tonight.ingest_id,
        tau=tonight.unlearn.tau,
        metrics=tonight.metrics(figures),
    )
    return version, figures


def report(tonight: Tonight, version: ModelVersion, figures: Mapping[str, Any]) -> dict[str, Any]:
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
