"""Ingest deletion requests: quarantine unusable ones, and add new ones to the tombstones."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark.sql import Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import InputError
from unlearn_spark.ingestion import rules
from unlearn_spark.ingestion.rules import CONFLICT, TombstoneReport
from unlearn_spark.preconditions import is_remote
from unlearn_spark.spark.ingest import formats
from unlearn_spark.spark.requests import typed_id
from unlearn_spark.tables import quarantine, tombstones
from unlearn_spark.tables.delta_spark import SparkStore, quoted
from unlearn_spark.tables.requests import SCOPES
from unlearn_spark.tables.store import is_delta
from unlearn_spark.tables.tombstones import TEXTS, TIMES

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

_COLUMNS = TEXTS + TIMES


def ingest_requests(
    store: SparkStore,
    source: Any,
    format: str | None = None,
    id_types: Mapping[str, T.DataType] | None = None,
) -> TombstoneReport:
    """Validate requests, drop repeated ones, and append the new ones.

    A request is known by its `request_id`: the same content again is a duplicate, other content is
    quarantined (the first one stands). A request without `requested_at` is made now.

    Parameters
    ----------
    source
        File, folder or glob; or a table as for `formats.given_table`.
    format
        Of a path, one of `rules.REQUEST_FORMATS`.
    id_types
        Types of user_id and item_id in the ratings table (`ratings.id_types`). A request whose id
        cannot occur in that table would delete nothing, and is quarantined. None: there is no
        table yet, so every id is accepted.

    Raises
    ------
    InputError
        The input cannot be read, is empty, or holds no usable request. Nothing is written.
    SettingsError
        `format` is None, and the input does not show its format.
    ConflictError
        Another job wrote to one of the tables meanwhile.
    """
    if isinstance(source, str):
        path = source
        format = format or _guess_format(store.spark, path)
        rules.check_exists(path)
    else:
        path, format = rules.GIVEN_TABLE, "parquet"
    with formats.explained(path, format):
        read = _read_raw(store.spark, source, format)
        rows = _judged(read, id_types or {}).persist()
        problems = {row[0]: int(row[1]) for row in rows.groupBy("problem").count().collect()}
    try:
        total = sum(problems.values())
        if total == 0:
            raise InputError(f"--input {path}: has no requests; give a file with some")
        if None not in problems:
            raise InputError(
                f"--input {path}: none of its {total} requests is usable; "
                f"the most frequent reason: {rules.worst_of(problems)}"
            )
        store.create(tombstones.TABLE, tombstones.SPEC)
        sorted_out = _sort_out(
            rows.where(F.col("problem").isNull()), store.read(tombstones.TABLE)
        ).persist()
        try:
            fates = {row[0]: int(row[1]) for row in sorted_out.groupBy("fate").count().collect()}
            refused = rows.where(F.col("problem").isNotNull()).unionByName(
                sorted_out.where(F.col("fate") == "conflict")
                .withColumn("problem", F.lit(CONFLICT))
                .drop("fate")
            )
            n_refused = total - problems[None] + fates.get("conflict", 0)
            if n_refused:
                kept = refused.select(
                    "raw", F.col("problem").alias("reason"), "user_id", "item_id"
                ).limit(quarantine.MOST_KEPT)
                quarantine.add(store, path, kept.toArrow())
            newest = store.version(tombstones.TABLE)
            if fates.get("accepted"):
                accepted = sorted_out.where(F.col("fate") == "accepted").select(*_COLUMNS)
                newest = tombstones.append(store, accepted.toArrow())
        finally:
            sorted_out.unpersist()
    finally:
        rows.unpersist()
    return TombstoneReport(
        read=total,
        accepted=fates.get("accepted", 0),
        duplicates=fates.get("duplicate", 0),
        quarantined=n_refused,
        version=newest,
    )


def _sort_out(good: DataFrame, known: DataFrame) -> DataFrame:
    """The rows with `fate`: accepted, duplicate or conflict."""
    content = ("scope", "user_id", "item_id", "from_ts", "to_ts", "requested_at")
    one_request = Window.partitionBy("request_id").orderBy("position")
    packed = good.withColumn("mine", F.struct(*content))
    packed = packed.withColumn("rank", F.row_number().over(one_request)).withColumn(
        "first", F.first("mine").over(one_request)
    )
    known = known.select(F.col("request_id"), F.struct(*content).alias("theirs"))
    joined = packed.join(known, "request_id", "left")
    is_known = F.col("theirs").isNotNull()
    fate = (
        F.when(is_known & _same(F.col("mine"), F.col("theirs")), "duplicate")
        .when(is_known, "conflict")
        .when(F.col("rank") == 1, "accepted")
        .when(_same(F.col("mine"), F.col("first")), "duplicate")
        .otherwise("conflict")
    )
    return joined.withColumn("fate", fate).select(*good.columns, "fate")


def _same(mine: Column, other: Column) -> Column:
    """Do two requests have the same content? A missing `requested_at` equals any."""
    names = ("scope", "user_id", "item_id", "from_ts", "to_ts")
    tests = [mine[name].eqNullSafe(other[name]) for name in names]
    mine_at, other_at = mine["requested_at"], other["requested_at"]
    tests.append(mine_at.isNull() | other_at.isNull() | (mine_at == other_at))
    return reduce(lambda left, right: left & right, tests)


def _guess_format(spark: SparkSession, path: str) -> str:
    if is_remote(path):
        folder, _, name = path.rstrip("/").rpartition("/")
        return rules.format_of_requests(path, SparkStore(spark, folder).exists(name))
    return rules.format_of_requests(path, is_delta(Path(path)))


def _read_raw(spark: SparkSession, source: Any, format: str) -> DataFrame:
    """raw, earlier (the problem that reading found), and a request's columns: null where empty,
    times in the type that the input has."""
    if not isinstance(source, str):
        return _from_table(formats.given_table(spark, source), rules.GIVEN_TABLE)
    path = source
    if format in ("parquet", "delta"):
        return _from_table(formats.read_table(spark, path, format, TIMES), path)
    first = formats.first_line(spark, path)
    if format == "csv":
        names = rules.header_names(path, first)
        where = _locate(names, path)
        lines = formats.lines_below_header(spark, path, first)
        lines = lines.withColumn("fields", formats.csv_fields(len(names)))
        problem = F.when(F.col("fields").isNull(), rules.WRONG_WIDTH)
        values = {name: F.col("fields")[index] for name, index in where.items()}
    else:
        # Variants tell the number 42.0, which is an integer, from the text "42.0", which is not.
        schema = ", ".join([*(f"{name} variant" for name in _COLUMNS), "malformed string"])
        options = {"columnNameOfCorruptRecord": "malformed"}
        lines = formats.lines(spark, path)
        lines = lines.withColumn("fields", F.from_json("raw", schema, options))
        lines = lines.withColumn(
            "kinds",
            F.struct(
                *[F.schema_of_variant(F.col("fields")[name]).alias(name) for name in _COLUMNS]
            ),
        )
        found = {name: _from_variant(name) for name in _COLUMNS}
        malformed = F.when(F.col("fields.malformed").isNotNull(), "is not a JSON object")
        problem = F.coalesce(malformed, *[wrong for _, wrong in found.values()])
        # A step of its own: the expressions below use each value several times.
        lines = lines.select(
            "raw",
            problem.alias("wrong"),
            F.struct(*[value.alias(name) for name, (value, _) in found.items()]).alias("fields"),
        )
        problem = F.col("wrong")
        values = {name: F.col("fields")[name] for name in _COLUMNS}
    texts = [
        (F.nullif(formats.trimmed(values[name]), F.lit("")) if name in values else F.lit(None))
        .cast("string")
        .alias(name)
        for name in _COLUMNS
    ]
    raw = F.col("raw")
    earlier = F.coalesce(formats.not_utf8(raw, formats.is_unusual(raw)), problem)
    return lines.select("raw", earlier.alias("earlier"), *texts)


def _from_table(rows: DataFrame, path: str) -> DataFrame:
    where = _locate(rows.columns, path)
    nothing = F.lit(None).cast("string")
    given = rows.select(
        *[
            (F.col(quoted(rows.columns[where[name]])) if name in where else nothing).alias(name)
            for name in _COLUMNS
        ]
    )
    values, problems = [], []
    for name in _COLUMNS:
        value, kind = F.col(name), given.schema[name].dataType
        if name in TIMES:
            formats.require_times(kind, name, path)
        if name in TEXTS or isinstance(kind, T.StringType):
            value, problem = formats.id_of(value, kind, name, name, path)
            problems.append(problem)
        values.append((value.cast("string") if name in TEXTS else value).alias(name))
    return given.select(
        F.to_json(F.struct(*_COLUMNS)).alias("raw"),
        F.coalesce(*problems).alias("earlier"),
        *values,
    )


def _from_variant(name: str) -> tuple[Column, Column]:
    """A JSON value as text, and its problem. Numbers follow the rules of `formats.id_of`."""
    value, kind = F.col("fields")[name], F.col("kinds")[name]
    text = F.try_variant_get(value, "$", "string")
    nested = F.when(
        kind.rlike("^(ARRAY|OBJECT|BOOLEAN)"), f"{name} is a list, an object, true or false"
    )
    if name in TIMES:
        return text, nested
    number = F.try_variant_get(value, "$", "double")
    integer, inexact = formats.id_of(number, T.DoubleType(), name, name, "")
    is_inexact = kind.rlike("^(DECIMAL|DOUBLE|FLOAT)")
    return (
        F.when(is_inexact, integer.cast("string")).otherwise(text),
        F.coalesce(nested, F.when(is_inexact, inexact)),
    )


def _locate(names: list[str], path: str) -> dict[str, int]:
    wanted = {name: name for name in _COLUMNS}
    optional = [name for name in _COLUMNS if name not in ("request_id", "scope")]
    return rules.locate(names, wanted, optional, path, f"requests have {', '.join(_COLUMNS)}")


def _judged(rows: DataFrame, id_types: Mapping[str, T.DataType]) -> DataFrame:
    """Convert the times and find each row's first problem."""
    rows = rows.withColumn("scope", F.lower("scope"))
    times, time_problems = {}, []
    for name in TIMES:
        times[name], problem = formats.timestamp_of(F.col(name), rows.schema[name].dataType)
        # `timestamp_of` words its problems for rated_at.
        time_problems.append(F.replace(problem, F.lit("rated_at"), F.lit(name)))
    scope = F.col("scope")

    def missing(column: str) -> Column:
        return F.coalesce(F.col(column).cast("string"), F.lit("")) == ""

    def unless_in(column: str, *scopes: str) -> Column:
        return F.when(
            ~missing(column) & ~scope.isin(*scopes), f"{column} does not belong to this scope"
        )

    def needed_in(column: str, *scopes: str) -> Column:
        return F.when(missing(column) & scope.isin(*scopes), f"{column} is missing for this scope")

    problem = F.coalesce(
        F.col("earlier"),
        F.when(missing("request_id"), "request_id is missing"),
        F.when(missing("scope"), "scope is missing"),
        F.when(~scope.isin(*SCOPES), f"scope is none of {', '.join(SCOPES)}"),
        needed_in("user_id", "user", "rating", "window"),
        needed_in("item_id", "item", "rating"),
        F.when(
            (scope == "reinstate") & missing("user_id") & missing("item_id"),
            "reinstate needs user_id or item_id",
        ),
        # Without these checks a request would delete more than its other columns say.
        unless_in("user_id", "user", "rating", "window", "reinstate"),
        unless_in("item_id", "item", "rating", "reinstate"),
        unless_in("from_ts", "window"),
        unless_in("to_ts", "window"),
        *time_problems,
        needed_in("from_ts", "window"),
        needed_in("to_ts", "window"),
        F.when(times["from_ts"] >= times["to_ts"], "from_ts is not before to_ts"),
        *[
            F.when(
                ~missing(column) & typed_id(F.col(column), kind).isNull(),
                rules.FOREIGN_ID.format(column=column),
            )
            for column, kind in id_types.items()
        ],
    )
    return rows.select(
        "raw",
        formats.position().alias("position"),
        *TEXTS,
        *[times[name].alias(name) for name in TIMES],
        problem.alias("problem"),
    )
