"""Half-sweeps on Spark: Spark moves factor rows and leaves rating parts where they are.

    rating parts of one side ---+
                                +-- cogroup by part --> new factor rows of that side
    factor rows of the other ---+

The side with fewer rows is the *anchor*. Its rows are the iterate y that is accelerated. Solving
them also yields the residuals and the objective of the iterate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.core.blocks import chunk_numbers, raw
from unlearn_spark.core.kernel import row_residuals
from unlearn_spark.core.solver import (
    AnchorSweep,
    OtherSide,
    Solver,
    cut_stack,
    joined_stack,
    mixed,
    solve_anchor,
)
from unlearn_spark.spark.arrow import arrays_of, binary_table, list_column, pieces_table
from unlearn_spark.spark.training.local_parts import PartReader
from unlearn_spark.spark.training.messages import FACTOR_SCHEMA

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row

    from unlearn_spark.spark.training.layout import SideLayout

STATE_SCHEMA = (
    "part int, slots binary, history binary, quadratic double, penalty double, "
    "worst double, products binary, missing int"
)
"""Rows of the anchor after a sweep. `history` is float32 (2h, n, rank): g and f = g - y of the
newest sweep, then of the one before, and so on. One of a part's rows has its scalars, the others
have 0 or nothing: `quadratic` and `penalty` (see `objective_of`); `worst`, the largest residual of
y; `products`, the part's share of the acceleration's matrix; and `missing`, the number of parts of
both sides whose ratings were not found. If there are any, the other columns mean nothing."""

ITERATE_SCHEMA = f"{FACTOR_SCHEMA}, history binary"
"""Rows of the anchor before a sweep: y as `factors`, and as `history` float32 (1 + 2h, n, rank), y
again and the (g, f) pairs that are kept."""

ROW_SCHEMA = (
    "slot int, n_ratings int, chunk int, gradient_norm double, b_norm double, "
    "factor_norm double, factors array<float>"
)
"""Finished factor rows with the norms of their equations."""


SENT = PartReader()
"""Reads ratings that Spark sends, and does not keep them."""


def deliver(
    to: SideLayout, other: DataFrame, own: DataFrame | None = None, stack: str = "factors"
) -> DataFrame:
    """Messages of factors to every part of a side, in the partitions of its rating parts.

    Parameters
    ----------
    other
        Factor parts (`FACTOR_SCHEMA`; other columns are dropped) of the other side; each goes to
        every part.
    own
        Rows of the side itself (part, slots and the column `stack`); each goes to its own part.
    stack
        The column of `own` that is sent as `factors`.
    """
    keys = F.array(*map(F.lit, to.keys))
    every = F.explode(keys).alias("key")
    messages = other.select(every, F.lit(False).alias("own"), *FACTOR_KINDS)
    if own is not None:
        mine = own.select(
            F.element_at(keys, F.col("part") % len(to.keys) + 1).alias("key"),
            F.lit(True).alias("own"),
            "part",
            "slots",
            F.col(stack).alias("factors"),
            F.lit(None).cast("binary").alias("gram"),
            F.lit(0.0).alias("scalar"),
            F.lit(0).alias("missing"),
        )
        messages = messages.union(mine)
    return messages.repartition(to.n_places, "key")


def solve_side(
    solver: Solver,
    parts: DataFrame,
    layout: SideLayout,
    other: DataFrame,
    other_slots: int,
    reader: PartReader = SENT,
) -> DataFrame:
    """Solve the rows of one side (`FACTOR_SCHEMA`) with the other side fixed."""

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return pa.schema(FACTOR_KINDS).empty_table()
        part, ratings = reader.read(left)
        if ratings is None:
            return binary_table([solver.missing_row(part)])
        seen = OtherSide.from_messages(arrays_of(right), solver.rank, other_slots)
        factors = solver.solve(ratings, seen, None).factors
        penalty = solver.penalty(ratings, factors)
        return pieces_table(solver.factor_rows(part, ratings.slots, factors, penalty))

    return (
        parts.groupBy("key")
        .cogroup(deliver(layout, other).groupBy("key"))
        .applyInArrow(solve, FACTOR_SCHEMA)
    )


def sweep_anchor(
    solver: Solver,
    parts: DataFrame,
    layout: SideLayout,
    other: DataFrame,
    other_slots: int,
    iterate: DataFrame,
    floor: float,
    reader: PartReader = SENT,
) -> DataFrame:
    """The anchor's next state (`STATE_SCHEMA`), from its iterate and the other side's factors.

    `iterate` has part, slots and history of `ITERATE_SCHEMA`. `floor` is the anchor's (`floor_of`).
    """
    messages = deliver(layout, other, iterate, stack="history")

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return pa.schema(STATE_KINDS).empty_table()
        part, ratings = reader.read(left)
        if ratings is None:
            return binary_table([missing_state(part)])
        received = arrays_of(right)
        seen = OtherSide.from_messages(received, solver.rank, other_slots)
        stack = joined_stack([message for message in received if message["own"]], solver.rank)
        found = solve_anchor(solver, ratings, seen, stack, floor)
        return pieces_table(state_rows(part, ratings.slots, found, seen.missing))

    return parts.groupBy("key").cogroup(messages.groupBy("key")).applyInArrow(solve, STATE_SCHEMA)


def state_rows(
    part: int, slots: NDArray[np.int32], found: AnchorSweep, missing: int
) -> Iterator[dict[str, Any]]:
    """A part's state as rows of `STATE_SCHEMA`."""
    scalars = {
        "quadratic": found.quadratic,
        "penalty": found.penalty,
        "worst": found.worst,
        "products": found.products.tobytes(),
        "missing": missing,
    }
    for own, history in cut_stack(slots, found.history):
        yield {
            "part": part,
            "slots": raw(own, np.int32),
            "history": raw(history, np.float32),
            **scalars,
        }
        scalars = {**dict.fromkeys(scalars, 0), "products": b""}


