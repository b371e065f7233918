"""Writes recommendations: to their table, or to files of a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type

from unlearn_spark.tables.recommendations import TABLE, export_format, spec

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.delta_spark import SparkStore


def flatten(recommendations: DataFrame, model_version: int) -> DataFrame:
    """One row for each entry of the lists (id, recommendations) that `top_n` makes."""
    entries = recommendations.select(
        F.col("id").alias("user_id"), F.posexplode("recommendations").alias("place", "entry")
    )
    return entries.select(
        "user_id",
        (F.col("place") + 1).cast("int").alias("rank"),
        F.col("entry.id").alias("item_id"),
        F.col("entry.rating").alias("score"),
        F.lit(model_version).cast("bigint").alias("model_version"),
    )


def write(store: SparkStore, rows: DataFrame) -> int:
    """Replace the table by `flatten`'s rows; return its Delta version."""
    kinds = [to_arrow_type(rows.schema[name].dataType) for name in ("user_id", "item_id")]
    store.create(TABLE, spec(*kinds))
    return store.overwrite(TABLE, rows)


def export(rows: DataFrame, path: str) -> None:
    """Write rows to a directory, as Spark does: CSV with a header for `.csv`, Parquet for
    `.parquet`, otherwise a Delta table, which is replaced if it exists.

    CSV follows RFC 4180, as most readers expect: quotes are doubled and white space is kept.
    """
    form = export_format(path)
    writer = rows.write.format(form)
    if form == "delta":
        writer = writer.mode("overwrite").option("overwriteSchema", True)
    elif form == "csv":
        # Spark's defaults escape with a backslash and trim white space.
        writer = writer.options(
            header=True,
            escape='"',
            ignoreLeadingWhiteSpace=False,
            ignoreTrailingWhiteSpace=False,
        )
    writer.save(path)
