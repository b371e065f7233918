"""A half-sweep on Spark: rating parts stay where they are, factor rows travel.

    rating parts of one side ---+
                                +-- cogroup by part --> new factor rows of that side
    factor rows of the other ---+

The side with fewer rows is the *anchor*: its rows are the iterate that is accelerated, and while
they are solved for, the residuals and the objective of the iterate come out for free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.als.acceleration import curvature_weights, history_products, mix
from unlearn_spark.als.blocks import RatingBlock, chunk_numbers, raw
from unlearn_spark.als.kernel import Objective, relative_residual, row_residuals, solve_rows
from unlearn_spark.als.spark import (
    FACTOR_SCHEMA,
    arrays_of,
    binary_table,
    list_column,
    part_key,
    part_of,
)

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.als.encoding import SideLayout

STATE_SCHEMA = (
    "part int, slots binary, history binary, quadratic double, penalty double, "
    "worst double, products binary"
)
"""The anchor's part after a sweep. `history` is float32 (2h, n, rank): g and f = g - y of the
newest sweep, then of the one before, and so on. `quadratic` and `penalty` add up to the objective,
`worst` is the largest residual of y, `products` the part's share of the acceleration's matrix."""

ROW_SCHEMA = (
    "slot int, n_ratings int, chunk int, gradient_norm double, b_norm double, "
    "factor_norm double, factors array<float>"
)
"""Finished factor rows with the evidence about them."""


@dataclass(frozen=True)
class Solver:
    """What a worker needs to solve rows; small and picklable."""

    objective: Objective
    rank: int
    dtype: str

    def solve(
        self, ratings: RatingBlock, other: OtherSide, warm: NDArray[np.float32] | None
    ) -> Any:
        """`kernel.solve_rows` with this solver's settings."""
        return solve_rows(
            ratings.indptr,
            ratings.others,
            ratings.values,
            other.dense,
            self.objective,
            gram=other.gram,
            warm=warm,
            active=None,
            dtype=np.float64 if self.dtype == "float64" else np.float32,
        )

    def penalty(self, ratings: RatingBlock, factors: NDArray[np.float32]) -> float:
        """lambda * sum n |x|^2, the part of the objective that the other side cannot see."""
        if self.objective.implicit_prefs:
            positive = np.concatenate([[0], np.cumsum(ratings.values > 0)])
            counts = np.diff(positive[ratings.indptr])
        else:
            counts = np.diff(ratings.indptr)
        squares = np.einsum("ij,ij->i", factors, factors, dtype=np.float64)
        return float(self.objective.reg_param * (counts @ squares))

    def constant(self, ratings: RatingBlock) -> float:
        """The objective's term without factors, summed over these rows."""
        values = ratings.values.astype(np.float64)
        if self.objective.implicit_prefs:
            positive = values[values > 0]
            return float(len(positive) + self.objective.alpha * positive.sum())
        return float(values @ values)

    def gram(self, factors: NDArray[np.float32]) -> bytes | None:
        """Y'Y in float64, where the objective needs it."""
        if not self.objective.implicit_prefs:
            return None
        wide = factors.astype(np.float64)
        return (wide.T @ wide).tobytes()

    def factor_row(
        self, part: int, slots: NDArray[np.int32], factors: NDArray[np.float32], scalar: float
    ) -> dict[str, Any]:
        """One row of `FACTOR_SCHEMA`."""
        return {
            "part": part,
            "slots": raw(slots, np.int32),
            "factors": raw(factors, np.float32),
            "gram": self.gram(factors),
            "scalar": scalar,
        }


@dataclass(frozen=True)
class OtherSide:
    """The other side's factors as a part sees them.

    Attributes
    ----------
    dense : float32 (n_slots, rank)
    gram : float64 (rank, rank) or None
    penalty
        Sum of the senders' scalars.
    """

    dense: NDArray[np.float32]
    gram: NDArray[np.float64] | None
    penalty: float

    @classmethod
    def from_messages(cls, messages: list[dict[str, Any]], rank: int, n_slots: int) -> OtherSide:
        messages = [row for row in messages if not row.get("own", False)]
        messages.sort(key=lambda row: row["part"])  # one order of every sum
        dense = np.zeros((n_slots, rank), np.float32)
        gram: NDArray[np.float64] | None = None
        for row in messages:
            slots = np.frombuffer(row["slots"], np.int32)
            dense[slots] = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
            if row["gram"] is not None:
                share = np.frombuffer(row["gram"], np.float64).reshape(rank, rank)
                gram = share.copy() if gram is None else gram + share
        return cls(dense, gram, float(sum(row["scalar"] for row in messages)))


