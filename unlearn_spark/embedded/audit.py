"""Checks a published model's certificate independently of the jobs that wrote it, in this process.

The audit reads ratings, factors, ledger, tombstones and receipts at the versions that the models
row names. It computes every row's residual ||A x - b|| / max(||b||, floor) in float64 from the
ratings table and the factor tables. It uses neither the packed ratings nor the code of the solvers
and the ledger, so a mistake there cannot hide itself here. The floors come from the certificate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array

from unlearn_spark.audit.equations import ABSOLUTE_SLACK, OTHER, RELATIVE_SLACK, Equations
from unlearn_spark.embedded.ids import as_text
from unlearn_spark.embedded.portions import portions
from unlearn_spark.embedded.ratings import (
    PAIR,
    covered,
    fitted_rules,
    known_ratings,
    retained,
)
from unlearn_spark.tables import factors, ratings, requests
from unlearn_spark.tables.audits import Audit
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.models import ModelVersion
from unlearn_spark.tables.relational import query

SLICE_RATINGS = 1 << 17
"""Ratings, about, of the rows that a thread takes at a time."""

STEP_BYTES = 1 << 21
"""Size of the vectors that a thread gathers at a time, so that they stay in its cache."""


def audit(store: DeltaRsStore, model: ModelVersion, threads: int) -> Audit:
    """Scan a published version, the newest or an earlier one; write nothing.

    Holds about 20 bytes a rating, and the factors in float32.

    Raises
    ------
    InputError
        The model names no ratings, so there is nothing to check it against.
    """
    known = known_ratings(model)
    rows = {side: _read_rows(store, model, side) for side in OTHER}
    scanned = _read_ratings(store, model, known, rows)
    residuals = {side: _residuals(model, rows, scanned, side, threads) for side in OTHER}
    ledger = store.read(factors.LEDGER, model.ledger_version, ["side", "id", "bound"])
    rated = {side: scanned.counts[side] > 0 for side in OTHER}
    return Audit(
        model_version=model.model_version,
        tau=float(model.certificate["tau"]),
        max_residual={side: float(residuals[side].max(initial=0.0)) for side in OTHER},
        floor=model.floors,
        rows={side: int(rows[side].copies.sum()) for side in OTHER},
        **_compare(rows, residuals, ledger),
        tombstoned_ratings_found=scanned.tombstoned,
        rows_without_ratings=sum(int(np.count_nonzero(~rated[side])) for side in OTHER),
        ratings_without_rows=scanned.unmatched,
    )


# --- what is stored ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The factor rows of one side, one for each id.

    Attributes
    ----------
    ids
        string or int64 (n,), distinct.
    copies : int64 (n,)
        How many factor rows the id has.
    vectors : float32 (n, rank)
        Those of the first copy; zeros where it is not usable.
    usable : bool (n,)
        Whether the stored vector has the length rank.
    """

    ids: pa.Array
    copies: NDArray[np.int64]
    vectors: NDArray[np.float32]
    usable: NDArray[np.bool_]

    @property
    def gram(self) -> NDArray[np.float64]:
        """Y'Y of the usable rows, float64 (rank, rank)."""
        total = np.zeros((self.vectors.shape[1],) * 2)
        for first in range(0, len(self.vectors), SLICE_RATINGS):
            part = self.vectors[first : first + SLICE_RATINGS].astype(np.float64)
            total += part.T @ part
        return total


def _read_rows(store: DeltaRsStore, model: ModelVersion, side: str) -> _Rows:
    version = getattr(model, f"{side}_factors_version")
    rank = model.als.rank
    table = store.read(factors.factor_table(side), version, ["id", "factors"])
    table = table.take(pc.sort_indices(table["id"]))  # sums must not follow the order of files
    usable, parts = [np.zeros(0, np.bool_)], [np.zeros((0, rank), np.float32)]
    for chunk in table["factors"].chunks:
        fits = pc.fill_null(pc.equal(pc.list_value_length(chunk), rank), False)
        # A missing number inside a vector becomes NaN.
        flat = chunk.filter(fits).flatten().to_numpy(zero_copy_only=False)
        mask = fits.to_numpy(zero_copy_only=False)
        vectors = flat.reshape(-1, rank)
        if not mask.all():
            vectors = np.zeros((len(mask), rank), np.float32)
            vectors[mask] = flat.reshape(-1, rank)
        usable.append(mask)
        parts.append(vectors)
    ids = table["id"].combine_chunks()
    rows = _Rows(ids, np.ones(len(ids), np.int64), np.concatenate(parts), np.concatenate(usable))
    distinct = ids.unique()
    if len(distinct) == len(ids):
        return rows
    copies = np.bincount(pc.index_in(ids, distinct).to_numpy(), minlength=len(distinct))
    first = pc.index_in(distinct, ids).to_numpy()
    return _Rows(distinct, copies, rows.vectors[first], rows.usable[first])


