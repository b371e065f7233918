"""Helpers for DataFrames: compute once, aggregate both sides, count the session's task slots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.spark.arrow import matrix_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession


def gram_of(rows: DataFrame, rank: int) -> np.ndarray:
    """X'X of factor rows, float64 (rank, rank); only partial sums reach the driver."""

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        total = np.zeros((rank, rank))
        for batch in batches:
            x = matrix_of(batch.column("factors"), rank).astype(np.float64)
            total += x.T @ x
        yield pa.RecordBatch.from_arrays([pa.array([total.tobytes()], pa.binary())], ["gram"])

    total = np.zeros((rank, rank))
    for row in rows.select("factors").mapInArrow(add_up, "gram binary").collect():
        total += np.frombuffer(row["gram"]).reshape(rank, rank)
    return total


def session_parallelism(spark: SparkSession) -> int:
    """The number of task slots of the session, found in a way that Spark Connect allows.

    Spark cuts `spark.range` into one slice per default task slot.
    """
    slices = spark.range(4096).select(F.spark_partition_id().alias("slice"))
    last = slices.agg(F.max("slice")).first()
    return 1 if last is None else int(last[0]) + 1


def materialise(frame: DataFrame, how: str) -> DataFrame:
    """Compute a frame once and keep its rows.

    `how` is `execution.checkpoint`: "local" also truncates the plan, which keeps loops fast;
    "persist" is for clusters that may lose executors.
    """
    frame = frame.persist()
    if how == "local":
        # Cached first: a checkpoint keeps the plan's estimated size, and a join's is a product. In
        # a loop the estimate would double its digits every round. A cache knows its true size.
        kept = frame.localCheckpoint(eager=True)
        frame.unpersist()
        return kept
    frame.count()
    return frame


def aggregates_of(frames: dict[str, DataFrame], *aggregates: Column) -> dict[str, tuple[Any, ...]]:
    """By side: the aggregates of its frame. One job computes both sides."""
    users, items = (frames[side].agg(*aggregates) for side in SIDES)
    row = users.crossJoin(items).first()
    assert row is not None
    return {"user": tuple(row)[: len(aggregates)], "item": tuple(row)[len(aggregates) :]}
