"""Functions that a night's Spark tasks run to load the rows of a patch and to solve them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlearn_spark.core.blocks import SIDES, RatingBlock, raw
from unlearn_spark.core.ledger_page import COLUMNS, Page, Paging, Thresholds
from unlearn_spark.core.patch import PatchResult, PatchSide, solve_patch
from unlearn_spark.spark.arrow import _mapped, _table_of, arrays_of
from unlearn_spark.spark.night.factor_tasks import _BINARY_COLUMNS, _by_side, _known_rows

if TYPE_CHECKING:
    from unlearn_spark.core.solver import Solver

WANTED = "side string, block int, chunk int, wanted binary"
"""The slots of a stored chunk whose ratings a patch needs."""

LOADED = f"key int, side string, counts binary, others binary, values binary, {_BINARY_COLUMNS}"
"""A part of a patch: packed ratings as stored, or, where counts is null, ledger entries with the
rating changes since then."""

RESULTS = (
    "side string, page int, slots binary, factors binary, gradient_norm binary, b_norm binary, "
    "factor_norm binary, solved binary, push_slots binary, push_gradient binary, push_b binary, "
    "gram_change binary, solved_rows long, solved_ratings long, scanned_ratings long"
)
"""A `PatchResult` by page. Its `TOTALS` are in the first row of each part and side, else null."""

TOTALS = ("side", "gram_change", "solved_rows", "solved_ratings", "scanned_ratings")


def chunk_finder(
    patch: dict[str, str], thresholds: Thresholds
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Find the chunks (`WANTED`) of the rows that `patch` chooses in pages of the ledger."""

    def find(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        side, page = row["side"], Page.from_binary(row)
        chosen = thresholds.chosen(page, side, patch[side]) & (page.chunks >= 0)
        slots, chunks = page.slots[chosen], page.chunks[chosen]
        for chunk in np.unique(chunks).tolist():
            yield {
                "side": side,
                "block": chunk % thresholds.n_blocks[side],
                "chunk": chunk,
                "wanted": raw(slots[chunks == chunk], np.int32),
            }

    return _mapped(find, WANTED, one_batch=True)


def entry_finder(
    patch: dict[str, str], thresholds: Thresholds, keys: tuple[int, ...]
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Take the rows that `patch` chooses (`LOADED`), by part, from pages of the ledger."""

    def find(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        side, page = row["side"], Page.from_binary(row)
        chosen = thresholds.chosen(page, side, patch[side])
        for part, mine in page.of(chosen).split(len(keys)):
            no_ratings = dict.fromkeys(("counts", "others", "values"))
            yield {"key": keys[part], "side": side, **no_ratings, **mine.to_binary()}

    return _mapped(find, LOADED)


def wanted_keeper(
    keys: tuple[int, ...],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Take the ratings (`LOADED`) of `wanted` slots, by part, from stored chunks."""
    nothing = dict.fromkeys(COLUMNS)

    def pieces(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        block = RatingBlock.from_binary(row)
        block = block.rows(np.isin(block.slots, np.frombuffer(row["wanted"], np.int32)))
        part = block.slots % len(keys)
        for number in np.unique(part):
            packed = block.rows(part == number).to_binary()
            counted = {name: packed[name] for name in ("counts", "others", "values")}
            place = {"key": keys[number], "side": row["side"]}
            yield {**place, **counted, **nothing, "slots": packed["slots"]}

    return _mapped(pieces, LOADED)


def patch_solver(
    solver: Solver,
    thresholds: Thresholds,
    grams: dict[str, NDArray[np.float64]],
    spare: float,
    eager: Container[str],
    paging: Paging,
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Solve a part (`LOADED`) with the factors that it needs (`MESSAGES`), and return `RESULTS`.

    `grams` and `spare` are those of `solve_patch`; `eager` are the sides with rows over tau.
    """

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return _table_of(RESULTS, [])
        loaded, messages = _by_side(arrays_of(left)), _by_side(arrays_of(right))
        sides = {
            side: _patch_side(
                loaded[side], messages[side], solver.rank, thresholds.floors[side], side in eager
            )
            for side in SIDES
        }
        results = solve_patch(solver, sides, thresholds.tau, thresholds.mark, grams, spare)
        rows = [row for side in SIDES for row in _result_rows(side, results[side], paging)]
        return _table_of(RESULTS, rows)

    return solve


def _patch_side(
    loaded: list[dict[str, Any]],
    messages: list[dict[str, Any]],
    rank: int,
    floor: float,
    eager: bool,
) -> PatchSide:
    """One side of a part, from its loaded rows (`LOADED`) and factors (`MESSAGES`)."""
    pages = [Page.from_binary(row) for row in loaded if row["counts"] is None]
    block = RatingBlock.from_pieces([row for row in loaded if row["counts"] is not None])
    for page in pages:
        block = page.changes.applied(block)
    slots = np.concatenate([np.zeros(0, np.int32), *[page.slots for page in pages]])
    order = np.argsort(slots)
    if not np.array_equal(slots[order], block.slots):
        raise ValueError("ledger rows and packed ratings differ; the rating blocks are damaged")
    gradient = np.concatenate([np.zeros(0), *[page.gradient_norm for page in pages]])
    forced = np.isinf(gradient)[order]
    return PatchSide(*_known_rows(messages, rank), block, forced, floor, eager)


def _result_rows(side: str, result: PatchResult, paging: Paging) -> Iterator[dict[str, Any]]:
    """Rows of `RESULTS`, at least one."""
    totals: dict[str, Any] = {
        "gram_change": raw(result.gram_change, np.float64),
        "solved_rows": result.solved_rows,
        "solved_ratings": result.solved_ratings,
        "scanned_ratings": result.scanned_ratings,
    }
    factor_norm = np.linalg.norm(result.factors.astype(np.float64), axis=1)
    pushes = dict(paging.split(side, result.push_slots))
    own = dict(paging.split(side, result.slots))
    none = np.zeros(0, np.intp)
    for page in sorted({paging.keys[0], *pushes, *own}):
        rows, pushed = own.get(page, none), pushes.get(page, none)
        yield {
            "side": side,
            "page": page,
            "slots": raw(result.slots[rows], np.int32),
            "factors": raw(result.factors[rows], np.float32),
            "gradient_norm": raw(result.gradient_norm[rows], np.float64),
            "b_norm": raw(result.b_norm[rows], np.float64),
            "factor_norm": raw(factor_norm[rows], np.float64),
            "solved": raw(result.solved[rows], np.bool_),
            "push_slots": raw(result.push_slots[pushed], np.int32),
            "push_gradient": raw(result.push_gradient[pushed], np.float64),
            "push_b": raw(result.push_b[pushed], np.float64),
            **totals,
        }
        totals = dict.fromkeys(totals)
