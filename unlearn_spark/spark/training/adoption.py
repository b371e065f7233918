"""Turns factors that were trained elsewhere into a fit, if wanted after sweeps to tolerance."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark import adoption
from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.solver import solver_of
from unlearn_spark.core.training import SweepReport, TrainingSummary
from unlearn_spark.spark.arrow import pieces_table
from unlearn_spark.spark.frames import aggregates_of
from unlearn_spark.spark.placement import part_key
from unlearn_spark.spark.training.encoded import Encoded, encode_ratings
from unlearn_spark.spark.training.half_sweep import FACTOR_KINDS, objective_of, sweep_anchor
from unlearn_spark.spark.training.messages import FACTOR_SCHEMA, part_of
from unlearn_spark.spark.training.sweeper import Sweeper, finish_rows, starting_rows
from unlearn_spark.spark.training.training import FitResult, largest_residual, with_bounds

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.config import AlsSettings, ExecutionSettings


@dataclass(frozen=True)
class AdoptedFit(FitResult):
    """A `FitResult` of factors that came from elsewhere.

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

    residual_before: float
    without_factors: dict[str, int]
    without_ratings: dict[str, int]

    def rows_over(self, tolerance: float) -> dict[str, int]:
        """By side: the number of rows whose relative residual exceeds a tolerance."""
        bounded = with_bounds(self.rows, self.encoded.floors)
        over = F.count_if(F.col("bound") > tolerance)
        return {side: counts[0] for side, counts in aggregates_of(bounded, over).items()}


def adopt_factors(
    ratings: DataFrame,
    user_factors: DataFrame,
    item_factors: DataFrame,
    als: AlsSettings,
    execution: ExecutionSettings,
    *,
    converge: bool = False,
    on_scan: Callable[[float], None] | None = None,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> AdoptedFit:
    """Make a fit of given factors and the retained ratings.

    Parameters
    ----------
    ratings
        user_id, item_id (any types), rating (castable to float): the retained ratings.
    user_factors, item_factors
        id (unique, of the ratings' types), factors array<float> of `als.rank` finite elements.
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
    encoded = encode_ratings(ratings, als, execution)
    encode_seconds = time.perf_counter() - started
    given = {"user": user_factors, "item": item_factors}
    without_factors, without_ratings = _compare(encoded, given, als, converge)

    parts = {side: _starting_parts(encoded, als, side, given[side]).persist() for side in SIDES}
    rows = finish_rows(encoded, als, parts)
    before = largest_residual(rows, encoded.floors)
    if on_scan is not None:
        on_scan(before)
    reports: list[SweepReport] = []
    if converge:
        for frame in rows.values():
            frame.unpersist()
        sweeper = Sweeper(encoded, als, execution, on_sweep, reports)
        # An iterate without history has only the factors.
        iterate = parts[encoded.anchor].withColumn("history", F.col("factors"))
        anchor, other, converged = sweeper.run(iterate)
        rows = sweeper.finish(anchor, other)
        worst = largest_residual(rows, encoded.floors)
        sweeper.release()
        objective = reports[-1].objective
    else:
        adoption.check_residual(before)
        worst, converged = before, before <= als.tol
        objective = _objective(encoded, als, parts)
    for frame in parts.values():
        frame.unpersist()
    summary = TrainingSummary.of(
        encoded.n_rows,
        encoded.n_ratings,
        reports,
        converged,
        objective,
        worst,
        started,
        encode_seconds,
    )
    return AdoptedFit(rows, encoded, summary, before, without_factors, without_ratings)


def _compare(
    encoded: Encoded, given: dict[str, DataFrame], als: AlsSettings, converge: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """By side: the numbers of rated ids without factors, and of ids with factors but no rating."""
    joined = {
        side: encoded.dictionaries[side]
        .select("id", "slot")
        .join(given[side].select("id", "factors"), "id", "full")
        for side in SIDES
    }
    rated, known = F.col("slot").isNotNull(), F.col("factors").isNotNull()
    counts = aggregates_of(
        joined,
        F.count_if(rated & ~known),
        F.count_if(known & ~rated),
        F.count_if(rated & (F.array_min("factors") < 0)),
    )
    missing = {side: counts[side][0] for side in SIDES}
    negative = {side: counts[side][2] for side in SIDES}
    adoption.check_given(encoded.n_rows, missing, negative, als, converge)
    return missing, {side: counts[side][1] for side in SIDES}


def _starting_parts(encoded: Encoded, als: AlsSettings, side: str, given: DataFrame) -> DataFrame:
    """Factor parts (`FACTOR_SCHEMA`) of one side, with its penalty: the given rows, or, for ids
    without one, the rows that a fresh training starts from."""
    layout, solver = encoded.layouts[side], solver_of(als)
    rows = (
        encoded.dictionaries[side]
        .join(given.select("id", "factors"), "id", "left")
        .select(
            F.expr(part_key("slot", layout.keys)).alias("key"),
            "slot",
            F.xxhash64("id").alias("hash"),
            "factors",
        )
    )

    def start(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return pa.schema(FACTOR_KINDS).empty_table()
        part, ratings = part_of(left)
        table = right.sort_by("slot")  # the order of the ratings' rows
        x = starting_rows(table, als, side)
        penalty = solver.penalty(ratings, x)
        return pieces_table(solver.factor_rows(part, ratings.slots, x, penalty))

    return (
        encoded.parts[side]
        .groupBy("key")
        .cogroup(rows.groupBy("key"))
        .applyInArrow(start, FACTOR_SCHEMA)
    )


def _objective(encoded: Encoded, als: AlsSettings, parts: dict[str, DataFrame]) -> float:
    """The objective of the given factors, which a sweep computes for its starting point."""
    side, other = encoded.anchor, other_side(encoded.anchor)
    state = sweep_anchor(
        solver_of(als),
        encoded.parts[side],
        encoded.layouts[side],
        parts[other],
        encoded.layouts[other].n_slots,
        parts[side].select("part", "slots", F.col("factors").alias("history")),
        encoded.floors[side],
    )
    return objective_of(state.select("quadratic", "penalty").collect())
