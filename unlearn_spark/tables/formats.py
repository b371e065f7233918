"""Rating files as one kind of DataFrame: what a row says, and what is wrong with it.

Every format becomes the columns of `RawRatings.frame`. A row that cannot be used keeps its text
and gets a `problem`; a file that cannot be used at all raises `InputError`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.preconditions import is_remote

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession

FORMATS = ("movielens", "csv", "parquet", "delta", "netflix")
COLUMNS = ("user_id", "item_id", "rating", "rated_at")

WRONG_WIDTH = "wrong number of columns"
NO_MOVIE = "rating stands before any movie line"
BAD_TIME = "rated_at is neither ISO 8601 nor seconds since 1970"
TIME_RANGE = "rated_at is outside the years 1 to 9999 (are these milliseconds?)"

_MOVIELENS_HEADER = ["userid", "movieid", "rating", "timestamp"]
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_ISO_8601 = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?(Z|[+-][0-9]{2}(:?[0-9]{2})?)?)?$"
)
_FIRST_SECOND, _LAST_SECOND = -62135596800, 253402300799  # years 1 and 9999
_UNUSED_SEPARATOR = "\x01"
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
_INTEGRAL = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)


@dataclass(frozen=True)
class RawRatings:
    """Rows as a file has them.

    Attributes
    ----------
    frame
        raw string (the line, or the row as JSON), position bigint (grows along a file), user_id
        and item_id (string or bigint), rating double, rated_at timestamp (null: unknown), and
        problem string (null: none). The reason never quotes the row.
    source
        What was read, as the user named it.
    text_ids
        The ids come from text, so whether they are integers is still to be decided.
    """

    frame: DataFrame
    source: str
    text_ids: bool


def parse_columns(text: str | None) -> dict[str, str]:
    """Read `user_id=uid,item_id=iid`: which column of the input plays which part.

    Raises
    ------
    SettingsError
        A part is unknown or named twice, or a name is missing.
    """
    renamed: dict[str, str] = {}
    for entry in (text or "").split(","):
        if not entry.strip():
            continue
        part, equals, name = (piece.strip() for piece in entry.partition("="))
        if not equals or not name:
            raise SettingsError(f"--columns {entry.strip()}: expected part=column, as user_id=uid")
        if part not in COLUMNS:
            raise SettingsError(
                f"--columns {entry.strip()}: {part} is none of {', '.join(COLUMNS)}"
            )
        if part in renamed:
            raise SettingsError(f"--columns {text}: {part} is named twice")
        renamed[part] = name
    return renamed


def read_ratings(
    spark: SparkSession, path: str, format: str, columns: Mapping[str, str] | None = None
) -> RawRatings:
    """Read ratings from a file or folder in one of `FORMATS`.

    Parameters
    ----------
    path
        File, folder or glob, local or in an object store.
    format
        `movielens`: `ratings.csv`, `u.data` (tabs) or `ratings.dat` (`::`), known by the first
        line. `csv`: with a header, in UTF-8; a quoted value may hold commas, not line ends.
        `netflix`: `movie:` lines, each followed by `user,rating,date` lines.
    columns
        By part (`COLUMNS`) the column that holds it, for csv, parquet and delta. Only `rated_at`
        may be absent, unless it is named here: its times are then unknown.

    Raises
    ------
    InputError
        The path is missing or empty, is not of that format, or lacks a column.
    SettingsError
        `columns` is given for a format whose columns are fixed.
    """
    columns = dict(columns or {})
    if columns and format in ("movielens", "netflix"):
        raise SettingsError(f"--columns: the columns of {format} are fixed; leave it out")
    check_exists(path)
    if format in ("parquet", "delta"):
        with explained(path, format):
            rows = spark.read.format(format).load(path)
            return _from_table(rows, path, columns)
    with explained(path, format):
        first = first_line(spark, path)
        if format == "csv":
            return _from_csv(spark, path, first, columns)
        if format == "movielens":
            return _from_movielens(spark, path, first)
        if format == "netflix":
            return _from_netflix(spark, path, first)
    raise SettingsError(f"--format {format}: expected one of {', '.join(FORMATS)}")


def check_exists(path: str) -> None:
    """Raise InputError where a local path that is no glob is missing or out of reach."""
    if is_remote(path) or any(mark in path for mark in "*?[{"):
        return
    try:
        Path(path).stat()
    except PermissionError as error:
        raise InputError(f"--input {path}: not readable; check its permissions") from error
    except OSError as error:
        raise InputError(f"--input {path}: no such file or folder; check the path") from error


@contextmanager
def explained(path: str, format: str) -> Iterator[None]:
    """Turn Spark's complaints about an input's files into one line that names the input."""
    try:
        yield
    except Exception as error:
        text = str(error)
        for marks, mend in _COMPLAINTS:
            if any(mark in text for mark in marks):
                raise InputError(f"--input {path}: {mend.format(format=format)}") from error
        raise


_COMPLAINTS = (
    (("PATH_NOT_FOUND", "FileNotFoundException"), "no such file or folder; check the path"),
    (("Permission denied", "AccessControlException"), "not readable; check its permissions"),
    (
        ("CSV header does not conform", "CSV header"),
        "its files have different headers; make them alike or read them one by one",
    ),
    (
        (
            "UNABLE_TO_INFER_SCHEMA",
            "is not a Parquet file",
            "CANNOT_READ_FILE_FOOTER",
            "DELTA_TABLE_NOT_FOUND",
            "DELTA_MISSING_DELTA_TABLE",
            "DELTA_PATH_DOES_NOT_EXIST",
            "is not a Delta table",
            "FAILED_READ_FILE",
            "ZipException",
            "incorrect header check",
            "EOFException",
        ),
        "cannot be read as {format}; check --format and that the file is whole",
    ),
)


def first_line(spark: SparkSession, path: str) -> str:
    """The first line that is not blank; raises InputError where there is none, or no text."""
    found = spark.read.text(path).where(
        (F.col("_metadata.file_block_start") == 0) & (F.trim("value") != "")
    )
    row = found.select("value").first()
    if row is None:
        raise InputError(f"--input {path}: is empty; give a file with some rows")
    line = str(row["value"])
    if _CONTROL.search(line):
        raise InputError(f"--input {path}: is no text in UTF-8; check --format and the encoding")
    return line


def header_names(path: str, header: str) -> list[str]:
    """The names in a csv header line; raises InputError where it is none."""
    try:
        return [name.strip() for name in next(csv.reader([header]))]
    except csv.Error as error:
        raise InputError(
            f"--input {path}: its first line is no csv header ({error}); check --format"
        ) from error


# --- text formats ---------------------------------------------------------------------------


def _from_csv(
    spark: SparkSession, path: str, header: str, columns: Mapping[str, str]
) -> RawRatings:
    names = header_names(path, header)
    where = _locate(names, columns, path)
    return _from_fields(
        lines_below_header(spark, path, header), path, csv_fields(len(names)), where
    )


def _from_movielens(spark: SparkSession, path: str, first: str) -> RawRatings:
    where: dict[str, int] = {part: index for index, part in enumerate(COLUMNS)}
    if [name.strip().lower() for name in first.split(",")] == _MOVIELENS_HEADER:
        rows = lines_below_header(spark, path, first)
        return _from_fields(rows, path, csv_fields(4), where)
    for separator in ("::", "\t"):
        if first.count(separator) == 3:
            fields = F.split("raw", re.escape(separator), -1)
            return _from_fields(
                lines(spark, path), path, F.when(F.size(fields) == 4, fields), where
            )
    raise InputError(
        f"--input {path}: is no MovieLens ratings file (ratings.csv, u.data or ratings.dat); "
        "use --format csv with --columns for other headers"
    )


def lines(spark: SparkSession, path: str) -> DataFrame:
    """raw of every line that is not blank."""
    return spark.read.text(path).select(F.col("value").alias("raw")).where(F.trim("raw") != "")


def lines_below_header(spark: SparkSession, path: str, header: str) -> DataFrame:
    """`lines`, without the header line of each file; other headers fail when it is run."""
    # Spark's CSV reader drops the header of every file and, asked to, checks that all are alike;
    # a separator that does not occur makes each line one value, so that the raw text is kept.
    schema = T.StructType([T.StructField(header, T.StringType())])
    reader = spark.read.schema(schema).options(
        header=True, enforceSchema=False, sep=_UNUSED_SEPARATOR, quote="", encoding="UTF-8"
    )
    quoted = "`" + header.replace("`", "``") + "`"
    return reader.csv(path).select(F.col(quoted).alias("raw")).where(F.trim("raw") != "")


def csv_fields(width: int) -> Column:
    """The values of a line as an array, null where their number is not `width`."""
    plain = F.split("raw", ",", -1)
    schema = ", ".join([*(f"c{index} string" for index in range(width)), "malformed string"])
    options = {"columnNameOfCorruptRecord": "malformed", "escape": '"'}
    parsed = F.from_csv("raw", schema, options)
    quoted = F.when(
        parsed["malformed"].isNull(), F.array(*[parsed[f"c{index}"] for index in range(width)])
    )
    # The parser costs several times a split, and most files have no quotes.
    return F.when(F.contains(F.col("raw"), F.lit('"')), quoted).otherwise(
        F.when(F.size(plain) == width, plain)
    )


def _from_fields(
    rows: DataFrame, path: str, fields: Column, where: Mapping[str, int]
) -> RawRatings:
    split = rows.select("raw", fields.alias("fields"))
    texts = {
        part: F.trim(F.col("fields")[where[part]]) if part in where else F.lit(None).cast("string")
        for part in COLUMNS
    }
    width = F.when(F.col("fields").isNull(), WRONG_WIDTH)
    return _from_texts(split, texts, path, width)


def _from_texts(
    rows: DataFrame, texts: Mapping[str, Column], path: str, earlier_problem: Column
) -> RawRatings:
    named = rows.select(
        "raw",
        earlier_problem.alias("earlier"),
        *[texts[part].alias(part) for part in COLUMNS],
    )
    frame = _judged(named)
    return RawRatings(frame, path, text_ids=True)


# --- Netflix Prize --------------------------------------------------------------------------


def _from_netflix(spark: SparkSession, path: str, first: str) -> RawRatings:
    if not re.fullmatch(r"\s*[^,:\s]+:\s*", first):
        raise InputError(
            f"--input {path}: is no Netflix Prize file; its first line should be a movie, as 123:"
        )
    text = spark.read.text(path).select(
        "value",
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.file_block_start").alias("start"),
    )
    # A large file is read in several pieces, and a piece that is not the first begins amid a
    # movie's ratings: it needs the last movie of the pieces before. One row a piece, no more.
    is_movie = F.col("value").rlike(r"^\s*[^,:\s]+:\s*$")
    pieces = (
        text.withColumn("position", position())
        .groupBy("file", "start")
        .agg(F.max_by(F.when(is_movie, F.col("value")), F.when(is_movie, F.col("position"))))
        .toDF("file", "start", "movie")
        .collect()
    )
    carried: dict[tuple[str, int], str] = {}
    movie, file = "", None
    for piece in sorted(pieces, key=lambda row: (row["file"], row["start"])):
        if piece["file"] != file:
            movie, file = "", piece["file"]
        carried[(piece["file"], piece["start"])] = movie
        movie = piece["movie"].strip()[:-1] if piece["movie"] else movie

    def attach(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _attach_movies(batches, carried)

    rows = text.mapInArrow(attach, "line string, movie string")
    fields = F.split("line", ",", -1)
    rows = rows.select(
        F.concat("movie", F.lit(":"), "line").alias("raw"),
        "movie",
        F.when(F.size(fields) == 3, fields).alias("fields"),
    )
    texts = {
        "user_id": F.trim(F.col("fields")[0]),
        "item_id": F.col("movie"),
        "rating": F.trim(F.col("fields")[1]),
        "rated_at": F.trim(F.col("fields")[2]),
    }
    problem = F.when(F.col("fields").isNull(), WRONG_WIDTH).when(F.col("movie") == "", NO_MOVIE)
    return _from_texts(rows, texts, path, problem)


def _attach_movies(
    batches: Iterable[pa.RecordBatch], carried: Mapping[tuple[str, int], str]
) -> Iterator[pa.RecordBatch]:
    """Give each rating line of a partition the movie of the nearest movie line above it."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    place: tuple[str, int] | None = None
    movie = ""
    for batch in batches:
        if batch.num_rows == 0:
            continue
        text = pc.utf8_trim_whitespace(batch.column(0))
        is_movie = pc.match_substring_regex(text, r"^[^,:\s]+:$")
        movies = pc.if_else(is_movie, pc.utf8_rtrim(text, ":"), pa.scalar(None, text.type))
        files, starts = batch.column(1), batch.column(2)
        same = np.ones(batch.num_rows, bool)
        same[1:] = pc.and_(
            pc.equal(files[1:], files[:-1]), pc.equal(starts[1:], starts[:-1])
        ).to_numpy(zero_copy_only=False)
        here = (files[0].as_py(), starts[0].as_py())
        opening = {0: movie if here == place else carried[here]}
        for row in np.flatnonzero(~same):
            opening[int(row)] = carried[(files[int(row)].as_py(), starts[int(row)].as_py())]
        mask = np.zeros(batch.num_rows, bool)
        mask[list(opening)] = True
        mask &= ~is_movie.to_numpy(zero_copy_only=False)
        values = [opening[int(row)] for row in np.flatnonzero(mask)]
        movies = pc.replace_with_mask(movies, pa.array(mask), pa.array(values, type=movies.type))
        movies = pc.fill_null_forward(movies)
        place = (files[-1].as_py(), starts[-1].as_py())
        movie = movies[-1].as_py()
        keep = pc.and_(pc.invert(is_movie), pc.not_equal(text, ""))
        yield pa.RecordBatch.from_arrays(
            [text.filter(keep), movies.filter(keep)], names=["line", "movie"]
        )