def missing_state(part: int) -> dict[str, Any]:
    """A row of `STATE_SCHEMA` that reports a part's ratings as missing."""
    nothing = AnchorSweep(np.zeros((1, 0, 1), np.float32), 0.0, 0.0, 0.0, np.zeros(0))
    return next(state_rows(part, np.zeros(0, np.int32), nothing, 1))


def objective_of(scalars: Sequence[Row]) -> float:
    """The objective of an iterate, from its `STATE_SCHEMA`: the sum of the parts' quadratic and the
    penalty, which every part has as a whole."""
    return math.fsum(row["quadratic"] for row in scalars) + max(row["penalty"] for row in scalars)


def next_iterate(
    solver: Solver,
    state: DataFrame,
    weights: Sequence[float],
    keep: int,
    drop_newest: bool = False,
) -> DataFrame:
    """The anchor's next iterate (`ITERATE_SCHEMA`): a mixture of its stored sweeps.

    Parameters
    ----------
    weights
        One for each stored g, newest first; they add up to 1.
    keep
        The number of (g, f) pairs to keep in the history.
    drop_newest
        Drop the newest pair first, because its iterate was rejected.
    """
    rank, nonnegative = solver.rank, solver.objective.nonnegative

    def combine(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        slots = np.frombuffer(row["slots"], np.int32)
        history = joined_stack([row], rank, "history")
        stack = mixed(history, weights, keep, drop_newest, nonnegative)
        return iterate_rows(solver, row["part"], slots, stack)

    return map_rows(state, combine, ITERATE_SCHEMA)


def iterate_rows(
    solver: Solver, part: int, slots: NDArray[np.int32], stack: NDArray[np.float32]
) -> Iterator[dict[str, Any]]:
    """Rows of `ITERATE_SCHEMA` from a stack of y and its history, float32 (1 + 2h, n, rank)."""
    for own, piece in cut_stack(slots, stack):
        row = solver.factor_row(part, own, piece[0], 0.0)
        yield {**row, "history": raw(piece, np.float32)}


def factors_of(iterate: DataFrame) -> DataFrame:
    """The iterate's y as factor parts (`FACTOR_SCHEMA`)."""
    return iterate.drop("history")


def finish_side(
    solver: Solver,
    parts: DataFrame,
    layout: SideLayout,
    own: DataFrame,
    other: DataFrame,
    other_slots: int,
    reader: PartReader = SENT,
) -> DataFrame:
    """Turn factor parts into a row per user or item (`ROW_SCHEMA`), with norms in float64.

    A part is left out if the reader does not find its ratings.
    """
    messages = deliver(layout, other, own)

    def scan(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return pa.schema(ROW_KINDS).empty_table()
        _, ratings = reader.read(left)
        if ratings is None:
            return pa.schema(ROW_KINDS).empty_table()
        received = arrays_of(right)
        factors = joined_stack([row for row in received if row["own"]], solver.rank)[0]
        seen = OtherSide.from_messages(received, solver.rank, other_slots)
        gradient, b_norm = row_residuals(
            ratings.indptr,
            ratings.others,
            ratings.values,
            seen.dense,
            factors,
            solver.objective,
            gram=seen.gram,
        )
        return pa.table(
            {
                "slot": pa.array(ratings.slots),
                "n_ratings": pa.array(ratings.counts),
                "chunk": pa.array(chunk_numbers(ratings.slots, ratings.counts, layout.n_blocks)),
                "gradient_norm": pa.array(gradient),
                "b_norm": pa.array(b_norm),
                "factor_norm": pa.array(np.linalg.norm(factors.astype(np.float64), axis=1)),
                "factors": list_column(factors),
            }
        )

    return parts.groupBy("key").cogroup(messages.groupBy("key")).applyInArrow(scan, ROW_SCHEMA)


def map_rows(
    frame: DataFrame, function: Callable[[dict[str, Any]], Iterable[dict[str, Any]]], schema: str
) -> DataFrame:
    """Apply a function from one row to several rows to every row of a frame of large binaries."""

    def apply(batches: Any) -> Any:
        for batch in batches:
            for row in arrays_of(batch):
                yield from pieces_table(function(row)).to_batches()

    return frame.mapInArrow(apply, schema)


FACTOR_KINDS = {
    "part": pa.int32(),
    "slots": pa.binary(),
    "factors": pa.binary(),
    "gram": pa.binary(),
    "scalar": pa.float64(),
    "missing": pa.int32(),
}
STATE_KINDS = {
    "part": pa.int32(),
    "slots": pa.binary(),
    "history": pa.binary(),
    "quadratic": pa.float64(),
    "penalty": pa.float64(),
    "worst": pa.float64(),
    "products": pa.binary(),
    "missing": pa.int32(),
}
ROW_KINDS = {
    "slot": pa.int32(),
    "n_ratings": pa.int32(),
    "chunk": pa.int32(),
    "gradient_norm": pa.float64(),
    "b_norm": pa.float64(),
    "factor_norm": pa.float64(),
    "factors": pa.list_(pa.float32()),
}
