"""Read ratings of every format into one kind of DataFrame, and say what is wrong with a row.

Every format becomes the columns of `RawRatings.frame`, by the rules of `ingestion.rules`. A row
that cannot be used keeps its text and gets a `problem`. A file that cannot be used at all raises
`InputError`. Spark turns all bytes that are not UTF-8 into U+FFFD, which would make several ids
one; such a row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.ingestion import rules
from unlearn_spark.ingestion.rules import COLUMNS
from unlearn_spark.preconditions import for_spark, is_remote
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.tables.delta_spark import quoted

if TYPE_CHECKING:
    from pyspark.sql import Column, SparkSession

_UNUSED_SEPARATOR = "\x01"
_INTEGRAL = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_TIMES = (T.TimestampType, T.TimestampNTZType, T.DateType, T.NumericType, T.StringType)


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


def read_ratings(
    spark: SparkSession, source: Any, format: str, columns: Mapping[str, str] | None = None
) -> RawRatings:
    """Read ratings from a file or folder, or from a table in memory.

    Parameters
    ----------
    source
        File, folder or glob, local or in an object store; or a table as for `given_table`.
    format
        Of a path, one of `rules.FORMATS`.
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
    if not isinstance(source, str):
        return _from_table(given_table(spark, source), rules.GIVEN_TABLE, columns)
    path = source
    rules.check_exists(path)
    if format in ("parquet", "delta"):
        with explained(path, format):
            rows = read_table(spark, path, format, [columns.get("rated_at", "rated_at")])
            return _from_table(rows, path, columns)
    with explained(path, format):
        first = first_line(spark, path)
        if format == "csv":
            return _from_csv(spark, path, first, columns)
        if format == "movielens":
            return _from_movielens(spark, path, first)
        if format == "netflix":
            return _from_netflix(spark, path, first)
    raise SettingsError(f"--format {format}: expected one of {', '.join(rules.FORMATS)}")


@contextmanager
def explained(path: str, format: str) -> Iterator[None]:
    """Turn Spark's complaints about an input's files into one line that names the input."""
    try:
        yield
    except Exception as error:
        text = str(error)
        unread = re.search(r"(?:reading file|footer for file:) (.+?)\.\s+[A-Z]", text)
        name = unread[1].rpartition("/")[2] if unread else ""
        if ":" in name and not is_remote(path):
            raise InputError(
                f"--input {path}: Hadoop cannot read names with a colon, as {name}; rename it"
            ) from error
        if "UNABLE_TO_INFER_SCHEMA" in text and _is_hidden(path):
            raise InputError(f"--input {path}: {_HIDDEN}") from error
        for marks, mend in _COMPLAINTS:
            if any(mark in text for mark in marks):
                raise InputError(f"--input {path}: {mend.format(format=format)}") from error
        raise


_HIDDEN = "Spark skips files whose names begin with _ or .; rename what is to be read"


def _is_hidden(path: str) -> bool:
    """Does a local path hold files, but none that Spark reads?"""
    top = Path(path)
    if is_remote(path) or not top.exists():
        return False
    files = [file for file in top.rglob("*") if file.is_file()] if top.is_dir() else [top]
    parts = [file.relative_to(top).parts if top.is_dir() else (file.name,) for file in files]
    return bool(files) and all(any(part[0] in "_." for part in names) for names in parts)


