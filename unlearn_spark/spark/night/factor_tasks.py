"""What travels between the tasks of a night, and what workers make of it.

Every table is a few rows of raw arrays (`blocks.raw`), described by the schemas below. Functions
take and give Arrow tables or their rows as dictionaries; nothing here starts a Spark job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from unlearn_spark.core.blocks import SIDES, distinct, other_side, places_in, raw
from unlearn_spark.core.ledger_page import COLUMNS, Paging
from unlearn_spark.core.solver import cut_stack
from unlearn_spark.spark.arrow import _table_of, arrays_of, list_column, matrix_of

if TYPE_CHECKING:
    pass


def _by_side(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each side, in their order."""
    return {side: [row for row in rows if row["side"] == side] for side in SIDES}


def _tables_by_side(table: pa.Table) -> dict[str, pa.Table]:
    return {side: table.filter(pa.compute.equal(table["side"], side)) for side in SIDES}


_BINARY_COLUMNS = ", ".join(f"{name} binary" for name in COLUMNS)
FACTOR_PAGES = "side string, page int, slots binary, factors binary"
"""Factors of rows of a page, a few rows at a time."""

NEEDED = "side string, page int, key int, slots binary"
"""Rows of a page whose factors the task with this key needs."""

ASKED = "side string, slot int"

MESSAGES = "side string, key int, slots binary, factors binary"
"""The answer."""

NO_MESSAGES = _table_of(MESSAGES, [])

MOVED = "slot int, factors array<float>, round int"


def need_finder(
    paging: Paging,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """From what was loaded (`LOADED`) by page and part the rows whose factors the part needs, its
    own among them; all of a part lies in one partition.

    Ratings that changes take away are counted in, which may name rows that left."""

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
    """Needed rows (`NEEDED`) one by one (`ASKED`)."""
    for batch in batches:
        for row in arrays_of(batch):
            slots = np.frombuffer(row["slots"], np.int32)
            sides = pa.array([row["side"]] * len(slots), pa.string())
            yield pa.RecordBatch.from_pydict({"side": sides, "slot": slots})


def _needed_rows(
    side: str, key: int, slots: NDArray[np.int32], paging: Paging
) -> Iterator[dict[str, Any]]:
    """Rows of `NEEDED`."""
    for page, mine in paging.split(side, slots):
        yield {"side": side, "page": page, "key": key, "slots": raw(slots[mine], np.int32)}


def _stock_rows(
    place: dict[str, Any], slots: NDArray[np.int32], factors: NDArray[np.float32]
) -> Iterator[dict[str, Any]]:
    for own, stack in cut_stack(slots, factors[None]):
        yield {**place, "slots": raw(own, np.int32), "factors": raw(stack[0], np.float32)}


def fetcher(rank: int) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Answers what parts need from the factors of a page, where it has them."""

    def fetch(left: pa.Table, right: pa.Table) -> pa.Table:
        asked = _by_side(arrays_of(left))
        stock = _by_side(sorted(arrays_of(right), key=lambda row: row["round"]))
        answers: list[dict[str, Any]] = []
        for side in SIDES:
            if not asked[side] or not stock[side]:
                continue
            mine = [_solved_of(row, rank) for row in stock[side]]
            slots = np.concatenate([known for known, _ in mine])
            factors = np.concatenate([values for _, values in mine])
            # Later rounds stand behind: of a slot's rows the last one counts.
            known, from_end = np.unique(slots[::-1], return_index=True)
            rows = len(slots) - 1 - from_end
            for row in asked[side]:
                wanted = np.frombuffer(row["slots"], np.int32)
                places, here = places_in(wanted, known)
                place = {"side": side, "key": row["key"]}
                answers += _stock_rows(place, wanted[here], factors[rows[places]])
        return _table_of(MESSAGES, answers)

    return fetch


def _solved_of(row: dict[str, Any], rank: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) of a row of stock, or of those that a round solved."""
    slots = np.frombuffer(row["slots"], np.int32)
    factors = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
    if row["solved"] is None:
        return slots, factors
    solved = np.frombuffer(row["solved"], np.bool_)
    return slots[solved], factors[solved]


def packer(
    rank: int, paging: Paging
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Factor rows (side, slot, factors) as `FACTOR_PAGES`."""

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for side, rows in _tables_by_side(pa.Table.from_batches([batch])).items():
                slots, factors = rows["slot"].to_numpy(), matrix_of(rows["factors"], rank)
                for page, mine in paging.split(side, slots):
                    packed = _stock_rows({"side": side, "page": page}, slots[mine], factors[mine])
                    yield from _table_of(FACTOR_PAGES, list(packed)).to_batches()

    return pack


def _known_rows(
    messages: list[dict[str, Any]], rank: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) by slot from messages of one side; a slot may come twice."""
    slots = [np.frombuffer(row["slots"], np.int32) for row in messages]
    factors = [np.frombuffer(row["factors"], np.float32).reshape(-1, rank) for row in messages]
    known, first = np.unique(np.concatenate([np.zeros(0, np.int32), *slots]), return_index=True)
    return known, np.concatenate([np.zeros((0, rank), np.float32), *factors])[first]


def moved_unpacker(rank: int) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """From results of rounds the factors that they solved (`MOVED`), a row each."""

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
