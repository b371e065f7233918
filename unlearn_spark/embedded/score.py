"""Scores (user, item) pairs, and finds the best items of users, in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from unlearn_spark.core.ranking import best
from unlearn_spark.embedded.ids import as_text, typed_ids
from unlearn_spark.errors import InputError

QUERY_ROWS = 4096
"""Query rows that a thread takes at a time."""

PRODUCT_BYTES = 1 << 21
"""Size of the vectors whose products are taken at a time, so that they stay in the cache."""


@dataclass(frozen=True)
class Vectors:
    """The factor rows of one side.

    Attributes
    ----------
    ids
        string or int64 (n,), distinct.
    factors : float32 (n, rank)
    """

    ids: pa.Array
    factors: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.ids)

    def by_id(self) -> Vectors:
        """The same rows by rising id."""
        return self.take(pc.sort_indices(self.ids).to_numpy())

    def take(self, rows: NDArray[np.integer]) -> Vectors:
        """Some rows, in this order."""
        return Vectors(self.ids.take(pa.array(rows)), self.factors[rows])

    def rows_of(self, ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
        """`places_of` ids among these rows'."""
        return places_of(ids, self.ids)


def places_of(ids: pa.Array | pa.ChunkedArray, known: pa.Array) -> NDArray[np.int32]:
    """The place of each id among known ones, int32 (n,); -1 if it is not there. Ids of another type
    are compared as text."""
    if ids.type == known.type:
        return pc.fill_null(pc.index_in(ids, known), -1).to_numpy(zero_copy_only=False)
    encoded = pa.chunked_array(ids).combine_chunks().dictionary_encode()
    distinct = typed_ids(as_text(encoded.dictionary), known.type)
    places = pc.fill_null(pc.index_in(distinct, known), -1)
    # A null id has no place.
    found = np.append(places.to_numpy(zero_copy_only=False), np.int32(-1))
    return found[pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)]


@dataclass(frozen=True)
class Best:
    """The best candidates of consecutive queries.

    Attributes
    ----------
    first
        Row of the first query.
    counts, chosen, scores
        As from `core.ranking.best`.
    """

    first: int
    counts: NDArray[np.int64]
    chosen: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def queries(self) -> NDArray[np.int64]:
        """The query row of each choice."""
        return self.first + np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def places(self) -> NDArray[np.int64]:
        """The place of each choice among its query's, from 1."""
        starts = np.cumsum(self.counts) - self.counts
        return np.arange(1, len(self.chosen) + 1) - np.repeat(starts, self.counts)


def top_n(
    queries: Vectors,
    candidates: Vectors,
    n: int,
    excluded: csr_array | None = None,
    threads: int = 1,
) -> Iterator[Best]:
    """Find the n candidates with the largest scalar products for every query.

    Parameters
    ----------
    candidates
        By rising id; of equal scores the one with the smaller id is chosen.
    excluded
        From `pairs_by_query`: pairs that must not be chosen.

    Yields
    ------
    Best
        In the order of the queries; all of them are there.

    Raises
    ------
    InputError
        n is below 1.
    """
    if n < 1:
        raise InputError(f"{n} recommendations were asked for; ask for 1 or more")

    def found(first: int) -> Best:
        rows = slice(first, min(first + QUERY_ROWS, len(queries)))
        pairs = None
        if excluded is not None:
            indptr = excluded.indptr[rows.start : rows.stop + 1]
            columns = excluded.indices[indptr[0] : indptr[-1]]
            pairs = np.repeat(np.arange(rows.stop - rows.start), np.diff(indptr)), columns
        return Best(first, *best(queries.factors[rows], candidates.factors, n, pairs))

    waiting: deque[Future[Best]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(queries), QUERY_ROWS):
            waiting.append(pool.submit(found, first))
            if len(waiting) > 2 * threads:  # the reader may be slower
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pairs_by_query(queries: Vectors, candidates: Vectors, tables: Iterator[pa.Table]) -> csr_array:
    """The pairs of tables with user_id and item_id by row of the queries (users) and candidates;
    pairs whose user or item is in neither are left out."""
    rows, columns = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for table in tables:
        row, column = queries.rows_of(table["user_id"]), candidates.rows_of(table["item_id"])
        known = (row >= 0) & (column >= 0)
        rows.append(row[known])
        columns.append(column[known])
    places = np.concatenate(rows), np.concatenate(columns)
    del rows, columns
    shape = len(queries), len(candidates)
    pairs = coo_array((np.ones(len(places[0]), np.bool_), places), shape=shape)
    pairs.has_canonical_format = True  # pairs may repeat
    return pairs.tocsr()


def predict_pairs(
    users: Vectors, items: Vectors, user_rows: NDArray[np.integer], item_rows: NDArray[np.integer]
) -> NDArray[np.float32]:
    """The predicted ratings of pairs of rows, float32 (n,); NaN where either is -1."""
    predicted = np.full(len(user_rows), np.nan, np.float32)
    known = np.flatnonzero((user_rows >= 0) & (item_rows >= 0))
    step = max(1, PRODUCT_BYTES // (4 * users.factors.shape[1]))
    for first in range(0, len(known), step):
        part = known[first : first + step]
        x, y = users.factors[user_rows[part]], items.factors[item_rows[part]]
        predicted[part] = np.einsum("ij,ij->i", x, y)
    return predicted


def named(users: Vectors, names: Sequence[str]) -> tuple[Vectors, list[str]]:
    """The rows of some users, given as text, by rising id; and the names that have none."""
    rows = users.rows_of(pa.array(names, pa.string()))
    unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
    return users.take(np.unique(rows[rows >= 0])), unknown
