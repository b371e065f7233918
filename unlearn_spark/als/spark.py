"""What blocks look like as Spark rows: schemas, Arrow conversion, and how they are placed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import RatingBlock

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PART_SCHEMA = "key int, part int, slots binary, counts binary, others binary, values binary"
"""Pieces of rating parts: whole rows, or loose ratings, where `counts` is null and `slots` names
the row of each (see `RatingBlock.from_pieces`)."""

FACTOR_SCHEMA = "part int, slots binary, factors binary, gram binary, scalar double, missing int"
"""Factor rows of one part: int32 slots, float32 (n, rank) rows, their float64 Gram matrix where
the objective is implicit, their share of the penalty on their side, and 1 where there are no rows
because the part's ratings were not found (see `local_parts`)."""

_KINDS = {
    "key": pa.int32(),
    "part": pa.int32(),
    "missing": pa.int32(),
    "scalar": pa.float64(),
    "quadratic": pa.float64(),
    "penalty": pa.float64(),
    "worst": pa.float64(),
}


def arrays_of(table: pa.Table | pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as dictionaries; binary values as buffers of the table, not copies."""
    columns = [_values(table.column(name)) for name in table.schema.names]
    return [dict(zip(table.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _values(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_binary(column.type):
        return column.to_pylist()
    values: list[Any] = []
    for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        # Slices of the chunk's own buffer: a scalar of it (`chunk[i].as_buffer()`) is a copy.
        _, ends, data = chunk.buffers()
        data = data or pa.py_buffer(b"")  # may be absent where every value is empty
        bounds = np.frombuffer(ends, np.int32)[chunk.offset :][: len(chunk) + 1].tolist()
        valid = chunk.is_valid().to_pylist()
        values += [
            data.slice(first, last - first) if there else None
            for (first, last), there in zip(pairwise(bounds), valid, strict=True)
        ]
    return values


def part_of(pieces: pa.Table) -> tuple[int, RatingBlock]:
    """A part's number and its ratings, from its pieces (`PART_SCHEMA`)."""
    rows = arrays_of(pieces)
    return rows[0]["part"], RatingBlock.from_pieces(rows)


def binary_table(rows: Iterable[Mapping[str, Any]], **kinds: pa.DataType) -> pa.Table:
    """An Arrow table of such rows; columns are binary unless `_KINDS` or `kinds` says otherwise.

    The column order is that of the first row, and must be the schema's: Spark takes the columns
    of `mapInArrow` by position.
    """
    rows = list(rows)
    columns = {}
    for name in rows[0]:
        kind = kinds.get(name) or _KINDS.get(name) or pa.binary()
        values = [row[name] for row in rows]
        columns[name] = (
            _binary_array(values) if kind == pa.binary() else pa.array(values, type=kind)
        )
    return pa.table(columns)


def _binary_array(values: list[Any]) -> pa.Array:
    """A binary column from buffers; a single value is wrapped without a copy."""
    if len(values) == 1 and values[0] is not None:
        return one_binary(values[0])
    return pa.array([None if v is None else bytes(v) for v in values], type=pa.binary())


def one_binary(value: Any) -> pa.Array:
    """A column of one binary value that stands on the given buffer."""
    data = pa.py_buffer(value)
    offsets = pa.py_buffer(np.array([0, data.size], np.int32))
    return pa.Array.from_buffers(pa.binary(), 1, [None, offsets, data])


def pieces_table(rows: Iterable[Mapping[str, Any]], **kinds: pa.DataType) -> pa.Table:
    """The same as `binary_table`, but of one batch a row, so that nothing is copied and the JVM
    holds no more than a row at a time."""
    return pa.concat_tables([binary_table([row], **kinds) for row in rows])


def list_of(values: pa.Array) -> pa.Array:
    """A column of one list."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def list_column(matrix: np.ndarray) -> pa.Array:
    """A float32 (n, rank) matrix as a column of type array<float>, without a copy."""
    n, rank = matrix.shape
    flat = pa.array(np.ascontiguousarray(matrix, np.float32).reshape(-1))
    return pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * rank), flat)


def matrix_of(column: pa.Array | pa.ChunkedArray, rank: int) -> np.ndarray:
    """The reverse: array<float> values of equal length as a float32 (n, rank) matrix."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # pyarrow keeps an empty chunked array chunked
        return np.zeros((0, rank), np.float32)
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), rank)


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


