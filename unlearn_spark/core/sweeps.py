"""Whole sweeps over ratings that are in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import RatingBlock, scatter
from unlearn_spark.core.bounds import gram
from unlearn_spark.core.solver import OtherSide, Solver, mixed, solve_anchor

GOING_ON, CONVERGED, CAPPED = 0, 1, 2
"""Why sweeps ended: their time was up, the residual was small enough, or none were left."""


@dataclass(frozen=True)
class Limits:
    """When to stop, whichever comes first.

    Attributes
    ----------
    sweeps, seconds
        The most sweeps, and the time after which no further one begins.
    tol, floor
        The largest residual that counts as converged, and the least denominator of the anchor's
        residuals (`floor_of`).
    """

    sweeps: int
    tol: float
    floor: float
    seconds: float = np.inf


@dataclass(frozen=True)
class Swept:
    """Result of `sweep_both`.

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


def sweep_both(
    solver: Solver,
    anchor: RatingBlock,
    other: RatingBlock,
    n_slots: tuple[int, int],
    stack: NDArray[np.float32],
    accelerator: Accelerator,
    limits: Limits,
    on_sweep: Callable[[float, float, float], None] | None = None,
) -> Swept:
    """Sweep until a limit is reached; changes the accelerator in place.

    Parameters
    ----------
    anchor, other
        All ratings, by rows of the anchor and by rows of the other side.
    n_slots
        Of the anchor and of the other side.
    stack
        As in the result.
    on_sweep
        Called after every sweep with its report.
    """
    reports: list[tuple[float, float, float]] = []
    constant = solver.constant(anchor)
    begun = time.perf_counter()
    while True:
        started = time.perf_counter()
        y = stack[0]
        fixed = seen(solver, anchor.slots, y, n_slots[0])
        x = solver.solve(other, fixed, None).factors
        found = solve_anchor(
            solver,
            anchor,
            seen(solver, other.slots, x, n_slots[1], solver.penalty(other, x)),
            stack,
            limits.floor,
            constant,
        )
        objective = found.quadratic + found.penalty
        reports.append((objective, found.worst, time.perf_counter() - started))
        if on_sweep is not None:
            on_sweep(*reports[-1])
        if found.worst <= limits.tol:
            return Swept(stack[:1], x, reports, CONVERGED)
        step = accelerator.step(objective, found.worst, found.products)
        if len(reports) >= limits.sweeps:
            # g of the newest sweep is better than its y.
            return Swept(found.history[:1], x, reports, CAPPED)
        stack = mixed(
            found.history,
            step.weights,
            step.keep,
            step.drop_newest,
            solver.objective.nonnegative,
        )
        if time.perf_counter() - begun >= limits.seconds:
            return Swept(stack, x, reports, GOING_ON)


def seen(
    solver: Solver,
    slots: NDArray[np.int32],
    rows: NDArray[np.float32],
    n_slots: int,
    penalty: float = 0.0,
) -> OtherSide:
    """A side's rows as the rows of the other side see them."""
    whole = gram(rows) if solver.objective.implicit_prefs else None
    return OtherSide(scatter(slots, rows, n_slots), whole, penalty)
