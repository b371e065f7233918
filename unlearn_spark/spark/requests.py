"""Finds the ratings that deletion requests cover, by the rules of `tables.requests.rules`."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import pyarrow.compute as pc
from pyspark.sql import functions as F
from pyspark.sql import types as T

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.tables.relational import query

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame


def covered(ratings: DataFrame, rules: pa.Table) -> DataFrame:
    """The ratings that rules cover: one row per rating and request, with its `request_id`.

    Parameters as for `with_requests`.
    """
    marked = with_requests(ratings, rules)
    return marked.withColumn("request_id", F.explode("request_ids")).drop("request_ids")


def retained(ratings: DataFrame, rules: pa.Table | None) -> DataFrame:
    """The ratings that no rule covers; parameters as for `with_requests` (None: no rules)."""
    if rules is None:
        return ratings
    return with_requests(ratings, rules).where(F.size("request_ids") == 0).drop("request_ids")


def with_requests(ratings: DataFrame, rules: pa.Table) -> DataFrame:
    """The ratings with `request_ids` array<string>: the requests that cover each, in order.

    Parameters
    ----------
    ratings
        user_id and item_id (string or bigint), rated_at timestamp, and any other columns.
    rules
        From `tables.requests.rules`. They are broadcast, so they must fit in memory.
    """
    found = [F.array().cast("array<string>")]
    marked = ratings
    by_id = query(
        """
        SELECT "by", id, list({
            'request_id': request_id, 'item': item, 'from': "from", 'to': "to", 'until': until
        }) AS rules
        FROM rules GROUP BY ALL
        """,
        rules=rules,
    )
    for side in SIDES:
        mine = by_id.filter(pc.equal(by_id["by"], side))
        if not mine.num_rows:
            continue
        named = ratings.sparkSession.createDataFrame(mine.select(["id", "rules"]))
        id = typed_id(F.col("id"), ratings.schema[f"{side}_id"].dataType)
        named = named.select(id.alias(f"__{side}_id"), F.col("rules").alias(f"__{side}_rules"))
        named = named.where(F.col(f"__{side}_id").isNotNull())
        marked = marked.join(
            F.broadcast(named), F.col(f"{side}_id") == F.col(f"__{side}_id"), "left"
        ).drop(f"__{side}_id")
        here = F.col(f"__{side}_rules")
        names = F.transform(F.filter(here, _holds), lambda rule: rule["request_id"])
        found.append(F.when(here.isNull(), found[0]).otherwise(names))
    marked = marked.withColumn("request_ids", F.array_sort(F.concat(*found)))
    return marked.drop(*[f"__{side}_rules" for side in SIDES])


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
