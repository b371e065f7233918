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

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.errors import AnalysisException
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion.formats import check_exists, explained, read_table, text_of
from unlearn_spark.tables.requests import typed_id

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from pyspark.sql import DataFrame, SparkSession

FORMATS = ("mllib", "parquet", "npz")

MAX_RANK = 2048
"""Upper limit of `als.rank`."""

_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "mllib": {"user": ("userFactors",), "item": ("itemFactors",)},
    "parquet": {
        "user": ("user_factors", "user_factors.parquet"),
        "item": ("item_factors", "item_factors.parquet"),
    },
}
_FACTOR_COLUMNS = ("factors", "features")
_INTEGRAL = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_LARGEST_FLOAT = 3.4028234663852886e38
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
    """Read and check factors in one of `FORMATS`.

    Parameters
    ----------
    path
        The folder; for npz also the file itself. npz must be local to the driver.
    form
        One of `FORMATS`.
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
    if form not in FORMATS:
        raise SettingsError(f"--format {form}: expected one of {', '.join(FORMATS)}")
    check_exists(path)
    read = _from_npz(spark, path) if form == "npz" else _from_folders(spark, path, form)
    types = id_types or {}
    checked = {side: _checked(*read[side], types.get(side)) for side in ("user", "item")}
    (users, user_rank, n_users), (items, item_rank, n_items) = checked["user"], checked["item"]
    if user_rank != item_rank:
        raise InputError(
            f"--input {path}: users have {user_rank} factors and items {item_rank}; "
            "give both sides of one model"
        )
    return ForeignFactors(users, items, user_rank, n_users, n_items)


# --- folders of Parquet ---------------------------------------------------------------------


def _from_folders(spark: SparkSession, path: str, form: str) -> dict[str, tuple[DataFrame, str]]:
    """By side the rows (id, factors) and the path they were read from."""
    found = {}
    for side, names in _NAMES[form].items():
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
    mend = (
        "give the folder that ALSModel.save() wrote (of a saved pipeline: its stages/..._ALS_...)"
        if form == "mllib"
        else "write one Parquet file or folder for each side, with columns id and factors"
    )
    raise InputError(f"--input {path}: has no {' or '.join(names)}; {mend}")


def _named(rows: DataFrame, place: str) -> DataFrame:
    """id (string or bigint) and factors array<float> from a Parquet file's columns."""
    names = [name for name in _FACTOR_COLUMNS if name in rows.columns]
    shown = ", ".join(rows.columns[:8])[:120]
    if "id" not in rows.columns:
        raise InputError(f"--input {place}: has no column id (found: {shown}); rename yours")
    if not names:
        raise InputError(f"--input {place}: has no column factors (found: {shown}); rename yours")
    if len(names) > 1:
        raise InputError(f"--input {place}: has both columns factors and features; drop one")
    kinds = {field.name: field.dataType for field in rows.schema.fields}
    id_kind, kind = kinds["id"], kinds[names[0]]
    if not isinstance(id_kind, (*_INTEGRAL, T.StringType)):
        raise InputError(
            f"--input {place}: column id has type {id_kind.simpleString()}; "
            "ids must be string or integer, cast it first"
        )
    if not (
        isinstance(kind, T.ArrayType) and isinstance(kind.elementType, (T.FloatType, T.DoubleType))
    ):
        raise InputError(
            f"--input {place}: column {names[0]} has type {kind.simpleString()}; "
            "factors must be array<float>, cast it first"
        )
    id = F.col("id") if isinstance(id_kind, T.StringType) else F.col("id").cast("bigint")
    return rows.select(id.alias("id"), F.col(names[0]).cast("array<float>").alias("factors"))


# --- NumPy ----------------------------------------------------------------------------------


def _from_npz(spark: SparkSession, path: str) -> dict[str, tuple[DataFrame, str]]:
    file = _npz_file(path)
    arrays = _load(file)
    found = {}
    for side in ("user", "item"):
        table = _table(file, side, arrays[f"{side}_ids"], arrays[f"{side}_factors"])
        found[side] = (spark.createDataFrame(table), f"{file}: {side}_factors")
    return found


