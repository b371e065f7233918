"""Held-out quality on Spark: errors of predicted ratings, rankings, and a deterministic split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.errors import InputError
from unlearn_spark.evaluation import split
from unlearn_spark.evaluation.metrics import RankingMetrics, as_json, ranking_scores
from unlearn_spark.spark.scoring import predict_pairs, top_n

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame


def rmse(predictions: DataFrame, rating: str = "rating", prediction: str = "prediction") -> float:
    """Root of the mean squared error; NaN where a prediction is NaN.

    Raises
    ------
    InputError
        There are no rows.
    """
    return float(np.sqrt(_mean_error(predictions, F.pow(_error(rating, prediction), F.lit(2)))))


def mae(predictions: DataFrame, rating: str = "rating", prediction: str = "prediction") -> float:
    """Mean absolute error; NaN where a prediction is NaN.

    Raises
    ------
    InputError
        There are no rows.
    """
    return _mean_error(predictions, F.abs(_error(rating, prediction)))


def _error(rating: str, prediction: str) -> Column:
    return F.col(rating).cast("double") - F.col(prediction).cast("double")


def _mean_error(predictions: DataFrame, error: Column) -> float:
    row = predictions.agg(F.avg(error)).first()
    if row is None or row[0] is None:
        raise InputError("there are no predictions to evaluate; give held-out ratings")
    return float(row[0])


def ranking_metrics(
    recommendations: DataFrame,
    held_out: DataFrame,
    k: int,
    *,
    user_col: str = "user_id",
    item_col: str = "item_id",
) -> RankingMetrics:
    """Compare recommendations with what was held out.

    Parameters
    ----------
    recommendations
        A user column (the first one) and `recommendations`, an array of structs whose first field
        is the item, best first: what `top_n` and `ALSModel.recommendForAllUsers` return.
    held_out
        One row for every relevant (user, item); repeated rows count once.
    k
        Only the first k recommendations count.

    Raises
    ------
    InputError
        k is below 1, or nothing was held out.
    """
    if k < 1:
        raise InputError(f"metrics at {k} were asked for; ask for 1 or more")
    user = recommendations.columns[0]
    item = recommendations.schema["recommendations"].dataType.elementType.names[0]  # type: ignore[attr-defined]
    first = F.slice(f"recommendations.{item}", 1, k)
    asked = recommendations.select(F.col(user).alias("user"), first.alias("items"))
    relevant = held_out.groupBy(F.col(user_col).alias("user")).agg(
        F.collect_set(item_col).alias("relevant")
    )
    hits = F.transform("items", lambda entry: F.array_contains("relevant", entry))
    judged = relevant.join(asked, "user", "left").select(
        F.coalesce(hits, F.array().cast("array<boolean>")).alias("hits"),
        F.size("relevant").alias("relevant"),
    )

    def measure(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            scores = ranking_scores(
                _padded(batch.column("hits"), k), batch.column("relevant").to_numpy()
            )
            yield pa.record_batch({name: pa.array(values) for name, values in scores.items()})

    names = ["ndcg", "precision", "recall", "map"]
    scored = judged.mapInArrow(measure, ", ".join(f"{name} double" for name in names))
    row = scored.agg(F.count(F.lit(1)), *[F.avg(name) for name in names]).first()
    if row is None or row[0] == 0:
        raise InputError("there are no held-out items to compare with; give held-out ratings")
    return RankingMetrics(int(row[0]), *[float(value) for value in row[1:]])


def _padded(lists: pa.Array, k: int) -> NDArray[np.bool_]:
    """Lists of booleans, at most k long, as rows filled up with False."""
    lengths = lists.value_lengths().to_numpy()
    matrix = np.zeros((len(lists), k), np.bool_)
    matrix[np.arange(k) < lengths[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
    return matrix


def ndcg_at_k(recommendations: DataFrame, held_out: DataFrame, k: int, **columns: str) -> float:
    """Normalised discounted cumulative gain; see `ranking_metrics`."""
    return ranking_metrics(recommendations, held_out, k, **columns).ndcg


def precision_at_k(
    recommendations: DataFrame, held_out: DataFrame, k: int, **columns: str
) -> float:
    """Share of the k places that hold a relevant item; see `ranking_metrics`."""
    return ranking_metrics(recommendations, held_out, k, **columns).precision


def recall_at_k(recommendations: DataFrame, held_out: DataFrame, k: int, **columns: str) -> float:
    """Share of the relevant items that are recommended; see `ranking_metrics`."""
    return ranking_metrics(recommendations, held_out, k, **columns).recall


def map_at_k(recommendations: DataFrame, held_out: DataFrame, k: int, **columns: str) -> float:
    """Mean average precision; see `ranking_metrics`."""
    return ranking_metrics(recommendations, held_out, k, **columns).map


def held_out_metrics(
    user_factors: DataFrame,
    item_factors: DataFrame,
    held_out: DataFrame,
    seen: DataFrame | None,
    *,
    k: int,
    min_rating: float | None = None,
) -> dict[str, Any]:
    """Errors and ranking measures of a model on ratings that it was not fitted to.

    Parameters
    ----------
    user_factors, item_factors
        id, factors array<float>.
    held_out
        user_id, item_id, rating; ids may be null or unknown.
    seen
        user_id, item_id of the ratings that the model was fitted to; they are not recommended.
    k
        Places that count in rankings.
    min_rating
        From this rating up a held-out item is relevant; None: all are.

    Returns
    -------
    dict
        `ratings` and, among these, `ratings_known`, whose user and item the model has; rmse and mae
        over the known ones (None without any); the ranking measures at k, over `users` users with
        a relevant item.

    Raises
    ------
    InputError
        No rating is held out, or none is relevant.
    """
    held_out = held_out.persist()
    try:
        n_ratings = held_out.count()
        if n_ratings == 0:
            raise InputError("there are no held-out ratings; give some, or a larger split")
        predicted = predict_pairs(held_out, user_factors, item_factors, cold_start="drop")
        error = _error("rating", "prediction")
        errors = predicted.agg(
            F.count(F.lit(1)), F.sqrt(F.avg(error * error)), F.avg(F.abs(error))
        ).first()
        assert errors is not None
        relevant = held_out
        if min_rating is not None:
            relevant = held_out.where(F.col("rating") >= F.lit(min_rating))
        asked = user_factors.join(
            relevant.select(F.col("user_id").alias("id")).distinct(), "id", "left_semi"
        )
        exclude = seen and seen.select(
            F.col("user_id").alias("query_id"), F.col("item_id").alias("candidate_id")
        )
        lists = top_n(asked, item_factors, k, exclude)
        ranking = ranking_metrics(lists, relevant, k)
    finally:
        held_out.unpersist()
    return {
        "rmse": errors[1],
        "mae": errors[2],
        **as_json(ranking, k),
        "users": ranking.users,
        "ratings": n_ratings,
        "ratings_known": errors[0],
    }


def split_by_hash(
    ratings: DataFrame,
    fraction: float,
    seed: int = 0,
    *,
    user_col: str = "user_id",
    item_col: str = "item_id",
) -> tuple[DataFrame, DataFrame]:
    """Hold out a share of the pairs, decided by `xxhash64(user, item, seed)`.

    A pair falls on the same side whatever else is in the table, before a deletion and after it.

    Returns
    -------
    train, held_out : DataFrame

    Raises
    ------
    InputError
        The fraction is not between 0 and 1.
    """
    below = split.threshold(fraction)
    drawn = F.pmod(F.xxhash64(user_col, item_col, F.lit(seed)), F.lit(split.BUCKETS))
    held_out = drawn < F.lit(below)
    return ratings.where(~held_out), ratings.where(held_out)
