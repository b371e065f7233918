"""What a worker does to one part in a half-sweep, and the messages in which factors travel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.core.acceleration import curvature_weights, history_products, mix
from unlearn_spark.core.blocks import RatingBlock, raw
from unlearn_spark.core.bounds import gram
from unlearn_spark.core.kernel import RowSolution, row_residuals, solve_rows
from unlearn_spark.core.objective import Objective, relative_residual
from unlearn_spark.core.threads import shared_out

RUN_RATINGS = 65_536
"""Ratings of the rows that a thread takes at a time."""

MESSAGE_BYTES = 131_072
"""Most bytes of factors in a message: for large objects the JVM's collector (G1) grows the heap."""


@dataclass(frozen=True)
class Solver:
    """The settings that a worker needs to solve rows; small and picklable.

    Attributes
    ----------
    threads
        Threads that share the rows of a call. Results do not depend on it, because rows are cut
        into the same runs for any number.
    """

    objective: Objective
    rank: int
    dtype: str
    threads: int = 1

    def solve(
        self, ratings: RatingBlock, other: OtherSide, warm: NDArray[np.float32] | None
    ) -> RowSolution:
        """`kernel.solve_rows` with this solver's settings."""

        def solved(run: tuple[int, int, RatingBlock]) -> RowSolution:
            first, last, rows = run
            return solve_rows(
                rows.indptr,
                rows.others,
                rows.values,
                other.dense,
                self.objective,
                gram=other.gram,
                warm=None if warm is None else warm[first:last],
                active=None,
                dtype=np.float64 if self.dtype == "float64" else np.float32,
            )

        found = shared_out(solved, _runs(ratings), self.threads)
        if len(found) == 1:
            return found[0]
        return RowSolution(
            np.concatenate([part.factors for part in found]),
            np.concatenate([part.gradient_norm for part in found]),
            np.concatenate([part.b_norm for part in found]),
            math.fsum(part.quadratic for part in found),
        )

    def residuals(
        self, ratings: RatingBlock, other: OtherSide, factors: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`kernel.row_residuals` of these rows: ||A x - b|| and ||b||, in float64."""

        def scanned(
            run: tuple[int, int, RatingBlock],
        ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            first, last, rows = run
            return row_residuals(
                rows.indptr,
                rows.others,
                rows.values,
                other.dense,
                factors[first:last],
                self.objective,
                gram=other.gram,
            )

        found = shared_out(scanned, _runs(ratings), self.threads)
        gradient, b = zip(*found, strict=True)
        return np.concatenate(gradient), np.concatenate(b)

    def penalty(self, ratings: RatingBlock, factors: NDArray[np.float32]) -> float:
        """lambda * sum n |x|^2: the rows' penalty, which the other side's solves do not include."""
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
        """Y'Y as float64 bytes; None in explicit mode."""
        if not self.objective.implicit_prefs:
            return None
        return gram(factors).tobytes()

    def factor_row(
        self, part: int, slots: NDArray[np.int32], factors: NDArray[np.float32], scalar: float
    ) -> dict[str, Any]:
        """One message: a row of `FACTOR_SCHEMA`."""
        return {
            "part": part,
            "slots": raw(slots, np.int32),
            "factors": raw(factors, np.float32),
            "gram": self.gram(factors),
            "scalar": scalar,
            "missing": 0,
        }

    def factor_rows(
        self, part: int, slots: NDArray[np.int32], factors: NDArray[np.float32], scalar: float
    ) -> Iterator[dict[str, Any]]:
        """The messages that carry a part's factors; only the first carries the scalar."""
        for own, stack in cut_stack(slots, factors[None]):
            yield self.factor_row(part, own, stack[0], scalar)
            scalar = 0.0

    def missing_row(self, part: int) -> dict[str, Any]:
        """The message that reports a part without its ratings."""
        slots, factors = np.zeros(0, np.int32), np.zeros((0, self.rank), np.float32)
        return {**self.factor_row(part, slots, factors, 0.0), "missing": 1}


def _runs(ratings: RatingBlock) -> list[tuple[int, int, RatingBlock]]:
    """The rows in runs of about `RUN_RATINGS` ratings: first row, the row after the last, run."""
    runs, first = [], 0
    for rows in ratings.pieces(RUN_RATINGS):
        runs.append((first, first + rows.n_rows, rows))
        first += rows.n_rows
    return runs


def cut_stack(
    slots: NDArray[np.int32], stack: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Cut a stack float32 (h, n, rank) into stacks of fewer rows, each of at most `MESSAGE_BYTES`
    or of one row; `joined_stack` undoes it."""
    rows = max(1, MESSAGE_BYTES // (4 * stack.shape[0] * stack.shape[2]))
    for first in range(0, max(1, len(slots)), rows):
        yield slots[first : first + rows], stack[:, first : first + rows]


def joined_stack(
    messages: Sequence[dict[str, Any]], rank: int, name: str = "factors"
) -> NDArray[np.float32]:
    """Join a part's messages, in any order, to a stack float32 (h, n, rank) in slot order."""
    stacks = []
    for row in sorted(messages, key=_first_slot):
        n = len(row["slots"]) // 4
        stacks.append(np.frombuffer(row[name], np.float32).reshape(-1, n, rank))
    return stacks[0] if len(stacks) == 1 else np.concatenate(stacks, axis=1)


def _first_slot(message: dict[str, Any]) -> int:
    slots = np.frombuffer(message["slots"], np.int32)
    return int(slots[0]) if len(slots) else -1


@dataclass(frozen=True)
class OtherSide:
    """The other side's factors as a part sees them.

    Attributes
    ----------
    dense : float32 (n_slots, rank)
    gram : float64 (rank, rank) or None
    penalty
        Sum of the senders' scalars.
    missing
        Number of messages from parts without their ratings.
    """

    dense: NDArray[np.float32]
    gram: NDArray[np.float64] | None
    penalty: float
    missing: int = 0

    @classmethod
    def from_messages(cls, messages: list[dict[str, Any]], rank: int, n_slots: int) -> OtherSide:
        """Gather the other side's messages, leaving out the part's own."""
        messages = [row for row in messages if not row.get("own", False)]
        # So that sums do not follow arrival order.
        messages.sort(key=lambda row: (row["part"], _first_slot(row)))
        dense = np.zeros((n_slots, rank), np.float32)
        gram: NDArray[np.float64] | None = None
        for row in messages:
            slots = np.frombuffer(row["slots"], np.int32)
            dense[slots] = np.frombuffer(row["factors"], np.float32).reshape(-1, rank)
            if row["gram"] is not None:
                share = np.frombuffer(row["gram"], np.float64).reshape(rank, rank)
                gram = share.copy() if gram is None else gram + share
        penalty = float(sum(row["scalar"] for row in messages))
        return cls(dense, gram, penalty, sum(row["missing"] for row in messages))


@dataclass(frozen=True)
class AnchorSweep:
    """What `solve_anchor` found.

    Attributes
    ----------
    history : float32 (2h, n, rank)
        g and f = g - y of this sweep, then of the one before, and so on.
    quadratic, penalty
        These rows' share of the objective without the other side's penalty, and that penalty.
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
    solver: Solver,
    ratings: RatingBlock,
    seen: OtherSide,
    stack: NDArray[np.float32],
    floor: float,
    constant: float | None = None,
) -> AnchorSweep:
    """Solve the anchor's rows.

    Parameters
    ----------
    stack : float32 (1 + 2h, n, rank)
        y and the earlier history.
    floor
        The least denominator of the anchor's residuals (`floor_of`).
    constant
        `Solver.constant` of the ratings, if known.
    """
    y, past = stack[0], stack[1:]
    solved = solver.solve(ratings, seen, y)
    history = np.concatenate([solved.factors[None], (solved.factors - y)[None], past])
    worst = relative_residual(solved.gradient_norm, solved.b_norm, floor)
    return AnchorSweep(
        history,
        (solver.constant(ratings) if constant is None else constant) + solved.quadratic,
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
    """Make the next stack from a history, as an `acceleration.Step` says."""
    y = mix(list(history[0::2]), weights)
    if nonnegative:
        y = np.maximum(y, 0)  # weights may be negative
    first = 2 if drop_newest else 0
    return np.concatenate([y[None], history[first : first + 2 * keep]])


class FitSettings(Protocol):
    """The settings that a solver takes from `config.AlsSettings`."""

    @property
    def rank(self) -> int: ...

    @property
    def reg_param(self) -> float: ...

    @property
    def implicit_prefs(self) -> bool: ...

    @property
    def alpha(self) -> float: ...

    @property
    def nonnegative(self) -> bool: ...

    @property
    def dtype(self) -> str: ...


def solver_of(settings: FitSettings, threads: int = 1) -> Solver:
    """The solver that these settings ask for."""
    objective = Objective(
        settings.reg_param, settings.implicit_prefs, settings.alpha, settings.nonnegative
    )
    return Solver(objective, settings.rank, settings.dtype, threads)
