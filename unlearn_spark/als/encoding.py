"""From a table of ratings to rating blocks spread over a session, once per training.

The ids are replaced by slots (see `blocks`), the ratings are packed into binary chunks where they
are read, and only chunks are shuffled: never single ratings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark.als.blocks import RatingBlock, concatenate, raw, split_into_chunks
from unlearn_spark.als.spark import (
    PART_SCHEMA,
    arrays_of,
    balanced_keys,
    binary_table,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

Batches = Iterable[pa.RecordBatch]

PACK_RATINGS = 2_000_000
"""Ratings gathered before a chunk is sent: fewer, larger messages (24 MB at most each)."""

ROWS_PER_BLOCK = 4096
"""Rows of one storage block where the number of blocks is chosen from the data."""

MAX_BLOCKS = 4096


@dataclass(frozen=True)
class SideLayout:
    """How the rows of one side are cut.

    Attributes
    ----------
    side
        "user" or "item".
    n_rows
        Rows with at least one rating.
    n_blocks
        Storage blocks; `block = pmod(xxhash64(id), n_blocks)`.
    n_parts
        Tasks; divides `n_blocks`.
    n_slots
        Slots run from 0 to this, exclusive; some stay empty.
    """

    side: str
    n_rows: int
    n_blocks: int
    n_parts: int
    n_slots: int

    @property
    def keys(self) -> tuple[int, ...]:
        """The grouping key of each part; Spark hashes these to one partition each."""
        return balanced_keys(self.n_parts)


def choose_blocks(n_rows: int, wanted: int | None) -> int:
    """Storage blocks: as told, else about `ROWS_PER_BLOCK` rows each and eight at least."""
    if wanted is not None:
        return wanted
    power = max(3, int(np.ceil(np.log2(max(1, n_rows) / ROWS_PER_BLOCK))))
    return int(min(MAX_BLOCKS, 1 << power))


def choose_parts(n_ratings: int, n_blocks: int, part_ratings: int, parallelism: int) -> int:
    """Tasks of a half-sweep: enough for every core and for memory, a divisor of `n_blocks`."""
    needed = -(-n_ratings // part_ratings)
    # Tiny inputs are not worth a task per core: a task costs tens of milliseconds.
    useful = max(1, min(parallelism, n_ratings // 50_000))
    target = max(needed, useful)
    divisors = [d for d in range(1, n_blocks + 1) if n_blocks % d == 0]
    return next((d for d in divisors if d >= target), n_blocks)


def count_ratings(ratings: DataFrame, id_column: str) -> DataFrame:
    """(id, n_ratings) of one side."""
    return ratings.groupBy(F.col(id_column).alias("id")).agg(
        F.count(F.lit(1)).cast("int").alias("n_ratings")
    )


def assign_slots(counted: DataFrame, n_blocks: int) -> DataFrame:
    """(id, n_ratings, block, slot): positions within a block by falling degree, then id."""
    block = F.pmod(F.xxhash64("id"), F.lit(n_blocks)).cast("int")
    position = F.row_number().over(
        Window.partitionBy("block").orderBy(F.desc("n_ratings"), F.asc("id"))
    )
    return counted.withColumn("block", block).withColumn(
        "slot", ((position - 1) * F.lit(n_blocks) + F.col("block")).cast("int")
    )


def encode(
    ratings: DataFrame, users: DataFrame, items: DataFrame, layout: SideLayout, *, small: bool
) -> DataFrame:
    """Rating parts of one side (columns of `PART_SCHEMA`), one row per part.

    Parameters
    ----------
    ratings
        user_id, item_id, rating.
    users, items
        Dictionaries with id and slot.
    layout
        Of the side whose rows the parts hold.
    small
        Both dictionaries fit into an executor's memory many times: join by broadcast.
    """
    hint = F.broadcast if small else (lambda frame: frame)
    slots = ratings.join(
        hint(users.select(F.col("id").alias("user_id"), F.col("slot").alias("user_slot"))),
        "user_id",
    ).join(
        hint(items.select(F.col("id").alias("item_id"), F.col("slot").alias("item_slot"))),
        "item_id",
    )
    other = "item" if layout.side == "user" else "user"
    entries = slots.select(
        F.col(f"{layout.side}_slot").alias("row"),
        F.col(f"{other}_slot").alias("other"),
        F.col("rating").cast("float").alias("value"),
    )
    packed = entries.mapInArrow(_packer(layout.n_parts, layout.keys), PART_SCHEMA)
    return _build(packed, layout)


def transpose(parts: DataFrame, layout: SideLayout) -> DataFrame:
    """The parts of the other side (`layout`) from the parts of one side."""
    return _build(parts.mapInArrow(_transposer(layout.n_parts, layout.keys), PART_SCHEMA), layout)


def assemble(chunks: DataFrame, layout: SideLayout) -> DataFrame:
    """Parts from stored chunks: rows with slots, counts, others, values (any grouping)."""
    regrouped = chunks.mapInArrow(_regrouper(layout.n_parts, layout.keys), PART_SCHEMA)
    return _build(regrouped, layout)


def _build(packed: DataFrame, layout: SideLayout) -> DataFrame:
    """Join the chunks of each part into one sorted block; partitioned by key, so that sweeps
    find every part where it lies."""
    built = packed.groupBy("key").applyInArrow(_join_chunks, PART_SCHEMA)
    return built.repartition(layout.n_parts, "key")


def _join_chunks(table: pa.Table) -> pa.Table:
    rows = arrays_of(table)
    if rows[0]["counts"] is None:
        joined = [
            np.concatenate([np.frombuffer(row[name], kind) for row in rows])
            for name, kind in _ENTRY_KINDS
        ]
        block = RatingBlock.from_entries(*joined)
    else:
        block = concatenate([RatingBlock.from_binary(row) for row in rows])
    return binary_table([{"key": rows[0]["key"], "part": rows[0]["part"], **block.to_binary()}])


_ENTRY_KINDS = (("slots", np.int32), ("others", np.int32), ("values", np.float32))


def _entries_by_part(
    rows: np.ndarray, others: np.ndarray, values: np.ndarray, n_parts: int, keys: tuple[int, ...]
) -> Iterator[dict]:
    """Loose entries, one record per part that occurs."""
    bounds = np.array([0, len(rows)])
    if n_parts > 1:
        part = (rows % n_parts).astype(np.uint16 if n_parts <= 65536 else np.uint32)
        order = np.argsort(part, kind="stable")  # 16-bit keys: a radix sort
        rows, others, values = rows[order], others[order], values[order]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=n_parts))])
    for number in range(n_parts):
        first, last = int(bounds[number]), int(bounds[number + 1])
        if last > first:
            yield {
                "key": keys[number],
                "part": number,
                "slots": raw(rows[first:last], np.int32),
                "counts": None,
                "others": raw(others[first:last], np.int32),
                "values": raw(values[first:last], np.float32),
            }


def _packer(n_parts: int, keys: tuple[int, ...]) -> Callable[[Batches], Batches]:
    def pack(batches: Batches) -> Batches:
        waiting: list[tuple[np.ndarray, ...]] = []
        size = 0

        def flush() -> Iterator[pa.RecordBatch]:
            rows, others, values = (np.concatenate(part) for part in zip(*waiting, strict=True))
            for record in _entries_by_part(rows, others, values, n_parts, keys):
                yield from binary_table([record]).to_batches()

        for batch in batches:
            waiting.append(tuple(column.to_numpy(zero_copy_only=False) for column in batch.columns))
            size += batch.num_rows
            if size >= PACK_RATINGS:
                yield from flush()
                waiting, size = [], 0
        if size:
            yield from flush()

    return pack


def _transposer(n_parts: int, keys: tuple[int, ...]) -> Callable[[Batches], Batches]:
    def turn(batches: Batches) -> Batches:
        for batch in batches:
            for row in arrays_of(batch):
                block = RatingBlock.from_binary(row)
                entries = _entries_by_part(
                    block.others, block.entry_rows(), block.values, n_parts, keys
                )
                for record in entries:
                    yield from binary_table([record]).to_batches()

    return turn


def _regrouper(n_parts: int, keys: tuple[int, ...]) -> Callable[[Batches], Batches]:
    def regroup(batches: Batches) -> Batches:
        for batch in batches:
            for row in arrays_of(batch):
                block = RatingBlock.from_binary(row)
                part = int(block.slots[0]) % n_parts  # a chunk lies within one block, so one part
                record = {"key": keys[part], "part": part, **block.to_binary()}
                yield from binary_table([record]).to_batches()

    return regroup


CHUNK_SCHEMA = (
    "side string, block int, chunk int, slots binary, counts binary, others binary, values binary"
)
"""Rating chunks as they are stored; see `blocks.chunk_numbers`."""


def stored_chunks(parts: DataFrame, layout: SideLayout) -> DataFrame:
    """The parts of one side cut into the chunks that later jobs read (`CHUNK_SCHEMA`)."""
    side, n_blocks = layout.side, layout.n_blocks
    kinds = {"side": pa.string(), "block": pa.int32(), "chunk": pa.int32()}

    def cut(batches: Batches) -> Batches:
        for batch in batches:
            for row in arrays_of(batch):
                for block, chunk, ratings in split_into_chunks(
                    RatingBlock.from_binary(row), n_blocks
                ):
                    place = {"side": side, "block": block, "chunk": chunk}
                    yield from binary_table(
                        [{**place, **ratings.to_binary()}], **kinds
                    ).to_batches()

    return parts.mapInArrow(cut, CHUNK_SCHEMA)
