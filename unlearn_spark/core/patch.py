"""A patch: rows of one or both sides that one task solves together.

The rows of the two sides are solved in turn, each from the newest factors of the other, until none
of them is over tau. All other rows stand still meanwhile, so only the net move of a patch is
pushed to them. A user and an item that hardly anybody else has rated may pull at each other for
many turns: within a patch a turn is a little arithmetic, between patches it costs Spark jobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.core.blocks import SIDES, RatingBlock, other_side, places_among, raw
from unlearn_spark.core.bounds import gram, moved_norms
from unlearn_spark.core.objective import relative_residual
from unlearn_spark.core.solver import OtherSide

if TYPE_CHECKING:
    from unlearn_spark.core.solver import Solver

MOST_TURNS = 2000
"""Most half-sweeps of a patch; rows that are still over tau then are left to the next round."""


@dataclass(frozen=True)
class PatchSide:
    """One side of a patch before it is solved.

    Attributes
    ----------
    known : int32 (n,)
        Ascending slots of the rows of this side that have factors here: the patch's own rows and
        all neighbours of its rows on the other side.
    factors : float32 (n, rank)
        Their factors before the patch.
    ratings
        All ratings of the rows to look at; without rows if this side stands still.
    forced : bool (ratings.n_rows,)
        Rows to solve even if they are under the mark.
    floor
        The least denominator of this side's residuals (`floor_of`).
    eager
        Solve down to the mark at the first turn, even if no row proves to be over tau.
    """

    known: NDArray[np.int32]
    factors: NDArray[np.float32]
    ratings: RatingBlock
    forced: NDArray[np.bool_]
    floor: float
    eager: bool = True


@dataclass(frozen=True)
class PatchResult:
    """One side of a patch after it is solved.

    Attributes
    ----------
    slots : int32 (n,)
        The rows looked at.
    factors : float32 (n, rank)
    gradient_norm, b_norm : float64 (n,)
        Their true ||A x - b|| and ||b|| at the end.
    solved : bool (n,)
        Rows that were solved at least once.
    push_slots : int32 (m,)
        Rows of this side outside the patch whose equations the other side's moves changed.
    push_gradient, push_b : float64 (m,)
        Norms of that change.
    gram_change : float64 (rank, rank)
        Change of this side's X'X.
    solved_rows, solved_ratings, scanned_ratings
        Work done: rows solved, their ratings, and ratings whose residual was computed. Each counts
        again at every turn.
    """

    slots: NDArray[np.int32]
    factors: NDArray[np.float32]
    gradient_norm: NDArray[np.float64]
    b_norm: NDArray[np.float64]
    solved: NDArray[np.bool_]
    push_slots: NDArray[np.int32]
    push_gradient: NDArray[np.float64]
    push_b: NDArray[np.float64]
    gram_change: NDArray[np.float64]
    solved_rows: int
    solved_ratings: int
    scanned_ratings: int

    def to_binary(self) -> dict[str, Any]:
        """The fields by name, arrays as raw little-endian bytes."""
        return {
            name: raw(value, value.dtype.type) if isinstance(value, np.ndarray) else value
            for name, value in vars(self).items()
        }


def solve_patch(
    solver: Solver,
    sides: Mapping[str, PatchSide],
    tau: float,
    mark: float,
    grams: Mapping[str, NDArray[np.float64]],
    spare: float = np.inf,
    most_turns: int = MOST_TURNS,
) -> dict[str, PatchResult]:
    """Solve the rows of a patch until none is over tau, within `most_turns` half-sweeps.

    An eager side at its first turn, and any side with a row over tau, is solved down to the mark.
    In implicit mode every move disturbs every row a little. Endless turns would amount to whole
    sweeps without acceleration, so `spare` limits them.

    Parameters
    ----------
    tau, mark
        Relative residuals, mark <= tau.
    grams
        By side: X'X over the whole side before the patch, float64 (rank, rank). Needed in implicit
        mode, where every move updates it.
    spare
        Most ratings of rows solved after the first turn of their side; a rating counts again each
        time its row is solved.

    Raises
    ------
    ValueError
        Ratings name a row whose factors are missing, or the reverse.
    """
    workers = {side: _Side(solver, side, sides, grams.get(side)) for side in SIDES}
    side = min(SIDES, key=lambda name: workers[name].ratings.n_ratings or np.inf)
    for _ in range(most_turns):
        if not workers[side].stale.any():
            side = other_side(side)
            if not workers[side].stale.any():
                break
        left = spare - sum(worker.again for worker in workers.values())
        moved = workers[side].turn(workers[other_side(side)], tau, mark, left)
        workers[other_side(side)].disturb(workers[side], moved)
        side = other_side(side)
    for side, worker in workers.items():  # some rows are stale only if the turns ran out
        worker.look(workers[other_side(side)], worker.stale)
    return {side: workers[side].result(workers[other_side(side)]) for side in SIDES}


class _Side:
    """One side of a patch while it is solved."""

    def __init__(
        self,
        solver: Solver,
        side: str,
        sides: Mapping[str, PatchSide],
        gram_before: NDArray[np.float64] | None,
    ) -> None:
        mine, other = sides[side], sides[other_side(side)]
        n = mine.ratings.n_rows
        self.solver = solver
        self.known, self.before, self.factors = mine.known, mine.factors, mine.factors.copy()
        self.slots = mine.ratings.slots
        self.places = places_among(self.slots, mine.known)
        self.ratings = replace(mine.ratings, others=places_among(mine.ratings.others, other.known))
        self.entry_rows = np.repeat(np.arange(n, dtype=np.int32), np.diff(mine.ratings.indptr))
        self.gram = gram_before
        self.forced = mine.forced.copy()
        self.floor = mine.floor
        self.turned, self.eager = False, mine.eager
        self.stale, self.solved = np.ones(n, np.bool_), np.zeros(n, np.bool_)
        self.gradient_norm, self.b_norm = np.zeros(n), np.zeros(n)
        self.again = 0  # ratings solved after the first turn
        self.solved_rows = self.solved_ratings = self.scanned_ratings = 0

    def look(self, other: _Side, keep: NDArray[np.bool_]) -> None:
        """Compute the residuals of the rows where `keep` is true."""
        part = self.ratings.rows(keep)
        seen = OtherSide(other.factors, other.gram, 0.0)
        self.gradient_norm[keep], self.b_norm[keep] = self.solver.residuals(
            part, seen, self.factors[self.places[keep]]
        )
        self.scanned_ratings += part.n_ratings

    def turn(self, other: _Side, tau: float, mark: float, most: float) -> NDArray[np.bool_]:
        """Look at the stale rows and solve those over the mark; return the mask of solved rows.

        Rows are solved if one is forced or over tau, and at the first turn of an eager side. After
        the first turn nothing is solved if it has more than `most` ratings.
        """
        needs = self.forced.copy()
        self.look(other, self.stale & ~needs)  # forced rows follow once they are solved
        residual = relative_residual(self.gradient_norm, self.b_norm, self.floor)
        if (self.eager and not self.turned) or needs.any() or (residual > tau).any():
            needs |= residual > mark
        ratings = int(np.diff(self.ratings.indptr)[needs].sum())
        if self.turned and ratings > most:
            needs[:] = False
        elif self.turned:
            self.again += ratings
        self.turned = True
        self.stale[:] = False
        self.forced[:] = False
        part, places = self.ratings.rows(needs), self.places[needs]
        if part.n_rows:
            seen = OtherSide(other.factors, other.gram, 0.0)
            after = self.solver.solve(part, seen, None).factors
            if self.gram is not None:
                self.gram = self.gram + (gram(after) - gram(self.factors[places]))
            self.factors[places] = after
            self.solved |= needs
            self.solved_rows += part.n_rows
            self.solved_ratings += part.n_ratings
            self.look(other, needs)
        return needs

    def disturb(self, other: _Side, moved: NDArray[np.bool_]) -> None:
        """Mark the rows as stale that depend on the other side's rows `moved`."""
        if self.gram is not None:
            self.stale |= bool(moved.any())  # the Gram matrix is in every equation
            return
        here = np.zeros(len(other.known), np.bool_)
        here[other.places[moved]] = True
        self.stale[self.entry_rows[here[self.ratings.others]]] = True

    def result(self, other: _Side) -> PatchResult:
        """What moved on this side, and how the other side's moves changed rows outside."""
        gradient = b = np.zeros(len(self.known))
        if other.solved.any():
            moves = other.ratings.rows(other.solved)
            places = other.places[other.solved]
            gradient, b = moved_norms(
                moves.indptr,
                moves.others,
                moves.values,
                self.before,
                other.factors[places],
                other.before[places],
                self.solver.objective,
                self.solver.threads,
            )
        outside = np.ones(len(self.known), np.bool_)
        outside[self.places] = False
        pushed = np.flatnonzero(outside & (gradient > 0))
        mine = self.places[self.solved]
        return PatchResult(
            self.slots,
            self.factors[self.places],
            self.gradient_norm,
            self.b_norm,
            self.solved,
            self.known[pushed],
            gradient[pushed],
            b[pushed],
            gram(self.factors[mine]) - gram(self.before[mine]),
            self.solved_rows,
            self.solved_ratings,
            self.scanned_ratings,
        )
