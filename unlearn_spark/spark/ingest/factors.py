"""Read factors that another library trained, and check them: a DataFrame (id, factors) a side.

=========  ======================================================================================
format     what is read
=========  ======================================================================================
mllib      what `ALSModel.write().save()` of Spark MLlib leaves: `userFactors`, `itemFactors`
parquet    `user_factors` and `item_factors`, with or without `.parquet`: columns id and factors
npz        arrays user_factors (n, k), item_factors (m, k), user_ids (n,), item_ids (m,) of NumPy
=========  ======================================================================================

The workers read mllib and parquet. The driver reads an .npz, whose model fitted into the memory of
one machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import SettingsError
from unlearn_spark.ingestion import foreign
from unlearn_spark.ingestion.rules import FACTOR_FORMATS, LARGEST_FLOAT, check_exists
from unlearn_spark.spark.ingest.formats import explained, read_table, text_of
from unlearn_spark.spark.requests import typed_id

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_INTEGRAL = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_BATCH_ROWS = 16384


@dataclass(frozen=True)
class ForeignFactors:
    """Factors of both sides: ids unique and not null, all rows finite and of one rank.

    Attributes
    ----------
    user, item
        id (string or bigint), factors array<float> of `rank` elements.
    rank
        Number of latent factors.
    n_users, n_items
        Rows.
    """

    user: DataFrame
    item: DataFrame
    rank: int
    n_users: int
    n_items: int


def read_factors(
    spark: SparkSession,
    path: str,
    form: str,
    id_types: Mapping[str, T.DataType] | None = None,
) -> ForeignFactors:
    """Read and check factors in one of `FACTOR_FORMATS`.

    Parameters
    ----------
    path
        The folder; for npz also the file itself. npz must be local to the driver.
    form
        One of `FACTOR_FORMATS`.
    id_types
        By side ("user", "item") the type that ids must have: string or bigint. Integers become
        text. Text, without the white space around it, becomes the integer that is written exactly
        so: 7, but not 007. By default text stays text and integers become bigint.

    Raises
    ------
    InputError
        A file, column or array is missing, unreadable or empty; ids are null, repeated or not of
        the wanted type; factors are missing, not finite in float32, or of different ranks.
    SettingsError
        `form` is unknown.
    """
    if form not in FACTOR_FORMATS:
        raise SettingsError(f"--format {form}: expected one of {', '.join(FACTOR_FORMATS)}")
    check_exists(path)
    read = _from_npz(spark, path) if form == "npz" else _from_folders(spark, path, form)
    types = id_types or {}
    checked = {side: _checked(*read[side], types.get(side)) for side in foreign.SIDES}
    (users, user_rank, n_users), (items, item_rank, n_items) = checked["user"], checked["item"]
    foreign.check_ranks(path, user_rank, item_rank)
    return ForeignFactors(users, items, user_rank, n_users, n_items)


# --- folders of Parquet ---------------------------------------------------------------------


def _from_folders(spark: SparkSession, path: str, form: str) -> dict[str, tuple[DataFrame, str]]:
    """By side the rows (id, factors) and the path they were read from."""
    found = {}
    for side, names in foreign.NAMES[form].items():
        rows, place = _first_found(spark, path.rstrip("/"), names, form)
        found[side] = (_named(rows, place), place)
    return found


def _first_found(
    spark: SparkSession, path: str, names: Iterable[str], form: str
) -> tuple[DataFrame, str]:
    for name in names:
        place = f"{path}/{name}"
        with explained(place, "parquet"):
            try:
                rows = read_table(spark, place, "parquet")
            except AnalysisException as error:
                if error.getCondition() != "PATH_NOT_FOUND":
                    raise
            else:
                return rows, place
    raise foreign.neither_of(path, tuple(names), form)


def _named(rows: DataFrame, place: str) -> DataFrame:
    """id (string or bigint) and factors array<float> from a Parquet file's columns."""
    column = foreign.factor_column(rows.columns, place)
    kinds = {field.name: field.dataType for field in rows.schema.fields}
    id_kind, kind = kinds["id"], kinds[column]
    if not isinstance(id_kind, (*_INTEGRAL, T.StringType)):
        raise foreign.no_ids(place, id_kind.simpleString())
    if not (
        isinstance(kind, T.ArrayType) and isinstance(kind.elementType, (T.FloatType, T.DoubleType))
    ):
        raise foreign.no_factors(place, column, kind.simpleString())
    id = F.col("id") if isinstance(id_kind, T.StringType) else F.col("id").cast("bigint")
    return rows.select(id.alias("id"), F.col(column).cast("array<float>").alias("factors"))


