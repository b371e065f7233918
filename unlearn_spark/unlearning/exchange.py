"""What travels between the tasks of a night, and what workers make of it.

Every table is a few rows of raw arrays (`blocks.raw`), described by the schemas below. Functions
take and give Arrow tables or their rows as dictionaries; nothing here starts a Spark job.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from unlearn_spark.als.spark import arrays_of, list_column, matrix_of, pieces_table
from unlearn_spark.core.blocks import SIDES, RatingBlock, distinct, other_side, places_in, raw
from unlearn_spark.core.bounds import rating_terms
from unlearn_spark.core.ledger_page import COLUMNS, Page, Paging, RatingChanges, Summary
from unlearn_spark.core.patch import PatchSide, SettledSide, places_among, settle
from unlearn_spark.core.solver import cut_stack

if TYPE_CHECKING:
    from unlearn_spark.core.objective import Objective
    from unlearn_spark.core.solver import Solver

_TYPES = {
    "string": pa.string(),
    "int": pa.int32(),
    "long": pa.int64(),
    "boolean": pa.bool_(),
    "binary": pa.binary(),
}


def _arrow_kinds(schema: str) -> dict[str, pa.DataType]:
    """The Arrow types of a schema, for `spark.pieces_table`."""
    return {name: _TYPES[kind] for name, kind in (each.split() for each in schema.split(", "))}


def _table_of(schema: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of a schema, also none."""
    kinds = _arrow_kinds(schema)
    return pieces_table(rows, **kinds) if rows else pa.schema(kinds).empty_table()


