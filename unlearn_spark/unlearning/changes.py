"""What a night has to do: pending requests and new ratings, as changes of the published model.

Computed from the ratings version that the published model names, never from the newest: a job that
died after deleting rows finds the same work again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyspark.sql import functions as F

from unlearn_spark import publishing
from unlearn_spark.als.blocks import SIDES
from unlearn_spark.als.spark import block_of, materialise
from unlearn_spark.errors import InputError
from unlearn_spark.tables import ratings, receipts, tombstones
from unlearn_spark.unlearning import requests

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.models import ModelVersion
    from unlearn_spark.tables.store import Store

LARGE_SHARE, LARGE_CHANGES = 0.05, 250_000
"""A night that changes so many ratings, and this share of all, sweeps everything at once: to put
the changes into the ledger would take longer than to encode the ratings anew."""

FEW_USERS = 128
"""The ratings of so many users are a small part of all, and are found without reading the rest."""

PAIR = ["user_id", "item_id"]


@dataclass(frozen=True)
class News:
    """What has come since the published model.

    Attributes
    ----------
    pending
        Requests without a receipt; None where nothing was ever asked.
    scopes
        How many of them have each scope.
    n_users
        About how many users the ingested ratings are of.
    ratings_version, ingest_id, tombstones_version
        The state of the tables that this was found in.
    """

    pending: DataFrame | None
    scopes: dict[str, int]
    n_users: int
    ratings_version: int
    ingest_id: int
    tombstones_version: int | None

    @property
    def n_requests(self) -> int:
        return sum(self.scopes.values())

    @property
    def is_small(self) -> bool:
        """Is what is read for it little enough for `SMALL_QUERIES`?"""
        return "item" not in self.scopes and self.n_requests + self.n_users <= FEW_USERS


@dataclass(frozen=True)
class Changes:
    """What a night has to do.

    Attributes
    ----------
    news
        What it was computed from.
    removed
        user_id, item_id, request_id: one row for each rating and request, in the model or not.
    pairs
        user_id, item_id, value, change (-1 leaves the model, +1 enters it).
    blocks
        By side those in which the rows of `pairs` lie.
    n_removed, n_added
        Ratings that requests take out of the model, and new or corrected ones.
    net
        By how many ratings the model grows.
    """

    news: News
    removed: DataFrame | None
    pairs: DataFrame
    blocks: dict[str, list[int]]
    n_removed: int
    n_added: int
    net: int

    @property
    def figures(self) -> dict[str, Any]:
        """Of the job's JSON."""
        return {
            "requests": self.news.n_requests,
            "ratings_removed": self.n_removed,
            "ratings_added": self.n_added,
        }

    def are_large(self, n_ratings: int) -> bool:
        """Is sweeping everything the quicker way for a model of so many ratings?"""
        n_changes = self.n_removed + self.n_added
        return n_changes >= max(LARGE_CHANGES, LARGE_SHARE * n_ratings)


