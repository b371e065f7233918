"""Simpler ways to forget, as baselines, and the objective that judges every model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.kernel import solve_rows
from unlearn_spark.core.objective import Objective
from unlearn_spark.spark.arrow import list_column, matrix_of
from unlearn_spark.spark.comparison.deletion import Deletion
from unlearn_spark.spark.frames import gram_of, materialise
from unlearn_spark.spark.scoring import predict_pairs

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

    from unlearn_spark.config import AlsSettings


def penalty_weights(retained: DataFrame, implicit: bool) -> dict[str, DataFrame]:
    """By side: id, and `n`, the number of ratings (implicit: positive ones) that scales lambda."""
    counts = F.sum((F.col("rating") > 0).cast("int")) if implicit else F.count(F.lit(1))
    return {
        side: retained.groupBy(F.col(f"{side}_id").alias("id")).agg(counts.alias("n"))
        for side in SIDES
    }


def objective_of(
    retained: DataFrame,
    weights: Mapping[str, DataFrame],
    factors: Mapping[str, DataFrame],
    als: AlsSettings,
) -> float:
    """The objective that training minimises, for any factors on the retained ratings.

    Explicit (Zhou et al. 2008, equation 4): `sum (r - x.y)^2 + lambda (sum n_u |x_u|^2 + sum n_i
    |y_i|^2)` over the retained ratings. Implicit (Hu, Koren and Volinsky 2008, equation 3, lambda
    scaled by counts as in MLlib): over all pairs of a retained user and a retained item, those
    unrated with confidence 1 and preference 0, those rated with confidence `1 + alpha |r|`.
    A missing row counts as zeros; rows without a retained rating do not count.

    Parameters
    ----------
    weights
        As from `penalty_weights`.
    factors
        By side: id, factors array<float>.
    """
    scored = predict_pairs(retained, factors["user"], factors["item"])
    s = F.nanvl(F.col("prediction").cast("double"), F.lit(0.0))
    r = F.col("rating").cast("double")
    if als.implicit_prefs:
        c = F.lit(als.alpha) * F.abs(r)
        d = F.when(r > 0, 1 + c).otherwise(F.lit(0.0))
        error = c * s * s - 2 * d * s + d
    else:
        error = (r - s) * (r - s)
    found = scored.agg(F.sum(error)).first()
    assert found is not None
    total = float(found[0])
    grams = []
    for side in SIDES:
        rows = factors[side].select("id", "factors").join(weights[side], "id")
        mine = rows.agg(F.sum(F.col("n") * _squared_norm("factors"))).first()
        assert mine is not None
        total += als.reg_param * float(mine[0] or 0.0)
        if als.implicit_prefs:
            grams.append(gram_of(rows, als.rank))
    if grams:  # the sum of (x.y)^2 over all pairs is <X'X, Y'Y>
        total += float(np.sum(grams[0] * grams[1]))
    return total


def _squared_norm(column: str) -> Column:
    return F.aggregate(
        column, F.lit(0.0), lambda total, value: total + value.cast("double") * value.cast("double")
    )


def direct_step(
    deletion: Deletion,
    before: Mapping[str, DataFrame],
    weights: Mapping[str, DataFrame],
    checkpoint: str,
) -> dict[str, DataFrame]:
    """Factors of `before` after one closed-form step on the rows that lost a rating.

    First each such user row is solved for the retained ratings and the items of `before`, then each
    such item row for the new user rows. Rows without a retained rating are dropped. Ratings whose
    other row `before` lacks are ignored.

    Parameters
    ----------
    before
        Factors of that version, by side: id, factors array<float>.
    weights
        As from `penalty_weights`.

    Returns
    -------
    dict
        By side: id, factors array<float>.
    """
    als = deletion.after.als
    factors = {
        side: before[side].select("id", "factors").join(weights[side], "id", "left_semi")
        for side in SIDES
    }
    for side in SIDES:
        lost = deletion.deleted.select(F.col(f"{side}_id").alias("id")).distinct()
        lost = lost.join(factors[side].select("id"), "id", "left_semi")
        solved = _solved(deletion.retained, lost, side, factors[other_side(side)], als)
        kept = factors[side].join(solved.select("id", F.col("factors").alias("new")), "id", "left")
        kept = kept.select("id", F.coalesce("new", "factors").alias("factors"))
        factors[side] = materialise(kept, checkpoint)
    return factors


def _solved(
    retained: DataFrame, rows: DataFrame, side: str, others: DataFrame, als: AlsSettings
) -> DataFrame:
    """id, factors of the named rows, each solved for all its ratings, which one task holds."""
    rank, dtype = als.rank, als.dtype
    objective = Objective(als.reg_param, als.implicit_prefs, als.alpha, als.nonnegative)
    gram = gram_of(others, rank) if als.implicit_prefs else None
    other = others.withColumnRenamed("id", f"{other_side(side)}_id")
    rated = (
        retained.join(rows.withColumnRenamed("id", f"{side}_id"), f"{side}_id", "left_semi")
        .join(other, f"{other_side(side)}_id")
        .select(F.col(f"{side}_id").alias("id"), F.col("rating").cast("float"), "factors")
    )

    def solve(table: pa.Table) -> pa.Table:
        n = table.num_rows
        solution = solve_rows(
            np.array([0, n], np.int64),
            np.arange(n, dtype=np.int32),
            table["rating"].to_numpy(),
            np.ascontiguousarray(matrix_of(table["factors"], rank)),
            objective,
            gram=gram,
            dtype=dtype,
            engine="numpy",  # one row at a time: nothing to batch
        )
        return pa.table({"id": table["id"].slice(0, 1), "factors": list_column(solution.factors)})

    schema = f"id {rated.schema['id'].dataType.simpleString()}, factors array<float>"
    return rated.groupBy("id").applyInArrow(solve, schema)
