"""DataFrames that are computed once, and what the session can do at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unlearn_spark.core.blocks import SIDES

if TYPE_CHECKING:
    from pyspark.sql import Column

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark.spark.arrow import matrix_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


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
    """Task slots of the session, learnt in a way that Connect allows.

    `spark.range` is cut into one slice per default task slot.
    """
    slices = spark.range(4096).select(F.spark_partition_id().alias("slice"))
    last = slices.agg(F.max("slice")).first()
    return 1 if last is None else int(last[0]) + 1


def materialise(frame: DataFrame, how: str) -> DataFrame:
    """Compute a frame once and keep it.

    Parameters
    ----------
    how
        `execution.checkpoint`: "local" also truncates the plan, so that loops stay fast; "persist"
        is for clusters that may lose executors.
    """
    frame = frame.persist()
    if how == "local":
        # A checkpoint keeps the estimated size of its plan, and the estimate of a join is a
        # product: in a loop it would double its digits every round, until planning takes minutes.
        # That of a cache is what it measured.
        kept = frame.localCheckpoint(eager=True)
        frame.unpersist()
        return kept
    frame.count()
    return frame


def aggregates_of(frames: dict[str, DataFrame], *aggregates: Column) -> dict[str, tuple[Any, ...]]:
    """Aggregates of the frames of both sides, by one job and one row."""
    users, items = (frames[side].agg(*aggregates) for side in SIDES)
    row = users.crossJoin(items).first()
    assert row is not None
    return {"user": tuple(row)[: len(aggregates)], "item": tuple(row)[len(aggregates) :]}
