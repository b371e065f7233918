"""Write the newest rating of each pair into the ratings table, sorted as a night reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from unlearn_spark.embedded.ids import user_keys, xxhash64
from unlearn_spark.embedded.ratings import FILE_LAYOUT, PAIR, in_blocks, user_blocks
from unlearn_spark.tables import ratings
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.store import TIMESTAMP

_UNKNOWN = np.iinfo(np.int64).min
"""An unknown time as a number: older than all others."""

_NEW = -1
"""The ingest of rows that are not in the table."""

_MERGED_ROWS = 1_000_000
"""Rows of the table that are merged at a time."""

_WRITTEN_ROWS = 1 << 17
"""Rows that are handed to the writer at a time."""


def upsert(store: DeltaRsStore, rows: pa.Table) -> tuple[int, int | None]:
    """Write the rows that are the newest of their pair, in the input and in the table.

    Parameters
    ----------
    rows
        user_id and item_id (string or int64, as in the table if there is one), rating float,
        rated_at timestamp. Of two rows of a pair with the same time, the later one wins; one that
        repeats what the table has is not written.

    Returns
    -------
    tuple
        How many rows were written, and the table's version afterwards (None: there is no table).

    Raises
    ------
    ConflictError
        Another job wrote ratings meanwhile; none of these is written.
    """
    if not store.exists(ratings.TABLE):
        return _create(store, rows) if rows.num_rows else (0, None)
    version = store.version(ratings.TABLE)
    n_blocks = user_blocks(store)
    newest = _Pairs.sorted(rows, n_blocks).newest() if rows.num_rows else None
    changed = [] if newest is None else list(_changed(store, version, newest, n_blocks))
    if not changed:
        return 0, version
    blocks = sorted(block for pairs in changed for block in pairs.blocks().tolist())
    written = store.replace_where(
        ratings.TABLE,
        _reader(changed, ratings.next_ingest(version), _known(store.schema(ratings.TABLE))),
        in_blocks(blocks),
        base=version,
        properties=FILE_LAYOUT,
    )
    return sum(int((pairs.ingest_id == _NEW).sum()) for pairs in changed), written


def _create(store: DeltaRsStore, rows: pa.Table) -> tuple[int, int]:
    """Create the table with its first rows, in one commit.

    A job that dies creates nothing, and of two first ingests at the same time one fails.
    """
    n_blocks = ratings.choose_blocks(rows.num_rows)
    newest = _Pairs.sorted(rows, n_blocks).newest()
    spec = ratings.spec({name: rows.schema.field(name).type for name in PAIR}, n_blocks)
    reader = _reader([newest], ratings.next_ingest(None), spec.schema)
    version = store.create_with(ratings.TABLE, spec, reader, FILE_LAYOUT)
    return len(newest.users), version


def _changed(store: DeltaRsStore, version: int, newest: _Pairs, n_blocks: int) -> Iterator[_Pairs]:
    """All rows of the blocks of the table that the newest rows of an input change."""
    blocks = newest.blocks()
    at_a_time = max(1, _MERGED_ROWS * n_blocks // max(1, store.rows(ratings.TABLE)))
    for start in range(0, len(blocks), at_a_time):
        some = blocks[start : start + at_a_time]
        columns = [*PAIR, "rating", "rated_at", "ingest_id"]
        known = store.read(ratings.TABLE, version, columns, in_blocks(some.tolist()))
        mine = newest.between(some[0], some[-1]).rows(_NEW).select(columns)
        both = _Pairs.sorted(pa.concat_tables([known, mine]), n_blocks).newest()
        hit = both.user_block[both.users[both.ingest_id == _NEW]]
        if len(hit):
            yield both.of_blocks(np.unique(hit))


@dataclass(frozen=True)
class _Pairs:
    """Ratings sorted by user_block, user_key, user_id and item_id.

    Attributes
    ----------
    user_ids, item_ids
        Distinct ids, in the order of the rows.
    user_block, user_key : int32 (n_users,)
    users, items : int32 (n,)
        Places of the ratings' ids.
    rating : float32 (n,)
    rated_at : int64 (n,)
        Microseconds since 1970, or `_UNKNOWN`.
    ingest_id : int64 (n,)
        `_NEW` where the row is not in the table.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    user_block: NDArray[np.int32]
    user_key: NDArray[np.int32]
    users: NDArray[np.int32]
    items: NDArray[np.int32]
    rating: NDArray[np.float32]
    rated_at: NDArray[np.int64]
    ingest_id: NDArray[np.int64]

    @classmethod
    def sorted(cls, rows: pa.Table, n_blocks: int) -> _Pairs:
        """From rows of the table; rows without ingest_id are new. Equal pairs keep their order."""
        user_ids, users = _coded(rows["user_id"])
        block, key = user_keys(xxhash64(user_ids), n_blocks)
        by_key = pc.sort_indices(
            pa.table({"key": key, "id": user_ids}), [("key", "ascending"), ("id", "ascending")]
        ).to_numpy()  # a block's keys are those of no other, and ascend with the block
        item_ids, items = _coded(rows["item_id"])
        by_id = pc.sort_indices(item_ids).to_numpy()
        users, items = _ranks(by_key)[users], _ranks(by_id)[items]
        # Two counting sorts: by item, then stably by user.
        entries = sparse.coo_array((np.arange(len(users), dtype=np.int32), (items, users)))
        entries.has_canonical_format = True  # else pairs that occur twice would be added up
        by_user = entries.tocsr().tocsc()
        order = by_user.data
        rated_at = pc.fill_null(rows["rated_at"].cast(pa.int64()), _UNKNOWN).to_numpy()
        ingest_id = (
            rows["ingest_id"].to_numpy()[order]
            if "ingest_id" in rows.column_names
            else np.full(len(order), _NEW, np.int64)
        )
        return cls(
            user_ids.take(pa.array(by_key)),
            item_ids.take(pa.array(by_id)),
            block[by_key],
            key[by_key],
            np.repeat(np.arange(len(user_ids), dtype=np.int32), np.diff(by_user.indptr)),
            by_user.indices.astype(np.int32, copy=False),
            rows["rating"].to_numpy()[order],
            rated_at[order],
            ingest_id,
        )

    def newest(self) -> _Pairs:
        """One row of each pair: the latest, of equally late ones the last; but where that repeats
        the row of the table, that one."""
        is_first = np.ones(len(self.users), np.bool_)
        is_first[1:] = (self.users[1:] != self.users[:-1]) | (self.items[1:] != self.items[:-1])
        if is_first.all():
            return self
        first = np.flatnonzero(is_first)
        latest_time = np.maximum.reduceat(self.rated_at, first)
        group = np.cumsum(is_first, dtype=np.int32) - 1
        latest = np.flatnonzero(self.rated_at == latest_time[group])
        winners = np.empty_like(first)
        winners[group[latest]] = latest  # the last of a group stays
        same = (
            (self.ingest_id[first] != _NEW)
            & (self.rated_at[first] == self.rated_at[winners])
            & (self.rating[first] == self.rating[winners])
        )
        return self._at(np.where(same, first, winners))

    def blocks(self) -> NDArray[np.int32]:
        """The blocks of the users, ascending."""
        present = np.zeros(len(self.user_ids), np.bool_)
        present[self.users] = True
        return np.unique(self.user_block[present])

    def of_blocks(self, blocks: NDArray[np.int32]) -> _Pairs:
        """The rows of these blocks."""
        return self._at(np.flatnonzero(np.isin(self.user_block, blocks)[self.users]))

    def between(self, first: int, last: int) -> _Pairs:
        """The rows of the blocks from `first` to `last`, as views."""
        users = np.searchsorted(self.user_block, [first, last + 1])
        return self._at(slice(*np.searchsorted(self.users, users)))

    def _at(self, places: NDArray[np.int64] | slice) -> _Pairs:
        return _Pairs(
            self.user_ids,
            self.item_ids,
            self.user_block,
            self.user_key,
            self.users[places],
            self.items[places],
            self.rating[places],
            self.rated_at[places],
            self.ingest_id[places],
        )

    def rows(self, ingest_id: int, start: int = 0, stop: int | None = None) -> pa.Table:
        """Rows of the table; `ingest_id` is that of new rows."""
        part = slice(start, stop)
        users, times = self.users[part], self.rated_at[part]
        ingests = self.ingest_id[part]
        return pa.table(
            {
                "user_id": self.user_ids.take(pa.array(users)),
                "item_id": self.item_ids.take(pa.array(self.items[part])),
                "rating": self.rating[part],
                "rated_at": pa.array(times, mask=times == _UNKNOWN).cast(TIMESTAMP),
                "user_block": self.user_block[users],
                "user_key": self.user_key[users],
                "ingest_id": np.where(ingests == _NEW, ingest_id, ingests),
            }
        )