def _npz_file(path: str) -> Path:
    if "://" in path:
        raise InputError(
            f"--input {path}: an .npz is read on the driver; copy it to a local folder first"
        )
    given = Path(path)
    if not given.is_dir():
        return given
    found = sorted(given.glob("*.npz"))
    if given / "factors.npz" in found:
        return given / "factors.npz"
    if not found:
        raise InputError(f"--input {path}: has no .npz file; give the file or its folder")
    if len(found) > 1:
        raise InputError(
            f"--input {path}: has {len(found)} .npz files and none is factors.npz; name the file"
        )
    return found[0]


def _load(file: Path) -> dict[str, NDArray[Any]]:
    """The four arrays; others that the file may have are not read."""
    names = ("user_factors", "item_factors", "user_ids", "item_ids")
    arrays = {}
    try:
        opened = np.load(file, allow_pickle=False)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--input {file}: is no .npz file of NumPy; write it with numpy.savez"
        ) from error
    if not isinstance(opened, np.lib.npyio.NpzFile):
        raise InputError(
            f"--input {file}: is one array, not an .npz file; write it with numpy.savez"
        )
    with opened:
        missing = [name for name in names if name not in opened.files]
        if missing:
            shown = ", ".join(opened.files[:8])[:120] or "none"
            raise InputError(
                f"--input {file}: has no array {missing[0]} (found: {shown}); "
                f"add it: numpy.savez(..., {missing[0]}=...)"
            )
        for name in names:
            try:
                arrays[name] = opened[name]
            except ValueError as error:
                raise InputError(
                    f"--input {file}: array {name} holds Python objects; "
                    f"store plain numbers or text, as numpy.array({name}.tolist())"
                ) from error
            except (OSError, EOFError, zipfile.BadZipFile) as error:
                raise InputError(
                    f"--input {file}: array {name} is damaged; write the file again"
                ) from error
    return arrays


def _table(file: Path, side: str, ids: NDArray[Any], matrix: NDArray[Any]) -> pa.Table:
    """id and factors as an Arrow table, in batches that keep list offsets within int32."""
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise InputError(
            f"--input {file}: array {side}_factors is {matrix.dtype} of shape {matrix.shape}; "
            "it must be floating point of shape (rows, rank)"
        )
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise InputError(
            f"--input {file}: array {side}_ids is {ids.dtype} of shape {ids.shape}; "
            "it must be one-dimensional, of integers or text"
        )
    if len(ids) != len(matrix):
        raise InputError(
            f"--input {file}: {len(ids)} {side}_ids name {len(matrix)} rows of {side}_factors; "
            "give one id for each row"
        )
    if ids.dtype.kind == "u" and len(ids) and int(ids.max()) > np.iinfo(np.int64).max:
        raise InputError(
            f"--input {file}: array {side}_ids has integers beyond int64; store them as text"
        )
    if not len(ids):
        raise InputError(
            f"--input {file}: {side}_factors has no rows; give a model that was fitted"
        )
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
        "factors", lambda value: value.isNull() | F.isnan(value) | (F.abs(value) > _LARGEST_FLOAT)
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
    for wrong, problem in (
        (found["rows"] == 0, "has no rows; give a model that was fitted"),
        (found["null_ids"], f"rows without an id: {found['null_ids']}; remove them"),
        (
            found["garbled"],
            f"ids that are not valid UTF-8: {found['garbled']}; export the model again",
        ),
        (found["null_rows"], f"rows without factors: {found['null_rows']}; remove them"),
        (
            found["foreign_ids"],
            f"ids that are no integers, as those of the ratings table are: {found['foreign_ids']}; "
            "map them to its ids",
        ),
        (
            found["ids"] < found["rows"],
            f"rows that repeat an id: {found['rows'] - found['ids']}; keep one row of each id",
        ),
        (
            found["least"] != found["most"],
            f"rows have from {found['least']} to {found['most']} factors; give one model's rows",
        ),
        (
            not 1 <= (found["most"] or 0) <= MAX_RANK,
            f"rows have {found['most']} factors; a rank is from 1 to {MAX_RANK}",
        ),
        (
            found["unusable"],
            "rows with factors that are null, not finite or beyond float32: "
            f"{found['unusable']}; export the model again",
        ),
    ):
        if wrong:
            raise InputError(f"--input {place}: {problem}")
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
