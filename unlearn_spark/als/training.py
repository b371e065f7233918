"""Fitting: encode once, then sweep until every row solves its own equations to tolerance."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import StorageLevel
from pyspark.sql import functions as F

from unlearn_spark.als import encoding
from unlearn_spark.als.burst import CONVERGED, GOING_ON, Limits, burst, results_of
from unlearn_spark.als.encoding import SideLayout
from unlearn_spark.als.local_parts import PartReader, drop, keep
from unlearn_spark.als.spark import (
    LARGE_ROWS,
    NARROW_ROWS,
    materialise,
    matrix_of,
    pieces_table,
    session_parallelism,
)
from unlearn_spark.als.sweep import (
    ITERATE_SCHEMA,
    SENT,
    factors_of,
    finish_side,
    iterate_rows,
    next_iterate,
    objective_of,
    solve_side,
    sweep_anchor,
)
from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import SIDES, other_side
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.objective import Objective
from unlearn_spark.core.solver import Solver
from unlearn_spark.core.training import SweepReport, TrainingSummary
from unlearn_spark.errors import InputError
from unlearn_spark.tables.session_conf import session_conf
from unlearn_spark.tables.sql import bound_expression

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, Row


MOST_MISSED = 3
"""Sweeps that did not find their ratings where they had been sent; after these they are always
sent."""


@dataclass(frozen=True)
class Encoded:
    """Ratings as parts of both sides, and the dictionaries that name their slots.

    Attributes
    ----------
    layouts
        By side.
    dictionaries
        By side: id, n_ratings, block, slot.
    parts
        By side: rating parts, placed.
    places
        By side: key and part of those alone, where they are. Spark reads all columns of a cache to
        hand on two of them, and a sweep that sends no ratings wants these.
    n_ratings
        Over all.
    floors
        By side what residuals are relative to at least (`floor_of`).
    held
        The caches on which these frames stand.
    token
        Names the files in which workers keep the parts.
    """

    layouts: dict[str, SideLayout]
    dictionaries: dict[str, DataFrame]
    parts: dict[str, DataFrame]
    places: dict[str, DataFrame]
    n_ratings: int
    floors: dict[str, float]
    held: list[DataFrame]
    token: str

    @property
    def anchor(self) -> str:
        """The side whose rows are the iterate: the one with fewer rows."""
        users, items = self.layouts["user"], self.layouts["item"]
        return "user" if users.n_rows < items.n_rows else "item"

    @property
    def fits_one_task(self) -> bool:
        """Are the ratings so few that a single task sweeps them?"""
        return all(layout.n_parts == 1 for layout in self.layouts.values())

    def ratings_of(self, side: str, sent: bool) -> tuple[DataFrame, PartReader]:
        """The parts of a side, and what gets their ratings in a worker: they are sent along (and
        kept there), or looked for where they are kept. A single task's are always sent."""
        if self.fits_one_task:
            return self.parts[side], SENT
        parts = self.parts if sent else self.places
        return parts[side], PartReader(self.token, side, sent)

    def release(self) -> None:
        """Drop the caches and the workers' files."""
        if not self.fits_one_task:
            drop([frame.select("key") for frame in self.places.values()], self.token)
        for frame in self.held:
            frame.unpersist()


@dataclass(frozen=True)
class FitResult:
    """A fitted model, still in the session.

    Attributes
    ----------
    rows
        By side, cached: id, block, slot, n_ratings, chunk, gradient_norm, b_norm, factor_norm,
        factors; the norms are those of a final scan in float64.
    encoded
        The ratings that the model solves.
    summary
        Figures of the training.
    """

    rows: dict[str, DataFrame]
    encoded: Encoded
    summary: TrainingSummary

    @property
    def user_factors(self) -> DataFrame:
        """id, factors array<float>, n_ratings."""
        return self.rows["user"].select("id", "factors", "n_ratings")

    @property
    def item_factors(self) -> DataFrame:
        """id, factors array<float>, n_ratings."""
        return self.rows["item"].select("id", "factors", "n_ratings")

    def release(self) -> None:
        """Drop the caches."""
        self.encoded.release()
        for frame in self.rows.values():
            frame.unpersist()


def solver_of(settings: AlsSettings) -> Solver:
    """The worker-side half of the settings."""
    objective = Objective(
        settings.reg_param, settings.implicit_prefs, settings.alpha, settings.nonnegative
    )
    return Solver(objective, settings.rank, settings.dtype)


def encode_ratings(
    ratings: DataFrame, settings: AlsSettings, execution: ExecutionSettings
) -> Encoded:
    """Number the ids and turn the ratings into cached parts of both sides.

    Parameters
    ----------
    ratings
        user_id, item_id, rating.

    Raises
    ------
    InputError
        There are no ratings.
    """
    with session_conf(ratings.sparkSession, LARGE_ROWS):
        return _encode(ratings, settings, execution)


