"""The steps that turn a table of ratings into rating parts of both sides.

The tasks that read the ratings pack them into binary fragments, and Spark shuffles only arrays, no
single ratings or ids. Every fragment has its own short dictionary of ids. The dictionaries are cut
by block; one task per block numbers its ids and tells every fragment their slots (see `blocks`).

    ratings --> fragments with local codes --> dictionaries, cut by block --> slots
                    |                                                          |
                    +-------------------- codes to slots ----------------------+--> parts of both
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from pyspark import TaskContext
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import PIECE_RATINGS, SIDES, other_side, raw, split_into_chunks
from unlearn_spark.spark.arrow import arrays_of, binary_table, list_of, one_binary, pieces_table
from unlearn_spark.spark.training.layout import SideLayout
from unlearn_spark.spark.training.messages import PART_SCHEMA, part_of

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

Batches = Iterable[pa.RecordBatch]

PACK_RATINGS = 1_000_000
"""Ratings of a fragment; a larger one hashes repeated ids less often but takes more memory."""


def fragment(ratings: DataFrame) -> DataFrame:
    """Pack ratings into fragments in the tasks that read them, with local codes in place of ids.

    Later steps move small integers, whatever the ids' type.

    Parameters
    ----------
    ratings
        user_id, item_id (any types), rating (castable to float); tasks raise ValueError for nulls.

    Returns
    -------
    DataFrame
        A fragment of about `PACK_RATINGS` ratings takes several rows. Every row has fragment, its
        number; values, float32 (n,); and for either side `<side>_codes`, int32 (n,), where n is at
        most `PIECE_RATINGS`. The first row also has what is null in the others: `<side>_ids`, the
        id of each code; `<side>_hashes`, its xxhash64; and `<side>_counts`, int32, its ratings.
    """
    schema = "fragment long, values binary"
    for side in SIDES:
        kind = ratings.schema[f"{side}_id"].dataType.simpleString()
        schema += f", {side}_codes binary, {side}_counts binary, {side}_ids array<{kind}>"
    entries = ratings.select("user_id", "item_id", F.col("rating").cast("float").alias("rating"))
    hashes = {f"{side}_hashes": F.transform(f"{side}_ids", _hash) for side in SIDES}
    return entries.mapInArrow(_fragments, schema).withColumns(hashes)


def _hash(id: Column) -> Column:
    return F.xxhash64(id)


def _fragments(batches: Batches) -> Batches:
    task = TaskContext.get()
    place = task.partitionId() if task is not None else 0
    waiting: list[pa.RecordBatch] = []
    size = number = 0

    def flush() -> Iterator[pa.RecordBatch]:
        table = pa.Table.from_batches(waiting)
        if any(column.null_count for column in table.columns):
            raise ValueError("a rating has a null id or value; filter these rows out before")
        values = table["rating"].to_numpy()
        names = {side: table[f"{side}_id"].combine_chunks().dictionary_encode() for side in SIDES}
        codes = {side: names[side].indices.to_numpy() for side in SIDES}
        for first in range(0, len(values), PIECE_RATINGS):
            piece = slice(first, first + PIECE_RATINGS)
            columns: dict[str, pa.Array] = {
                "fragment": pa.array([(place << 32) | number], pa.int64()),
                "values": one_binary(raw(values[piece], np.float32)),
            }
            for side in SIDES:
                ids = names[side].dictionary
                counts, named = pa.nulls(1, pa.binary()), pa.nulls(1, pa.list_(ids.type))
                if first == 0:
                    counts = one_binary(raw(np.bincount(codes[side], minlength=len(ids)), np.int32))
                    named = list_of(ids)
                columns[f"{side}_codes"] = one_binary(raw(codes[side][piece], np.int32))
                columns[f"{side}_counts"], columns[f"{side}_ids"] = counts, named
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


def estimate_sizes(fragments: DataFrame) -> tuple[dict[str, int], int]:
    """By side: the approximate number of distinct ids (to 5%); and the exact number of ratings."""
    n_values = F.octet_length("values") / np.dtype(np.float32).itemsize
    named = [
        F.struct(
            F.lit(side).alias("side"),
            F.col(f"{side}_hashes").alias("hashes"),
            (n_values if side == "user" else F.lit(0.0)).alias("n_ratings"),
        )
        for side in SIDES
    ]
    # The later pieces of a fragment have ratings but no hashes.
    hashes = fragments.select(F.explode(F.array(*named)).alias("of")).select(
        "of.side", "of.n_ratings", F.posexplode_outer("of.hashes").alias("position", "hash")
    )
    counts = [
        F.approx_count_distinct(F.when(F.col("side") == side, F.col("hash"))) for side in SIDES
    ]
    once = F.coalesce("position", F.lit(0)) == 0
    row = hashes.agg(*counts, F.sum(F.when(once, F.col("n_ratings")))).first()
    assert row is not None
    *rows, n_ratings = row
    return dict(zip(SIDES, rows, strict=True)), int(n_ratings or 0)


def number(fragments: DataFrame, side: str, n_blocks: int) -> DataFrame:
    """Number the ids of one side within each block, by falling number of ratings, then by id.

    Returns
    -------
    DataFrame
        Two kinds of rows. One per block: block, ids (by position), n_ratings array<int>. One per
        fragment and block, with null ids, which translates codes: fragment, block, codes int32
        (n,), slots int32 (n,).
    """
    kind = fragments.schema[f"{side}_ids"].dataType.simpleString()

    def cut(batches: Batches) -> Batches:
        for batch in batches:
            for row in range(batch.num_rows):
                yield from _cut_by_block(batch.slice(row, 1), n_blocks)

    cut_by_block = (
        fragments.where(F.col(f"{side}_ids").isNotNull())
        .select(
            "fragment",
            F.col(f"{side}_counts").alias("counts"),
            F.col(f"{side}_ids").alias("ids"),
            F.col(f"{side}_hashes").alias("hashes"),
        )
        .mapInArrow(cut, f"block int, fragment long, codes binary, counts binary, ids {kind}")
    )
    schema = (
        f"fragment long, block int, codes binary, slots binary, ids {kind}, n_ratings array<int>"
    )
    return cut_by_block.groupBy("block").applyInArrow(
        lambda pieces: _number_block(pieces, n_blocks), schema
    )


def _cut_by_block(fragment: pa.RecordBatch, n_blocks: int) -> Iterator[pa.RecordBatch]:
    """Cut a fragment's dictionary into one record for each block of its ids."""
    blocks = fragment["hashes"].flatten().to_numpy() % n_blocks
    ids = fragment["ids"].flatten()
    counts = np.frombuffer(arrays_of(fragment.select(["counts"]))[0]["counts"], np.int32)
    order = np.argsort(blocks, kind="stable")
    bounds = np.searchsorted(blocks[order], np.arange(n_blocks + 1))
    for block in np.flatnonzero(np.diff(bounds)):
        codes = order[bounds[block] : bounds[block + 1]]
        yield pa.RecordBatch.from_pydict(
            {
                "block": pa.array([block], pa.int32()),
                "fragment": fragment["fragment"],
                "codes": one_binary(raw(codes, np.int32)),
                "counts": one_binary(raw(counts[codes], np.int32)),
                "ids": list_of(ids.take(pa.array(codes))),
            }
        )