# --- tables ---------------------------------------------------------------------------------


def _from_table(rows: DataFrame, path: str, columns: Mapping[str, str]) -> RawRatings:
    where = _locate(rows.columns, columns, path)
    fields = rows.schema.fields
    chosen = rows.select(
        *[
            F.col("`" + fields[index].name.replace("`", "``") + "`").alias(part)
            for part, index in where.items()
        ]
    )
    if "rated_at" not in where:
        chosen = chosen.withColumn("rated_at", F.lit(None).cast("timestamp"))
    kinds = {field.name: field.dataType for field in chosen.schema.fields}
    for part in ("user_id", "item_id"):
        kind = kinds[part]
        if not isinstance(kind, (*_INTEGRAL, T.StringType)):
            raise InputError(
                f"--input {path}: column {columns.get(part, part)} has type {kind.simpleString()}; "
                "ids must be string or integer, cast it first"
            )
        if not isinstance(kind, T.StringType):
            chosen = chosen.withColumn(part, F.col(part).cast("bigint"))
    if not isinstance(kinds["rating"], (T.NumericType, T.StringType)):
        raise InputError(
            f"--input {path}: column {columns.get('rating', 'rating')} has type "
            f"{kinds['rating'].simpleString()}; ratings must be numbers"
        )
    times = (T.TimestampType, T.TimestampNTZType, T.DateType, T.NumericType, T.StringType)
    if not isinstance(kinds["rated_at"], times):
        raise InputError(
            f"--input {path}: column {columns.get('rated_at', 'rated_at')} has type "
            f"{kinds['rated_at'].simpleString()}; times must be timestamps, text or seconds"
        )
    named = chosen.select(
        F.to_json(F.struct(*COLUMNS), {"ignoreNullFields": "false"}).alias("raw"),
        F.lit(None).cast("string").alias("earlier"),
        *COLUMNS,
    )
    return RawRatings(_judged(named), path, text_ids=False)