_COMPLAINTS = (
    (("PATH_NOT_FOUND", "FileNotFoundException"), "no such file or folder; check the path"),
    (("Permission denied", "AccessControlException"), "not readable; check its permissions"),
    (
        ("CSV header does not conform", "CSV header"),
        "its files have different headers; make them alike or read them one by one",
    ),
    (
        ("COLUMN_ALREADY_EXISTS",),
        "has columns whose names differ only in case; rename all but one",
    ),
    (
        ("PARQUET_COLUMN_DATA_TYPE_MISMATCH",),
        "its files hold a column in different types; write them alike or read them one by one",
    ),
    (
        ("PARQUET_TYPE_ILLEGAL", "PARQUET_TYPE_NOT_SUPPORTED", "PARQUET_TYPE_NOT_RECOGNIZED"),
        "has a column of a type that Spark cannot read; write it without that column",
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
    """The first line that is not blank. Raises InputError if there is none, or it is not text."""
    found = _text(spark, path).where(
        (F.col("_metadata.file_block_start") == 0) & (F.trim("raw") != "")
    )
    row = found.select("raw").first()
    if row is None and _is_hidden(path):
        raise InputError(f"--input {path}: {_HIDDEN}")
    if row is None:
        raise InputError(f"--input {path}: is empty; give a file with some rows")
    line = str(row["raw"])
    if rules.CONTROL.search(line):
        raise InputError(f"--input {path}: is no text in UTF-8; check --format and the encoding")
    return line


def _text(spark: SparkSession, path: str) -> DataFrame:
    """raw, each line with U+FFFD in place of bytes that are not UTF-8; and Spark's `_metadata`."""
    rows = spark.read.text(for_spark(path))
    return rows.withColumn("raw", F.make_valid_utf8("value"))


# --- text formats ---------------------------------------------------------------------------


def _from_csv(
    spark: SparkSession, path: str, header: str, columns: Mapping[str, str]
) -> RawRatings:
    names = rules.header_names(path, header)
    where = _locate(names, columns, path)
    return _from_fields(
        lines_below_header(spark, path, header), path, csv_fields(len(names)), where
    )


def _from_movielens(spark: SparkSession, path: str, first: str) -> RawRatings:
    where: dict[str, int] = {part: index for index, part in enumerate(COLUMNS)}
    if [name.strip().lower() for name in first.split(",")] == rules.MOVIELENS_HEADER:
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
    return _text(spark, path).select("raw").where(F.trim("raw") != "")


def lines_below_header(spark: SparkSession, path: str, header: str) -> DataFrame:
    """`lines` without each file's header line. The query fails if a file has another header."""
    # Spark's CSV reader drops every file's header and checks that all are alike. A separator that
    # does not occur makes each line one value, which keeps the raw text.
    schema = T.StructType([T.StructField(header, T.StringType())])
    reader = spark.read.schema(schema).options(
        header=True, enforceSchema=False, sep=_UNUSED_SEPARATOR, quote="", encoding="UTF-8"
    )
    return (
        reader.csv(for_spark(path))
        .select(F.col(quoted(header)).alias("raw"))
        .where(F.trim("raw") != "")
    )


def csv_fields(width: int) -> Column:
    """The values of a line as an array, null where their number is not `width` or a quote is left
    open, as where a value goes on in the next line."""
    plain = F.split("raw", ",", -1)
    schema = ", ".join([*(f"c{index} string" for index in range(width)), "malformed string"])
    options = {"columnNameOfCorruptRecord": "malformed", "escape": '"'}
    parsed = F.from_csv("raw", schema, options)
    quotes = F.length("raw") - F.length(F.replace("raw", F.lit('"')))
    quoted = F.when(
        parsed["malformed"].isNull() & (quotes % 2 == 0),
        F.array(*[parsed[f"c{index}"] for index in range(width)]),
    )
    # Most files have no quotes, and splitting is several times cheaper than parsing.
    return F.when(F.contains(F.col("raw"), F.lit('"')), quoted).otherwise(
        F.when(F.size(plain) == width, plain)
    )


def _from_fields(
    rows: DataFrame, path: str, fields: Column, where: Mapping[str, int]
) -> RawRatings:
    split = rows.select("raw", fields.alias("fields"), is_unusual(F.col("raw")).alias("unusual"))
    texts = {
        part: trimmed(F.col("fields")[where[part]], F.col("unusual"))
        if part in where
        else F.lit(None).cast("string")
        for part in COLUMNS
    }
    width = F.when(F.col("fields").isNull(), rules.WRONG_WIDTH)
    problem = F.coalesce(not_utf8(F.col("raw"), F.col("unusual")), width)
    return _from_texts(split, texts, path, problem)


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
    text = _text(spark, path).select(
        F.col("raw").alias("value"),
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.file_block_start").alias("start"),
    )
    # Spark reads a large file in pieces. A later piece begins amid a movie's ratings, so it needs
    # the last movie of the pieces before it. The driver gets one row a piece.
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
    ).withColumn("unusual", is_unusual(F.col("raw")))
    user, rating, time = (trimmed(F.col("fields")[n], F.col("unusual")) for n in range(3))
    texts = {"user_id": user, "item_id": F.col("movie"), "rating": rating, "rated_at": time}
    problem = F.coalesce(
        not_utf8(F.col("raw"), F.col("unusual")),
        F.when(F.col("fields").isNull(), rules.WRONG_WIDTH).when(
            F.col("movie") == "", rules.NO_MOVIE
        ),
    )
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


def read_table(spark: SparkSession, path: str, format: str, times: Iterable[str] = ()) -> DataFrame:
    """The rows of Parquet files or of a Delta table.

    In Parquet files integers of every width become bigint, so files may differ in width. Values
    from folders `name=value` are text, so an id keeps its leading zeros. Spark reads times in
    nanoseconds as bigint; the columns that `times` names become timestamps.

    Raises
    ------
    InputError
        The files count a column of `times` in different units.
    """
    if format == "delta":
        return spark.read.format("delta").load(for_spark(path, glob=False))
    place = for_spark(path)
    nanoseconds = False
    with session_conf(spark, {"spark.sql.sources.partitionColumnTypeInference.enabled": "false"}):
        try:
            found = spark.read.parquet(place).schema
        except Exception as error:
            if "PARQUET_TYPE_ILLEGAL" not in str(error):
                raise
            nanoseconds = True
            with session_conf(spark, {"spark.sql.legacy.parquet.nanosAsLong": "true"}):
                found = spark.read.parquet(place).schema
    # A frame with an explicit schema does not depend on these settings, which Spark Connect would
    # look up again in every plan.
    fields = [
        T.StructField(field.name, T.LongType())
        if isinstance(field.dataType, _INTEGRAL)
        else T.StructField(field.name, field.dataType)
        for field in found.fields
    ]
    rows = spark.read.schema(T.StructType(fields)).parquet(place)
    wanted = {name.lower() for name in times}
    for field in fields if nanoseconds else ():
        if field.name.lower() in wanted and _is_in_nanoseconds(spark, path, field):
            time = F.timestamp_micros(F.expr(f"{quoted(field.name)} div 1000"))
            rows = rows.withColumn(field.name, time)
    return rows


def given_table(spark: SparkSession, source: Any) -> DataFrame:
    """The rows of a table in memory: Spark's, Arrow's, or what Arrow can take (pandas).

    Raises
    ------
    InputError
        It is no table, or has a column of a type that Spark does not have.
    """
    if isinstance(source, DataFrame):
        return source
    try:
        table = pa.table(source)
        held = pa.schema([(field.name, _held(field.type)) for field in table.schema])
        table = table.cast(held, safe=False)
        return spark.createDataFrame(table)
    except (pa.ArrowException, TypeError, ValueError, PySparkException) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--input {rules.GIVEN_TABLE}: cannot be read ({reason}); "
            "give an Arrow, pandas or Spark table of text, numbers and times"
        ) from error


