"""From a table of ratings to rating blocks spread over a session, once per training.

The ratings are packed into binary fragments where they are read, and only such arrays are shuffled:
never single ratings. The ids are replaced by slots (see `blocks`) through the fragments' own short
dictionaries.

    ratings --> fragments with local codes --> dictionaries of all ids --> slots
                    |                                                        |
                    +------------------- codes to slots ---------------------+--> parts of both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyspark import TaskContext
from pyspark.sql import Window
from pyspark.sql import functions as F

from unlearn_spark.als.blocks import PIECE_RATINGS, SIDES, other_side, raw, split_into_chunks
from unlearn_spark.als.spark import (
    PART_SCHEMA,
    arrays_of,
    balanced_keys,
    binary_table,
    part_of,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

Batches = Iterable[pa.RecordBatch]

PACK_RATINGS = 1_000_000
"""Ratings of one fragment: few, large messages (12 MB), and ids are hashed once for so many."""

ROWS_PER_BLOCK = 16_384
"""Rows of one storage block where the number of blocks is chosen from the data: 4 MB at rank 64."""

MAX_BLOCKS = 4096

TASK_RATINGS = 1_000_000
"""Fewer are not spread over several tasks."""


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


def choose_blocks(n_rows: int, parallelism: int, wanted: int | None) -> int:
    """Storage blocks: as told, else a power of two: about `ROWS_PER_BLOCK` rows each, at least
    eight, and at least one for each task slot, because a block is the least that a task takes."""
    if wanted is not None:
        return wanted
    least = max(8, parallelism, n_rows / ROWS_PER_BLOCK)
    return int(min(MAX_BLOCKS, 1 << int(np.ceil(np.log2(least)))))


def choose_parts(n_ratings: int, n_blocks: int, part_ratings: int, parallelism: int) -> int:
    """Tasks of a half-sweep: enough for every core and for memory, a divisor of `n_blocks`."""
    needed = -(-n_ratings // part_ratings)
    # A sweep of a million ratings takes a fraction of a second: less is not worth a task.
    useful = max(1, min(parallelism, n_ratings // TASK_RATINGS))
    target = max(needed, useful)
    divisors = [d for d in range(1, n_blocks + 1) if n_blocks % d == 0]
    return next((d for d in divisors if d >= target), n_blocks)


def fragment(ratings: DataFrame) -> DataFrame:
    """Ratings packed where they are read, under numbers of their own.

    Ids are hashed once, in Arrow, and whatever their type only small integers travel from here
    on. The dictionaries that undo it are as long as a fragment has distinct ids.

    Parameters
    ----------
    ratings
        user_id, item_id (any types), rating (castable to float); no nulls.

    Returns
    -------
    DataFrame
        One row for about `PACK_RATINGS` ratings. fragment: its number; values: float32 (n,);
        for either side `<side>_codes`: int32 (n,), `<side>_ids`: the id of each code, and
        `<side>_counts`: its ratings here.
    """
    schema = "fragment long, values binary"
    for side in SIDES:
        kind = ratings.schema[f"{side}_id"].dataType.simpleString()
        schema += f", {side}_codes binary, {side}_ids array<{kind}>, {side}_counts array<int>"
    entries = ratings.select("user_id", "item_id", F.col("rating").cast("float").alias("rating"))
    return entries.mapInArrow(_fragments, schema)


def _fragments(batches: Batches) -> Batches:
    task = TaskContext.get()
    place = task.partitionId() if task is not None else 0
    waiting: list[pa.RecordBatch] = []
    size = number = 0

    def flush() -> Iterator[pa.RecordBatch]:
        table = pa.Table.from_batches(waiting)
        columns: dict[str, pa.Array] = {
            "fragment": pa.array([(place << 32) | number], pa.int64()),
            "values": _one_binary(table["rating"].to_numpy(), np.float32),
        }
        for side in SIDES:
            if table[f"{side}_id"].null_count or table["rating"].null_count:
                raise ValueError("a rating has a null id or value; filter such rows out before")
            encoded = table[f"{side}_id"].combine_chunks().dictionary_encode()
            codes = encoded.indices.to_numpy()
            counts = np.bincount(codes, minlength=len(encoded.dictionary)).astype(np.int32)
            columns[f"{side}_codes"] = _one_binary(codes, np.int32)
            columns[f"{side}_ids"] = _one_list(encoded.dictionary)
            columns[f"{side}_counts"] = _one_list(pa.array(counts))
        yield from pa.table(columns).to_batches()

    for batch in batches:
        waiting.append(batch)
        size += batch.num_rows
        if size >= PACK_RATINGS:
            yield from flush()
            waiting, size = [], 0
            number += 1
    if size:
        yield from flush()


def _one_binary(values: np.ndarray, dtype: type[np.generic]) -> pa.Array:
    return pa.array([bytes(raw(values, dtype))], pa.binary())


def _one_list(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)


def local_ids(fragments: DataFrame, side: str) -> DataFrame:
    """(fragment, code, id, n): the dictionaries of the fragments, one row for each entry."""
    zipped = F.arrays_zip(F.col(f"{side}_ids").alias("id"), F.col(f"{side}_counts").alias("n"))
    return fragments.select("fragment", F.posexplode(zipped).alias("code", "entry")).select(
        "fragment", "code", "entry.id", "entry.n"
    )


def count_ratings(fragments: DataFrame, side: str) -> DataFrame:
    """(id, n_ratings) of one side."""
    return local_ids(fragments, side).groupBy("id").agg(F.sum("n").cast("int").alias("n_ratings"))


def assign_slots(counted: DataFrame, n_blocks: int) -> DataFrame:
    """(id, n_ratings, block, slot): positions within a block by falling degree, then id."""
    block = F.pmod(F.xxhash64("id"), F.lit(n_blocks)).cast("int")
    position = F.row_number().over(
        Window.partitionBy("block").orderBy(F.desc("n_ratings"), F.asc("id"))
    )
    return counted.withColumn("block", block).withColumn(
        "slot", ((position - 1) * F.lit(n_blocks) + F.col("block")).cast("int")
    )


ENTRY_SCHEMA = f"side string, {PART_SCHEMA}"
"""Loose ratings of the parts of both sides."""


def encode(
    fragments: DataFrame,
    dictionaries: Mapping[str, DataFrame],
    layouts: Mapping[str, SideLayout],
) -> DataFrame:
    """Every rating twice, as an entry of a user part and of an item part (`ENTRY_SCHEMA`).

    Parameters
    ----------
    fragments
        What `fragment` made.
    dictionaries
        By side: id and slot.
    layouts
        By side.
    """
    slots = [
        local_ids(fragments, side)
        .join(dictionaries[side].select("id", "slot"), "id")
        .select("fragment", F.lit(side).alias("side"), "code", "slot")
        for side in SIDES
    ]
    # An alias is another column to Spark, which the two sides of a cogroup must not share.
    own = F.col("fragment").alias("fragment")
    return (
        fragments.select(own, "values", "user_codes", "item_codes")
        .groupBy("fragment")
        .cogroup(slots[0].unionByName(slots[1]).groupBy("fragment"))
        .applyInArrow(_renumber(layouts), ENTRY_SCHEMA)
    )


def _renumber(layouts: Mapping[str, SideLayout]) -> Callable[[pa.Table, pa.Table], pa.Table]:
    def renumber(left: pa.Table, right: pa.Table) -> pa.Table:
        row = arrays_of(left)[0]
        names = {}
        for side in SIDES:
            mine = right.filter(pa.compute.equal(right["side"], side))
            slots = np.empty(mine.num_rows, np.int32)
            slots[mine["code"].to_numpy()] = mine["slot"].to_numpy()
            names[side] = slots[np.frombuffer(row[f"{side}_codes"], np.int32)]
        values = np.frombuffer(row["values"], np.float32)
        entries = [
            {"side": side, **record}
            for side in SIDES
            for record in _entries_by_part(
                names[side], names[other_side(side)], values, layouts[side]
            )
        ]
        return binary_table(entries, side=pa.string())

    return renumber


def place(entries: DataFrame, layout: SideLayout) -> DataFrame:
    """The parts of one side (`PART_SCHEMA`), each in one partition, where sweeps will find it.

    Their ratings are loose: whoever reads a part sorts it (`RatingBlock.from_pieces`), and the
    workers of a training keep it sorted (`local_parts`). To sort here would be a pass through
    Python and a shuffle more.
    """
    own = entries.where(F.col("side") == layout.side).drop("side")
    return own.repartition(layout.n_parts, "key")


def _entries_by_part(
    rows: np.ndarray, others: np.ndarray, values: np.ndarray, layout: SideLayout
) -> Iterator[dict]:
    """Loose entries, in records of one part and at most `PIECE_RATINGS`."""
    n_parts = layout.n_parts
    bounds = np.array([0, len(rows)])
    if n_parts > 1:
        part = (rows % n_parts).astype(np.uint16 if n_parts <= 65536 else np.uint32)
        order = np.argsort(part, kind="stable")  # 16-bit keys: a radix sort
        rows, others, values = rows[order], others[order], values[order]
        bounds = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=n_parts))])
    for number in range(n_parts):
        stop = int(bounds[number + 1])
        for first in range(int(bounds[number]), stop, PIECE_RATINGS):
            last = min(stop, first + PIECE_RATINGS)
            yield {
                "key": layout.keys[number],
                "part": number,
                "slots": raw(rows[first:last], np.int32),
                "counts": None,
                "others": raw(others[first:last], np.int32),
                "values": raw(values[first:last], np.float32),
            }


CHUNK_SCHEMA = (
    "side string, block int, chunk int, slots binary, counts binary, others binary, values binary"
)
"""Rating chunks as they are stored; see `blocks.chunk_numbers`."""


def stored_chunks(parts: DataFrame, layout: SideLayout) -> DataFrame:
    """The parts of one side cut into the chunks that later jobs read (`CHUNK_SCHEMA`)."""
    side, n_blocks = layout.side, layout.n_blocks
    kinds = {"side": pa.string(), "block": pa.int32(), "chunk": pa.int32()}

    def cut(pieces: pa.Table) -> pa.Table:
        part = part_of(pieces)[1]
        return binary_table(
            [
                {"side": side, "block": block, "chunk": chunk, **ratings.to_binary()}
                for block, chunk, ratings in split_into_chunks(part, n_blocks)
            ],
            **kinds,
        )

    return parts.groupBy("key").applyInArrow(cut, CHUNK_SCHEMA)