def find_news(store: Store, model: ModelVersion, checkpoint: str) -> News:
    """Pending requests, and how much was ingested; reads no rating that the model knows.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    if model.ratings_version is None:
        raise InputError(f"model version {model.model_version} names no ratings; train it here")
    heads = publishing.together(
        {
            "ratings": lambda: store.version(ratings.TABLE),
            "tombstones": lambda: tombstones.version(store),
        }
    )
    ratings_version, tombstones_version = heads["ratings"], heads["tombstones"]
    assert ratings_version is not None
    pending = None
    scopes: dict[str, int] = {}
    if tombstones_version is not None:
        pending = materialise(_pending(store, model, tombstones_version), checkpoint)
        scopes = dict(pending.groupBy("scope").count().toLocalIterator())
    ingest_id, n_users = model.ratings_ingest_id or 0, 0
    if ratings_version != model.ratings_version:
        later = ratings.since(store, ingest_id, ratings_version)
        newest = F.coalesce(F.max("ingest_id"), F.lit(ingest_id))
        row = later.agg(newest, F.approx_count_distinct("user_id")).first()
        assert row is not None
        ingest_id, n_users = row
    return News(pending, scopes, n_users, ratings_version, ingest_id, tombstones_version)


def collect_changes(store: Store, model: ModelVersion, news: News, checkpoint: str) -> Changes:
    """The ratings that requests take out of the model, and those that come in.

    Reads the user blocks that the requests name, and all of the ratings only for a request that
    names an item.
    """
    ratings_version, tombstones_version = news.ratings_version, news.tombstones_version
    removed, leaving, pairs = None, None, None
    if news.pending is not None and news.n_requests:
        found = _found(store, model, news.pending, "item" in news.scopes, ratings_version)
        found = materialise(found, checkpoint)
        removed = found.select(*PAIR, F.explode("asked").alias("request_id")).distinct()
        leaving = found.where("known").select(*PAIR, "rating")
        pairs = _changed(leaving, -1)
    ingested = ratings_version != model.ratings_version
    if ingested:
        added = _added(store, model, removed, ratings_version, tombstones_version)
        added = materialise(added, checkpoint)
        replaced = ratings.covering(store, added.select(PAIR), model.ratings_version)
        replaced = _with_known(store, model, replaced).where("known").select(*PAIR, "rating")
        if leaving is not None:
            replaced = replaced.join(leaving.select(PAIR), PAIR, "left_anti")
        more = _changed(replaced, -1).unionByName(_changed(added, 1))
        pairs = materialise(more if pairs is None else pairs.unionByName(more), checkpoint)
    if pairs is None:
        nothing = ratings.read(store, ratings_version).limit(0)
        pairs = _changed(nothing.select(*PAIR, "rating"), 1)
    n_left, n_added, *blocks = _counted(pairs, model)
    n_removed = n_left
    if ingested:  # old values of corrected ratings leave as well
        n_removed = leaving.count() if leaving is not None else 0
    return Changes(
        news,
        removed,
        pairs,
        {side: sorted(numbers) for side, numbers in zip(SIDES, blocks, strict=True)},
        n_removed,
        n_added,
        n_added - n_left,
    )


def _pending(store: Store, model: ModelVersion, tombstones_version: int) -> DataFrame:
    """Requests in force that the model has not answered."""
    pending = requests.effective(tombstones.read(store, tombstones_version))
    done = receipts.read(store, model)
    if done is None:
        return pending
    return pending.join(done.select("request_id"), "request_id", "left_anti")


def _found(
    store: Store, model: ModelVersion, pending: DataFrame, by_item: bool, ratings_version: int
) -> DataFrame:
    """Ratings that requests cover: user_id, item_id, rating, `asked` (the requests), and `known`:
    was the model fitted to it?"""
    columns = [*PAIR, "rating", "asked", "known"]
    assert model.ratings_version is not None
    before = _covered(store, pending, by_item, model.ratings_version)
    found = _with_known(store, model, before).select(columns)
    if ratings_version == model.ratings_version:
        return found
    # Also what a job that died after deleting has left, and what was ingested since.
    now = _covered(store, pending, by_item, ratings_version).withColumn("known", F.lit(False))
    return found.unionByName(now.select(columns))


def _covered(store: Store, pending: DataFrame, by_item: bool, version: int) -> DataFrame:
    """The ratings of a version that requests cover, with `asked`: the requests.

    `by_item`: there are requests that name an item, so that every user's ratings must be read.
    """
    of_users = pending.where("scope != 'item'").select("user_id")
    rows = ratings.covering(store, of_users, version)
    if by_item:
        of_items = pending.where("scope = 'item'").select("item_id")
        rows = rows.unionByName(ratings.covering(store, of_items, version)).distinct()
    marked = requests.with_requests(rows, pending, guard=False)
    return marked.where(F.size("request_ids") > 0).withColumnRenamed("request_ids", "asked")


def _with_known(store: Store, model: ModelVersion, rows: DataFrame) -> DataFrame:
    """Rows of the published ratings with `known`: was the model fitted to it?"""
    fitted = F.col("ingest_id") <= (model.ratings_ingest_id or 0)
    if model.tombstones_version is not None:
        earlier = tombstones.read(store, model.tombstones_version)
        rows = requests.with_requests(rows, earlier, guard=True)
        fitted = fitted & (F.size("request_ids") == 0)
    return rows.withColumn("known", fitted)


def _added(
    store: Store,
    model: ModelVersion,
    removed: DataFrame | None,
    ratings_version: int,
    tombstones_version: int | None,
) -> DataFrame:
    """user_id, item_id, rating of ratings that came since, unless a request covers them."""
    added = ratings.since(store, model.ratings_ingest_id or 0, ratings_version)
    if tombstones_version is not None:
        added = requests.retained(added, tombstones.read(store, tombstones_version))
    if removed is not None:
        added = added.join(removed.select(PAIR).distinct(), PAIR, "left_anti")
    return added.select(*PAIR, "rating")


def _changed(rows: DataFrame, change: int) -> DataFrame:
    return rows.withColumnRenamed("rating", "value").withColumn("change", F.lit(change))


def _counted(pairs: DataFrame, model: ModelVersion) -> tuple[int, int, list[int], list[int]]:
    """How many pairs leave and enter, and the blocks of their users and items."""
    blocks = [
        F.collect_set(block_of(f"{side}_id", model.settings["layouts"][side]["n_blocks"]))
        for side in SIDES
    ]
    row = pairs.agg(F.expr("count_if(change < 0)"), F.expr("count_if(change > 0)"), *blocks).first()
    assert row is not None
    return tuple(row)
