"""Fits a model in this process: encode the ratings once, then sweep until every row solves its
equations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from unlearn_spark.config import AlsSettings
from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import SIDES, RatingBlock, chunk_numbers, other_side
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.layout import choose_blocks
from unlearn_spark.core.objective import floor_of, relative_residual, target_magnitudes
from unlearn_spark.core.solver import OtherSide, Solver, solver_of
from unlearn_spark.core.sweeps import CONVERGED, Limits, seen, sweep_both
from unlearn_spark.core.threads import shared_out
from unlearn_spark.core.training import SweepReport, TrainingSummary, next_report
from unlearn_spark.embedded.ids import blocks_of, xxhash64
from unlearn_spark.embedded.model import FactorRows, Norms, WholeModel
from unlearn_spark.errors import InputError
from unlearn_spark.publishing import Fit

BLOCKS_WORTHWHILE = 8
"""Least number of blocks of a side, if its ratings are worth so many (`choose_blocks`)."""

FEW_RATINGS = 30_000_000
"""Up to so many ratings both sides are sorted at the same time; more would take much memory."""

Warm = Mapping[str, tuple[pa.Array, NDArray[np.float32]]]
"""By side: ids, and their factors float32 (n, rank)."""


@dataclass(frozen=True)
class Encoded:
    """Ratings by row of both sides, and the ids of the rows.

    Attributes
    ----------
    ids, hashes
        By side: id and `xxhash64` of each row, by ascending slot.
    blocks
        By side: the ratings; `slots` are those of all rows.
    n_blocks, n_slots
        By side: the number of storage blocks, and the largest slot + 1.
    floors
        By side: the least denominator of its residuals (`floor_of`).
    """

    ids: Mapping[str, pa.Array]
    hashes: Mapping[str, NDArray[np.int64]]
    blocks: Mapping[str, RatingBlock]
    n_blocks: Mapping[str, int]
    n_slots: Mapping[str, int]
    floors: Mapping[str, float]

    @property
    def anchor(self) -> str:
        """The side whose rows are the iterate: the one with fewer rows."""
        return "user" if self.blocks["user"].n_rows < self.blocks["item"].n_rows else "item"

    @property
    def n_ratings(self) -> int:
        return self.blocks["user"].n_ratings


@dataclass(frozen=True)
class Fitted:
    """A fitted model that is not published yet.

    Attributes
    ----------
    factors
        By side: float32 (n, rank), aligned with `encoded.ids`.
    norms
        By side: from a final scan in float64.
    """

    encoded: Encoded
    factors: Mapping[str, NDArray[np.float32]]
    norms: Mapping[str, Norms]
    summary: TrainingSummary

    @property
    def ids(self) -> Mapping[str, pa.Array]:
        """By side: the id of each row."""
        return self.encoded.ids

    def to_store(self) -> WholeModel:
        """The model as its tables hold it."""
        encoded = self.encoded
        rows = {
            side: FactorRows(
                encoded.ids[side],
                encoded.blocks[side].slots,
                encoded.blocks[side].counts,
                self.factors[side],
            )
            for side in SIDES
        }
        chunks = {
            side: chunk_numbers(block.slots, block.counts, encoded.n_blocks[side])
            for side, block in encoded.blocks.items()
        }
        return WholeModel(
            rows, self.norms, chunks, encoded.blocks, encoded.n_blocks, encoded.floors
        )

    @property
    def fit(self) -> Fit:
        """What is published of it apart from its tables."""
        encoded = self.encoded
        layouts = {
            side: {"n_blocks": encoded.n_blocks[side], "n_slots": encoded.n_slots[side]}
            for side in SIDES
        }
        return Fit(layouts, encoded.floors, self.summary)


# --- encoding -------------------------------------------------------------------------------------


class _Numbering:
    """Numbers ids in the order in which they first occur."""

    def __init__(self) -> None:
        self.known: pa.Array | None = None
        self.codes: list[NDArray[np.int32]] = []

    def add(self, ids: pa.Array) -> None:
        if self.known is None:
            self.known = ids.slice(0, 0)
        found = pc.index_in(ids, self.known)
        if found.null_count:
            new = pc.unique(ids.filter(found.is_null()))
            self.known = pa.concat_arrays([self.known, new])
            found = pc.index_in(ids, self.known)
        self.codes.append(found.to_numpy(zero_copy_only=False).astype(np.int32, copy=False))

    def joined(self) -> NDArray[np.int32]:
        codes, self.codes = np.concatenate(self.codes), []
        return codes


def encode(ratings: Iterable[pa.RecordBatch], als: AlsSettings, threads: int = 1) -> Encoded:
    """Number the ids and sort the ratings by row, on both sides.

    Parameters
    ----------
    ratings
        user_id, item_id (string or int64), rating; no nulls.

    Raises
    ------
    InputError
        There are no ratings.
    """
    numbering = {side: _Numbering() for side in SIDES}
    parts: list[NDArray[np.float32]] = []
    for batch in ratings:
        if batch.num_rows:
            given = [(numbering[side], batch[f"{side}_id"]) for side in SIDES]
            shared_out(lambda each: each[0].add(each[1]), given, threads)
            parts.append(batch["rating"].to_numpy(zero_copy_only=False).astype(np.float32))
    if not parts:
        raise InputError("there are no ratings to train on; ingest some first")
    values = np.concatenate(parts)
    del parts
    wanted = {"user": als.user_blocks, "item": als.item_blocks}
    slots, ids, hashes, n_blocks = {}, {}, {}, {}
    for side in SIDES:
        known, codes = numbering[side].known, numbering[side].joined()
        assert known is not None
        n_blocks[side] = choose_blocks(len(known), len(codes), BLOCKS_WORTHWHILE, wanted[side])
        hashes[side] = xxhash64(known)
        counts = np.bincount(codes, minlength=len(known))
        slot_of = _slots(known, hashes[side], counts, n_blocks[side])
        order = np.argsort(slot_of)
        ids[side], hashes[side] = known.take(pa.array(order)), hashes[side][order]
        slots[side] = slot_of[codes]
        del codes
    n_slots = {side: int(slots[side].max()) + 1 for side in SIDES}

    def by_row(side: str) -> RatingBlock:
        return RatingBlock.from_entries(slots[side], slots[other_side(side)], values)

    sorted_out = shared_out(by_row, SIDES, threads if len(values) <= FEW_RATINGS else 1)
    blocks = dict(zip(SIDES, sorted_out, strict=True))
    objective = solver_of(als).objective
    floors = {
        side: floor_of(target_magnitudes(block.indptr, block.values, objective))
        for side, block in blocks.items()
    }
    return Encoded(ids, hashes, blocks, n_blocks, n_slots, floors)


def _slots(
    ids: pa.Array, hashes: NDArray[np.int64], counts: NDArray[np.int64], n_blocks: int
) -> NDArray[np.int32]:
    """The slot of each id: positions in its block by falling number of ratings, then by id."""
    blocks = blocks_of(hashes, n_blocks)
    order = pc.sort_indices(
        pa.table({"block": blocks, "n_ratings": counts, "id": ids}),
        [("block", "ascending"), ("n_ratings", "descending"), ("id", "ascending")],
    ).to_numpy()
    in_order = blocks[order]
    starts = np.searchsorted(in_order, np.arange(n_blocks))
    positions = np.arange(len(order)) - starts[in_order]
    slots = np.empty(len(order), np.int32)
    slots[order] = positions * n_blocks + in_order
    return slots


# --- sweeping -------------------------------------------------------------------------------------


def fit(
    ratings: Iterable[pa.RecordBatch] | pa.Table,
    als: AlsSettings,
    threads: int = 1,
    *,
    warm: Warm | None = None,
    floors: Mapping[str, float] | None = None,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> Fitted:
    """Fit user and item factors.

    Parameters
    ----------
    ratings
        As for `encode`.
    warm
        Factors of an earlier model to start from.
    floors
        By side: the least denominator of its residuals; None: measure it on these ratings.
    on_sweep
        Called after every sweep.

    Raises
    ------
    InputError
        There are no ratings, or `warm` has another rank.
    """
    started = time.perf_counter()
    if warm is not None:
        require_rank(warm, als.rank)
    batches = ratings.to_batches() if isinstance(ratings, pa.Table) else ratings
    encoded = encode(batches, als, threads)
    if floors is not None:
        encoded = Encoded(**{**vars(encoded), "floors": dict(floors)})
    encode_seconds = time.perf_counter() - started
    start = starting_factors(encoded, als, encoded.anchor, warm)
    factors, reports, converged = sweep(encoded, als, start, threads, on_sweep)
    return finished(encoded, als, factors, reports, converged, started, encode_seconds, threads)


def require_rank(warm: Warm, rank: int) -> None:
    """Raise InputError unless the factors to start from have this rank."""
    given = warm["user"][1].shape[1]
    if given != rank:
        raise InputError(
            f"warm start: that model has rank {given}, als.rank is {rank}; set them equal"
        )


def starting_factors(
    encoded: Encoded, als: AlsSettings, side: str, warm: Warm | None
) -> NDArray[np.float32]:
    """Factors of a side to start from: those of `warm`, else by (seed, side, id)."""
    y = initial_factors(encoded.hashes[side], als.rank, als.seed, side, als.nonnegative)
    if warm is not None:
        ids, factors = warm[side]
        places = pc.index_in(encoded.ids[side], ids.cast(encoded.ids[side].type))
        known = places.is_valid().to_numpy(zero_copy_only=False)
        y[known] = factors[places.drop_null().to_numpy()]
    return y


def sweep(
    encoded: Encoded,
    als: AlsSettings,
    start: NDArray[np.float32],
    threads: int,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> tuple[dict[str, NDArray[np.float32]], list[SweepReport], bool]:
    """Sweep from the anchor's factors `start` to `als.tol`, or to the cap.

    Returns
    -------
    tuple
        By side the factors; a report for each sweep; whether the largest residual reached `tol`.
    """
    anchor = encoded.anchor
    other = other_side(anchor)
    reports: list[SweepReport] = []

    def reported(objective: float, worst: float, seconds: float) -> None:
        reports.append(next_report(reports, objective, worst, seconds, als.tol))
        if on_sweep is not None:
            on_sweep(reports[-1])

    swept = sweep_both(
        solver_of(als, threads),
        encoded.blocks[anchor],
        encoded.blocks[other],
        (encoded.n_slots[anchor], encoded.n_slots[other]),
        start[None],
        Accelerator(als.memory),
        Limits(als.max_sweeps, als.tol, encoded.floors[anchor]),
        reported,
    )
    factors = {anchor: swept.stack[0], other: swept.others}
    return factors, reports, swept.state == CONVERGED


def seen_by(
    solver: Solver,
    encoded: Encoded,
    side: str,
    factors: NDArray[np.float32],
    penalty: float = 0.0,
) -> OtherSide:
    """A side's factors as the other side's rows see them."""
    return seen(solver, encoded.blocks[side].slots, factors, encoded.n_slots[side], penalty)


def scan(
    encoded: Encoded, als: AlsSettings, factors: Mapping[str, NDArray[np.float32]], threads: int
) -> dict[str, Norms]:
    """By side: the norms of every row's equations, in float64."""
    solver = solver_of(als, threads)
    norms = {}
    for side in SIDES:
        others = seen_by(solver, encoded, other_side(side), factors[other_side(side)])
        gradient, b = solver.residuals(encoded.blocks[side], others, factors[side])
        lengths = np.linalg.norm(factors[side].astype(np.float64), axis=1)
        norms[side] = Norms(gradient, b, lengths)
    return norms


def largest_residual(norms: Mapping[str, Norms], floors: Mapping[str, float]) -> float:
    """The largest relative residual over the rows of both sides."""
    worst = [
        relative_residual(norms[side].gradient_norm, norms[side].b_norm, floors[side]).max()
        for side in SIDES
    ]
    return float(np.max(worst))


def finished(
    encoded: Encoded,
    als: AlsSettings,
    factors: Mapping[str, NDArray[np.float32]],
    reports: list[SweepReport],
    converged: bool,
    started: float,
    encode_seconds: float,
    threads: int,
) -> Fitted:
    """The model after its sweeps, with a final scan of all rows."""
    norms = scan(encoded, als, factors, threads)
    summary = TrainingSummary.of(
        {side: encoded.blocks[side].n_rows for side in SIDES},
        encoded.n_ratings,
        reports,
        converged,
        reports[-1].objective,
        largest_residual(norms, encoded.floors),
        started,
        encode_seconds,
    )
    return Fitted(encoded, factors, norms, summary)