@dataclass(frozen=True)
class AnchorSweep:
    """What solving the anchor's rows found.

    Attributes
    ----------
    history : float32 (2h, n, rank)
        g and f = g - y of this sweep, then of the one before, and so on.
    quadratic, penalty
        These rows' share of the objective without the anchor's penalty, and the other side's.
    worst
        Largest relative residual of y.
    products : float64 (h, h)
        These rows' share of the acceleration's matrix.
    """

    history: NDArray[np.float32]
    quadratic: float
    penalty: float
    worst: float
    products: NDArray[np.float64]


def solve_anchor(
    solver: Solver, ratings: RatingBlock, seen: OtherSide, stack: NDArray[np.float32]
) -> AnchorSweep:
    """Solve the anchor's rows; `stack` float32 (1 + 2h, n, rank) is y and the earlier history."""
    y, past = stack[0], stack[1:]
    solved = solver.solve(ratings, seen, y)
    history = np.concatenate([solved.factors[None], (solved.factors - y)[None], past])
    worst = relative_residual(solved.gradient_norm, solved.b_norm)
    return AnchorSweep(
        history,
        solver.constant(ratings) + solved.quadratic,
        seen.penalty,
        float(worst.max(initial=0.0)),
        history_products(list(history[1::2]), curvature_weights(solved.gradient_norm, history[1])),
    )


def mixed(
    history: NDArray[np.float32],
    weights: Sequence[float],
    keep: int,
    drop_newest: bool,
    nonnegative: bool,
) -> NDArray[np.float32]:
    """The next stack from a history, see `next_iterate`."""
    y = mix(list(history[0::2]), weights)
    if nonnegative:
        y = np.maximum(y, 0)  # weights may be negative
    first = 2 if drop_newest else 0
    return np.concatenate([y[None], history[first : first + 2 * keep]])


def deliver(to: SideLayout, other: DataFrame, own: DataFrame | None = None) -> DataFrame:
    """Messages for every part of a side, placed as its rating parts are.

    Parameters
    ----------
    other
        Factor parts (`FACTOR_SCHEMA`) of the other side; each goes to every part.
    own
        Rows with part, slots and factors of the side itself; each goes to its own part.
    """
    every = F.explode(F.array(*[F.lit(key) for key in to.keys]))
    columns = ["key", "own", *FACTOR_KINDS]
    messages = other.withColumns({"key": every, "own": F.lit(False)}).select(columns)
    if own is not None:
        mine = {
            "key": part_key("part", to.keys),
            "own": F.lit(True),
            "gram": F.lit(None).cast("binary"),
            "scalar": F.lit(0.0),
        }
        messages = messages.unionByName(own.withColumns(mine).select(columns))
    return messages.repartition(to.n_parts, "key")


