"""Ids to slots and ratings to parts, over several fragments and two types of id."""

import numpy as np
import pytest
from chispa import assert_df_equality
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark.core.layout import MAX_BLOCKS, choose_blocks
from unlearn_spark.spark.training import encoding
from unlearn_spark.spark.training.layout import SideLayout

N_BLOCKS = {"user": 4, "item": 2}


@pytest.fixture(scope="module")
def ratings(spark):
    random = np.random.default_rng(7)
    users, items = np.nonzero(random.random((60, 25)) < 0.4)
    rows = [
        (int(u) * 1_000_003 - 5, f"film {i % 19}", float(n % 9) / 2)
        for n, (u, i) in enumerate(zip(users, items, strict=True))
    ]
    frame = spark.createDataFrame(rows, "user_id long, item_id string, rating float")
    return frame.repartition(3).persist()


@pytest.fixture(scope="module")
def fragments(ratings):
    return encoding.fragment(ratings).persist()


@pytest.fixture(scope="module")
def numbered(fragments):
    return {
        side: encoding.number(fragments, side, n_blocks).persist()
        for side, n_blocks in N_BLOCKS.items()
    }


@pytest.mark.parametrize("side", ["user", "item"])
def test_slots_follow_the_rule(ratings, fragments, numbered, side):
    assert fragments.select("fragment").distinct().count() == 3
    n_blocks = N_BLOCKS[side]
    position = F.row_number().over(Window.partitionBy("block").orderBy(F.desc("n_ratings"), "id"))
    expected = (
        ratings.groupBy(F.col(f"{side}_id").alias("id"))
        .agg(F.count("*").cast("int").alias("n_ratings"))
        .withColumn("block", F.pmod(F.xxhash64("id"), F.lit(n_blocks)).cast("int"))
        .withColumn("slot", ((position - 1) * n_blocks + F.col("block")).cast("int"))
    )
    found = encoding.dictionary(numbered[side], n_blocks)
    assert_df_equality(found, expected, ignore_row_order=True, ignore_nullable=True)


def test_rows_are_estimated_and_ratings_counted(ratings, fragments):
    estimates, n_ratings = encoding.estimate_sizes(fragments)
    for side, estimate in estimates.items():
        rows = ratings.select(f"{side}_id").distinct().count()
        assert abs(estimate - rows) <= 0.1 * rows
    assert n_ratings == ratings.count()


@pytest.mark.parametrize(
    ("n_rows", "n_ratings", "parallelism", "n_blocks"),
    [
        (600, 20_000, 2, 1),
        (9_000, 100_000, 2, 2),
        (9_000, 10_000_000, 2, 8),
        (250, 1_000_000_000, 100, 128),
        (480_189, 100_480_507, 2, 32),
        (1_000_000_000, 10_000_000_000, 2, MAX_BLOCKS),
    ],
)
def test_number_of_blocks(n_rows, n_ratings, parallelism, n_blocks):
    assert choose_blocks(n_rows, n_ratings, parallelism, None) == n_blocks
    assert choose_blocks(n_rows, n_ratings, parallelism, 3) == 3


def test_every_rating_is_once_in_a_part_of_either_side(ratings, fragments, numbered):
    names = {side: encoding.dictionary(numbered[side], N_BLOCKS[side]) for side in N_BLOCKS}
    layouts = {
        side: SideLayout(
            side,
            n_rows=names[side].count(),
            n_blocks=n_blocks,
            n_parts=2,
            n_slots=names[side].agg(F.max("slot")).first()[0] + 1,
            first_place=0 if side == "user" else 2,
            n_places=4,
        )
        for side, n_blocks in N_BLOCKS.items()
    }
    entries = encoding.encode(fragments, numbered, layouts).persist()
    ids = {side: {row.slot: row.id for row in names[side].collect()} for side in names}
    expected = sorted(map(tuple, ratings.collect()))
    partitions = set()
    for side, other in (("user", "item"), ("item", "user")):
        found = []
        parts = encoding.entries_of(entries, side).withColumn("at", F.spark_partition_id())
        for row in parts.collect():
            slots, others = np.frombuffer(row.slots, np.int32), np.frombuffer(row.others, np.int32)
            assert (slots % layouts[side].n_parts == row.part).all()
            assert row.key == layouts[side].keys[row.part]
            partitions.add((side, row.part, row["at"]))
            for slot, other_slot, value in zip(
                slots, others, np.frombuffer(row["values"], np.float32), strict=True
            ):
                pair = {side: ids[side][slot], other: ids[other][other_slot]}
                found.append((pair["user"], pair["item"], float(value)))
        assert sorted(found) == expected
    assert len(partitions) == 4  # every part whole and alone in its partition
    assert len({at for _, _, at in partitions}) == 4
    entries.unpersist()
