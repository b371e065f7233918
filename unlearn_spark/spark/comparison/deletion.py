"""Find the ratings that were deleted between two model versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

from unlearn_spark.audit.versions import comparable_version
from unlearn_spark.errors import InputError
from unlearn_spark.spark import factors, ratings
from unlearn_spark.spark.frames import materialise
from unlearn_spark.spark.ingest import formats
from unlearn_spark.spark.requests import typed_id

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion


@dataclass(frozen=True)
class Deletion:
    """Two versions, and the ratings that lie between them.

    Attributes
    ----------
    before, after
        The newest earlier version that was trained or imported, and the one to judge.
    known, retained
        user_id, item_id, rating: what `before` was fitted to, and what `after` must fit.
    deleted
        user_id, item_id: known to `before`, not retained.
    n_retained, n_deleted
        Their numbers of rows.
    """

    before: ModelVersion
    after: ModelVersion
    known: DataFrame
    retained: DataFrame
    deleted: DataFrame
    n_retained: int
    n_deleted: int


def find_deletion(store: SparkStore, model: ModelVersion, checkpoint: str) -> Deletion:
    """Find what a version forgot since the last version before it that was trained or imported.

    Parameters
    ----------
    checkpoint
        `execution.checkpoint`: how the frames are kept.

    Raises
    ------
    InputError
        There is no such earlier version, nothing was removed since, the two were fitted with
        other settings, or one of them names no ratings.
    """
    before = comparable_version(store, model)
    pair = ["user_id", "item_id"]
    values = (*pair, "rating")
    retained = materialise(ratings.fitted(store, model).select(*values), checkpoint)
    known = ratings.fitted(store, before).select(*values)
    deleted = known.select(pair).join(retained.select(pair), pair, "left_anti")
    deleted = materialise(deleted, checkpoint)
    n_retained, n_deleted = retained.count(), deleted.count()
    if n_deleted == 0:
        raise InputError(
            f"version {model.model_version} removed nothing since version "
            f"{before.model_version}; nothing to compare"
        )
    return Deletion(before, model, known, retained, deleted, n_retained, n_deleted)


def held_out_ratings(store: SparkStore, model: ModelVersion, path: str, form: str) -> DataFrame:
    """Usable held-out ratings of a file, ids in the model's types: user_id, item_id, rating.

    An id that is no value of the model's type is null.

    Raises
    ------
    InputError
        The file is missing, empty or not of that format.
    """
    try:
        read = formats.read_ratings(store.spark, path, form)
    except InputError as error:
        raise InputError(str(error).replace("--input", "--held-out", 1)) from error
    kinds = [rows.schema["id"].dataType for rows in factors.read_factors(store, model)]
    ids = [
        typed_id(F.col(name).cast("string"), kind)
        for name, kind in zip(("user_id", "item_id"), kinds, strict=True)
    ]
    return read.frame.where("problem IS NULL").select(
        ids[0].alias("user_id"), ids[1].alias("item_id"), F.col("rating").cast("float")
    )