def _locate(names: list[str], columns: Mapping[str, str], path: str) -> dict[str, int]:
    """By part the index of its column."""
    where = {}
    for part in COLUMNS:
        name = columns.get(part, part)
        if names.count(name) > 1:
            raise InputError(f"--input {path}: has two columns {name}; rename one")
        if name in names:
            where[part] = names.index(name)
        elif part != "rated_at" or part in columns:
            shown = ", ".join(names[:8])[:120]
            raise InputError(
                f"--input {path}: has no column {name} (found: {shown}); "
                f"name it with --columns {part}=..."
            )
    return where


# --- values ---------------------------------------------------------------------------------


def _judged(named: DataFrame) -> DataFrame:
    """Convert rating and rated_at of (raw, earlier, *COLUMNS); number rows; find the problem."""
    kinds = {field.name: field.dataType for field in named.schema.fields}
    rating, rating_problem = _number(F.col("rating"), kinds["rating"])
    rated_at, time_problem = timestamp_of(F.col("rated_at"), kinds["rated_at"])
    problem = F.coalesce(
        F.col("earlier"),
        *[
            F.when(F.coalesce(F.col(part).cast("string"), F.lit("")) == "", f"{part} is missing")
            for part in ("user_id", "item_id")
        ],
        rating_problem,
        time_problem,
    )
    return named.select(
        "raw",
        position().alias("position"),
        "user_id",
        "item_id",
        rating.alias("rating"),
        rated_at.alias("rated_at"),
        problem.alias("problem"),
    )