def _number_block(pieces: pa.Table, n_blocks: int) -> pa.Table:
    block = pieces["block"][0].as_py()
    named = pa.chunked_array([chunk.flatten() for chunk in pieces["ids"].chunks])
    named = named.combine_chunks().dictionary_encode()
    own = named.indices.to_numpy()
    rows = arrays_of(pieces.select(["fragment", "codes", "counts"]))
    counts = _joined(rows, "counts", np.int32)
    n_ratings = np.bincount(own, weights=counts).astype(np.int32)
    order = pa.compute.sort_indices(
        pa.table({"n_ratings": n_ratings, "id": named.dictionary}),
        [("n_ratings", "descending"), ("id", "ascending")],
    ).to_numpy()
    slots = np.empty(len(order), np.int32)
    slots[order] = np.arange(len(order)) * n_blocks + block
    lists = {"ids": pieces.schema.field("ids").type, "n_ratings": pa.list_(pa.int32())}
    tables = [
        pa.table(
            {
                "fragment": pa.nulls(1, pa.int64()),
                "block": pa.array([block], pa.int32()),
                "codes": pa.nulls(1, pa.binary()),
                "slots": pa.nulls(1, pa.binary()),
                "ids": list_of(named.dictionary.take(pa.array(order))).cast(lists["ids"]),
                "n_ratings": list_of(pa.array(n_ratings[order])).cast(lists["n_ratings"]),
            }
        )
    ]
    first = 0
    for row in rows:
        last = first + len(row["codes"]) // 4
        columns = {
            "fragment": pa.array([row["fragment"]], pa.int64()),
            "block": pa.array([block], pa.int32()),
            "codes": one_binary(row["codes"]),
            "slots": one_binary(raw(slots[own[first:last]], np.int32)),
        }
        tables.append(pa.table(columns | {name: pa.nulls(1, lists[name]) for name in lists}))
        first = last
    return pa.concat_tables(tables)


