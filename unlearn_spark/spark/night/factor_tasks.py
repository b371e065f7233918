"""Row schemas that a night's Spark tasks exchange, and the functions that hand out factor rows.

Every row holds raw arrays (`blocks.raw`), as the schemas below say. The functions run in workers.
They take and return Arrow tables, or table rows as dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from unlearn_spark.core.blocks import SIDES, distinct, other_side, places_in, raw
from unlearn_spark.core.ledger_page import COLUMNS, Paging
from unlearn_spark.core.solver import cut_stack
from unlearn_spark.spark.arrow import _table_of, arrays_of, list_column, matrix_of


def _by_side(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each side, in their order."""
    return {side: [row for row in rows if row["side"] == side] for side in SIDES}


def _tables_by_side(table: pa.Table) -> dict[str, pa.Table]:
    return {side: table.filter(pa.compute.equal(table["side"], side)) for side in SIDES}


_BINARY_COLUMNS = ", ".join(f"{name} binary" for name in COLUMNS)
FACTOR_PAGES = "side string, page int, slots binary, factors binary"
"""Factors of some rows of a page."""

NEEDED = "side string, page int, key int, slots binary"
"""Rows of a page whose factors the task with this key needs."""

ASKED = "side string, slot int"
"""`NEEDED` with one slot a row."""

MESSAGES = "side string, key int, slots binary, factors binary"
"""The answer to `NEEDED`: factors for the task with this key."""

MOVED = "slot int, factors array<float>, round int"
"""A row that a round solved, and its factors after it."""


def need_finder(
    paging: Paging,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Find the rows (`NEEDED`) whose factors a part (`LOADED`, in one partition) needs: its own and
    their neighbours, also those of removed ratings, which may have left the model."""

    def need(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        found: dict[tuple[str, int], list[NDArray[np.int32]]] = {}
        for batch in batches:
            for row in arrays_of(batch):
                side, other = row["side"], other_side(row["side"])
                named = [(other, row["others"])]
                if row["counts"] is None:
                    named = [(side, row["slots"]), (other, row["change_others"])]
                for of, slots in named:
                    array = distinct(np.frombuffer(slots, np.int32))
                    found.setdefault((of, row["key"]), []).append(array)
        for (side, key), arrays in found.items():
            slots = distinct(np.concatenate(arrays))
            for row in _needed_rows(side, key, slots, paging):
                yield from _table_of(NEEDED, [row]).to_batches()

    return need


def need_unpacker(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
    """Turn `NEEDED` into `ASKED`."""
    for batch in batches:
        for row in arrays_of(batch):
            slots = np.frombuffer(row["slots"], np.int32)
            sides = pa.array([row["side"]] * len(slots), pa.string())
            yield pa.RecordBatch.from_pydict({"side": sides, "slot": slots})


def _needed_rows(
    side: str, key: int, slots: NDArray[np.int32], paging: Paging
) -> Iterator[dict[str, Any]]:
    """Rows of `NEEDED` for these slots, one for each page."""
    for page, mine in paging.split(side, slots):
        yield {"side": side, "page": page, "key": key, "slots": raw(slots[mine], np.int32)}


def _factor_rows(
    place: dict[str, Any], slots: NDArray[np.int32], factors: NDArray[np.float32]
) -> Iterator[dict[str, Any]]:
    """Rows with the columns of `place` and a message's worth of factors each."""
    for own, stack in cut_stack(slots, factors[None]):
        yield {**place, "slots": raw(own, np.int32), "factors": raw(stack[0], np.float32)}


def fetcher(rank: int) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Answer `NEEDED` of a page with `MESSAGES`, as far as the page has the factors: `FACTOR_PAGES`
    and results of rounds, both with the columns solved and round."""

    def fetch(left: pa.Table, right: pa.Table) -> pa.Table:
        asked = _by_side(arrays_of(left))
        sources = _by_side(sorted(arrays_of(right), key=lambda row: row["round"]))
        answers: list[dict[str, Any]] = []
        for side in SIDES:
            if not asked[side] or not sources[side]:
                continue
            mine = [_solved_of(row, rank) for row in sources[side]]
            slots = np.concatenate([known for known, _ in mine])
            factors = np.concatenate([values for _, values in mine])
            # Sorted by round: the last row of a slot is the newest.
            known, from_end = np.unique(slots[::-1], return_index=True)
            rows = len(slots) - 1 - from_end
            for row in asked[side]:
                wanted = np.frombuffer(row["slots"], np.int32)
                places, here = places_in(wanted, known)
                place = {"side": side, "key": row["key"]}
                answers += _factor_rows(place, wanted[here], factors[rows[places]])
        return _table_of(MESSAGES, answers)

    return fetch


def _solved_of(row: dict[str, Any], rank: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) of a page's row, or of the solved rows of a round's result."""
    slots = np.frombuffer(row["slots"], np.int32)
    factors = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
    if row["solved"] is None:
        return slots, factors
    solved = np.frombuffer(row["solved"], np.bool_)
    return slots[solved], factors[solved]


def packer(
    rank: int, paging: Paging
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Pack factor rows (side, slot, factors) into `FACTOR_PAGES`."""

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for side, rows in _tables_by_side(pa.Table.from_batches([batch])).items():
                slots, factors = rows["slot"].to_numpy(), matrix_of(rows["factors"], rank)
                for page, mine in paging.split(side, slots):
                    packed = _factor_rows({"side": side, "page": page}, slots[mine], factors[mine])
                    yield from _table_of(FACTOR_PAGES, list(packed)).to_batches()

    return pack


def _known_rows(
    messages: list[dict[str, Any]], rank: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) by rising slot from messages of one side, which may repeat a slot."""
    slots = [np.frombuffer(row["slots"], np.int32) for row in messages]
    factors = [np.frombuffer(row["factors"], np.float32).reshape(-1, rank) for row in messages]
    known, first = np.unique(np.concatenate([np.zeros(0, np.int32), *slots]), return_index=True)
    return known, np.concatenate([np.zeros((0, rank), np.float32), *factors])[first]


def moved_unpacker(rank: int) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Turn results of rounds into the rows that they solved (`MOVED`)."""

    def unpack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                slots, factors = _solved_of(row, rank)
                yield pa.RecordBatch.from_pydict(
                    {
                        "slot": slots,
                        "factors": list_column(factors),
                        "round": np.full(len(slots), row["round"], np.int32),
                    }
                )

    return unpack
