"""Draw the pairs on which models are compared, and score them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark.audit import membership
from unlearn_spark.audit.figures import (
    DELETED,
    NEIGHBOURING,
    PANEL_ROWS,
    RANDOM,
    REACH,
    SAMPLE_PAIRS,
    SAMPLE_SEED,
    UNSEEN,
    Scores,
)
from unlearn_spark.core.blocks import SIDES
from unlearn_spark.spark.arrow import matrix_of, vectors_of
from unlearn_spark.spark.comparison.deletion import Deletion
from unlearn_spark.spark.frames import materialise

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCORE_PARTS = 16

_SCORE_SCHEMA = ", ".join(
    [
        "kind string, user_id string, item_id string, matched boolean, scorable boolean",
        *(f"{name} double" for name in membership.FEATURES),
    ]
)


@dataclass(frozen=True)
class Sample:
    """The pairs on which predictions are compared.

    Attributes
    ----------
    pairs
        kind, user_id, item_id, matched. `deleted`; `unseen`: for each matched deleted pair the same
        user with an item of like popularity that was never rated; `neighbouring`: retained ratings
        of users or items that lost one; `random`: any user with any item.
    panel
        By side: `id` of up to `PANEL_ROWS` users or items.
    """

    pairs: DataFrame
    panel: Mapping[str, DataFrame]


def draw_sample(deletion: Deletion, checkpoint: str, size: int = SAMPLE_PAIRS) -> Sample:
    """Up to `size` pairs of each class, those with the smallest hashes."""
    retained, deleted = deletion.retained, deletion.deleted
    panel = {
        side: _by_hash(retained.select(F.col(f"{side}_id").alias("id")).distinct(), PANEL_ROWS)
        for side in SIDES
    }
    panel = {side: materialise(rows, checkpoint) for side, rows in panel.items()}
    members = materialise(_by_hash(deleted, size), checkpoint)
    matches = materialise(_matches(deletion, members), checkpoint)
    neighbours = retained.select("user_id", "item_id")
    for side in SIDES:
        lost = deleted.select(f"{side}_id").distinct().withColumn(f"{side}_lost", F.lit(True))
        neighbours = neighbours.join(lost, f"{side}_id", "left")
    neighbours = neighbours.where("user_lost OR item_lost").select("user_id", "item_id")
    anything = (
        panel["user"]
        .withColumnRenamed("id", "user_id")
        .crossJoin(panel["item"].withColumnRenamed("id", "item_id"))
    )
    found = members.join(matches, ["user_id", "item_id"], "left")
    classes = {
        DELETED: found.select("user_id", "item_id", F.col("match").isNotNull().alias("matched")),
        UNSEEN: matches.select("user_id", F.col("match").alias("item_id"), F.lit(True)),
        NEIGHBOURING: _by_hash(neighbours, size).select("user_id", "item_id", F.lit(False)),
        RANDOM: _by_hash(anything, size).select("user_id", "item_id", F.lit(False)),
    }
    pairs: DataFrame | None = None
    for kind, rows in classes.items():
        rows = rows.toDF("user_id", "item_id", "matched").withColumn("kind", F.lit(kind))
        pairs = rows if pairs is None else pairs.unionByName(rows)
    assert pairs is not None
    return Sample(materialise(pairs, checkpoint), panel)


def _by_hash(rows: DataFrame, n: int) -> DataFrame:
    return rows.orderBy(F.xxhash64(*rows.columns, F.lit(SAMPLE_SEED)), *rows.columns).limit(n)


def _matches(deletion: Deletion, members: DataFrame) -> DataFrame:
    """user_id, item_id of members and `match`: the never-rated item nearest in popularity.

    The same item may match several members; so popularities also agree for somebody who rated most
    popular items. A member without a free item within `REACH` places has no row.
    """
    counted = deletion.known.groupBy("item_id").agg(F.count(F.lit(1)).alias("n"))
    order = [F.desc("n"), F.xxhash64("item_id", F.lit(SAMPLE_SEED)), F.col("item_id")]
    # One task orders all items by count: far fewer rows than there are ratings.
    place = F.row_number().over(Window.partitionBy(F.lit(0)).orderBy(*order))
    places = counted.select("item_id", place.alias("place"))
    steps = [step for distance in range(1, REACH + 1) for step in (-distance, distance)]
    around = (
        members.join(places, "item_id")
        .select("user_id", "item_id", "place", F.explode(F.array(*map(F.lit, steps))).alias("step"))
        .withColumn("place", F.col("place") + F.col("step"))
        .join(places.withColumnRenamed("item_id", "match"), "place")
    )
    pair = ["user_id", "item_id"]
    rated = deletion.known.select(pair).unionByName(deletion.retained.select(pair))
    rated = rated.join(members.select("user_id").distinct(), "user_id", "left_semi")
    rated = rated.select("user_id", F.col("item_id").alias("match"))
    free = around.join(rated, ["user_id", "match"], "left_anti")
    nearness = F.struct(F.abs("step"), F.xxhash64("user_id", "match"), F.col("match"))
    return free.groupBy(pair).agg(F.min_by("match", nearness).alias("match"))


def score_sample(sample: Sample, factors: Mapping[str, DataFrame], rank: int) -> Scores:
    """Score the sample with a model's factors (by side: id, factors array<float>)."""
    joined = sample.pairs
    for side in SIDES:
        rows = factors[side].select(
            F.col("id").alias(f"{side}_id"), F.col("factors").alias(f"{side}_vector")
        )
        joined = joined.join(rows, f"{side}_id", "left")
    joined = joined.select(
        F.pmod(F.xxhash64("user_id"), F.lit(_SCORE_PARTS)).cast("int").alias("key"),
        "kind",
        F.col("user_id").cast("string"),
        F.col("item_id").cast("string"),
        "matched",
        "user_vector",
        "item_vector",
    )
    keys = F.explode(F.sequence(F.lit(0), F.lit(_SCORE_PARTS - 1))).alias("key")
    panels = [
        sample.panel[side]
        .join(factors[side], "id")
        .select(keys, F.lit(side).alias("side"), "factors")
        for side in SIDES
    ]

    def score(pairs: pa.Table, panel: pa.Table) -> pa.Table:
        vectors, known = {}, {}
        for side in SIDES:
            column = pa.concat_arrays(pairs[f"{side}_vector"].chunks)
            vectors[side], known[side] = vectors_of(column, rank)
        sides = panel["side"].to_pylist()
        every = matrix_of(panel["factors"], rank) if sides else np.zeros((0, rank), np.float32)
        chosen = {side: every[[one == side for one in sides]] for side in SIDES}
        features = membership.attack_features(
            vectors["user"], vectors["item"], chosen["user"], chosen["item"]
        )
        return pa.table(
            {
                **{name: pairs[name] for name in ("kind", "user_id", "item_id", "matched")},
                "scorable": pa.array(known["user"] & known["item"]),
                **{name: features[:, i] for i, name in enumerate(membership.FEATURES)},
            }
        )

    def score_if_any(pairs: pa.Table, panel: pa.Table) -> pa.Table:
        if pairs.num_rows:
            return score(pairs, panel)
        kinds = {"matched": pa.bool_(), "scorable": pa.bool_()}
        kinds |= dict.fromkeys(membership.FEATURES, pa.float64())
        names = ("kind", "user_id", "item_id", "matched", "scorable", *membership.FEATURES)
        return pa.schema([(name, kinds.get(name, pa.string())) for name in names]).empty_table()

    scored = (
        joined.groupBy("key")
        .cogroup(panels[0].unionByName(panels[1]).groupBy("key"))
        .applyInArrow(score_if_any, _SCORE_SCHEMA)
    )
    table = scored.toArrow().sort_by(
        [(name, "ascending") for name in ("kind", "user_id", "item_id")]
    )
    return Scores(
        np.asarray(table["kind"].to_pylist()),
        table["matched"].to_numpy(),
        table["scorable"].to_numpy(),
        np.column_stack([table[name].to_numpy() for name in membership.FEATURES]),
    )