# --- NumPy ----------------------------------------------------------------------------------


def _from_npz(spark: SparkSession, path: str) -> dict[str, tuple[DataFrame, str]]:
    return {
        side: (spark.createDataFrame(_table(arrays)), arrays.place)
        for side, arrays in foreign.read_npz(path).items()
    }


def _table(arrays: foreign.Arrays) -> pa.Table:
    """id and factors as an Arrow table, in batches that keep list offsets within int32."""
    ids, matrix = arrays.ids, arrays.factors
    kind = pa.string() if ids.dtype.kind == "U" else pa.int64()
    schema = pa.schema([("id", kind), ("factors", pa.list_(pa.float32()))])
    rank = matrix.shape[1]
    batches = []
    for first in range(0, len(ids), _BATCH_ROWS):
        rows = matrix[first : first + _BATCH_ROWS]
        with np.errstate(over="ignore"):  # `_checked` refuses the infinities
            flat = pa.array(np.ascontiguousarray(rows, np.float32).reshape(-1))
        offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * rank)
        names = pa.array(ids[first : first + _BATCH_ROWS].tolist(), kind)
        factors = pa.ListArray.from_arrays(offsets, flat)
        batches.append(pa.RecordBatch.from_arrays([names, factors], schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


# --- checks ---------------------------------------------------------------------------------


def _checked(rows: DataFrame, place: str, wanted: T.DataType | None) -> tuple[DataFrame, int, int]:
    """The rows with ids of the wanted type, their rank and their number; raises InputError."""
    typed = _typed(rows, wanted)
    unusable = F.exists(
        "factors", lambda value: value.isNull() | F.isnan(value) | (F.abs(value) > LARGEST_FLOAT)
    )
    with explained(place, "parquet"):
        found = typed.agg(
            F.count(F.lit(1)).alias("rows"),
            F.count_if(F.col("given").isNull()).alias("null_ids"),
            F.count_if("garbled").alias("garbled"),
            F.count_if(F.col("given").isNotNull() & F.col("id").isNull()).alias("foreign_ids"),
            F.count_distinct("given").alias("ids"),
            F.count_if(F.col("factors").isNull()).alias("null_rows"),
            F.min(F.size("factors")).alias("least"),
            F.max(F.size("factors")).alias("most"),
            F.count_if(unusable).alias("unusable"),
        ).first()
    assert found is not None
    foreign.check(place, foreign.Counts(**found.asDict()))
    return typed.select("id", "factors"), int(found["most"]), int(found["rows"])


def _typed(rows: DataFrame, wanted: T.DataType | None) -> DataFrame:
    """id (null where it has no value of the wanted type), given (the id as read, trimmed),
    garbled (the id is not valid UTF-8), factors."""
    is_text = isinstance(rows.schema["id"].dataType, T.StringType)
    given, problem = text_of(F.col("id")) if is_text else (F.col("id"), F.lit(None))
    rows = rows.select(given.alias("given"), problem.isNotNull().alias("garbled"), "factors")
    id = F.col("given")
    if wanted is not None and is_text != isinstance(wanted, T.StringType):
        id = typed_id(id, wanted) if is_text else id.cast(wanted)
    return rows.select(id.alias("id"), "given", "garbled", "factors")
