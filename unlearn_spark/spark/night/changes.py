"""Finds a night's work: the ratings that must leave the published model, and those that must enter.

It compares with the ratings version that the published model names, not with the newest. So if a
job died after it deleted ratings, the next one finds the same work again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.errors import InputError
from unlearn_spark.nightly import MOST_NAMED, Counts, unanswered
from unlearn_spark.spark import ratings, requests
from unlearn_spark.spark.frames import materialise
from unlearn_spark.spark.sql import block_of
from unlearn_spark.tables import tombstones
from unlearn_spark.tables.requests import rules, rules_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.tables.delta_spark import SparkStore
    from unlearn_spark.tables.models import ModelVersion

FEW_USERS = 128
"""The ratings of up to so many users are a small part of all, and Delta skips the rest."""

PAIR = ["user_id", "item_id"]


@dataclass(frozen=True)
class News:
    """Requests and ratings that arrived since the published model.

    Attributes
    ----------
    pending
        Requests without a receipt (`requests.effective`).
    lifts
        Reinstatements since the published model, which may let in ratings that it left out
        (columns of the tombstones).
    n_users
        The approximate number of users with newly ingested ratings.
    ratings_version, ingest_id, tombstones_version
        The Delta versions and the newest ingest that were read.
    """

    pending: pa.Table
    lifts: pa.Table
    n_users: int
    ratings_version: int
    ingest_id: int
    tombstones_version: int | None

    @property
    def n_requests(self) -> int:
        return self.pending.num_rows

    @property
    def may_add(self) -> bool:
        """Whether ratings may enter the model."""
        return bool(self.n_users or self.lifts.num_rows)

    @property
    def of_users(self) -> pa.Table:
        """The pending requests that name a user."""
        return self.pending.filter(pc.not_equal(self.pending["scope"], "item"))

    @property
    def of_items(self) -> pa.Table:
        """The pending requests that name an item alone."""
        return self.pending.filter(pc.equal(self.pending["scope"], "item"))

    @property
    def is_small(self) -> bool:
        """Whether the night reads little enough of the ratings table for `SMALL_QUERIES`."""
        reads_everything = self.of_items.num_rows or self.lifts.num_rows
        return not reads_everything and self.n_requests + self.n_users <= FEW_USERS


@dataclass(frozen=True)
class Changes:
    """A night's changes of the model and of the ratings table.

    Attributes
    ----------
    removed
        By request_id of every pending request: the number of ratings that it covers, in the model
        or not.
    stored
        user_id, item_id of the ratings to delete: the covered ones in the table's newest version.
        They exclude covered pairs that were rated again after the request.
    pairs
        user_id, item_id, value, change (-1 leaves the model, +1 enters it).
    blocks
        By side: the blocks of the rows of `pairs`.
    counts
        How much that is.
    """

    news: News
    removed: dict[str, int]
    stored: DataFrame | None
    pairs: DataFrame
    blocks: dict[str, list[int]]
    counts: Counts


def find_news(store: SparkStore, model: ModelVersion) -> News:
    """Find pending requests and newly ingested ratings; read no rating that the model knows.

    Raises
    ------
    InputError
        The model names no ratings.
    """
    if model.ratings_version is None:
        raise InputError(f"model version {model.model_version} names no ratings; train it here")
    ratings_version, tombstones_version = store.version(ratings.TABLE), tombstones.version(store)
    pending, lifts = unanswered(store, model, tombstones_version)
    ingest_id, n_users = model.ratings_ingest_id or 0, 0
    if ratings_version != model.ratings_version:
        later = ratings.since(store, ingest_id, ratings_version)
        newest = F.coalesce(F.max("ingest_id"), F.lit(ingest_id))
        row = later.agg(newest, F.approx_count_distinct("user_id")).first()
        assert row is not None
        ingest_id, n_users = row
    return News(pending, lifts, n_users, ratings_version, ingest_id, tombstones_version)


def collect_changes(store: SparkStore, model: ModelVersion, news: News, checkpoint: str) -> Changes:
    """Find the ratings that leave the model and those that enter it. Reads the user blocks that the
    requests name, and all ratings only if a request or a reinstatement names an item."""
    version = news.ratings_version
    found, stored, leaving, pairs = None, None, None, None
    if news.n_requests:
        found = materialise(_found(store, model, news), checkpoint)
        stored = found.where("stored").select(*PAIR)
        leaving = found.where("fitted").select(*PAIR, "rating")
        pairs = _changed(leaving, -1)
    may_add = version != model.ratings_version or bool(news.lifts.num_rows)
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
    n_left, n_added, user_blocks, item_blocks = _counted(pairs, model)
    n_removed = n_left
    if may_add:  # n_left also counts the old values of corrected ratings
        n_removed = leaving.count() if leaving is not None else 0
    removed = _removed(news.pending, found)
    idle = sorted(request for request, n in removed.items() if not n)
    return Changes(
        news,
        removed,
        stored,
        pairs,
        dict(zip(SIDES, (sorted(user_blocks), sorted(item_blocks)), strict=True)),
        Counts(
            n_requests=news.n_requests,
            without_ratings=idle[:MOST_NAMED],
            n_removed=n_removed,
            n_added=n_added,
            net=n_added - n_left,
        ),
    )


def _removed(pending: pa.Table, found: DataFrame | None) -> dict[str, int]:
    """By request_id of every pending request: the number of ratings that it covers."""
    removed = dict.fromkeys(pending["request_id"].to_pylist(), 0)
    if found is not None:
        # A pair counts once, though two versions of the table may have it.
        covered = found.select(*PAIR, F.explode("asked").alias("request_id")).distinct()
        counted = covered.groupBy("request_id").count().toArrow()
        removed.update(zip(*[column.to_pylist() for column in counted.columns], strict=True))
    return removed


def _found(store: SparkStore, model: ModelVersion, news: News) -> DataFrame:
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


def _covered(store: SparkStore, news: News, version: int) -> DataFrame:
    """The ratings of a version that pending requests cover, with the requests as `asked`."""
    users, items = news.of_users["user_id"], news.of_items["item_id"]
    marked = requests.with_requests(
        _named(store, users, items, version), rules(news.pending, guard=False)
    )
    return marked.where(F.size("request_ids") > 0).withColumnRenamed("request_ids", "asked")


def _named(
    store: SparkStore, users: pa.ChunkedArray, items: pa.ChunkedArray, version: int
) -> DataFrame:
    """The ratings of these users and items (text; nulls do not count); items make it read all
    ratings."""
    named = ratings.covering(store, store.frame(pa.table({"user_id": users})), version)
    if items.null_count == len(items):
        return named
    of_items = ratings.covering(store, store.frame(pa.table({"item_id": items})), version)
    return named.unionByName(of_items).distinct()


def _added(store: SparkStore, model: ModelVersion, news: News) -> DataFrame:
    """user_id, item_id, rating of the retained ratings that enter the model: those ingested since,
    and those that a reinstatement lets in."""
    version = news.ratings_version
    rows = ratings.since(store, model.ratings_ingest_id or 0, version)
    if news.lifts.num_rows:
        let_in = _named(store, news.lifts["user_id"], news.lifts["item_id"], version)
        let_in = ratings.with_fitted(store, model, let_in).where("NOT fitted").drop("fitted")
        rows = rows.unionByName(let_in.select(*rows.columns)).distinct()
    in_force = rules_of(store, news.tombstones_version, model.receipts_version)
    return requests.retained(rows, in_force).select(*PAIR, "rating")


def _changed(rows: DataFrame, change: int) -> DataFrame:
    return rows.withColumnRenamed("rating", "value").withColumn("change", F.lit(change))


def _counted(
    pairs: DataFrame, model: ModelVersion
) -> tuple[int, int, Sequence[int], Sequence[int]]:
    """The numbers of pairs that leave and enter, and the blocks of their users and items."""
    blocks = [
        F.collect_set(block_of(f"{side}_id", model.settings["layouts"][side]["n_blocks"]))
        for side in SIDES
    ]
    row = pairs.agg(F.expr("count_if(change < 0)"), F.expr("count_if(change > 0)"), *blocks).first()
    assert row is not None
    return row[0], row[1], row[2], row[3]