def _held(kind: pa.DataType) -> pa.DataType:
    """The type in which Spark holds values of an Arrow type."""
    if pa.types.is_dictionary(kind):
        return _held(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_unsigned_integer(kind):
        return pa.decimal128(20, 0) if kind == pa.uint64() else pa.int64()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return kind


def _is_in_nanoseconds(spark: SparkSession, path: str, field: T.StructField) -> bool:
    """Does a column that Spark reads as bigint count nanoseconds?

    Spark can also read an integer as a decimal, microseconds as a timestamp, and nanoseconds as
    neither.
    """

    def can_be(kind: T.DataType) -> bool:
        schema = T.StructType([T.StructField(field.name, kind)])
        reader = spark.read.schema(schema).option("ignoreCorruptFiles", True)
        rows = reader.parquet(for_spark(path)).select(F.col(quoted(field.name)).isNull())
        return rows.first() is not None  # `isEmpty` would not look at the column

    if not isinstance(field.dataType, T.LongType):
        return False
    if can_be(T.TimestampType()):
        raise InputError(
            f"--input {path}: its files count {field.name} in different units; "
            "write them alike or read them one by one"
        )
    return not can_be(T.DecimalType(20, 0))


def _from_table(rows: DataFrame, path: str, columns: Mapping[str, str]) -> RawRatings:
    names = {part: columns.get(part, part) for part in COLUMNS}
    where = _locate(rows.columns, columns, path)
    chosen = rows.select(*[F.col(quoted(rows.columns[n])).alias(part) for part, n in where.items()])
    if "rated_at" not in where:
        chosen = chosen.withColumn("rated_at", F.lit(None).cast("timestamp"))
    kinds = {field.name: field.dataType for field in chosen.schema.fields}
    if not isinstance(kinds["rating"], (T.NumericType, T.StringType)):
        raise InputError(
            f"--input {path}: column {names['rating']} has type "
            f"{kinds['rating'].simpleString()}; ratings must be numbers"
        )
    require_times(kinds["rated_at"], names["rated_at"], path)
    # Columns of their own: Spark repeats an expression wherever it is used.
    unusual = {
        part: is_unusual(F.col(part).cast("string")).alias(f"{part} is unusual")
        for part in COLUMNS
        if isinstance(kinds[part], T.StringType)
    }
    chosen = chosen.select(*COLUMNS, *unusual.values())
    unusual = {part: F.col(f"{part} is unusual") for part in unusual}
    ids, problems = {}, []
    for part in ("user_id", "item_id"):
        ids[part], problem = id_of(
            F.col(part), kinds[part], part, names[part], path, unusual.get(part)
        )
        problems.append(problem)
    texts = {
        part: text_of(F.col(part), unusual[part])[0] if part in unusual else F.col(part)
        for part in ("rating", "rated_at")
    }
    named = chosen.select(
        F.to_json(F.struct(*COLUMNS), {"ignoreNullFields": "false"}).alias("raw"),
        F.coalesce(*problems).alias("earlier"),
        *[value.alias(part) for part, value in {**ids, **texts}.items()],
    )
    return RawRatings(_judged(named), path, text_ids=False)


def _locate(names: list[str], columns: Mapping[str, str], path: str) -> dict[str, int]:
    wanted = {part: columns.get(part, part) for part in COLUMNS}
    optional = () if "rated_at" in columns else ("rated_at",)
    return rules.locate(names, wanted, optional, path, "name it with --columns {part}=...")


# --- values ---------------------------------------------------------------------------------


def is_unusual(text: Column) -> Column:
    """Does the text have characters outside printable ASCII?

    Only then can it have white space other than blanks, or bytes that are not UTF-8. This test is
    cheaper than looking for those in every row.
    """
    # Possessive: looking for a character out of the range instead takes half as long again.
    return ~text.rlike(r"\A[ -~]*+\z")


def trimmed(text: Column, unusual: Column | None = None) -> Column:
    """Text without the white space around it.

    Parameters
    ----------
    unusual
        `is_unusual` of the text, or of a line that it is part of.
    """
    unusual = is_unusual(text) if unusual is None else unusual
    return F.when(unusual, F.btrim(text, F.lit(rules.WHITE_SPACE))).otherwise(F.trim(text))


def not_utf8(text: Column, unusual: Column) -> Column:
    """The problem of text in which U+FFFD stands for bytes that were not UTF-8; null without it."""
    return F.when(unusual & F.contains(text, F.lit(rules.REPLACEMENT)), rules.NOT_UTF8)


def text_of(value: Column, unusual: Column | None = None) -> tuple[Column, Column]:
    """The trimmed text of a string column, null where nothing is left; and its problem.

    Parameters
    ----------
    unusual
        `is_unusual` of the value, if that is a column already.
    """
    # The cast drops a collation: ids are compared byte by byte.
    plain = value.cast("string")
    unusual = is_unusual(plain) if unusual is None else unusual
    text = trimmed(F.when(unusual, F.make_valid_utf8(plain)).otherwise(plain), unusual)
    broken = F.when(unusual & text.rlike("[\r\n]"), rules.LINE_BREAK)
    return F.nullif(text, F.lit("")), F.coalesce(not_utf8(text, unusual), broken)


def id_of(
    value: Column,
    kind: T.DataType,
    part: str,
    column: str,
    path: str,
    unusual: Column | None = None,
) -> tuple[Column, Column]:
    """An id from a column of a table: string or bigint, null where it is missing; and its problem.

    Parameters
    ----------
    kind
        The column's type.
    part, column
        What the problem and the error call the id.
    unusual
        As for `text_of`.

    Raises
    ------
    InputError
        No id can have this type.
    """
    if isinstance(kind, T.StringType):
        return text_of(value, unusual)
    nothing = F.lit(None).cast("string")
    if isinstance(kind, _INTEGRAL):
        return value.cast("bigint"), nothing
    if isinstance(kind, T.DecimalType):
        number = value.try_cast("bigint")
        exact = number == value
        missing = value.isNull()
    elif isinstance(kind, (T.FloatType, T.DoubleType)):
        number = value.try_cast("bigint")
        exact = (F.floor(value) == value) & (F.abs(value) <= _EXACT[type(kind)])
        missing = value.isNull() | F.isnan(value)  # pandas' way to leave an integer out
    else:
        raise InputError(
            f"--input {path}: column {column} has type {kind.simpleString()}; "
            "it must be text or integers, cast it first"
        )
    exact = F.coalesce(exact, F.lit(False))
    problem = F.when(~missing & ~exact, rules.INEXACT_ID.format(column=part))
    return F.when(exact & ~missing, number), problem


_EXACT: dict[type[T.DataType], float] = {T.FloatType: 2.0**24, T.DoubleType: 2.0**53}
"""Up to these values the type tells all integers apart."""


def require_times(kind: T.DataType, column: str, path: str) -> None:
    """Raise InputError where a column of this type cannot hold times."""
    if not isinstance(kind, _TIMES):
        raise InputError(
            f"--input {path}: column {column} has type {kind.simpleString()}; "
            "times must be timestamps, text or seconds"
        )


def _judged(named: DataFrame) -> DataFrame:
    """From (raw, earlier, *COLUMNS): convert rating and rated_at, number rows, find the problem."""
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
    """A row's place, which grows along a file. Add it where rows are judged, not before.

    Spark pushes no filter below a function that is not deterministic. Further down, a filter on
    the problem would repeat the parser's whole expression for each column that it reads.
    """
    return F.monotonically_increasing_id()


def _number(value: Column, kind: T.DataType) -> tuple[Column, Column]:
    problem = F.when(value.isNull(), "rating is missing")
    if isinstance(kind, T.StringType):
        special = F.lower(F.ltrim(value, F.lit("+-"))).isin("nan", "inf", "infinity")
        number = F.when(value.rlike(rules.NUMBER), value.try_cast("double"))
        problem = (
            problem.when(value == "", "rating is missing")
            .when(special, "rating is not finite")
            .when(number.isNull(), "rating is not a number")
        )
    else:
        number = value.cast("double")
    finite = ~F.isnan(number) & (F.abs(number) <= rules.LARGEST_FLOAT)
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
        return time, F.when(
            ~second.between(rules.FIRST_SECOND, rules.LAST_SECOND), rules.TIME_RANGE
        )
    numeric = value.rlike(rules.NUMBER)
    from_number, number_problem = _from_seconds(F.when(numeric, value.try_cast("double")))
    from_text = F.when(value.rlike(rules.ISO_8601), value.try_cast("timestamp"))
    problem = F.when(numeric, number_problem).when(
        (value != "") & from_text.isNull(), rules.BAD_TIME
    )
    return F.when(numeric, from_number).otherwise(from_text), problem


def _from_seconds(seconds: Column) -> tuple[Column, Column]:
    usable = seconds.between(
        rules.FIRST_SECOND, rules.LAST_SECOND
    )  # false for NaN, which sorts last
    problem = F.when(F.isnan(seconds), rules.BAD_TIME).when(~usable, rules.TIME_RANGE)
    return F.when(usable, F.timestamp_seconds(seconds)), problem
