"""Runs many sweeps in one task if all ratings fit one part.

Spark takes longer to start a sweep of few ratings than the sweep takes. So one task reads the
ratings of both sides, sweeps for some seconds (a burst), and reports; then the next burst starts.
The arithmetic is that of `core.sweeps`, the results are those of `half_sweep`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import functions as F

from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import RatingBlock, raw
from unlearn_spark.core.solver import Solver, joined_stack
from unlearn_spark.core.sweeps import Limits, sweep_both
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
"""A burst's result. `history` is the anchor's `Swept.stack`, `others` are the other side's rows,
`reports` is float64 (n, 3), and `accelerator` is a pickled `Accelerator`."""


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
        done = sweep_both(solver, anchor, other, n_slots, stack, carried, limits)
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
