"""Finds a night's work: the ratings that must leave the published model, and those that must enter.

It compares with the ratings version that the published model names, not with the newest. So if a
job died after it deleted ratings, the next one finds the same work again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F

from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.errors import InputError
from unlearn_spark.spark.frames import materialise
from unlearn_spark.tables import ratings, requests, tombstones
from unlearn_spark.tables.sql import block_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

FEW_USERS = 128
"""The ratings of up to so many users are a small part of all, and Delta skips the rest."""

MOST_NAMED = 1000
"""Largest number of requests without ratings that a job lists; all of them get receipts."""

LIFT = "reinstate"

PAIR = ["user_id", "item_id"]


@dataclass(frozen=True)
class News:
    """Requests and ratings that arrived since the published model.

    Attributes
    ----------
    pending
        Requests without a receipt (`requests.effective`); None if there never was a request.
    lifts
        Reinstatements since the published model, which may let in ratings that it left out; None
        if there are none.
    scopes
        The number of `pending` and `lifts` of each scope.
    n_users
        The approximate number of users with newly ingested ratings.
    ratings_version, ingest_id, tombstones_version
        The Delta versions and the newest ingest that were read.
    """

    pending: DataFrame | None
    lifts: DataFrame | None
    scopes: dict[str, int]
    n_users: int
    ratings_version: int
    ingest_id: int
    tombstones_version: int | None

    @property
    def n_requests(self) -> int:
        return sum(n for scope, n in self.scopes.items() if scope != LIFT)

    @property
    def may_add(self) -> bool:
        """Whether ratings may enter the model."""
        return bool(self.n_users) or self.lifts is not None

    @property
    def is_small(self) -> bool:
        """Whether the night reads little enough of the ratings table for `SMALL_QUERIES`."""
        reads_everything = "item" in self.scopes or self.lifts is not None
        return not reads_everything and self.n_requests + self.n_users <= FEW_USERS


@dataclass(frozen=True)
class Changes:
    """A night's changes of the model and of the ratings table.

    Attributes
    ----------
    removed
        user_id, item_id, request_id: one row for each request and rating that it covers, in the
        model or not.
    stored
        user_id, item_id of the ratings to delete: the covered ones in the table's newest version.
        They exclude pairs of `removed` that were rated again after the request.
    pairs
        user_id, item_id, value, change (-1 leaves the model, +1 enters it).
    blocks
        By side: the blocks of the rows of `pairs`.
    n_removed, n_added
        The number of ratings that requests take out of the model, and of new or corrected ratings.
    net
        The change of the model's number of ratings.
    without_ratings
        The first `MOST_NAMED` request_ids that cover no rating, in order.
    """

    news: News
    removed: DataFrame | None
    stored: DataFrame | None
    pairs: DataFrame
    blocks: dict[str, list[int]]
    n_removed: int
    n_added: int
    net: int
    without_ratings: list[str]

    @property
    def figures(self) -> dict[str, Any]:
        """The figures of these changes for the job's JSON."""
        return {
            "requests": self.news.n_requests,
            "requests_without_ratings": self.without_ratings,
            "ratings_removed": self.n_removed,
            "ratings_added": self.n_added,
        }


