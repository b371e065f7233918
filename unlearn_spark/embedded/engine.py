"""The engine of one process: DuckDB and NumPy over Arrow, delta-rs for the tables, no Java."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unlearn_spark.tables.delta_rs import DeltaRsStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from unlearn_spark.config import Settings
    from unlearn_spark.core.training import Progress, TrainingSummary
    from unlearn_spark.ingestion.rules import IngestReport, TombstoneReport
    from unlearn_spark.tables.audits import Audit
    from unlearn_spark.tables.models import ModelVersion


class EmbeddedEngine:
    """Works in this process; see `engine.Engine`."""

    name = "embedded"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def store(self) -> DeltaRsStore:
        """The tables under `settings.root`, which is given."""
        assert self.settings.root is not None
        return DeltaRsStore(self.settings.root)

    @property
    def threads(self) -> int:
        """`execution.threads`; by default all cores."""
        return self.settings.execution.threads or os.cpu_count() or 1

    def ingest_ratings(self, source: Any, format: str, columns: Mapping[str, str]) -> IngestReport:
        from unlearn_spark.embedded.ingest import ingest_ratings

        return ingest_ratings(self.store, source, format, columns, self.threads)

    def ingest_requests(self, source: Any, format: str | None) -> TombstoneReport:
        from unlearn_spark.embedded.ingest_requests import ingest_requests
        from unlearn_spark.embedded.ratings import id_types

        return ingest_requests(self.store, source, format, id_types(self.store), self.threads)

    def train(self, progress: Progress) -> tuple[ModelVersion, TrainingSummary]:
        from unlearn_spark.embedded.train import train

        _announce_compilation(progress)
        with _one_blas_thread():
            return train(self.store, self.settings, self.threads, progress)

    def import_factors(
        self, path: str, format: str, converge: bool, progress: Progress
    ) -> dict[str, Any]:
        from unlearn_spark.embedded.importing import import_factors

        _announce_compilation(progress)
        with _one_blas_thread():
            return import_factors(
                self.store, self.settings, path, format, converge, progress, self.threads
            )

    def run_night(self, kind: str, progress: Progress) -> dict[str, Any]:
        from unlearn_spark.embedded.night import run_night

        with _one_blas_thread():
            return run_night(self.store, self.settings, self.threads, progress, kind=kind)

    def audit(self, model: ModelVersion) -> Audit:
        from unlearn_spark.embedded.audit import audit

        with _one_blas_thread():
            return audit(self.store, model, self.threads)

    def prepare_comparison(
        self,
        model: ModelVersion,
        held_out: str | None,
        held_out_format: str,
        plot: str | None,
        progress: Progress,
    ) -> Callable[[int], dict[str, Any]]:
        from unlearn_spark.audit import membership, report
        from unlearn_spark.audit.comparison import compare
        from unlearn_spark.embedded.comparison.comparison import EmbeddedContestants
        from unlearn_spark.embedded.comparison.deletion import find_deletion
        from unlearn_spark.embedded.evaluation import read_held_out
        from unlearn_spark.preconditions import require_picture

        membership.require_sklearn()
        if plot is not None:
            require_picture(plot)
        deletion = find_deletion(self.store, model)
        judged = None
        if held_out is not None:
            judged = read_held_out(held_out, held_out_format, {}, self.threads, "--held-out")
        else:
            progress("no --held-out ratings: quality on held-out ratings is left out")

        def comparing(seeds: int) -> dict[str, Any]:
            with _one_blas_thread():
                contestants = EmbeddedContestants.of(
                    self.store, deletion, self.threads, judged, progress
                )
                found = compare(contestants, seeds, progress)
            report.show(found, plot)
            return found.figures

        return comparing

    def recommend(
        self,
        model: ModelVersion,
        top: int,
        users: Sequence[str] | None,
        exclude_seen: bool,
        output: str | None,
        progress: Progress,
    ) -> dict[str, Any]:
        from unlearn_spark.embedded.recommend import recommend

        with _one_blas_thread():
            return recommend(
                self.store, model, top, users, exclude_seen, output, progress, self.threads
            )

    def predict(self, model: ModelVersion, pairs: pa.Table) -> NDArray[np.float64]:
        from unlearn_spark.embedded.recommend import predict

        return predict(self.store, model, pairs)

    def sample(self, n: int) -> pa.Table:
        from unlearn_spark.embedded.sampling import sample_ratings

        return sample_ratings(self.store, n)

    def evaluate(
        self,
        model: ModelVersion,
        source: Any,
        format: str,
        columns: Mapping[str, str],
        k: int,
        min_rating: float | None,
    ) -> dict[str, Any]:
        from unlearn_spark.embedded.evaluation import evaluate, read_held_out

        held_out = read_held_out(source, format, columns, self.threads)
        with _one_blas_thread():
            return evaluate(self.store, model, held_out, k, min_rating, self.threads)

    def evaluate_split(
        self,
        fraction: float,
        seed: int,
        k: int,
        min_rating: float | None,
        progress: Progress,
    ) -> dict[str, Any]:
        from unlearn_spark.embedded.evaluation import evaluate_split

        als = self.settings.als
        with _one_blas_thread():
            return evaluate_split(
                self.store, als, fraction, seed, k, min_rating, progress, self.threads
            )


def _announce_compilation(progress: Progress) -> None:
    """Say why the first job after an installation takes longer."""
    from unlearn_spark.core import simd

    if not simd.are_compiled():
        progress("compiling the kernels, once for this installation")


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Let each of our threads call a BLAS of one thread: more would contend for the cores, and the
    order of their sums would depend on how many there are."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")
