"""Fits a model: encode the ratings once, then sweep until every row solves its equations."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from pyspark.sql import functions as F

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.training import SweepReport, TrainingSummary
from unlearn_spark.errors import InputError
from unlearn_spark.publishing import Fit
from unlearn_spark.spark.frames import aggregates_of
from unlearn_spark.spark.sql import bound_expression
from unlearn_spark.spark.training.encoded import Encoded, encode_ratings
from unlearn_spark.spark.training.sweeper import Sweeper, start_iterate

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True)
class FitResult:
    """A fitted model that is not published yet.

    Attributes
    ----------
    rows
        By side, cached: id, block, slot, n_ratings, chunk, gradient_norm, b_norm, factor_norm,
        factors. The norms come from a final scan in float64.
    encoded
        The ratings that the model is fitted to.
    """

    rows: dict[str, DataFrame]
    encoded: Encoded
    summary: TrainingSummary

    @property
    def user_factors(self) -> DataFrame:
        """id, factors array<float>, n_ratings."""
        return self.rows["user"].select("id", "factors", "n_ratings")

    @property
    def item_factors(self) -> DataFrame:
        """id, factors array<float>, n_ratings."""
        return self.rows["item"].select("id", "factors", "n_ratings")

    @property
    def fit(self) -> Fit:
        """The model as `publishing.publish_fit` takes it."""
        layouts = {
            side: {"n_blocks": layout.n_blocks, "n_slots": layout.n_slots}
            for side, layout in self.encoded.layouts.items()
        }
        return Fit(layouts, self.encoded.floors, self.summary)

    def release(self) -> None:
        """Drop the caches."""
        self.encoded.release()
        for frame in self.rows.values():
            frame.unpersist()


def fit_factors(
    ratings: DataFrame,
    settings: AlsSettings,
    execution: ExecutionSettings | None = None,
    *,
    warm_start: tuple[DataFrame, DataFrame] | None = None,
    floors: dict[str, float] | None = None,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> FitResult:
    """Fit user and item factors.

    Parameters
    ----------
    ratings
        user_id, item_id (any types), rating (castable to float).
    settings, execution
        See `unlearn_spark.config`.
    warm_start
        User and item factors (id, factors) of an earlier model.
    floors
        By side: the least denominator of its residuals; None: measure it on these ratings.
    on_sweep
        Called after every sweep.

    Raises
    ------
    InputError
        There are no ratings, or `warm_start` has another rank.
    """
    execution = execution or ExecutionSettings()
    started = time.perf_counter()
    if warm_start is not None:
        first = warm_start[0].select(F.size("factors")).first()
        if first is not None and first[0] != settings.rank:
            raise InputError(
                f"warm start: that model has rank {first[0]}, als.rank is {settings.rank}; "
                "set them equal"
            )
    encoded = encode_ratings(ratings, settings, execution)
    if floors is not None:
        encoded = replace(encoded, floors=floors)
    encode_seconds = time.perf_counter() - started
    warm = None if warm_start is None else warm_start[SIDES.index(encoded.anchor)]
    sweeper = Sweeper(encoded, settings, execution, on_sweep)
    anchor, other, converged = sweeper.run(start_iterate(encoded, settings, warm))
    rows = sweeper.finish(anchor, other)
    worst = largest_residual(rows, encoded.floors)
    reports = sweeper.reports
    summary = TrainingSummary.of(
        encoded.n_rows,
        encoded.n_ratings,
        reports,
        converged,
        reports[-1].objective,
        worst,
        started,
        encode_seconds,
    )
    sweeper.release()
    return FitResult(rows, encoded, summary)


def with_bounds(rows: dict[str, DataFrame], floors: dict[str, float]) -> dict[str, DataFrame]:
    """Add the relative residual `bound` to the rows of both sides (gradient_norm, b_norm)."""
    return {
        side: frame.withColumn("bound", bound_expression(F.lit(floors[side])))
        for side, frame in rows.items()
    }


def largest_residual(rows: dict[str, DataFrame], floors: dict[str, float]) -> float:
    """The largest relative residual over the rows of both sides (gradient_norm, b_norm)."""
    bounded = with_bounds(rows, floors)
    found = aggregates_of(bounded, F.coalesce(F.max("bound"), F.lit(0.0)))
    return float(np.max([found[side][0] for side in SIDES]))  # NaN wins, as in Spark