def _coded(ids: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int32]]:
    """Distinct ids, and the place among them of each."""
    encoded = ids.dictionary_encode().combine_chunks()
    return encoded.dictionary, encoded.indices.to_numpy()


def _ranks(order: NDArray[np.uint64]) -> NDArray[np.int32]:
    """The place of each element in an order."""
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order), dtype=np.int32)
    return ranks


def _known(schema: pa.Schema) -> pa.Schema:
    """The table's columns without those of a newer version of this software."""
    return pa.schema([field for field in schema if field.name in ratings.COLUMNS])


def _reader(parts: Sequence[_Pairs], ingest_id: int, schema: pa.Schema) -> pa.RecordBatchReader:
    """The rows of the table in batches, each of one block."""

    def batches() -> Iterator[pa.RecordBatch]:
        for pairs in parts:
            block = pairs.user_block[pairs.users]
            cuts = np.flatnonzero(np.append(True, block[1:] != block[:-1]))
            for start, stop in zip(cuts, np.append(cuts[1:], len(block)), strict=True):
                for first in range(start, stop, _WRITTEN_ROWS):
                    last = min(first + _WRITTEN_ROWS, stop)
                    rows = pairs.rows(ingest_id, first, last).select(schema.names)
                    yield from rows.cast(schema).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())