def _encode(ratings: DataFrame, settings: AlsSettings, execution: ExecutionSettings) -> Encoded:
    parallelism = session_parallelism(ratings.sparkSession)
    with session_conf(ratings.sparkSession, NARROW_ROWS):
        fragments = encoding.fragment(ratings).persist()
        estimates, n_ratings = encoding.estimate_sizes(fragments)
    if not n_ratings:
        fragments.unpersist()
        raise InputError("there are no ratings to train on; ingest some first")
    wanted = {"user": settings.user_blocks, "item": settings.item_blocks}
    n_blocks = {
        side: encoding.choose_blocks(estimates[side], n_ratings, parallelism, wanted[side])
        for side in SIDES
    }
    numbered = {side: encoding.number(fragments, side, n_blocks[side]).persist() for side in SIDES}
    dictionaries = {side: encoding.dictionary(numbered[side], n_blocks[side]) for side in SIDES}
    sizes = aggregates_of(dictionaries, F.count(F.lit(1)), F.max("slot"))
    n_parts = {
        side: encoding.choose_parts(n_ratings, n_blocks[side], execution.part_ratings, parallelism)
        for side in SIDES
    }
    together = max(n_parts.values()) == 1  # a single task sweeps all: in one partition
    first = {"user": 0, "item": 0 if together else n_parts["user"]}
    layouts = {
        side: SideLayout(
            side,
            n_rows=sizes[side][0],
            n_blocks=n_blocks[side],
            n_parts=n_parts[side],
            n_slots=sizes[side][1] + 1,
            first_place=first[side],
            n_places=1 if together else sum(n_parts.values()),
        )
        for side in SIDES
    }
    # On disk: once the workers have files of their own, Spark needs these no more if all goes well.
    entries = encoding.encode(fragments, numbered, layouts).persist(StorageLevel.DISK_ONLY)
    placed = entries.select("side", "key", "part").persist()
    placed.count()
    fragments.unpersist()
    token = uuid.uuid4().hex
    floors = keep(entries, None if together else token, solver_of(settings).objective)
    parts = {side: encoding.entries_of(entries, side) for side in SIDES}
    places = {side: encoding.entries_of(placed, side) for side in SIDES}
    held = [placed, entries, *numbered.values()]
    return Encoded(layouts, dictionaries, parts, places, n_ratings, floors, held, token)


def aggregates_of(frames: dict[str, DataFrame], *aggregates: Column) -> dict[str, tuple[Any, ...]]:
    """Aggregates of the frames of both sides, by one job and one row."""
    users, items = (frames[side].agg(*aggregates) for side in SIDES)
    row = users.crossJoin(items).first()
    assert row is not None
    return {"user": tuple(row)[: len(aggregates)], "item": tuple(row)[len(aggregates) :]}