def _by_side(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each side, in their order."""
    return {side: [row for row in rows if row["side"] == side] for side in SIDES}


def _tables_by_side(table: pa.Table) -> dict[str, pa.Table]:
    return {side: table.filter(pa.compute.equal(table["side"], side)) for side in SIDES}


_BINARY_COLUMNS = ", ".join(f"{name} binary" for name in COLUMNS)
PAGES = f"side string, page int, {_BINARY_COLUMNS}, ids binary, summary binary"
"""A page of the ledger; `ids` names its rows (`_IDS`), `summary` is a pickled `pages.Summary`."""

_IDS = pa.schema([("id", pa.string())])

STOCK = "side string, page int, slots binary, factors binary"
"""Factors of rows of a page, a few rows at a time."""

WANTED = "side string, block int, chunk int, wanted binary"
"""Slots of a stored chunk that a patch looks at."""

LOADED = f"key int, side string, counts binary, others binary, values binary, {_BINARY_COLUMNS}"
"""Packed ratings of a part, as they were stored, or (counts is null) its ledger entries with the
changes since."""

NEEDED = "side string, page int, key int, slots binary"
"""Rows of a page whose factors the task with this key needs."""

ASKED = "side string, slot int"

MESSAGES = "side string, key int, slots binary, factors binary"
"""The answer."""

NO_MESSAGES = _table_of(MESSAGES, [])

RESULTS = (
    "side string, page int, slots binary, factors binary, gradient_norm binary, b_norm binary, "
    "factor_norm binary, solved binary, push_slots binary, push_gradient binary, push_b binary, "
    "gram_change binary, solved_rows long, solved_ratings long, scanned_ratings long"
)
"""`patch.SettledSide` by page; its totals stand on the first row of each part and side."""

TOTALS = ("side", "gram_change", "solved_rows", "solved_ratings", "scanned_ratings")
MOVED = "slot int, factors array<float>, round int"
ENTRIES = (
    "side string, id string, block int, slot int, chunk int, n_ratings int, gradient_norm double, "
    "b_norm double, factor_norm double"
)

ENTRIES_AT_A_TIME = 10_000


@dataclass(frozen=True)
class Levels:
    """What rows are chosen by: blocks of each side, tau and the mark, and the floor of each side's
    residuals."""

    n_blocks: dict[str, int]
    tau: float
    mark: float
    floors: dict[str, float]

    def chosen(self, page: Page, side: str, choice: str) -> NDArray[np.bool_]:
        """Which rows of a page of this side a choice means."""
        return page.chosen(choice, self.tau, self.mark, self.floors[side])

    def summary(self, page: Page, side: str) -> Summary:
        """How a page of this side stands."""
        return page.summary(self.n_blocks[side], self.tau, self.mark, self.floors[side])


def _page_row(side: str, number: int, page: Page, ids: Any, levels: Levels) -> dict[str, Any]:
    """A row of `PAGES`."""
    summary = pickle.dumps(levels.summary(page, side))
    return {"side": side, "page": number, **page.to_binary(), "ids": ids, "summary": summary}


def _opened_page(state: pa.Table) -> tuple[Page, pa.Buffer]:
    """A page and its `ids`, from the entries, touched rows and changes of one side, told apart by
    what they lack."""
    is_change = state["other_slot"].is_valid()
    changes = state.filter(is_change)
    rows = state.filter(pa.compute.invert(is_change))
    is_stored = rows["gradient_norm"].is_valid()
    stored, touched = rows.filter(is_stored), rows.filter(pa.compute.invert(is_stored))
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


def _pushes_of(
    page: Page,
    tonight: int,
    mine: tuple[NDArray[np.int32], NDArray[np.float32]],
    others: tuple[NDArray[np.int32], NDArray[np.float32]],
    objective: Objective,
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """(slots, gradient, b): what tonight's changes do to the equations of a page's rows.

    Parameters
    ----------
    mine, others
        (slots, factors) of this side's rows and of the other side's, as they were.
    """
    news = page.changes.of(page.changes.order == tonight)
    news = news.of(np.isin(news.rows, page.slots))
    if not len(news):
        return np.zeros(0, np.int32), np.zeros(0), np.zeros(0)
    slots, rows = np.unique(news.rows, return_inverse=True)
    y = mine[1][places_among(slots, mine[0])]
    places = places_among(news.others, others[0])
    added = news.signs > 0
    change = [
        rating_terms(rows[which], places[which], news.values[which], y, others[1], objective)
        for which in (added, ~added)
    ]
    gradient, b = (change[0] - change[1]).norms()
    return slots, gradient, b


def _page_after(page: Page, results: list[dict[str, Any]], drift: float, again: bool) -> Page:
    """A page after a round. What a patch says of its own rows is final: no push, and no drift,
    comes on top."""

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


def _mapped(
    function: Callable[[dict[str, Any]], Iterator[dict[str, Any]]],
    schema: str,
    one_batch: bool = False,
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """For `mapInArrow`: a function that makes rows of a schema from one row; `one_batch` where they
    are many and small."""

    def apply(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for row in arrays_of(batch):
                table = _table_of(schema, list(function(row)))
                yield from (table.combine_chunks() if one_batch else table).to_batches()

    return apply


def chunk_finder(
    patch: dict[str, str], levels: Levels
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """From pages of the ledger the chunks (`WANTED`) that have chosen rows."""

    def find(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        side, page = row["side"], Page.from_binary(row)
        chosen = levels.chosen(page, side, patch[side]) & (page.chunks >= 0)
        slots, chunks = page.slots[chosen], page.chunks[chosen]
        for chunk in np.unique(chunks).tolist():
            yield {
                "side": side,
                "block": chunk % levels.n_blocks[side],
                "chunk": chunk,
                "wanted": raw(slots[chunks == chunk], np.int32),
            }

    return _mapped(find, WANTED, one_batch=True)


def entry_finder(
    patch: dict[str, str], levels: Levels, keys: tuple[int, ...]
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """From pages of the ledger the chosen rows (`LOADED`) by part."""

    def find(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        side, page = row["side"], Page.from_binary(row)
        chosen = levels.chosen(page, side, patch[side])
        for part, mine in page.of(chosen).split(len(keys)):
            no_ratings = dict.fromkeys(("counts", "others", "values"))
            yield {"key": keys[part], "side": side, **no_ratings, **mine.to_binary()}

    return _mapped(find, LOADED)


def wanted_keeper(
    keys: tuple[int, ...],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """From stored chunks with their `wanted` slots the ratings of those (`LOADED`) by part."""
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


def settler(
    solver: Solver,
    levels: Levels,
    grams: dict[str, NDArray[np.float64]],
    spare: float,
    eager: Container[str],
    paging: Paging,
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """Settles a part (`LOADED`) with the factors that it needs (`MESSAGES`): its `RESULTS`."""

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return _table_of(RESULTS, [])
        loaded, messages = _by_side(arrays_of(left)), _by_side(arrays_of(right))
        sides = {
            side: _patch_side(
                loaded[side], messages[side], solver.rank, levels.floors[side], side in eager
            )
            for side in SIDES
        }
        settled = settle(solver, sides, levels.tau, levels.mark, grams, spare)
        rows = [row for side in SIDES for row in _result_rows(side, settled[side], paging)]
        return _table_of(RESULTS, rows)

    return solve


def packer(
    rank: int, paging: Paging
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Factor rows (side, slot, factors) as `STOCK`."""

    def pack(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        for batch in batches:
            for side, rows in _tables_by_side(pa.Table.from_batches([batch])).items():
                slots, factors = rows["slot"].to_numpy(), matrix_of(rows["factors"], rank)
                for page, mine in paging.split(side, slots):
                    packed = _stock_rows({"side": side, "page": page}, slots[mine], factors[mine])
                    yield from _table_of(STOCK, list(packed)).to_batches()

    return pack


def change_need_finder(paging: Paging) -> Callable[[pa.Table], pa.Table]:
    """From changes (side, page, slot, other_slot) of a page the rows whose factors it needs
    (`NEEDED`)."""

    def need(table: pa.Table) -> pa.Table:
        key = table["page"][0].as_py()
        needed: list[dict[str, Any]] = []
        for side, mine in _tables_by_side(table).items():
            for name, of in (("slot", side), ("other_slot", other_side(side))):
                needed += _needed_rows(of, key, np.unique(mine[name].to_numpy()), paging)
        return _table_of(NEEDED, needed)

    return need


def page_opener(
    solver: Solver, tonight: int, drifts: dict[str, float], force: bool, levels: Levels
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """A page's entries, touched rows and changes and the factors that these need (`MESSAGES`) as
    `PAGES`, with tonight's changes pushed."""

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
            pushes = _pushes_of(page, tonight, known[side], known[other], solver.objective)
            page = page.pushed(*pushes, drifts[other], force)
            made.append(_page_row(side, state["page"][0].as_py(), page, ids, levels))
        return _table_of(PAGES, made)

    return make


def result_taker(
    drifts: dict[str, float], again: bool, levels: Levels
) -> Callable[[pa.Table, pa.Table], pa.Table]:
    """The pages after a round, from those before and its `RESULTS`."""

    def take(left: pa.Table, right: pa.Table) -> pa.Table:
        results = _by_side(arrays_of(right))
        made = []
        for row in arrays_of(left):
            side = row["side"]
            page = Page.from_binary(row)
            page = _page_after(page, results[side], drifts[other_side(side)], again)
            made.append(_page_row(side, row["page"], page, row["ids"], levels))
        return _table_of(PAGES, made)

    return take


def entry_unpacker(
    n_blocks: dict[str, int],
) -> Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]]:
    """Pages of the ledger as `ENTRIES`, by block and slot."""

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
                # Sorted here, because Spark's sort of sorted rows is one look at each.
                entries = entries.take(np.lexsort((page.slots, blocks)))
                yield from entries.to_batches(ENTRIES_AT_A_TIME)

    return unpack


def _known_rows(
    messages: list[dict[str, Any]], rank: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(slots, factors) by slot from messages of one side; a slot may come twice."""
    slots = [np.frombuffer(row["slots"], np.int32) for row in messages]
    factors = [np.frombuffer(row["factors"], np.float32).reshape(-1, rank) for row in messages]
    known, first = np.unique(np.concatenate([np.zeros(0, np.int32), *slots]), return_index=True)
    return known, np.concatenate([np.zeros((0, rank), np.float32), *factors])[first]


def _patch_side(
    loaded: list[dict[str, Any]],
    messages: list[dict[str, Any]],
    rank: int,
    floor: float,
    eager: bool,
) -> PatchSide:
    """One side of a part from what was loaded of it and the factor rows that came with that."""
    pages = [Page.from_binary(row) for row in loaded if row["counts"] is None]
    block = RatingBlock.from_pieces([row for row in loaded if row["counts"] is not None])
    for page in pages:
        block = page.changes.applied(block)
    slots = np.concatenate([np.zeros(0, np.int32), *[page.slots for page in pages]])
    order = np.argsort(slots)
    if not np.array_equal(slots[order], block.slots):
        raise ValueError("active rows and their ratings differ; the rating blocks are damaged")
    gradient = np.concatenate([np.zeros(0), *[page.gradient_norm for page in pages]])
    forced = np.isinf(gradient)[order]
    return PatchSide(*_known_rows(messages, rank), block, forced, floor, eager)


def _result_rows(side: str, settled: SettledSide, paging: Paging) -> Iterator[dict[str, Any]]:
    """Rows of `RESULTS`."""
    totals: dict[str, Any] = {
        "gram_change": raw(settled.gram_change, np.float64),
        "solved_rows": settled.solved_rows,
        "solved_ratings": settled.solved_ratings,
        "scanned_ratings": settled.scanned_ratings,
    }
    factor_norm = np.linalg.norm(settled.factors.astype(np.float64), axis=1)
    pushes = dict(paging.split(side, settled.push_slots))
    own = dict(paging.split(side, settled.slots))
    none = np.zeros(0, np.intp)
    for page in sorted({paging.keys[0], *pushes, *own}):
        rows, pushed = own.get(page, none), pushes.get(page, none)
        yield {
            "side": side,
            "page": page,
            "slots": raw(settled.slots[rows], np.int32),
            "factors": raw(settled.factors[rows], np.float32),
            "gradient_norm": raw(settled.gradient_norm[rows], np.float64),
            "b_norm": raw(settled.b_norm[rows], np.float64),
            "factor_norm": raw(factor_norm[rows], np.float64),
            "solved": raw(settled.solved[rows], np.bool_),
            "push_slots": raw(settled.push_slots[pushed], np.int32),
            "push_gradient": raw(settled.push_gradient[pushed], np.float64),
            "push_b": raw(settled.push_b[pushed], np.float64),
            **totals,
        }
        totals = dict.fromkeys(totals)


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