NARROW_ROWS = {"spark.sql.execution.arrow.maxBytesPerBatch": str(2**31 - 1)}
"""Hand rows to Python in batches that the number of rows alone limits. Spark 4.1 also limits their
bytes, and to do so adds up the sizes of all vectors after every row: with rows of three numbers
that takes longer than all the rest."""

LARGE_ROWS = {"spark.sql.inMemoryColumnarStorage.batchSize": "1"}
"""Cache every row by itself. Else their bytes are gathered in buffers of up to 4 MB that grow step
by step, and objects of that size make the JVM's heap grow (see `solver.MESSAGE_BYTES`)."""

SMALL_ROW_GROUPS = {"parquet.block.size": str(256 * 1024), "parquet.page.size.row.check.min": "1"}
"""Parquet files of many row groups, each with statistics of its own: one row each where rows are as
large as a chunk of ratings, so that of a file the wanted ones alone are read. (Delta hands none of
a writer's own options to Parquet.)"""

SMALL_QUERIES = {
    # Interpret expressions outside of whole-stage code. Delta keeps the state of a table in rows of
    # so many fields that Spark compiles none of their stages whole; each of their tasks then writes
    # the code of its projections anew, and to split it measures it line by line with regular
    # expressions. That was two fifths of what the tasks of a night took, and its small tables do
    # not need compiled code.
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    # For the commits of a Delta log, read as text, such code is written all the same, and every
    # task has its share of unpacking plans: one task for what fits into one, however many cores.
    "spark.sql.files.minPartitionNum": "1",
    "spark.sql.files.maxPartitionBytes": "32m",
    "spark.sql.shuffle.partitions": "1",
    # Nothing is left to adapt, and to plan anew after every stage takes longer than most stages.
    "spark.sql.adaptive.enabled": "false",
}
"""For many queries over small tables, where planning and starting tasks is what takes time. Where
there may be many rows, the number of partitions must be said."""


def session_parallelism(spark: SparkSession) -> int:
    """Task slots of the session, learnt in a way that Connect allows.

    `spark.range` is cut into one slice per default task slot.
    """
    slices = spark.range(4096).select(F.spark_partition_id().alias("slice"))
    last = slices.agg(F.max("slice")).first()
    return 1 if last is None else int(last[0]) + 1


def _murmur3_int(value: int, seed: int = 42) -> int:
    """Spark's `hash(int)`: Murmur3 x86 32-bit over one little-endian word, seed 42."""
    mask = 0xFFFFFFFF

    def rotate(x: int, r: int) -> int:
        return ((x << r) | (x >> (32 - r))) & mask

    k = (value & mask) * 0xCC9E2D51 & mask
    k = rotate(k, 15) * 0x1B873593 & mask
    h = (rotate(seed ^ k, 13) * 5 + 0xE6546B64) & mask
    h ^= 4
    h = (h ^ (h >> 16)) * 0x85EBCA6B & mask
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & mask
    h ^= h >> 16
    return h - (1 << 32) if h >> 31 else h


@lru_cache(maxsize=64)
def balanced_keys(n: int) -> tuple[int, ...]:
    """`n` integers that Spark's hash partitioning spreads over `n` partitions one by one.

    With the keys 0..n-1 about a third of the partitions would stay empty and others hold two or
    three parts, which a stage then waits for. Only the balance rests on this, no result.
    """
    keys: dict[int, int] = {}
    candidate = 0
    while len(keys) < n:
        keys.setdefault(_murmur3_int(candidate) % n, candidate)
        candidate += 1
    return tuple(keys[index] for index in range(n))


def part_key(slot: str, keys: Sequence[int]) -> str:
    """SQL for: the grouping key of the part that a slot (or a part's own number) belongs to."""
    return f"element_at({int_array(keys)}, {slot} % {len(keys)} + 1)"


def int_array(numbers: Iterable[int]) -> str:
    """SQL for: an array of these numbers."""
    return f"array({', '.join(map(str, numbers))})"


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
