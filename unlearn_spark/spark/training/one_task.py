"""Runs many sweeps in one task if all ratings fit one part.

Spark takes longer to start a sweep of few ratings than the sweep takes. So one task reads the
ratings of both sides, sweeps for some seconds (a burst), and reports; then the next burst starts.
The arithmetic and the results are those of `half_sweep`.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import RatingBlock, raw, scatter
from unlearn_spark.core.solver import OtherSide, Solver, joined_stack, mixed, solve_anchor
from unlearn_spark.spark.arrow import arrays_of, binary_table
from unlearn_spark.spark.training.half_sweep import FACTOR_SCHEMA, map_rows

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.spark.training.layout import SideLayout

BURST_SECONDS = 2.0
"""How long a burst lasts: the time between two reports of progress."""

BURST_SCHEMA = (
    "part int, slots binary, history binary, other_slots binary, others binary, "
    "accelerator binary, reports binary, state int"
)
"""A burst's result. `history` is the anchor's `Burst.stack`, `others` are the other side's rows,
`reports` is float64 (n, 3), and `accelerator` is a pickled `Accelerator`."""

GOING_ON, CONVERGED, CAPPED = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    """When a burst ends: the number of sweeps left, the largest residual that counts as converged,
    the anchor's floor (`floor_of`), and the burst's seconds."""

    sweeps: int
    tol: float
    floor: float
    seconds: float = BURST_SECONDS


@dataclass(frozen=True)
class Burst:
    """Result of `sweep_in_memory`.

    Attributes
    ----------
    stack : float32 (1 + 2h, n, rank)
        The anchor's y and its history. Unless the state is `GOING_ON`, y is the result.
    others : float32 (m, rank)
        The other side, solved from the last sweep's y.
    reports : list of (objective, largest residual, seconds)
        One for each sweep.
    state
        `GOING_ON`, `CONVERGED` or `CAPPED`.
    """

    stack: NDArray[np.float32]
    others: NDArray[np.float32]
    reports: list[tuple[float, float, float]]
    state: int


def sweep_in_memory(
    solver: Solver,
    anchor: RatingBlock,
    other: RatingBlock,
    n_slots: tuple[int, int],
    stack: NDArray[np.float32],
    accelerator: Accelerator,
    limits: Limits,
) -> Burst:
    """Sweep until a limit is reached; uses no Spark, and changes the accelerator in place.

    Parameters
    ----------
    anchor, other
        All ratings, by rows of the anchor and by rows of the other side.
    n_slots
        Of the anchor and of the other side.
    stack
        As in the result.
    """
    reports: list[tuple[float, float, float]] = []
    begun = time.perf_counter()
    while True:
        started = time.perf_counter()
        y = stack[0]
        fixed = _seen(solver, anchor.slots, y, n_slots[0], 0.0)
        x = solver.solve(other, fixed, None).factors
        found = solve_anchor(
            solver,
            anchor,
            _seen(solver, other.slots, x, n_slots[1], solver.penalty(other, x)),
            stack,
            limits.floor,
        )
        objective = found.quadratic + found.penalty
        reports.append((objective, found.worst, time.perf_counter() - started))
        if found.worst <= limits.tol:
            return Burst(stack[:1], x, reports, CONVERGED)
        step = accelerator.step(objective, found.worst, found.products)
        if len(reports) >= limits.sweeps:
            return Burst(found.history[:1], x, reports, CAPPED)
        stack = mixed(
            found.history,
            step.weights,
            step.keep,
            step.drop_newest,
            solver.objective.nonnegative,
        )
        if time.perf_counter() - begun >= limits.seconds:
            return Burst(stack, x, reports, GOING_ON)


def _seen(
    solver: Solver,
    slots: NDArray[np.int32],
    rows: NDArray[np.float32],
    n_slots: int,
    penalty: float,
) -> OtherSide:
    gram = solver.gram(rows)
    return OtherSide(
        scatter(slots, rows, n_slots),
        None if gram is None else np.frombuffer(gram).reshape(solver.rank, solver.rank),
        penalty,
    )


def burst(
    solver: Solver,
    parts: tuple[DataFrame, DataFrame],
    layouts: tuple[SideLayout, SideLayout],
    state: DataFrame,
    accelerator: Accelerator,
    limits: Limits,
) -> DataFrame:
    """Run one burst on Spark; its result is one row (`BURST_SCHEMA`).

    Parameters
    ----------
    parts, layouts
        Of the anchor and of the other side; one part each.
    state
        The first iterate (part, slots, history), or the result of the burst before.
    accelerator
        That of the first burst; later bursts take it from `state`.
    """
    key = layouts[0].keys[0]
    n_slots = (layouts[0].n_slots, layouts[1].n_slots)
    tagged = [frame.withColumn("anchor", F.lit(index == 0)) for index, frame in enumerate(parts)]
    if "accelerator" not in state.columns:
        state = state.withColumn("accelerator", F.lit(bytearray(pickle.dumps(accelerator))))
    state = state.select(F.lit(key).alias("key"), "part", "slots", "history", "accelerator")

    def sweep(left: pa.Table, right: pa.Table) -> pa.Table:
        pieces = arrays_of(left)
        blocks = {
            side: RatingBlock.from_pieces([row for row in pieces if row["anchor"] == side])
            for side in (True, False)
        }
        rows = arrays_of(right)  # several only for the first iterate
        row = rows[0]
        anchor, other = blocks[True], blocks[False]
        stack = joined_stack(rows, solver.rank, "history")
        carried: Accelerator = pickle.loads(row["accelerator"])
        done = sweep_in_memory(solver, anchor, other, n_slots, stack, carried, limits)
        return binary_table(
            [
                {
                    "part": row["part"],
                    "slots": raw(anchor.slots, np.int32),
                    "history": raw(done.stack, np.float32),
                    "other_slots": raw(other.slots, np.int32),
                    "others": raw(done.others, np.float32),
                    "accelerator": pickle.dumps(carried),
                    "reports": raw(np.array(done.reports), np.float64),
                    "state": done.state,
                }
            ],
            state=pa.int32(),
        )

    both = tagged[0].unionByName(tagged[1])
    return both.groupBy("key").cogroup(state.groupBy("key")).applyInArrow(sweep, BURST_SCHEMA)


def results_of(solver: Solver, last: DataFrame) -> tuple[DataFrame, DataFrame]:
    """Factor parts (`FACTOR_SCHEMA`) of the anchor and of the other side after the last burst."""

    def side(slots: str, rows: str) -> DataFrame:
        def take(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
            found = np.frombuffer(row[slots], np.int32)
            factors = np.frombuffer(row[rows], np.float32)[: len(found) * solver.rank]
            return solver.factor_rows(row["part"], found, factors.reshape(-1, solver.rank), 0.0)

        return map_rows(last, take, FACTOR_SCHEMA)

    return side("slots", "history"), side("other_slots", "others")
