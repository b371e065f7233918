"""The recommendations table: the best items of each user, replaced as a whole by every run.

As in the other tables, no id gets into the log or into a partition value.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql.types import (
    DataType,
    FloatType,
    IntegerType,
    LongType,
    StructField,
    StructType,
)

from unlearn_spark.errors import InputError
from unlearn_spark.preconditions import is_remote, require_creatable
from unlearn_spark.tables.store import TableSpec, is_delta

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.store import Store

TABLE = "recommendations"


def spec(user_type: DataType, item_type: DataType) -> TableSpec:
    """user_id, rank (1 is best), item_id, score, and the model version that scored it."""
    return TableSpec(
        StructType(
            [
                StructField("user_id", user_type),
                StructField("rank", IntegerType()),
                StructField("item_id", item_type),
                StructField("score", FloatType()),
                StructField("model_version", LongType()),
            ]
        ),
        skipping=("rank", "model_version"),
    )


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


def write(store: Store, rows: DataFrame) -> str:
    """Replace the table by `flatten`'s rows; return its location."""
    store.create(TABLE, spec(rows.schema["user_id"].dataType, rows.schema["item_id"].dataType))
    store.overwrite(TABLE, rows)
    return store.location(TABLE) if store.root is not None else store.name(TABLE)


def check_export(path: str) -> None:
    """Fail before the work if `export` could not write.

    Raises
    ------
    InputError
        A local path exists already, unless it is a Delta table, or cannot be created.
    """
    if is_remote(path):
        return
    target = Path(path)
    if os.path.exists(target) and not (_form(path) == "delta" and is_delta(target)):
        raise InputError(f"--output {path}: exists already; name another or remove it")
    require_creatable("--output", path)


def export(rows: DataFrame, path: str) -> None:
    """Write rows to a directory, as Spark does: CSV with a header for `.csv`, Parquet for
    `.parquet`, otherwise a Delta table, which is replaced if it exists.

    CSV follows RFC 4180, as most readers expect: quotes are doubled and white space is kept.
    """
    form = _form(path)
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


def _form(path: str) -> str:
    suffix = PurePosixPath(path).suffix.lower()
    return {".csv": "csv", ".parquet": "parquet"}.get(suffix, "delta")
