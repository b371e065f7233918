"""Rating blocks and factor blocks as plain arrays, and their binary form.

Words used here and in the rest of the package:

slot
    The number that stands for a user or an item inside one model version:
    ``slot = position * n_blocks + block``. Positions run from 0 inside every block, most rated
    first, so ``slot % n_blocks`` is the block, neighbouring slots have similar degrees, and a
    factor matrix indexed by slot keeps its most used rows together in the cache.
part
    The rows that one task works on: all slots with ``slot % n_parts == part``. ``n_parts``
    divides ``n_blocks``, so a part is a whole number of blocks. It travels as several *pieces*,
    runs of its rows in slot order.

A worked example: 2 blocks and 1 part; users a, b, c hash to blocks 0, 1, 0 and have 1, 2 and 3
ratings. Block 0 holds c (position 0, slot 0) and a (position 1, slot 2); block 1 holds b (position
0, slot 1). The part's rows in slot order are c, b, a with counts 3, 2, 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

SIDES = ("user", "item")
"""Both sides, in the order of every tuple and table that covers both."""

PIECE_RATINGS = 16_384
"""Ratings in one piece: few, so that arrays in the JVM stay small however large a part is."""

CHUNK_RATINGS = 32_768
"""Ratings in one stored chunk, which is the least that is read for the ratings of one row."""


def other_side(side: str) -> str:
    """`item` for `user` and the reverse."""
    return "item" if side == "user" else "user"


@dataclass(frozen=True)
class RatingBlock:
    """Ratings of some rows of one side, compressed by row.

    Attributes
    ----------
    slots : int32 (n_rows,)
        Ascending slots of the rows.
    indptr : int64 (n_rows + 1,)
        Row ``j`` owns entries ``indptr[j]:indptr[j + 1]``.
    others : int32 (n_ratings,)
        Slots of the other side, ascending within a row, so that sums have one order whatever
        order the ratings arrived in.
    values : float32 (n_ratings,)
    """

    slots: NDArray[np.int32]
    indptr: NDArray[np.int64]
    others: NDArray[np.int32]
    values: NDArray[np.float32]

    @property
    def n_rows(self) -> int:
        return len(self.slots)

    @property
    def n_ratings(self) -> int:
        return len(self.values)

    @property
    def counts(self) -> NDArray[np.int32]:
        """Ratings of each row, int32 (n_rows,)."""
        return np.diff(self.indptr).astype(np.int32)

    def to_binary(self) -> dict[str, bytes | memoryview]:
        """The arrays as raw little-endian bytes, under the column names of `COLUMNS`."""
        return {
            "slots": raw(self.slots, np.int32),
            "counts": raw(self.counts, np.int32),
            "others": raw(self.others, np.int32),
            "values": raw(self.values, np.float32),
        }

    @classmethod
    def from_binary(cls, columns: Mapping[str, object]) -> RatingBlock:
        """The block from buffers made by `to_binary`; all arrays but `indptr` are views."""
        counts = np.frombuffer(columns["counts"], np.int32)  # type: ignore[call-overload]
        indptr = _starts(counts)
        return cls(
            np.frombuffer(columns["slots"], np.int32),  # type: ignore[call-overload]
            indptr,
            np.frombuffer(columns["others"], np.int32),  # type: ignore[call-overload]
            np.frombuffer(columns["values"], np.float32),  # type: ignore[call-overload]
        )

    @classmethod
    def from_entries(
        cls,
        rows: NDArray[np.int32],
        others: NDArray[np.int32],
        values: NDArray[np.float32],
    ) -> RatingBlock:
        """Group loose (row slot, other slot, value) entries by row.

        Entries that name the same pair stay separate ratings, as in MLlib.
        """
        if not len(values):
            return concatenate([])
        # Two counting sorts: by other slot, then stably by row.
        entries = sparse.coo_array((values, (others, rows)))
        entries.has_canonical_format = True  # else pairs that occur twice would be added up
        by_row = entries.tocsr().tocsc()
        slots = np.flatnonzero(np.diff(by_row.indptr)).astype(np.int32)
        indptr = np.append(by_row.indptr[slots], len(values)).astype(np.int64)
        block = cls(slots, indptr, by_row.indices.astype(np.int32, copy=False), by_row.data)
        _sort_repeated_pairs(block)
        return block

    @classmethod
    def from_pieces(cls, rows: Sequence[Mapping[str, object]]) -> RatingBlock:
        """Join pieces made by `to_binary`, in any order; or loose ratings, whose `counts` is None
        and whose `slots` name the row of each rating."""
        if rows and rows[0]["counts"] is None:
            kinds = {"slots": np.int32, "others": np.int32, "values": np.float32}
            joined = {
                name: np.concatenate([np.frombuffer(row[name], kind) for row in rows])  # type: ignore[call-overload]
                for name, kind in kinds.items()
            }
            return cls.from_entries(joined["slots"], joined["others"], joined["values"])
        return concatenate([cls.from_binary(row) for row in rows])

    def rows(self, keep: NDArray[np.bool_]) -> RatingBlock:
        """Only the rows where `keep` is true."""
        if keep.all():
            return self
        entries = np.repeat(keep, np.diff(self.indptr))
        counts = np.diff(self.indptr)[keep]
        indptr = _starts(counts)
        return RatingBlock(self.slots[keep], indptr, self.others[entries], self.values[entries])

    def pieces(self, most: int = PIECE_RATINGS) -> Iterator[RatingBlock]:
        """Cut into runs of whole rows with about `most` ratings; `concatenate` undoes it."""
        if not self.n_rows:
            yield self
            return
        marks = np.arange(0, max(1, self.n_ratings), most)
        cuts = np.unique([*np.searchsorted(self.indptr, marks), self.n_rows])
        for first, last in pairwise(cuts):
            start, stop = self.indptr[first], self.indptr[last]
            yield RatingBlock(
                self.slots[first:last],
                self.indptr[first : last + 1] - start,
                self.others[start:stop],
                self.values[start:stop],
            )

    def entry_rows(self) -> NDArray[np.int32]:
        """The slot of every rating's row, int32 (n_ratings,)."""
        return np.repeat(self.slots, np.diff(self.indptr))

    def without(self, rows: NDArray[np.int32], others: NDArray[np.int32]) -> RatingBlock:
        """Drop the entries of the given (row slot, other slot) pairs, and rows that lose all."""
        places, here = places_in(rows, self.slots)
        gone = others[here].astype(np.int64)
        kept = np.ones(self.n_ratings, np.bool_)
        kept[ranges(self._place(places, gone), self._place(places, gone + 1))] = False
        indptr = _starts(kept)[self.indptr]
        block = replace(self, indptr=indptr, others=self.others[kept], values=self.values[kept])
        return block.rows(np.diff(indptr) > 0)

    def _place(self, rows: NDArray[np.int32], others: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place of the first entry in row `rows[i]` whose other slot is at least `others[i]`;
        the row's end if all are smaller."""
        first, last = self.indptr[rows], self.indptr[rows + 1]
        while (open := first < last).any():
            middle = (first + last) // 2  # of a row that is done perhaps past the last entry
            below = open & (self.others[np.minimum(middle, self.n_ratings - 1)] < others)
            first = np.where(below, middle + 1, first)
            last = np.where(open & ~below, middle, last)
        return first


def _is_dense(slots: NDArray[np.int32], n_lookups: int) -> bool:
    """Whether a table over all slots is small compared with the number of lookups."""
    return bool(slots.size) and int(slots.max()) < 4 * n_lookups


def distinct(slots: NDArray[np.int32]) -> NDArray[np.int32]:
    """`np.unique` of slots, which avoids the sort where the slots are dense."""
    if not _is_dense(slots, len(slots)):
        return np.unique(slots)
    seen = np.zeros(int(slots.max()) + 1, np.bool_)
    seen[slots] = True
    return np.flatnonzero(seen).astype(np.int32)


def places_in(
    slots: NDArray[np.int32], known: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Look slots up in `known` (ascending): the positions of those found, and a mask of these."""
    if not len(known):
        return np.zeros(0, np.int32), np.zeros(len(slots), np.bool_)
    last = known[-1]
    if _is_dense(known, len(slots)):
        table = np.zeros(last + 1, np.int32)
        table[known] = np.arange(len(known), dtype=np.int32)
        places = table[np.minimum(slots, last)]
    else:
        places = np.searchsorted(known, np.minimum(slots, last)).astype(np.int32)
    here = known[places] == slots
    return places[here], here


def places_among(slots: NDArray[np.int32], known: NDArray[np.int32]) -> NDArray[np.int32]:
    """The positions of slots in `known` (ascending). Raises ValueError if one is not there."""
    places, here = places_in(slots, known)
    if not here.all():
        raise ValueError("a rating names a row without factors; the rating blocks are damaged")
    return places


def concatenate(blocks: Sequence[RatingBlock]) -> RatingBlock:
    """Join blocks into one; a row that occurs in several of them is joined too."""
    if len(blocks) == 1:
        return blocks[0]
    if not blocks:
        return RatingBlock(
            np.zeros(0, np.int32),
            np.zeros(1, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
        )
    blocks = sorted(blocks, key=lambda block: int(block.slots[0]) if block.n_rows else -1)
    slots = np.concatenate([block.slots for block in blocks])
    others = np.concatenate([block.others for block in blocks])
    values = np.concatenate([block.values for block in blocks])
    counts = np.concatenate([np.diff(block.indptr) for block in blocks])
    if bool((slots[1:] > slots[:-1]).all()):  # the pieces of one block
        return RatingBlock(slots, _starts(counts), others, values)
    order = np.argsort(slots, kind="stable")
    if (np.diff(slots[order]) == 0).any():
        rows = np.concatenate([block.entry_rows() for block in blocks])
        return RatingBlock.from_entries(rows, others, values)
    # No row occurs twice, and its entries are sorted: only whole rows move.
    stops = np.cumsum(counts)
    entries = ranges((stops - counts)[order], stops[order])
    indptr = _starts(counts[order])
    return RatingBlock(slots[order], indptr, others[entries], values[entries])


def chunk_numbers(
    slots: NDArray[np.int32],
    counts: NDArray[np.int32],
    n_blocks: int,
    chunk_ratings: int = CHUNK_RATINGS,
) -> NDArray[np.int32]:
    """The number of each row's stored chunk, int32 (n_rows,).

    Rows of a block fill chunks of about `chunk_ratings` in slot order, and no row is cut. A number
    is congruent to its block modulo `n_blocks`, so it identifies a chunk among those of all blocks.
    """
    chunks = np.zeros(len(slots), np.int32)
    blocks = slots % n_blocks
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        before = np.cumsum(counts[rows], dtype=np.int64) - counts[rows]
        chunks[rows] = before // chunk_ratings * n_blocks + block
    return chunks


def split_into_chunks(
    block: RatingBlock, n_blocks: int, chunk_ratings: int = CHUNK_RATINGS
) -> Iterator[tuple[int, int, RatingBlock]]:
    """Cut into stored chunks (`chunk_numbers`), block by block: block number, chunk number and
    ratings of each."""
    numbers = chunk_numbers(block.slots, block.counts, n_blocks, chunk_ratings)
    order = np.lexsort((numbers, numbers % n_blocks))
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    for first, last in zip(starts, [*starts[1:], len(order)], strict=True):
        rows = order[first:last]
        entries = ranges(block.indptr[rows], block.indptr[rows + 1])
        counts = block.counts[rows]
        indptr = _starts(counts)
        number = int(numbers[rows[0]])
        yield (
            number % n_blocks,
            number,
            RatingBlock(block.slots[rows], indptr, block.others[entries], block.values[entries]),
        )


def ranges(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int64]:
    """The integers of all half-open ranges, one after the other."""
    lengths = stops - starts
    total = int(lengths.sum())
    if not total:
        return np.zeros(0, np.int64)
    offsets = np.repeat(starts - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
    return np.arange(total, dtype=np.int64) + offsets


def scatter(
    slots: NDArray[np.int32], rows: NDArray[np.float32], n_slots: int
) -> NDArray[np.float32]:
    """A (n_slots, rank) matrix with `rows` at `slots` and zeros elsewhere."""
    dense = np.zeros((n_slots, rows.shape[1]), np.float32)
    dense[slots] = rows
    return dense


def _starts(counts: NDArray[np.integer] | NDArray[np.bool_]) -> NDArray[np.int64]:
    """The `indptr` of rows with these numbers of entries."""
    indptr = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    return indptr


def _sort_repeated_pairs(block: RatingBlock) -> None:
    """Sort the ratings of a pair that occurs twice by value, in place."""
    twice = block.others[1:] == block.others[:-1]
    twice[block.indptr[1:-1] - 1] = False  # a row's last entry and the next row's first
    if not twice.any():
        return
    places = np.flatnonzero(np.append(twice, False) | np.append(False, twice))
    runs = np.cumsum(~np.append(False, twice))[places]
    values = block.values[places]
    block.values[places] = values[np.lexsort((values, runs))]


def raw(array: NDArray[Any], dtype: type[np.generic]) -> memoryview:
    """The array's little-endian bytes; copied only if not contiguous or of another dtype."""
    buffer: Any = np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8)
    return memoryview(buffer)
