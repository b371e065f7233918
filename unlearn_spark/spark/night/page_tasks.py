"""Functions that a night's Spark tasks run on pages of the ledger: open, update and unpack them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from unlearn_spark.core.blocks import other_side
from unlearn_spark.core.ledger_page import Page, Paging, RatingChanges, Thresholds, changed_norms
from unlearn_spark.spark.arrow import _table_of, arrays_of
from unlearn_spark.spark.night.factor_tasks import (
    _BINARY_COLUMNS,
    NEEDED,
    _by_side,
    _known_rows,
    _needed_rows,
    _tables_by_side,
)

if TYPE_CHECKING:
    from unlearn_spark.core.solver import Solver

PAGES = f"side string, page int, {_BINARY_COLUMNS}, ids binary, summary binary"
"""A page of the ledger. `ids` are its rows' ids (`_IDS`), `summary` is a pickled `Summary`."""

_IDS = pa.schema([("id", pa.string())])

KINDS = ("entry", "touched", "change")
"""Kinds of rows that a page is made from: the published model's ledger entries, rows whose ratings
change tonight, and rating changes since the chunks were packed."""

ENTRIES = (
    "side string, id string, block int, slot int, chunk int, n_ratings int, gradient_norm double, "
    "b_norm double, factor_norm double"
)

ENTRIES_AT_A_TIME = 10_000


def _page_row(
    side: str, number: int, page: Page, ids: Any, thresholds: Thresholds
) -> dict[str, Any]:
    """A row of `PAGES`."""
    summary = pickle.dumps(thresholds.summary(page, side))
    return {"side": side, "page": number, **page.to_binary(), "ids": ids, "summary": summary}


def _opened_page(state: pa.Table) -> tuple[Page, pa.Buffer]:
    """Make a page and its `ids` from entries, touched rows and changes (`KINDS`) of one side."""
    stored, touched, changes = (
        state.filter(pa.compute.equal(state["kind"], kind)) for kind in KINDS
    )
    rows = pa.concat_tables([stored, touched])
    numbers = ("n_ratings", "gradient_norm", "b_norm", "factor_norm")
    page = Page.opened(
        {
            "slots": stored["slot"].to_numpy(),
            "chunks": stored["chunk"].to_numpy(),
            **{name: stored[name].to_numpy() for name in numbers},
        },
        {"slots": touched["slot"].to_numpy(), "n_ratings": touched["n_ratings"].to_numpy()},
        RatingChanges(
            *(
                changes[name].to_numpy()
                for name in ("slot", "other_slot", "value", "change", "model_version")
            )
        ),
    )
    slots = rows["slot"].to_numpy()
    order = np.argsort(slots)
    ids = rows["id"].combine_chunks().take(order[np.searchsorted(slots, page.slots, sorter=order)])
    return page, pa.record_batch([ids], schema=_IDS).serialize()


def _page_after(page: Page, results: list[dict[str, Any]], drift: float, again: bool) -> Page:
    """A page after a round: pushes and drift first, then a patch's final values of its own rows."""

    def column(name: str, kind: type[np.generic]) -> NDArray[Any]:
        arrays = [np.frombuffer(row[name], kind) for row in results]
        return np.concatenate([np.zeros(0, kind), *arrays])

    page = page.pushed(
        column("push_slots", np.int32),
        column("push_gradient", np.float64),
        column("push_b", np.float64),
        drift,
    )
    norms = {name: column(name, np.float64) for name in ("gradient_norm", "b_norm", "factor_norm")}
    return page.looked_at(column("slots", np.int32), norms, column("solved", np.bool_), again)


def change_need_finder(paging: Paging) -> Callable[[pa.Table], pa.Table]:
    """Find the rows (`NEEDED`) that a page's changes (side, page, slot, other_slot) name."""

    def need(table: pa.Table) -> pa.Table:
        key = table["page"][0].as_py()
        needed: list[dict[str, Any]] = []
        for side, mine in _tables_by_side(table).items():
            for name, of in (("slot", side), ("other_slot", other_side(side))):
                needed += _needed_rows(of, key, np.unique(mine[name].to_numpy()), paging)
        return _table_of(NEEDED, needed)

    return need


def page_opener(
    solver: Solver, tonight: int, drifts: dict[str, float], force: bool, thresholds: Thresholds
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Make `PAGES` from rows of all `KINDS`, and push tonight's changes into them with the factors
    that they need (`MESSAGES`)."""

    def make(left: pa.Table, right: pa.Table) -> pa.Table:
        known = {
            side: _known_rows(rows, solver.rank)
            for side, rows in _by_side(arrays_of(right)).items()
        }
        made = []
        for side, state in _tables_by_side(left).items():
            page, ids = _opened_page(state)
            if not len(page.slots):
                continue
            other = other_side(side)
            pushes = changed_norms(page, tonight, known[side], known[other], solver.objective)
            page = page.pushed(*pushes, drifts[other], force)
            made.append(_page_row(side, state["page"][0].as_py(), page, ids, thresholds))
        return _table_of(PAGES, made)

    return make


def result_taker(
    drifts: dict[str, float], again: bool, thresholds: Thresholds
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Update `PAGES` with the `RESULTS` of a round."""

    def take(left: pa.Table, right: pa.Table) -> pa.Table:
        results = _by_side(arrays_of(right))
        made = []
        for row in arrays_of(left):
            side = row["side"]
            page = Page.from_binary(row)
            page = _page_after(page, results[side], drifts[other_side(side)], again)
            made.append(_page_row(side, row["page"], page, row["ids"], thresholds))
        return _table_of(PAGES, made)

    return take


def entry_unpacker(
    n_blocks: Mapping[str, int],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Turn `PAGES` into `ENTRIES`, sorted by block and slot."""

    def unpack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                page = Page.from_binary(row)
                ids = pa.ipc.read_record_batch(row["ids"], _IDS).column(0)
                blocks = page.slots % np.int32(n_blocks[row["side"]])
                entries = pa.table(
                    {
                        "side": pa.array([row["side"]] * len(ids), pa.string()),
                        "id": ids,
                        "block": blocks,
                        "slot": page.slots,
                        "chunk": page.chunks,
                        "n_ratings": page.n_ratings,
                        "gradient_norm": page.gradient_norm,
                        "b_norm": page.b_norm,
                        "factor_norm": page.factor_norm,
                    }
                )
                # Spark sorts again, but only has to pass over rows that are sorted.
                entries = entries.take(np.lexsort((page.slots, blocks)))
                yield from entries.to_batches(ENTRIES_AT_A_TIME)

    return unpack