def position() -> Column:
    """The place of a row: grows along a file. To be given where a row is judged, not before.

    As it is no pure function of the row, a filter on the problem stays above it; pushed below, the
    filter would repeat the parser's whole expression once for each column that it looks at.
    """
    return F.monotonically_increasing_id()


def _number(value: Column, kind: T.DataType) -> tuple[Column, Column]:
    problem = F.when(value.isNull(), "rating is missing")
    if isinstance(kind, T.StringType):
        special = F.lower(F.ltrim(value, F.lit("+-"))).isin("nan", "inf", "infinity")
        number = F.when(value.rlike(_NUMBER), value.try_cast("double"))
        problem = (
            problem.when(value == "", "rating is missing")
            .when(special, "rating is not finite")
            .when(number.isNull(), "rating is not a number")
        )
    else:
        number = value.cast("double")
    # Ratings are stored as float32: what overflows there is as little use as infinity.
    finite = ~F.isnan(number) & (F.abs(number) <= 3.4028234663852886e38)
    return number, problem.when(~finite, "rating is not finite")


def timestamp_of(value: Column, kind: T.DataType) -> tuple[Column, Column]:
    """A time from ISO 8601 text, seconds since 1970 (UTC) or a timestamp; and its problem.

    A null or empty value is an unknown time, which is no problem.
    """
    if isinstance(kind, T.NumericType):
        return _from_seconds(value.cast("double"))
    if not isinstance(kind, T.StringType):
        time = value.cast("timestamp")
        second = F.unix_seconds(time)
        return time, F.when(~second.between(_FIRST_SECOND, _LAST_SECOND), TIME_RANGE)
    numeric = value.rlike(_NUMBER)
    from_number, number_problem = _from_seconds(F.when(numeric, value.try_cast("double")))
    from_text = F.when(value.rlike(_ISO_8601), value.try_cast("timestamp"))
    problem = F.when(numeric, number_problem).when((value != "") & from_text.isNull(), BAD_TIME)
    return F.when(numeric, from_number).otherwise(from_text), problem


def _from_seconds(seconds: Column) -> tuple[Column, Column]:
    usable = seconds.between(_FIRST_SECOND, _LAST_SECOND)  # false for NaN, which sorts last
    problem = F.when(F.isnan(seconds), BAD_TIME).when(~usable, TIME_RANGE)
    return F.when(usable, F.timestamp_seconds(seconds)), problem