def solve_side(
    solver: Solver, parts: DataFrame, layout: SideLayout, other: DataFrame, other_slots: int
) -> DataFrame:
    """New factors (`FACTOR_SCHEMA`) of one side from the factors of the other."""

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return _empty(FACTOR_KINDS)
        part, ratings = part_of(left)
        seen = OtherSide.from_messages(arrays_of(right), solver.rank, other_slots)
        factors = solver.solve(ratings, seen, None).factors
        penalty = solver.penalty(ratings, factors)
        return binary_table([solver.factor_row(part, ratings.slots, factors, penalty)])

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
) -> DataFrame:
    """The anchor's next state (`STATE_SCHEMA`) from its iterate and the other side's factors.

    `iterate` is what `next_iterate` made: y and the history that stays, stacked.
    """
    kept = iterate.select("part", "slots", F.col("history").alias("factors"))
    messages = deliver(layout, other, kept)

    def solve(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return _empty(STATE_KINDS)
        part, ratings = part_of(left)
        received = arrays_of(right)
        own = next(message for message in received if message["own"])
        seen = OtherSide.from_messages(received, solver.rank, other_slots)
        stack = np.frombuffer(own["factors"], np.float32).reshape(-1, ratings.n_rows, solver.rank)
        found = solve_anchor(solver, ratings, seen, stack)
        return binary_table(
            [
                {
                    "part": part,
                    "slots": raw(ratings.slots, np.int32),
                    "history": raw(found.history, np.float32),
                    "quadratic": found.quadratic,
                    "penalty": found.penalty,
                    "worst": found.worst,
                    "products": found.products.tobytes(),
                }
            ]
        )

    return parts.groupBy("key").cogroup(messages.groupBy("key")).applyInArrow(solve, STATE_SCHEMA)


def next_iterate(
    solver: Solver,
    state: DataFrame,
    weights: Sequence[float],
    keep: int,
    drop_newest: bool = False,
) -> DataFrame:
    """The anchor's next iterate: a mixture of its stored sweeps.

    Parameters
    ----------
    weights
        One for each stored g, newest first; they add up to 1.
    keep
        How many (g, f) pairs stay in the history.
    drop_newest
        Leave the newest pair out before that: its iterate was rejected.

    Returns
    -------
    DataFrame
        part, slots, history: float32 (1 + 2 keep, n, rank), first y, then the pairs.
    """
    rank, nonnegative = solver.rank, solver.objective.nonnegative

    def combine(rows: dict[str, Any]) -> dict[str, Any]:
        n = len(rows["slots"]) // 4
        history = np.frombuffer(rows["history"], np.float32).reshape(-1, n, rank)
        stack = mixed(history, weights, keep, drop_newest, nonnegative)
        return {"part": rows["part"], "slots": rows["slots"], "history": raw(stack, np.float32)}

    return map_rows(state, combine, "part int, slots binary, history binary")


def factors_of(solver: Solver, iterate: DataFrame) -> DataFrame:
    """The iterate's y as factor parts (`FACTOR_SCHEMA`)."""

    def first(row: dict[str, Any]) -> dict[str, Any]:
        slots = np.frombuffer(row["slots"], np.int32)
        size = len(slots) * solver.rank
        y = np.frombuffer(row["history"], np.float32)[:size].reshape(len(slots), solver.rank)
        return solver.factor_row(row["part"], slots, y, 0.0)

    return map_rows(iterate, first, FACTOR_SCHEMA)


def finish_side(
    solver: Solver,
    parts: DataFrame,
    layout: SideLayout,
    own: DataFrame,
    other: DataFrame,
    other_slots: int,
) -> DataFrame:
    """One row per user or item (`ROW_SCHEMA`), its residual recomputed in float64."""
    messages = deliver(layout, other, own.select("part", "slots", "factors"))

    def scan(left: pa.Table, right: pa.Table) -> pa.Table:
        if not left.num_rows:
            return _empty(ROW_KINDS)
        ratings = part_of(left)[1]
        received = arrays_of(right)
        mine = next(message for message in received if message["own"])
        factors = np.frombuffer(mine["factors"], np.float32).reshape(-1, solver.rank)
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
    frame: DataFrame, function: Callable[[dict[str, Any]], dict[str, Any]], schema: str
) -> DataFrame:
    """Apply a function to every (large, binary) row."""

    def apply(batches: Any) -> Any:
        for batch in batches:
            for row in arrays_of(batch):
                yield from binary_table([function(row)]).to_batches()

    return frame.mapInArrow(apply, schema)


FACTOR_KINDS = {
    "part": pa.int32(),
    "slots": pa.binary(),
    "factors": pa.binary(),
    "gram": pa.binary(),
    "scalar": pa.float64(),
}
STATE_KINDS = {
    "part": pa.int32(),
    "slots": pa.binary(),
    "history": pa.binary(),
    "quadratic": pa.float64(),
    "penalty": pa.float64(),
    "worst": pa.float64(),
    "products": pa.binary(),
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


def _empty(kinds: dict[str, pa.DataType]) -> pa.Table:
    return pa.table({name: pa.array([], kind) for name, kind in kinds.items()})