def dictionary(numbered: DataFrame, n_blocks: int) -> DataFrame:
    """id, n_ratings, block, slot of one side, from the result of `number`."""
    entries = F.arrays_zip(F.col("ids").alias("id"), F.col("n_ratings").alias("n_ratings"))
    return (
        numbered.where(F.col("ids").isNotNull())
        .select("block", F.posexplode(entries).alias("position", "entry"))
        .select(
            "entry.id",
            "entry.n_ratings",
            "block",
            (F.col("position") * n_blocks + F.col("block")).cast("int").alias("slot"),
        )
    )


ENTRY_SCHEMA = f"side string, {PART_SCHEMA}"
"""Loose ratings of the parts of both sides."""


def encode(
    fragments: DataFrame,
    numbered: Mapping[str, DataFrame],
    layouts: Mapping[str, SideLayout],
) -> DataFrame:
    """Turn every rating into an entry of a user part and one of an item part (`ENTRY_SCHEMA`).

    Each part's entries lie in its own partition, where sweeps find them. They are not sorted, which
    would take another shuffle. Readers sort a part (`RatingBlock.from_pieces`), and a training's
    workers keep it sorted (`local_parts`).
    """
    slots = [
        numbered[side]
        .where(F.col("fragment").isNotNull())
        .select("fragment", F.lit(side).alias("side"), "codes", "slots")
        for side in SIDES
    ]
    # The two sides of a cogroup must not share a column: to Spark, an alias is another one.
    own = F.col("fragment").alias("fragment")
    return (
        fragments.select(own, "values", "user_codes", "item_codes")
        .groupBy("fragment")
        .cogroup(slots[0].unionByName(slots[1]).groupBy("fragment"))
        .applyInArrow(_renumber(layouts), ENTRY_SCHEMA)
        .repartition(layouts["user"].n_places, "key")
    )


def entries_of(entries: DataFrame, side: str) -> DataFrame:
    """The parts of one side (`PART_SCHEMA`), left in their partitions."""
    return entries.where(F.col("side") == side).drop("side")


def _renumber(layouts: Mapping[str, SideLayout]) -> Callable[[pa.Table, pa.Table], pa.Table]:
    def renumber(left: pa.Table, right: pa.Table) -> pa.Table:
        pieces, translations = arrays_of(left), arrays_of(right)
        names = {}
        for side in SIDES:
            mine = [row for row in translations if row["side"] == side]
            codes = _joined(mine, "codes", np.int32)
            slots = np.empty(len(codes), np.int32)
            slots[codes] = _joined(mine, "slots", np.int32)
            names[side] = slots[_joined(pieces, f"{side}_codes", np.int32)]
        values = _joined(pieces, "values", np.float32)
        return pieces_table(
            (
                {"side": side, **record}
                for side in SIDES
                for record in _entries_by_part(
                    names[side], names[other_side(side)], values, layouts[side]
                )
            ),
            side=pa.string(),
        )

    return renumber


def _joined(rows: Sequence[Mapping[str, Any]], name: str, dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.frombuffer(row[name], dtype) for row in rows])


def _entries_by_part(
    rows: np.ndarray, others: np.ndarray, values: np.ndarray, layout: SideLayout
) -> Iterator[dict]:
    """Loose ratings as records of one part and at most `PIECE_RATINGS` each."""
    n_parts = layout.n_parts
    bounds = np.array([0, len(rows)])
    if n_parts > 1:
        part = (rows % n_parts).astype(np.uint16 if n_parts <= 65536 else np.uint32)
        order = np.argsort(part, kind="stable")  # a radix sort, if keys have 16 bits
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
"""Rating chunks as the table `rating_blocks` stores them; see `blocks.chunk_numbers`."""


def stored_chunks(parts: DataFrame, layout: SideLayout) -> DataFrame:
    """Cut the parts of one side into the chunks that later jobs read (`CHUNK_SCHEMA`)."""
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
