"""Ingest ratings: quarantine unusable rows, and write the newest rating of each pair."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.errors import InputError
from unlearn_spark.ingestion.rules import FOREIGN_ID, REFUSED, IngestReport, worst_of
from unlearn_spark.spark import ratings, requests
from unlearn_spark.spark.ingest import formats
from unlearn_spark.tables import quarantine, tombstones
from unlearn_spark.tables import ratings as table
from unlearn_spark.tables import requests as asked
from unlearn_spark.tables.store import persistently

if TYPE_CHECKING:
    from unlearn_spark.tables.delta_spark import SparkStore


@dataclass(frozen=True)
class _Profile:
    """One look at an input: rows by problem, and which id columns could be integers."""

    problems: dict[str | None, int]
    integral: dict[str, bool]

    @property
    def read(self) -> int:
        return sum(self.problems.values())

    @property
    def good(self) -> int:
        return self.problems.get(None, 0)

    @property
    def bad(self) -> int:
        return self.read - self.good

    @property
    def worst(self) -> str:
        """The most frequent problem."""
        return worst_of({why: n for why, n in self.problems.items() if why is not None})


def ingest_ratings(
    store: SparkStore,
    raw: formats.RawRatings,
) -> IngestReport:
    """Validate, quarantine and upsert the ratings of one input.

    The newest rating of a pair wins, by `rated_at` (an unknown time is the oldest), then by its
    place: a later line, a later ingest. The same input twice changes nothing. Of rows that an
    accepted tombstone covers, the quarantine keeps the reason and no content.

    The quarantine is committed first, then the ratings. A job that dies in between has written no
    rating, and running it again repeats neither.

    Raises
    ------
    InputError
        There are no rows, or not one is usable. Nothing is written.
    ConflictError
        Another job wrote ratings meanwhile; no rating is written.
    """
    types = ratings.id_types(store)
    rows = _typed(raw, types)
    with formats.explained(raw.source, "this format"):
        profile = _profile(rows, raw.text_ids and types is None)
    if profile.read == 0:
        raise InputError(f"--input {raw.source}: has no ratings; give a file with some")
    if profile.good == 0:
        raise InputError(
            f"--input {raw.source}: none of its {profile.read} rows is usable; "
            f"the most frequent reason: {profile.worst}"
        )
    if types is None:
        types = _choose_types(raw, profile)
        rows = _typed(raw, types)

    good = rows.where(F.col("problem").isNull())
    n_refused, unusable = 0, []
    if profile.bad:
        texts = [F.col(name).cast("string").alias(name) for name in ("user_id", "item_id")]
        bad = rows.where(F.col("problem").isNotNull())
        unusable.append(bad.select("raw", F.col("problem").alias("reason"), *texts))
    tombstones_version = tombstones.version(store)
    if tombstones_version is not None:
        guards = asked.rules(
            asked.effective(tombstones.read(store, tombstones_version)), guard=True
        )
        marked = requests.with_requests(good, guards)
        good = marked.where(F.size("request_ids") == 0).drop("request_ids")
        refused = marked.where(F.size("request_ids") > 0)
        n_refused = refused.count()
        if n_refused:
            nothing = [F.lit(None).cast("string").alias(name) for name in ("user_id", "item_id")]
            unusable.append(
                refused.select(
                    F.lit(None).cast("string").alias("raw"),
                    F.concat(F.lit(REFUSED), F.col("request_ids")[0]).alias("reason"),
                    *nothing,
                )
            )
    if unusable:
        kept = reduce(DataFrame.unionByName, unusable).limit(quarantine.MOST_KEPT)
        quarantine.add(store, raw.source, kept.toArrow())

    n_good = profile.good - n_refused
    written, version = ratings.upsert(store, good, n_good, types)
    if version is not None and written and tombstones.version(store) != tombstones_version:
        version = _delete_covered(store, version)
    return IngestReport(
        read=profile.read,
        written=written,
        superseded=n_good - written,
        quarantined=profile.bad + n_refused,
        version=version,
    )


def _delete_covered(store: SparkStore, version: int) -> int:
    """Delete what `version` brought in and a request covers that was accepted meanwhile: its night
    may have ended before these rows came. Returns the version afterwards.

    Raises
    ------
    ConflictError
        Other jobs wrote ratings whenever this one tried.
    """
    ingest_id = table.ingest_of(version)

    def attempt() -> int:
        newest = store.version(table.TABLE)
        mine = ratings.read(store, newest).where(F.col("ingest_id") == ingest_id)
        guards = asked.rules(asked.effective(tombstones.read(store)), guard=True)
        return ratings.delete(store, requests.covered(mine, guards), newest)

    return persistently(attempt)


def _choose_types(raw: formats.RawRatings, profile: _Profile) -> dict[str, T.DataType]:
    """The types of a typed input; for text, bigint where every usable id is an integer."""
    if raw.text_ids:
        return {
            name: T.LongType() if integral else T.StringType()
            for name, integral in profile.integral.items()
        }
    return {name: raw.frame.schema[name].dataType for name in ("user_id", "item_id")}


def _typed(raw: formats.RawRatings, types: dict[str, T.DataType] | None) -> DataFrame:
    """The rows with ids in these types. Where they are bigint, other text becomes a problem."""
    rows = raw.frame
    if types is None:
        return rows
    problem = F.col("problem")
    converted = {}
    for name, kind in types.items():
        source = rows.schema[name].dataType
        converted[name] = F.col(name).cast(kind)
        if isinstance(source, T.StringType) and not isinstance(kind, T.StringType):
            converted[name] = requests.typed_id(F.col(name), kind)
            foreign = FOREIGN_ID.format(column=name)
            problem = F.coalesce(problem, F.when(converted[name].isNull(), foreign))
    return rows.select(
        "raw",
        "position",
        *[column.alias(name) for name, column in converted.items()],
        "rating",
        "rated_at",
        problem.alias("problem"),
    )


def _profile(rows: DataFrame, judge_ids: bool) -> _Profile:
    """Count the rows by problem in one pass (the reasons are few)."""
    names = ("user_id", "item_id")
    integral = [
        F.min(F.coalesce(requests.typed_id(F.col(name), T.LongType()).isNotNull(), F.lit(False)))
        if judge_ids
        else F.lit(False)
        for name in names
    ]
    counts = rows.groupBy("problem").agg(F.count(F.lit(1)), *integral).collect()
    usable = [row for row in counts if row[0] is None]
    flags = {name: all(row[2 + index] for row in usable) for index, name in enumerate(names)}
    return _Profile({row[0]: int(row[1]) for row in counts}, flags)