@dataclass(frozen=True)
class _Ratings:
    """The ratings that a model was fitted to.

    Attributes
    ----------
    places : int32 (n,)
        By side: the number of the factor row. Only ratings both of whose rows are usable.
    values : float32 (n,)
    counts : int64
        By side: all ratings of each factor row.
    unmatched
        Ratings whose user or item has no usable row.
    tombstoned
        Stored ratings that a request with a receipt covers.
    """

    places: Mapping[str, NDArray[np.int32]]
    values: NDArray[np.float32]
    counts: Mapping[str, NDArray[np.int64]]
    unmatched: int
    tombstoned: int


def _read_ratings(
    store: DeltaRsStore, model: ModelVersion, known: str, rows: Mapping[str, _Rows]
) -> _Ratings:
    """Read the ratings that meet a condition, a portion at a time."""
    forbidden, honoured = fitted_rules(store, model), _honoured_rules(store, model)
    has_rules = forbidden is not None or honoured is not None
    columns = [*PAIR, "rating", *(["rated_at"] if has_rules else [])]
    places: dict[str, list[NDArray[np.int32]]] = {side: [] for side in OTHER}
    values: list[NDArray[np.float32]] = []
    counts = {side: np.zeros(len(rows[side].ids), np.int64) for side in OTHER}
    unmatched = tombstoned = 0
    with store.reading(ratings.TABLE, model.ratings_version, columns, known) as reader:
        for portion in portions(reader):
            if honoured is not None:
                tombstoned += len(pc.unique(covered(portion, honoured)["place"]))
            table = retained(portion, forbidden)
            fine = np.ones(table.num_rows, np.bool_)
            found = {}
            for side in OTHER:
                place = pc.index_in(table[f"{side}_id"], rows[side].ids)
                at = pc.fill_null(place, -1).to_numpy()
                counts[side] += np.bincount(at[at >= 0], minlength=len(counts[side]))
                fine &= np.append(rows[side].usable, False)[at]
                found[side] = at
            unmatched += int(np.count_nonzero(~fine))
            for side in OTHER:
                places[side].append(found[side][fine])
            values.append(table["rating"].to_numpy()[fine])
    return _Ratings(
        {side: np.concatenate([np.zeros(0, np.int32), *places.pop(side)]) for side in OTHER},
        np.concatenate([np.zeros(0, np.float32), *values]),
        counts,
        unmatched,
        tombstoned,
    )


def _honoured_rules(store: DeltaRsStore, model: ModelVersion) -> pa.Table | None:
    """The rules of the requests that have a receipt; None: there are none."""
    if model.receipts_version is None or model.tombstones_version is None:
        return None
    every = requests.asked(store, model.tombstones_version, model.receipts_version)
    rules = requests.rules(every.filter(pc.invert(every["pending"])), guard=True)
    return rules if rules.num_rows else None


# --- residuals -----------------------------------------------------------------------------------


def _residuals(
    model: ModelVersion, rows: Mapping[str, _Rows], scanned: _Ratings, side: str, threads: int
) -> NDArray[np.float64]:
    """The residual of each row of a side, float64 (n,); infinite if the row is not usable, or if
    its id has several."""
    mine, others = rows[side], rows[OTHER[side]]
    gram = others.gram if model.als.implicit_prefs else None
    scan = _Scan(
        Equations.of(model.als, gram, model.floors[side]),
        mine.vectors,
        others.vectors,
        _by_row(scanned, side, (len(mine.ids), len(others.ids))),
    )
    with ThreadPoolExecutor(threads) as pool:
        found = np.concatenate([np.zeros(0), *pool.map(scan.residuals, scan.slices())])
    return np.where(mine.usable & (mine.copies == 1), found, np.inf)


def _by_row(scanned: _Ratings, side: str, shape: tuple[int, int]) -> csr_array:
    """Values by row of a side and, so that sums have one order, by column: row of the other."""
    places = scanned.places[side], scanned.places[OTHER[side]]
    entries = coo_array((scanned.values, places), shape=shape)
    entries.has_canonical_format = True  # a pair that is stored twice counts twice
    return entries.tocsc().tocsr()


