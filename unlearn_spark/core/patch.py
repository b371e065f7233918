"""A patch: rows of one or both sides that one task solves together.

The rows of the two sides are solved in turn, each from the newest factors of the other, until none
of them is over tau. Whatever lies outside stands still meanwhile, so that only the net move of
a patch is pushed. A user and an item that hardly anybody else has rated pull each other for dozens
of turns: within a patch such a turn costs microseconds, between patches it costs Spark jobs.

NumPy and the kernels; nothing here knows Spark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.core.blocks import SIDES, RatingBlock, other_side, places_in, raw
from unlearn_spark.core.bounds import gram, moved_norms
from unlearn_spark.core.kernel import row_residuals
from unlearn_spark.core.objective import relative_residual
from unlearn_spark.core.solver import OtherSide

if TYPE_CHECKING:
    from unlearn_spark.core.solver import Solver

MOST_TURNS = 2000
"""After so many half-sweeps of a patch the night goes on with what is over tau by then."""


@dataclass(frozen=True)
class PatchSide:
    """What a patch has of one side.

    Attributes
    ----------
    known : int32 (n,)
        Ascending slots of the rows whose factors are here: those of the patch and all of their
        neighbours.
    factors : float32 (n, rank)
        As they are before the patch.
    ratings
        Those of the rows to look at, all of them; no rows where this side stands still.
    forced : bool (ratings.n_rows,)
        Rows to solve even where they are under the mark.
    floor
        What this side's residuals are relative to at least.
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
    """What a patch did to one side.

    Attributes
    ----------
    slots : int32 (n,)
        The rows looked at.
    factors : float32 (n, rank)
    gradient_norm, b_norm : float64 (n,)
        Their true residuals' parts at the end.
    solved : bool (n,)
        Rows that were solved at least once.
    push_slots : int32 (m,)
        Rows of this side outside the patch whose equations the other side's moves changed.
    push_gradient, push_b : float64 (m,)
        Norms of that change.
    gram_change : float64 (rank, rank)
        Change of this side's X'X.
    solved_rows, solved_ratings, scanned_ratings
        Work done: rows solved and their ratings, counted at each turn, and ratings whose residual
        was computed.
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
    In implicit mode every move disturbs every row a little, and going on and on would
    be whole sweeps, which are better accelerated: hence `spare`.

    Parameters
    ----------
    tau, mark
        Relative residuals, mark <= tau.
    grams
        By side: float64 (rank, rank), X'X over the whole side before the patch; needed in
        implicit mode, where it follows the moves.
    spare
        Ratings of rows that may be solved after the first turn of their side, each counted
        whenever its row is solved.

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
    for side, worker in workers.items():  # of use where the turns ran out
        worker.look(workers[other_side(side)], worker.stale)
    return {side: workers[side].settled(workers[other_side(side)]) for side in SIDES}


class _Side:
    """A side while its patch is worked on."""

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
        """Compute the residuals of some rows."""
        part = self.ratings.rows(keep)
        self.gradient_norm[keep], self.b_norm[keep] = row_residuals(
            part.indptr,
            part.others,
            part.values,
            other.factors,
            self.factors[self.places[keep]],
            self.solver.objective,
            gram=other.gram,
        )
        self.scanned_ratings += part.n_ratings

    def turn(self, other: _Side, tau: float, mark: float, most: float) -> NDArray[np.bool_]:
        """Look at the stale rows, and if that asks for it solve the rows over the mark, unless
        it is not the first turn and these have more than `most` ratings; returns which."""
        needs = self.forced.copy()
        self.look(other, self.stale & ~needs)  # at the others when they are solved
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
        """The other side's rows `moved` have new factors: what depends on them is stale."""
        if self.gram is not None:
            self.stale |= bool(moved.any())  # the Gram matrix is in every equation
            return
        here = np.zeros(len(other.known), np.bool_)
        here[other.places[moved]] = True
        self.stale[self.entry_rows[here[self.ratings.others]]] = True

    def settled(self, other: _Side) -> PatchResult:
        """The end: what moved here, and what the other side's moves did to rows outside."""
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


def places_among(slots: NDArray[np.int32], known: NDArray[np.int32]) -> NDArray[np.int32]:
    """Where in `known` (ascending) the slots stand, which must all be there."""
    places, here = places_in(slots, known)
    if not here.all():
        raise ValueError("a rating names a row without factors; the rating blocks are damaged")
    return places
