"""The job import_model in this process: factors that were trained elsewhere become a version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlearn_spark import adoption, publishing
from unlearn_spark.config import AlsSettings, Settings
from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.objective import relative_residual
from unlearn_spark.core.solver import solve_anchor, solver_of
from unlearn_spark.core.training import SweepReport, TrainingSummary
from unlearn_spark.embedded import training
from unlearn_spark.embedded.foreign import read_factors
from unlearn_spark.embedded.model import write_whole_model
from unlearn_spark.embedded.ratings import id_types, newest_ingest
from unlearn_spark.embedded.train import retained_batches
from unlearn_spark.embedded.training import Encoded, Fitted, Warm
from unlearn_spark.tables.delta_rs import DeltaRsStore

if TYPE_CHECKING:
    from unlearn_spark.core.training import Progress


def import_factors(
    store: DeltaRsStore,
    settings: Settings,
    path: str,
    form: str,
    converge: bool,
    progress: Progress,
    threads: int,
) -> dict[str, Any]:
    """Publish factors that were trained elsewhere; return the figures of the job.

    Raises
    ------
    UserError
        There are no ratings, the input cannot be read, or it does not fit the ratings
        (`adopt_factors`).
    ConflictError
        Another job published meanwhile.
    """
    basis = publishing.basis(store)
    kinds = id_types(store)
    assert kinds is not None
    given = read_factors(path, form, {side: kinds[f"{side}_id"] for side in SIDES})
    warm = {
        side: (rows.ids, rows.factors)
        for side, rows in (("user", given.user), ("item", given.item))
    }
    n_rows = {side: len(ids) for side, (ids, _) in warm.items()}
    als = adoption.announced(path, n_rows, given.rank, settings.als, progress)
    with retained_batches(store, basis) as batches:
        adopted = adopt_factors(
            batches,
            warm,
            als,
            threads,
            converge=converge,
            on_scan=lambda residual: progress(adoption.scan_line(residual, als)),
            on_sweep=lambda report: progress(report.line()),
        )
    fitted = adopted.fitted
    tau = settings.unlearn.resolved(0.0).tau
    over = adopted.rows_over(tau)
    progress(adoption.verdict(fitted.summary, als, tau, over, converge))
    version = publishing.publish_fit(
        store,
        fitted.fit,
        write_whole_model(store, fitted.to_store(), threads),
        als,
        kind="import",
        basis=basis,
        ratings_ingest_id=newest_ingest(store, basis.ratings_version),
    )
    return adoption.figures(
        version.model_version,
        given.rank,
        fitted.summary,
        adopted.residual_before,
        adopted.without_factors,
        adopted.without_ratings,
        over,
        converge,
    )


@dataclass(frozen=True)
class Adopted:
    """A model of factors that came from elsewhere.

    Attributes
    ----------
    residual_before
        Largest relative residual of the given factors, over all rows of both sides; rows without
        given factors count with their starting factors. Infinite if every target is zero (both
        floors are 0) and a row is not.
    without_factors
        By side: the number of rated ids without given factors.
    without_ratings
        By side: the number of ids with given factors but without ratings; the model omits them.
    """

    fitted: Fitted
    residual_before: float
    without_factors: Mapping[str, int]
    without_ratings: Mapping[str, int]

    def rows_over(self, tolerance: float) -> dict[str, int]:
        """By side: the number of rows whose relative residual exceeds a tolerance."""
        floors = self.fitted.encoded.floors
        residuals = {
            side: relative_residual(norms.gradient_norm, norms.b_norm, floors[side])
            for side, norms in self.fitted.norms.items()
        }
        return {side: int(np.count_nonzero(residuals[side] > tolerance)) for side in SIDES}


def adopt_factors(
    ratings: Iterable[pa.RecordBatch],
    given: Warm,
    als: AlsSettings,
    threads: int = 1,
    *,
    converge: bool = False,
    on_scan: Callable[[float], None] | None = None,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> Adopted:
    """Make a model of given factors and the retained ratings.

    Parameters
    ----------
    ratings
        As for `training.encode`.
    given
        By side: distinct ids of the ratings' types, and their factors, finite.
    als
        The objective that the factors were trained for. `warm_start` is ignored.
    converge
        Sweep to `als.tol`, or `als.max_sweeps` times, starting from the given rows of the side with
        fewer rows (the other side is solved from them). Otherwise keep the given factors.
    on_scan
        Called with `residual_before` as soon as it is known.
    on_sweep
        Called after every sweep.

    Raises
    ------
    InputError
        There are no ratings; no rated id of a side has factors; factors are negative although
        `als.nonnegative` is set; or, without `converge`, a rated id has no factors, or a row is not
        zero although every target is.
    """
    started = time.perf_counter()
    encoded = training.encode(ratings, als, threads)
    encode_seconds = time.perf_counter() - started
    n_rows = {side: encoded.blocks[side].n_rows for side in SIDES}
    without_factors, without_ratings, negative = {}, {}, {}
    for side in SIDES:
        ids, factors = given[side]
        places = pc.index_in(encoded.ids[side], ids).drop_null().to_numpy()
        without_factors[side] = n_rows[side] - len(places)
        without_ratings[side] = len(ids) - len(places)
        negative[side] = int(np.count_nonzero((factors[places] < 0).any(axis=1)))
    adoption.check_given(n_rows, without_factors, negative, als, converge)

    start = {side: training.starting_factors(encoded, als, side, given) for side in SIDES}
    norms = training.scan(encoded, als, start, threads)
    before = training.largest_residual(norms, encoded.floors)
    if on_scan is not None:
        on_scan(before)
    if converge:
        factors_of, reports, converged = training.sweep(
            encoded, als, start[encoded.anchor], threads, on_sweep
        )
        fitted = training.finished(
            encoded, als, factors_of, reports, converged, started, encode_seconds, threads
        )
    else:
        adoption.check_residual(before)
        summary = TrainingSummary.of(
            n_rows,
            encoded.n_ratings,
            [],
            before <= als.tol,
            _objective(encoded, als, start, threads),
            before,
            started,
            encode_seconds,
        )
        fitted = Fitted(encoded, start, norms, summary)
    return Adopted(fitted, before, without_factors, without_ratings)


def _objective(
    encoded: Encoded, als: AlsSettings, factors: Mapping[str, NDArray[np.float32]], threads: int
) -> float:
    """The objective of the given factors, which a sweep computes for its starting point."""
    solver, anchor = solver_of(als, threads), encoded.anchor
    other = other_side(anchor)
    penalty = solver.penalty(encoded.blocks[other], factors[other])
    seen = training.seen_by(solver, encoded, other, factors[other], penalty)
    stack = factors[anchor][None]
    found = solve_anchor(solver, encoded.blocks[anchor], seen, stack, encoded.floors[anchor])
    return found.quadratic + found.penalty
