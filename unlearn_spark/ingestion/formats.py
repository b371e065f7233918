"""Read rating files of every format into one kind of DataFrame, and say what is wrong with a row.

Every format becomes the columns of `RawRatings.frame`. A row that cannot be used keeps its text
and gets a `problem`. A file that cannot be used at all raises `InputError`. Deletion requests
(`ingestion.requests`) follow the same rules:

- White space around a value is cut (`trimmed`). An id that was nothing else is missing.
- Text is UTF-8. A row with other bytes is refused: Spark turns them all into U+FFFD, which would
  make several ids one.
- An id is text or an integer. A whole number of a numeric type counts as an integer; a fraction,
  or a number too large to be exact, is refused. The text 42.0 or 042 is not an integer.
- A column is found whatever the case of its name.
- A local path that exists is meant literally; any other may be a glob.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import InputError, SettingsError
from unlearn_spark.preconditions import for_spark, is_remote
from unlearn_spark.tables.session_conf import session_conf
from unlearn_spark.tables.sql import quoted

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession

FORMATS = ("movielens", "csv", "parquet", "delta", "netflix")
COLUMNS = ("user_id", "item_id", "rating", "rated_at")

WRONG_WIDTH = "wrong number of columns"
NO_MOVIE = "rating stands before any movie line"
BAD_TIME = "rated_at is neither ISO 8601 nor seconds since 1970"
TIME_RANGE = "rated_at is outside the years 1 to 9999 (are these milliseconds?)"
NOT_UTF8 = "is not valid UTF-8, or has the character U+FFFD that stands for such bytes"
LINE_BREAK = "has a line break inside a value, which no line of csv can hold"
INEXACT_ID = "{column} is a fraction, or too large a number to be exact"
FOREIGN_ID = "{column} is not an integer as in the table"
"""The problem of an id that is no integer, where the ratings table has integer ids."""

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
_TIMES = (T.TimestampType, T.TimestampNTZType, T.DateType, T.NumericType, T.StringType)
# Unicode's white space, and two characters without width: U+200B, and U+FEFF (byte order mark).
_WHITE_SPACE = (
    "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
    "\u2008\u2009\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
)
_REPLACEMENT = "\ufffd"


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
    raise SettingsError(f"--format {format}: expected one of {', '.join(FORMATS)}")


def check_exists(path: str) -> None:
    """Raise InputError if a local path is out of reach, or is missing and is no glob."""
    if is_remote(path):
        return
    try:
        Path(path).stat()
    except PermissionError as error:
        raise InputError(f"--input {path}: not readable; check its permissions") from error
    except OSError as error:
        if not any(mark in path for mark in "*?[{"):
            raise InputError(f"--input {path}: no such file or folder; check the path") from error


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
    if _CONTROL.search(line):
        raise InputError(f"--input {path}: is no text in UTF-8; check --format and the encoding")
    return line


def _text(spark: SparkSession, path: str) -> DataFrame:
    """raw, each line with U+FFFD in place of bytes that are not UTF-8; and Spark's `_metadata`."""
    rows = spark.read.text(for_spark(path))
    return rows.withColumn("raw", F.make_valid_utf8("value"))


def header_names(path: str, header: str) -> list[str]:
    """The names in a csv header line. Raises InputError if the line is no header."""
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
    width = F.when(F.col("fields").isNull(), WRONG_WIDTH)
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
        F.when(F.col("fields").isNull(), WRONG_WIDTH).when(F.col("movie") == "", NO_MOVIE),
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
    return locate(names, wanted, optional, path, "name it with --columns {part}=...")


def locate(
    names: list[str],
    wanted: Mapping[str, str],
    optional: Collection[str],
    path: str,
    mend: str,
) -> dict[str, int]:
    """By part the index of its column, whatever the case of its name.

    Parameters
    ----------
    names
        The columns that there are.
    wanted
        By part the name of its column.
    optional
        Parts that may be absent.
    mend
        What to do about a missing column; `{part}` is filled in.

    Raises
    ------
    InputError
        A part is absent that is not optional, or has two columns.
    """
    where = {}
    for part, name in wanted.items():
        found = [n for n, other in enumerate(names) if other.lower() == name.lower()]
        if len(found) > 1:
            these = sorted({names[n] for n in found})
            raise InputError(f"--input {path}: has two columns {' and '.join(these)}; rename one")
        if found:
            where[part] = found[0]
        elif part not in optional:
            shown = ", ".join(names[:8])[:120]
            raise InputError(
                f"--input {path}: has no column {name} (found: {shown}); {mend.format(part=part)}"
            )
    return where


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
    return F.when(unusual, F.btrim(text, F.lit(_WHITE_SPACE))).otherwise(F.trim(text))


def not_utf8(text: Column, unusual: Column) -> Column:
    """The problem of text in which U+FFFD stands for bytes that were not UTF-8; null without it."""
    return F.when(unusual & F.contains(text, F.lit(_REPLACEMENT)), NOT_UTF8)


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
    broken = F.when(unusual & text.rlike("[\r\n]"), LINE_BREAK)
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
    problem = F.when(~missing & ~exact, INEXACT_ID.format(column=part))
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
        number = F.when(value.rlike(_NUMBER), value.try_cast("double"))
        problem = (
            problem.when(value == "", "rating is missing")
            .when(special, "rating is not finite")
            .when(number.isNull(), "rating is not a number")
        )
    else:
        number = value.cast("double")
    # Ratings are stored as float32, in which larger numbers are infinite.
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
