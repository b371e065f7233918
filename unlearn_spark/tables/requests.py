"""Which ratings a deletion request covers.

A tombstone has a scope: `user` (all ratings of a user), `item` (all of an item), `rating` (one
pair, as it was rated up to the request) or `window` (a user's ratings with
`from_ts <= rated_at < to_ts`, up to the request). `reinstate` lifts the earlier user or item
tombstones of an id.

A request is pending until a model version has a receipt for it. Whether it is pending matters only
after a reinstatement:

=======  ========================================================================
request  a user or item tombstone that was lifted since
=======  ========================================================================
pending  still covers what was rated up to its `requested_at`: that was to be forgotten
done     covers nothing: what comes in again is welcome
=======  ========================================================================

Ingestion asks what may be stored; it treats every lifted tombstone as done (`guard`).

A rating whose time is unknown counts as older than every request, and is in no window.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

from pyspark.sql import functions as F
from pyspark.sql import types as T

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

SCOPES = ("user", "item", "rating", "window", "reinstate")


def effective(tombstones: DataFrame, done: DataFrame | None = None) -> DataFrame:
    """The deletion requests among the tombstones, with two more columns.

    `reinstated_at` (timestamp) is the first reinstatement of the request's user or item that is
    later than the request; null while the request is in force, and always for `rating` and
    `window`. A reinstatement at the very time of the request does not lift it. `pending` (boolean)
    says whether the request has no receipt.

    Parameters
    ----------
    done
        Receipts, with `request_id`; None: there are none.
    """
    lifts = tombstones.where(F.col("scope") == "reinstate")
    lifts = lifts.select(
        F.explode(
            F.array(
                *[
                    F.struct(F.lit(scope).alias("scope"), F.col(f"{scope}_id").alias("id"))
                    for scope in ("user", "item")
                ]
            )
        ).alias("lifted"),
        F.col("requested_at").alias("at"),
    ).where(F.col("lifted.id").isNotNull())
    lifts = lifts.groupBy(
        F.col("lifted.scope").alias("lift_scope"), F.col("lifted.id").alias("lift_id")
    ).agg(F.collect_list("at").alias("lifts"))
    requests = tombstones.where(F.col("scope") != "reinstate")
    target = F.when(F.col("scope") == "user", F.col("user_id")).when(
        F.col("scope") == "item", F.col("item_id")
    )
    joined = requests.join(
        F.broadcast(lifts),
        (F.col("scope") == F.col("lift_scope")) & (target == F.col("lift_id")),
        "left",
    )
    later = F.filter("lifts", lambda at: at > F.col("requested_at"))
    found = joined.withColumn("reinstated_at", F.array_min(later)).drop(
        "lift_scope", "lift_id", "lifts"
    )
    if done is None:
        return found.withColumn("pending", F.lit(True))
    answered = done.select("request_id", F.lit(False).alias("pending")).distinct()
    found = found.join(answered, "request_id", "left")
    return found.withColumn("pending", F.coalesce("pending", F.lit(True)))


def covered(
    ratings: DataFrame,
    tombstones: DataFrame,
    guard: bool,
) -> DataFrame:
    """The ratings that requests cover: one row per rating and request, with its `request_id`.

    Parameters
    ----------
    ratings
        user_id and item_id (string or bigint), rated_at timestamp, and any other columns.
    tombstones
        The whole tombstones table, or some rows of its `effective`: a part of the table does not
        show which requests were lifted. It is broadcast, so it must fit in memory.
    guard
        True: find what may not be stored. False: find what must be removed or may not be learnt
        (see the module).
    """
    marked = with_requests(ratings, tombstones, guard)
    return marked.withColumn("request_id", F.explode("request_ids")).drop("request_ids")


def retained(
    ratings: DataFrame,
    tombstones: DataFrame,
    guard: bool,
) -> DataFrame:
    """The ratings that no request covers; parameters as for `covered`."""
    marked = with_requests(ratings, tombstones, guard)
    return marked.where(F.size("request_ids") == 0).drop("request_ids")


def with_requests(
    ratings: DataFrame,
    tombstones: DataFrame,
    guard: bool,
) -> DataFrame:
    """The ratings with `request_ids` array<string>: the requests that cover each, in order.

    Parameters as for `covered`.
    """
    if "reinstated_at" not in tombstones.columns:
        tombstones = effective(tombstones)
    rules = _rules(tombstones, guard)
    nothing = F.array().cast("array<string>")
    marked = ratings
    found = []
    for side in ("user", "item"):
        mine = _by_id(rules.where(F.col("by") == side), ratings, f"{side}_id")
        mine = mine.toDF(f"__{side}_id", f"__{side}_rules")
        marked = marked.join(
            F.broadcast(mine), F.col(f"{side}_id") == F.col(f"__{side}_id"), "left"
        ).drop(f"__{side}_id")
        here = F.col(f"__{side}_rules")
        holding = F.filter(here, _holds)
        names = F.transform(holding, lambda rule: rule["request_id"])
        found.append(F.when(here.isNull(), nothing).otherwise(names))
    return marked.withColumn("request_ids", F.array_sort(F.concat(*found))).drop(
        "__user_rules", "__item_rules"
    )


def _rules(requests: DataFrame, guard: bool) -> DataFrame:
    """(by, id, rule): every request in one form, looked up by its user or its item.

    A rule covers a rating of that id if all its non-null fields hold: the item matches, the time is
    in [from, to), and it is not after `until`.
    """
    scope = F.col("scope")
    lifted = F.col("reinstated_at").isNotNull()
    covers_nothing = lifted & scope.isin("user", "item")
    if not guard:
        covers_nothing &= ~F.col("pending")
    open_ended = scope.isin("user", "item") & ~lifted
    rule = F.struct(
        F.col("request_id"),
        F.when(scope == "rating", F.col("item_id")).alias("item"),
        F.when(scope == "window", F.col("from_ts")).alias("from"),
        F.when(scope == "window", F.col("to_ts")).alias("to"),
        F.when(~open_ended, F.col("requested_at")).alias("until"),
    )
    by_item = scope == "item"
    return requests.where(~covers_nothing).select(
        F.when(by_item, "item").otherwise("user").alias("by"),
        F.when(by_item, F.col("item_id")).otherwise(F.col("user_id")).alias("id"),
        rule.alias("rule"),
    )


def _by_id(rules: DataFrame, ratings: DataFrame, column: str) -> DataFrame:
    """(id in the ratings' type, array of rules), without ids that are no value of that type."""
    cast = typed_id(F.col("id"), ratings.schema[column].dataType)
    rules = rules.select(cast.alias("id"), "rule").where(F.col("id").isNotNull())
    return rules.groupBy("id").agg(F.collect_list("rule").alias("rules"))


def typed_id(id: Column, kind: T.DataType) -> Column:
    """A string id in the type of a ratings column; null unless that type writes it so (not 007).

    Casting the few ids of the requests, not the many of the ratings, keeps joins cheap.
    """
    if isinstance(kind, T.StringType):
        return id
    number = id.try_cast(kind)
    return F.when(number.cast("string") == id, number)


def _holds(rule: Column) -> Column:
    rated_at = F.col("rated_at")
    same_item = rule["item"] == F.col("item_id").cast("string")
    tests = [
        rule["item"].isNull() | same_item,
        rule["from"].isNull() | F.coalesce(rated_at >= rule["from"], F.lit(False)),
        rule["to"].isNull() | F.coalesce(rated_at < rule["to"], F.lit(False)),
        rule["until"].isNull() | F.coalesce(rated_at <= rule["until"], F.lit(True)),
    ]
    return reduce(lambda left, right: left & right, tests)
