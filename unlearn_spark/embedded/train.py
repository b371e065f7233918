"""The job train in this process: fit the retained ratings, write the tables, publish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from unlearn_spark import publishing
from unlearn_spark.config import Settings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.training import Progress, TrainingSummary
from unlearn_spark.embedded import training
from unlearn_spark.embedded.model import read_factors, write_whole_model
from unlearn_spark.embedded.portions import portions
from unlearn_spark.embedded.ratings import PAIR, newest_ingest, retained
from unlearn_spark.publishing import Basis
from unlearn_spark.tables import models, ratings, requests
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion


def train(
    store: DeltaRsStore, settings: Settings, threads: int, progress: Progress
) -> tuple[ModelVersion, TrainingSummary]:
    """Fit a model to the ratings table and publish it.

    Raises
    ------
    UserError
        There are no ratings, or `als.warm_start` names a version that does not fit.
    ConflictError
        Another job published meanwhile.
    """
    basis = publishing.basis(store)
    als = settings.als
    warm = None
    if als.warm_start is not None:
        wanted = None if als.warm_start == "latest" else int(als.warm_start)
        warm = warm_start(store, models.published(store, wanted))
        training.require_rank(warm, als.rank)
    with retained_batches(store, basis) as batches:
        fitted = training.fit(
            batches, als, threads, warm=warm, on_sweep=lambda report: progress(report.line())
        )
    written = write_whole_model(store, fitted.to_store(), threads)
    version = publishing.publish_fit(
        store,
        fitted.fit,
        written,
        als,
        kind="train",
        basis=basis,
        ratings_ingest_id=newest_ingest(store, basis.ratings_version),
    )
    return version, fitted.summary


def warm_start(store: DeltaRsStore, model: ModelVersion) -> training.Warm:
    """By side the ids and factors of a published version."""
    sides = {side: read_factors(store, model, side) for side in SIDES}
    return {side: (rows.ids, rows.factors) for side, rows in sides.items()}


@contextmanager
def retained_batches(store: DeltaRsStore, basis: Basis) -> Iterator[Iterator[pa.RecordBatch]]:
    """The retained ratings (user_id, item_id, rating), a batch at a time."""
    rules = requests.rules_of(store, basis.tombstones_version, basis.receipts_version)
    columns = [*PAIR, "rating"] if rules is None else [*PAIR, "rating", "rated_at"]
    with store.reading(ratings.TABLE, basis.ratings_version, columns) as reader:

        def batches() -> Iterator[pa.RecordBatch]:
            for rows in portions(reader):
                yield from retained(rows, rules).combine_chunks().to_batches()

        yield batches()