@dataclass(frozen=True)
class _Scan:
    """Computes the residuals of the rows of one side.

    Attributes
    ----------
    x, y : float32
        Vectors of this side's and of the other side's rows.
    ratings
        Values by row of this side (rows) and of the other (columns).
    """

    equations: Equations
    x: NDArray[np.float32]
    y: NDArray[np.float32]
    ratings: csr_array

    def slices(self) -> Sequence[slice]:
        """Consecutive rows that together are all rows, with about equal work."""
        n = len(self.x)
        work = self.ratings.indptr + np.arange(n + 1)
        cuts = np.searchsorted(work, np.arange(0, int(work[-1]) + SLICE_RATINGS, SLICE_RATINGS))
        cuts = np.unique(np.minimum(cuts, n))
        return [slice(first, last) for first, last in pairwise(cuts.tolist())]

    def residuals(self, rows: slice) -> NDArray[np.float64]:
        """The residuals of some rows, float64."""
        # A number that is not finite makes its rows' residuals infinite.
        with np.errstate(invalid="ignore", over="ignore"):
            return self._residuals(rows)

    def _residuals(self, rows: slice) -> NDArray[np.float64]:
        x = self.x[rows].astype(np.float64)
        gradient, b = np.zeros_like(x), np.zeros_like(x)
        penalised = np.zeros(len(x))
        for part, bounds, entries in self._steps(rows):
            places = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
            y = np.take(self.y, self.ratings.indices[entries], axis=0).astype(np.float64)
            values = self.ratings.data[entries].astype(np.float64)
            scores = np.vecdot(np.take(x[part], places, axis=0), y)
            to_gradient, to_b, counts = self.equations.terms(values, scores)
            gradient[part] += _sums(bounds, to_gradient, y)
            b[part] += _sums(bounds, to_b, y)
            penalised[part] += np.bincount(places, counts, len(bounds) - 1)
        return self.equations.residuals(x, gradient, b, penalised)

    def _steps(self, rows: slice) -> Iterator[tuple[slice, NDArray[np.int64], slice]]:
        """Some entries of the rows at a time, and whose they are: rows counted from the first of
        `rows`, the bounds of each one's entries among these, and the entries."""
        indptr = self.ratings.indptr
        step = max(1, STEP_BYTES // (8 * self.x.shape[1]))
        end = int(indptr[rows.stop])
        for first in range(int(indptr[rows.start]), end, step):
            last = min(first + step, end)
            low = int(np.searchsorted(indptr, first, "right")) - 1
            high = int(np.searchsorted(indptr, last, "left"))
            bounds = np.clip(indptr[low : high + 1], first, last) - first
            yield slice(low - rows.start, high - rows.start), bounds, slice(first, last)


def _sums(
    bounds: NDArray[np.int64], weights: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The weighted sums of consecutive rows of y, float64 (len(bounds) - 1, rank)."""
    columns = np.arange(len(weights))
    return csr_array((weights, columns, bounds), shape=(len(bounds) - 1, len(weights))) @ y


# --- the ledger ----------------------------------------------------------------------------------


def _compare(
    rows: Mapping[str, _Rows], residuals: Mapping[str, NDArray[np.float64]], ledger: pa.Table
) -> dict[str, int]:
    """How the residuals compare with the ledger's bounds: the counts `ledger_*` of `Audit`."""
    scanned = pa.concat_tables(
        pa.table(
            {
                "side": pa.repeat(side, len(residuals[side])),
                "id": as_text(rows[side].ids),
                "copies": rows[side].copies,
                "residual": residuals[side],
            }
        )
        for side in OTHER
    )
    found = query(
        """
        WITH entries AS (
            SELECT side, id, count(*) AS entries, min(bound) AS bound FROM ledger GROUP BY side, id
        ), matched AS (
            SELECT coalesce(copies, 0) AS copies, coalesce(entries, 0) AS entries,
                coalesce(
                    NOT isnan(bound) AND bound * (1 + $relative) + $absolute >= residual, false
                ) AS is_enough
            FROM scanned FULL JOIN entries USING (side, id)
        )
        SELECT
            count(*) FILTER (copies > 0 AND entries > 0 AND NOT is_enough) AS ledger_below,
            sum(greatest(copies - entries, 0)) AS ledger_missing,
            sum(greatest(entries - copies, 0)) AS ledger_extra
        FROM matched
        """,
        {"relative": RELATIVE_SLACK, "absolute": ABSOLUTE_SLACK},
        scanned=scanned,
        ledger=ledger,
    )
    return {name: int(count or 0) for name, count in found.to_pylist()[0].items()}