def start_iterate(
    encoded: Encoded, settings: AlsSettings, warm: DataFrame | None = None
) -> DataFrame:
    """The anchor's first iterate (`ITERATE_SCHEMA`): the factors of `warm` (id, factors).

    Rows that it does not have start where a fresh training starts them: by (seed, side, id).
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
    """float32 (n, rank): the `factors` of a table where it has them, else those that a fresh
    training starts from, by its column `hash`."""
    y = initial_factors(
        table["hash"].to_numpy(), settings.rank, settings.seed, side, settings.nonnegative
    )
    given = table["factors"].is_valid().to_numpy()
    if given.any():
        y[given] = matrix_of(table["factors"].drop_null(), settings.rank)
    return y


@dataclass
class Sweeper:
    """Runs sweeps over encoded ratings; the driver sees a few numbers per part and sweep."""

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
            self._report(number, objective, worst, time.perf_counter() - started)
            if worst <= self.settings.tol:
                return factors_of(iterate), other, True
            step = accelerator.step(objective, worst, products.reshape(size, size))
            if number == self.settings.max_sweeps:
                # The cap: the newest plain half-sweep is the better of the two anchors.
                plain = [1.0] + [0.0] * (size - 1)
                return factors_of(next_iterate(solver, state, plain, 0)), other, False
            for frame in before:  # what the next iterate stands on is computed
                frame.unpersist()
            iterate = next_iterate(solver, state, step.weights, step.keep, step.drop_newest)
        raise AssertionError("max_sweeps is at least 1")

    def _sweep(self, iterate: DataFrame, sent: bool) -> tuple[DataFrame, DataFrame, list[Row]]:
        """The other side, the anchor's state, and the scalars of that; the ratings are sent along
        or looked for where they were sent before."""
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
        """The same for ratings that fit one task, without a Spark job for every sweep."""
        encoded, solver = self.encoded, solver_of(self.settings)
        sides = (encoded.anchor, other_side(encoded.anchor))
        parts = (encoded.parts[sides[0]], encoded.parts[sides[1]])
        layouts = (encoded.layouts[sides[0]], encoded.layouts[sides[1]])
        accelerator = Accelerator(self.settings.memory)
        floor = encoded.floors[encoded.anchor]
        state = iterate
        while True:
            left = self.settings.max_sweeps - len(self.reports)
            limits = Limits(left, self.settings.tol, floor)
            state = materialise(
                burst(solver, parts, layouts, state, accelerator, limits),
                self.execution.checkpoint,
            )
            row = state.select("reports", "state").first()
            assert row is not None
            for objective, worst, seconds in np.frombuffer(row["reports"]).reshape(-1, 3):
                self._report(len(self.reports) + 1, float(objective), float(worst), float(seconds))
            if row["state"] != GOING_ON:
                anchor, other = (frame.persist() for frame in results_of(solver, state))
                self.held = [anchor, other]
                return anchor, other, row["state"] == CONVERGED

    def finish(self, anchor: DataFrame, other: DataFrame) -> dict[str, DataFrame]:
        """What `run` returned, as rows (`finish_rows`)."""
        encoded = self.encoded
        factors = {encoded.anchor: anchor, other_side(encoded.anchor): other}
        return finish_rows(encoded, self.settings, factors)

    def release(self) -> None:
        """Drop the caches that the results stand on."""
        for frame in self.held:
            frame.unpersist()

    def _report(self, number: int, objective: float, worst: float, seconds: float) -> None:
        eta = None
        earlier = [report for report in self.reports[-5:] if report.max_residual > worst > 0]
        if earlier:
            first = earlier[0]
            decay = math.log(first.max_residual / worst) / (number - first.sweep)
            missing = max(0.0, math.log(worst / self.settings.tol) / decay)
            eta = missing * seconds
        report = SweepReport(number, objective, worst, seconds, eta)
        self.reports.append(report)
        if self.on_sweep is not None:
            self.on_sweep(report)


def finish_rows(
    encoded: Encoded, settings: AlsSettings, factors: dict[str, DataFrame], sent: bool = False
) -> dict[str, DataFrame]:
    """Factor parts of both sides as rows with ids, residuals recomputed in float64; cached.

    Parameters
    ----------
    sent
        Send the ratings; else they are looked for where they are kept, and sent if any are missing.
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
    if not (sent or encoded.fits_one_task):  # all found?
        found = aggregates_of(rows, F.count(F.lit(1)))
        if any(found[side][0] != encoded.layouts[side].n_rows for side in SIDES):
            for frame in rows.values():
                frame.unpersist()
            return finish_rows(encoded, settings, factors, sent=True)
    return rows


def fit_factors(
    ratings: DataFrame,
    settings: AlsSettings,
    execution: ExecutionSettings | None = None,
    *,
    warm_start: tuple[DataFrame, DataFrame] | None = None,
    floors: dict[str, float] | None = None,
    on_sweep: Callable[[SweepReport], None] | None = None,
) -> FitResult:
    """Fit user and item factors.

    Parameters
    ----------
    ratings
        user_id, item_id (any types), rating (castable to float).
    settings, execution
        See `unlearn_spark.config`.
    warm_start
        User and item factors (id, factors) of an earlier model.
    floors
        By side what residuals are relative to at least; None: as these ratings ask for.
    on_sweep
        Called after every sweep.

    Raises
    ------
    InputError
        There are no ratings, or `warm_start` has another rank.
    """
    execution = execution or ExecutionSettings()
    started = time.perf_counter()
    if warm_start is not None:
        first = warm_start[0].select(F.size("factors")).first()
        if first is not None and first[0] != settings.rank:
            raise InputError(
                f"warm start: that model has rank {first[0]}, als.rank is {settings.rank}; "
                "set them equal"
            )
    encoded = encode_ratings(ratings, settings, execution)
    if floors is not None:
        encoded = replace(encoded, floors=floors)
    encode_seconds = time.perf_counter() - started
    warm = None if warm_start is None else warm_start[SIDES.index(encoded.anchor)]
    sweeper = Sweeper(encoded, settings, execution, on_sweep)
    anchor, other, converged = sweeper.run(start_iterate(encoded, settings, warm))
    rows = sweeper.finish(anchor, other)
    worst = largest_residual(rows, encoded.floors)
    reports = sweeper.reports
    summary = TrainingSummary.of(
        encoded, reports, converged, reports[-1].objective, worst, started, encode_seconds
    )
    sweeper.release()
    return FitResult(rows, encoded, summary)


def with_bounds(rows: dict[str, DataFrame], floors: dict[str, float]) -> dict[str, DataFrame]:
    """The rows of both sides, which have gradient_norm and b_norm, with their residual `bound`."""
    return {
        side: frame.withColumn("bound", bound_expression(F.lit(floors[side])))
        for side, frame in rows.items()
    }


def largest_residual(rows: dict[str, DataFrame], floors: dict[str, float]) -> float:
    """The largest over the rows of both sides, which have gradient_norm and b_norm."""
    bounded = with_bounds(rows, floors)
    found = aggregates_of(bounded, F.coalesce(F.max("bound"), F.lit(0.0)))
    return float(np.max([found[side][0] for side in SIDES]))  # NaN wins, as in Spark
