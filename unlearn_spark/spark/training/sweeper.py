"""Sweeps over encoded ratings until every row solves its equations to tolerance."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark.sql import functions as F

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.solver import solver_of
from unlearn_spark.core.sweeps import CONVERGED, GOING_ON, Limits
from unlearn_spark.core.training import SweepReport, next_report
from unlearn_spark.spark.arrow import matrix_of, pieces_table
from unlearn_spark.spark.frames import aggregates_of, materialise
from unlearn_spark.spark.session_conf import session_conf
from unlearn_spark.spark.settings import LARGE_ROWS
from unlearn_spark.spark.training.encoded import Encoded
from unlearn_spark.spark.training.half_sweep import (
    ITERATE_SCHEMA,
    factors_of,
    finish_side,
    iterate_rows,
    next_iterate,
    objective_of,
    solve_side,
    sweep_anchor,
)
from unlearn_spark.spark.training.one_task import BURST_SECONDS, burst, results_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row

MOST_MISSED = 3
"""After so many sweeps that did not find kept ratings, the ratings are sent with every sweep."""


def start_iterate(
    encoded: Encoded, settings: AlsSettings, warm: DataFrame | None = None
) -> DataFrame:
    """The anchor's first iterate (`ITERATE_SCHEMA`), from the factors `warm` (id, factors).

    Rows that `warm` lacks start as in a fresh training, by (seed, side, id).
    """
    side, solver = encoded.anchor, solver_of(settings)
    layout = encoded.layouts[side]
    rows = encoded.dictionaries[side].withColumn("hash", F.xxhash64("id"))
    if warm is not None:
        rows = rows.join(warm.select("id", "factors"), "id", "left")
    else:
        rows = rows.withColumn("factors", F.lit(None).cast("array<float>"))
    rows = rows.select(
        F.pmod("slot", F.lit(layout.n_parts)).cast("int").alias("part"), "slot", "hash", "factors"
    )

    def start(table: pa.Table) -> pa.Table:
        table = table.sort_by("slot")
        slots = table["slot"].to_numpy().astype(np.int32)
        y = starting_rows(table, settings, side)
        return pieces_table(iterate_rows(solver, table["part"][0].as_py(), slots, y[None]))

    return rows.groupBy("part").applyInArrow(start, ITERATE_SCHEMA)


def starting_rows(table: pa.Table, settings: AlsSettings, side: str) -> NDArray[np.float32]:
    """Starting factors, float32 (n, rank): the table's `factors`; where these are null, those of a
    fresh training, from its column `hash`."""
    y = initial_factors(
        table["hash"].to_numpy(), settings.rank, settings.seed, side, settings.nonnegative
    )
    given = table["factors"].is_valid().to_numpy()
    if given.any():
        y[given] = matrix_of(table["factors"].drop_null(), settings.rank)
    return y


@dataclass
class Sweeper:
    """Runs sweeps over encoded ratings; only a few numbers per part and sweep reach the driver."""

    encoded: Encoded
    settings: AlsSettings
    execution: ExecutionSettings
    on_sweep: Callable[[SweepReport], None] | None = None
    reports: list[SweepReport] = field(default_factory=list)
    held: list[DataFrame] = field(default_factory=list)

    def run(self, iterate: DataFrame) -> tuple[DataFrame, DataFrame, bool]:
        """Sweep to tolerance or to the cap.

        Returns
        -------
        anchor, other : DataFrame
            Factor parts (`FACTOR_SCHEMA`) of the two sides, cached until `release`.
        converged : bool
            Whether the largest residual reached the tolerance.
        """
        run = self._run_in_bursts if self.encoded.fits_one_task else self._run_in_jobs
        with session_conf(iterate.sparkSession, LARGE_ROWS):
            return run(iterate)

    def _run_in_jobs(self, iterate: DataFrame) -> tuple[DataFrame, DataFrame, bool]:
        solver = solver_of(self.settings)
        accelerator = Accelerator(self.settings.memory)
        missed = 0
        for number in range(1, self.settings.max_sweeps + 1):
            started = time.perf_counter()
            before, self.held = self.held, [iterate.persist()]
            other, state, scalars = self._sweep(iterate, missed >= MOST_MISSED)
            if any(row["missing"] for row in scalars):
                other, state, scalars = self._sweep(iterate, True)
                missed += 1
            objective = objective_of(scalars)
            worst = max(row["worst"] for row in scalars)
            shares = [np.frombuffer(row["products"]) for row in scalars if row["products"]]
            products = np.sum(shares, axis=0)
            size = math.isqrt(len(products))
            self._report(objective, worst, time.perf_counter() - started)
            if worst <= self.settings.tol:
                return factors_of(iterate), other, True
            step = accelerator.step(objective, worst, products.reshape(size, size))
            if number == self.settings.max_sweeps:
                # At the cap, g of the newest sweep is better than its y.
                plain = [1.0] + [0.0] * (size - 1)
                return factors_of(next_iterate(solver, state, plain, 0)), other, False
            for frame in before:  # the next iterate does not read these
                frame.unpersist()
            iterate = next_iterate(solver, state, step.weights, step.keep, step.drop_newest)
        raise AssertionError("max_sweeps is at least 1")

    def _sweep(self, iterate: DataFrame, sent: bool) -> tuple[DataFrame, DataFrame, list[Row]]:
        """Run a sweep: the other side's factors, the anchor's state, and the state's scalars;
        `sent` is that of `Encoded.ratings_of`."""
        encoded, solver, side = self.encoded, solver_of(self.settings), self.encoded.anchor
        layouts, against = encoded.layouts, other_side(side)
        parts, reader = encoded.ratings_of(against, sent)
        other = solve_side(
            solver, parts, layouts[against], iterate, layouts[side].n_slots, reader
        ).persist()
        parts, reader = encoded.ratings_of(side, sent)
        swept = sweep_anchor(
            solver,
            parts,
            layouts[side],
            other,
            layouts[against].n_slots,
            iterate,
            encoded.floors[side],
            reader,
        )
        state = materialise(swept, self.execution.checkpoint)
        self.held += [other, state]
        return other, state, state.drop("slots", "history").collect()

    def _run_in_bursts(self, iterate: DataFrame) -> tuple[DataFrame, DataFrame, bool]:
        """Like `_run_in_jobs`, for ratings that fit one task: a Spark job runs several sweeps."""
        encoded, solver = self.encoded, solver_of(self.settings)
        sides = (encoded.anchor, other_side(encoded.anchor))
        parts = (encoded.parts[sides[0]], encoded.parts[sides[1]])
        layouts = (encoded.layouts[sides[0]], encoded.layouts[sides[1]])
        accelerator = Accelerator(self.settings.memory)
        floor = encoded.floors[encoded.anchor]
        state = iterate
        while True:
            left = self.settings.max_sweeps - len(self.reports)
            limits = Limits(left, self.settings.tol, floor, BURST_SECONDS)
            state = materialise(
                burst(solver, parts, layouts, state, accelerator, limits),
                self.execution.checkpoint,
            )
            row = state.select("reports", "state").first()
            assert row is not None
            for objective, worst, seconds in np.frombuffer(row["reports"]).reshape(-1, 3):
                self._report(float(objective), float(worst), float(seconds))
            if row["state"] != GOING_ON:
                anchor, other = (frame.persist() for frame in results_of(solver, state))
                self.held = [anchor, other]
                return anchor, other, row["state"] == CONVERGED

    def finish(self, anchor: DataFrame, other: DataFrame) -> dict[str, DataFrame]:
        """Turn the factor parts that `run` returned into rows (`finish_rows`)."""
        encoded = self.encoded
        factors = {encoded.anchor: anchor, other_side(encoded.anchor): other}
        return finish_rows(encoded, self.settings, factors)

    def release(self) -> None:
        """Drop the caches of the results."""
        for frame in self.held:
            frame.unpersist()

    def _report(self, objective: float, worst: float, seconds: float) -> None:
        report = next_report(self.reports, objective, worst, seconds, self.settings.tol)
        self.reports.append(report)
        if self.on_sweep is not None:
            self.on_sweep(report)


def finish_rows(
    encoded: Encoded, settings: AlsSettings, factors: dict[str, DataFrame], sent: bool = False
) -> dict[str, DataFrame]:
    """Turn factor parts into rows with ids (`ROW_SCHEMA`, id, block), by side and cached.

    Unless the ratings are `sent`, workers look for kept ones; if any is missing, all are sent.
    """
    solver = solver_of(settings)
    rows = {}
    for side in SIDES:
        parts, reader = encoded.ratings_of(side, sent)
        scanned = finish_side(
            solver,
            parts,
            encoded.layouts[side],
            factors[side],
            factors[other_side(side)],
            encoded.layouts[other_side(side)].n_slots,
            reader,
        )
        names = encoded.dictionaries[side].select("slot", "id", "block")
        rows[side] = scanned.join(names, "slot").persist()
    if not (sent or encoded.fits_one_task):  # workers may have missed ratings
        found = aggregates_of(rows, F.count(F.lit(1)))
        if any(found[side][0] != encoded.layouts[side].n_rows for side in SIDES):
            for frame in rows.values():
                frame.unpersist()
            return finish_rows(encoded, settings, factors, sent=True)
    return rows