def find_news(store: Store, model: ModelVersion, checkpoint: str) -> News:
    """Find pending requests and newly ingested ratings; read no rating that the model knows.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    if model.ratings_version is None:
        raise InputError(f"model version {model.model_version} names no ratings; train it here")
    heads = run_concurrently(
        {
            "ratings": lambda: store.version(ratings.TABLE),
            "tombstones": lambda: tombstones.version(store),
        }
    )
    ratings_version, tombstones_version = heads["ratings"], heads["tombstones"]
    assert ratings_version is not None
    pending, lifts = None, None
    scopes: dict[str, int] = {}
    if tombstones_version is not None:
        asked = materialise(_unanswered(store, model, tombstones_version), checkpoint)
        scopes = dict(asked.groupBy("scope").count().toLocalIterator())
        pending = asked.where(F.col("scope") != LIFT)
        lifts = asked.where(F.col("scope") == LIFT) if LIFT in scopes else None
    ingest_id, n_users = model.ratings_ingest_id or 0, 0
    if ratings_version != model.ratings_version:
        later = ratings.since(store, ingest_id, ratings_version)
        newest = F.coalesce(F.max("ingest_id"), F.lit(ingest_id))
        row = later.agg(newest, F.approx_count_distinct("user_id")).first()
        assert row is not None
        ingest_id, n_users = row
    return News(pending, lifts, scopes, n_users, ratings_version, ingest_id, tombstones_version)


def collect_changes(store: Store, model: ModelVersion, news: News, checkpoint: str) -> Changes:
    """Find the ratings that leave the model and those that enter it. Reads the user blocks that the
    requests name, and all ratings only if a request or a reinstatement names an item."""
    version = news.ratings_version
    removed, stored, leaving, pairs = None, None, None, None
    if news.pending is not None and news.n_requests:
        found = materialise(_found(store, model, news), checkpoint)
        removed = found.select(*PAIR, F.explode("asked").alias("request_id")).distinct()
        stored = found.where("stored").select(*PAIR)
        leaving = found.where("fitted").select(*PAIR, "rating")
        pairs = _changed(leaving, -1)
    may_add = version != model.ratings_version or news.lifts is not None
    if may_add:
        added = materialise(_added(store, model, news), checkpoint)
        replaced = ratings.covering(store, added.select(PAIR), model.ratings_version)
        replaced = ratings.with_fitted(store, model, replaced).where("fitted")
        replaced = replaced.select(*PAIR, "rating")
        if leaving is not None:
            replaced = replaced.join(leaving.select(PAIR), PAIR, "left_anti")
        more = _changed(replaced, -1).unionByName(_changed(added, 1))
        pairs = materialise(more if pairs is None else pairs.unionByName(more), checkpoint)
    if pairs is None:
        nothing = ratings.read(store, version).limit(0)
        pairs = _changed(nothing.select(*PAIR, "rating"), 1)
    n_left, n_added, user_blocks, item_blocks, without_ratings = _counted(
        pairs, model, news.pending, removed
    )
    n_removed = n_left
    if may_add:  # n_left also counts the old values of corrected ratings
        n_removed = leaving.count() if leaving is not None else 0
    return Changes(
        news,
        removed,
        stored,
        pairs,
        dict(zip(SIDES, (sorted(user_blocks), sorted(item_blocks)), strict=True)),
        n_removed,
        n_added,
        n_added - n_left,
        without_ratings,
    )


def _unanswered(store: Store, model: ModelVersion, tombstones_version: int) -> DataFrame:
    """Requests without a receipt, and reinstatements since the published model."""
    pending = ratings.asked(store, tombstones_version, model.receipts_version).where("pending")
    if tombstones_version == model.tombstones_version:
        return pending
    lifts = tombstones.read(store, tombstones_version).where(F.col("scope") == LIFT)
    if model.tombstones_version is not None:
        earlier = tombstones.read(store, model.tombstones_version).select("request_id")
        lifts = lifts.join(earlier, "request_id", "left_anti")
    return pending.unionByName(lifts, allowMissingColumns=True)


def _found(store: Store, model: ModelVersion, news: News) -> DataFrame:
    """The ratings that pending requests cover: user_id, item_id, rating, `asked` (the requests),
    `fitted` (the model was fitted to it), and `stored` (the newest version has it)."""
    columns = [*PAIR, "rating", "asked", "fitted", "stored"]
    assert model.ratings_version is not None
    is_newest = news.ratings_version == model.ratings_version
    before = ratings.with_fitted(store, model, _covered(store, news, model.ratings_version))
    found = before.withColumn("stored", F.lit(is_newest)).select(columns)
    if is_newest:
        return found
    # A job that died may have deleted some of them, and more may have been ingested since.
    now = _covered(store, news, news.ratings_version)
    now = now.withColumns({"fitted": F.lit(False), "stored": F.lit(True)})
    return found.unionByName(now.select(columns))


def _covered(store: Store, news: News, version: int) -> DataFrame:
    """The ratings of a version that pending requests cover, with the requests as `asked`."""
    assert news.pending is not None
    of_users = news.pending.where("scope != 'item'")
    of_items = news.pending.where("scope = 'item'") if "item" in news.scopes else None
    rows = _named(store, of_users, of_items, version)
    marked = requests.with_requests(rows, news.pending, guard=False)
    return marked.where(F.size("request_ids") > 0).withColumnRenamed("request_ids", "asked")


def _named(
    store: Store, of_users: DataFrame, of_items: DataFrame | None, version: int
) -> DataFrame:
    """The ratings of the users, and of the items (or None), that tombstones name; items make it
    read all ratings."""
    rows = ratings.covering(store, of_users.select("user_id"), version)
    if of_items is None:
        return rows
    of_items = ratings.covering(store, of_items.select("item_id"), version)
    return rows.unionByName(of_items).distinct()


def _added(store: Store, model: ModelVersion, news: News) -> DataFrame:
    """user_id, item_id, rating of the retained ratings that enter the model: those ingested since,
    and those that a reinstatement lets in."""
    version = news.ratings_version
    rows = ratings.since(store, model.ratings_ingest_id or 0, version)
    if news.lifts is not None:
        let_in = _named(store, news.lifts, news.lifts, version)
        let_in = ratings.with_fitted(store, model, let_in).where("NOT fitted").drop("fitted")
        rows = rows.unionByName(let_in.select(*rows.columns)).distinct()
    rows = ratings.without_asked(store, rows, news.tombstones_version, model.receipts_version)
    return rows.select(*PAIR, "rating")


def _changed(rows: DataFrame, change: int) -> DataFrame:
    return rows.withColumnRenamed("rating", "value").withColumn("change", F.lit(change))


def _counted(
    pairs: DataFrame, model: ModelVersion, pending: DataFrame | None, removed: DataFrame | None
) -> tuple[int, int, list[int], list[int], list[str]]:
    """The numbers of pairs that leave and enter, the blocks of their users and items, and the first
    requests that cover no rating."""
    blocks = [
        F.collect_set(block_of(f"{side}_id", model.settings["layouts"][side]["n_blocks"]))
        for side in SIDES
    ]
    counted = pairs.agg(F.expr("count_if(change < 0)"), F.expr("count_if(change > 0)"), *blocks)
    if pending is None or removed is None:
        counted = counted.withColumn("without_ratings", F.array().cast("array<string>"))
    else:
        idle = pending.join(removed.select("request_id"), "request_id", "left_anti")
        idle = idle.orderBy("request_id").limit(MOST_NAMED)
        counted = counted.crossJoin(idle.agg(F.array_sort(F.collect_list("request_id"))))
    row = counted.first()
    assert row is not None
    return tuple(row)
