"""The ledger while a night works on it: entries of many rows as plain arrays, a page at a time.

A page holds all rows of some blocks of one side (`Paging`), and the changes of their ratings that
are not packed into the rating blocks yet. On pages, a step of the frontier loop is a few passes
over arrays; on a table of single rows it would be several Spark jobs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn_spark.core.blocks import (
    RatingBlock,
    concatenate,
    places_among,
    places_in,
    raw,
)
from unlearn_spark.core.bounds import rating_terms
from unlearn_spark.core.objective import Objective, relative_residual

PAGE_ROWS = 100_000
"""Rows of both sides that one task handles, approximately."""

MOST_CHUNKS = 512
"""Most chunks that are listed by number; beyond it, whole blocks are read."""

CHOICES = ("over_tau", "last_round", "candidates")
"""Which rows a round may look at: those over tau; those that the last round looked at; or those
that the last round looked at and those over the mark."""


@dataclass(frozen=True)
class Paging:
    """Which page a row lies in. A page holds whole blocks, so it is written back as whole files.

    Attributes
    ----------
    keys
        By page number: the key by which Spark groups the page.
    n_blocks
        By side: its number of blocks.
    """

    keys: tuple[int, ...]
    n_blocks: Mapping[str, int]

    def split(self, side: str, slots: NDArray[np.int32]) -> Iterator[tuple[int, NDArray[np.intp]]]:
        """Group slots by page: (key of the page, positions in `slots` of its rows)."""
        numbers = slots % np.int32(self.n_blocks[side]) % np.int32(len(self.keys))
        for number in np.unique(numbers):
            yield self.keys[number], np.flatnonzero(numbers == number)


@dataclass(frozen=True)
class RatingChanges:
    """Ratings that left or entered the equations of some rows since the blocks were packed.

    Attributes
    ----------
    rows, others : int32 (n,)
        Slots of the row and of the other side's row.
    values : float32 (n,)
    signs : int32 (n,)
        -1 removes the pair, +1 adds it.
    order : int64 (n,)
        The model version that brought the change; the newest change of a pair counts.
    """

    rows: NDArray[np.int32]
    others: NDArray[np.int32]
    values: NDArray[np.float32]
    signs: NDArray[np.int32]
    order: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, keep: NDArray[np.bool_]) -> RatingChanges:
        """Only the changes where `keep` is true."""
        return RatingChanges(*(getattr(self, field.name)[keep] for field in fields(self)))

    def applied(self, block: RatingBlock) -> RatingBlock:
        """The block after these changes, without the rows that lost all their ratings."""
        if not len(self):
            return block
        order = np.lexsort((self.signs, self.order, self.others, self.rows))
        rows, others, values = self.rows[order], self.others[order], self.values[order]
        newest = np.append((np.diff(rows) != 0) | (np.diff(others) != 0), True)
        block = block.without(rows[newest], others[newest])
        added = newest & (self.signs[order] > 0)
        extra = RatingBlock.from_entries(rows[added], others[added], values[added])
        return concatenate([block, extra]) if extra.n_ratings else block


@dataclass(frozen=True)
class Thresholds:
    """What decides which rows a round works on.

    Attributes
    ----------
    n_blocks, floors
        By side: its number of blocks, and the least denominator of its residuals (`floor_of`).
    tau, mark
        The largest residual that is promised, and the one down to which rows are solved.
    """

    n_blocks: Mapping[str, int]
    tau: float
    mark: float
    floors: Mapping[str, float]

    def chosen(self, page: Page, side: str, choice: str) -> NDArray[np.bool_]:
        """A mask of the page's rows that a choice (`CHOICES`) selects."""
        return page.chosen(choice, self.tau, self.mark, self.floors[side])

    def summary(self, page: Page, side: str) -> Summary:
        """The summary of a page of this side."""
        return page.summary(self.n_blocks[side], self.tau, self.mark, self.floors[side])


def changed_norms(
    page: Page,
    version: int,
    mine: tuple[NDArray[np.int32], NDArray[np.float32]],
    others: tuple[NDArray[np.int32], NDArray[np.float32]],
    objective: Objective,
) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """Slots of the page's rows whose ratings a model version changes, and norms of the changes of
    their gradient and b.

    Parameters
    ----------
    mine, others
        (slots, factors) of this side's rows and of the other side's, before any is solved.
    """
    news = page.changes.of(page.changes.order == version)
    news = news.of(np.isin(news.rows, page.slots))
    if not len(news):
        return np.zeros(0, np.int32), np.zeros(0), np.zeros(0)
    slots, rows = np.unique(news.rows, return_inverse=True)
    y = mine[1][places_among(slots, mine[0])]
    known, neighbours = np.unique(news.others, return_inverse=True)
    x = others[1][places_among(known, others[0])]
    added = news.signs > 0
    change = [
        rating_terms(rows[which], neighbours[which], news.values[which], y, x, objective)
        for which in (added, ~added)
    ]
    gradient, b = (change[0] - change[1]).norms()
    return slots, gradient, b


NO_CHANGES = RatingChanges(
    np.zeros(0, np.int32),
    np.zeros(0, np.int32),
    np.zeros(0, np.float32),
    np.zeros(0, np.int32),
    np.zeros(0, np.int64),
)


@dataclass(frozen=True)
class Summary:
    """The state of a page or of a whole side.

    Attributes
    ----------
    over
        Number of rows whose bound exceeds tau.
    worst
        The largest bound.
    solved, solved_blocks
        Number of rows that were re-solved tonight, and the blocks that hold them.
    ratings
        By choice (`CHOICES`): the number of ratings of its rows.
    chunks
        By choice: the stored chunks that hold its rows; None if more than `MOST_CHUNKS`.
    """

    over: int
    worst: float
    solved: int
    solved_blocks: frozenset[int]
    ratings: Mapping[str, int]
    chunks: Mapping[str, frozenset[int] | None]

    def __add__(self, other: Summary) -> Summary:
        chunks: dict[str, frozenset[int] | None] = {}
        for name in CHOICES:
            mine, theirs = self.chunks[name], other.chunks[name]
            both = None if mine is None or theirs is None else mine | theirs
            chunks[name] = both if both is not None and len(both) <= MOST_CHUNKS else None
        return Summary(
            self.over + other.over,
            max(self.worst, other.worst),
            self.solved + other.solved,
            self.solved_blocks | other.solved_blocks,
            {name: self.ratings[name] + other.ratings[name] for name in CHOICES},
            chunks,
        )


NOTHING = Summary(
    0, 0.0, 0, frozenset(), dict.fromkeys(CHOICES, 0), dict.fromkeys(CHOICES, frozenset())
)


@dataclass(frozen=True)
class Page:
    """Ledger entries of some rows of one side.

    Attributes
    ----------
    slots : int32 (n,)
        Ascending.
    chunks : int32 (n,)
        The stored chunk that holds the row's packed ratings; -1: it has none.
    n_ratings : int32 (n,)
    gradient_norm : float64 (n,)
        Upper bounds of ||A x - b||.
    b_norm : float64 (n,)
        Lower bounds of ||b||.
    factor_norm : float64 (n,)
    last_round : bool (n,)
        The last round looked at the row, and the next may do so again (`rounds.looks_again`).
    solved : bool (n,)
        The row was re-solved tonight.
    changes
        Changes of the rows' ratings since the blocks were packed.
    """

    slots: NDArray[np.int32]
    chunks: NDArray[np.int32]
    n_ratings: NDArray[np.int32]
    gradient_norm: NDArray[np.float64]
    b_norm: NDArray[np.float64]
    factor_norm: NDArray[np.float64]
    last_round: NDArray[np.bool_]
    solved: NDArray[np.bool_]
    changes: RatingChanges = NO_CHANGES

    @classmethod
    def opened(
        cls,
        stored: Mapping[str, NDArray[Any]],
        touched: Mapping[str, NDArray[np.int32]],
        changes: RatingChanges,
    ) -> Page:
        """The page at the start of a night: the rows that have ratings.

        Parameters
        ----------
        stored
            slots, chunks, n_ratings, gradient_norm, b_norm, factor_norm: the entries of the
            published model.
        touched
            slots and new n_ratings of the rows whose ratings changed. Rows with none left are
            dropped. A row without an entry is new and gets an infinite bound.
        """
        slots = np.union1d(stored["slots"], touched["slots"])
        n = len(slots)
        arrays = {
            "chunks": np.full(n, -1, np.int32),
            "n_ratings": np.zeros(n, np.int32),
            "gradient_norm": np.full(n, np.inf),
            "b_norm": np.zeros(n),
            "factor_norm": np.ones(n),
        }
        places = np.searchsorted(slots, stored["slots"])
        for name, array in arrays.items():
            array[places] = stored[name]
        arrays["n_ratings"][np.searchsorted(slots, touched["slots"])] = touched["n_ratings"]
        here = arrays["n_ratings"] > 0
        kept = {name: array[here] for name, array in arrays.items()}
        false = np.zeros(int(here.sum()), np.bool_)
        return cls(slots=slots[here], **kept, last_round=false, solved=false, changes=changes)

    def bound(self, floor: float) -> NDArray[np.float64]:
        """Upper bounds of the rows' residuals (`relative_residual`), float64 (n,)."""
        return relative_residual(self.gradient_norm, self.b_norm, floor)

    def pushed(
        self,
        slots: NDArray[np.int32],
        gradient: NDArray[np.float64],
        b: NDArray[np.float64],
        drift: float = 0.0,
        force: bool = False,
    ) -> Page:
        """The page after changes of known norm.

        Parameters
        ----------
        slots, gradient, b
            Rows, and the norms of the changes of their gradient and b. Rows may repeat; those of
            other pages are ignored.
        drift
            How much the other side's Gram matrix changed (`bounds.drift`). It disturbs every row in
            proportion to its factor norm.
        force
            Make the bounds of the named rows infinite, so that they are solved.
        """
        order = np.lexsort((b, gradient, slots))  # so that sums do not follow arrival order
        slots, gradient, b = slots[order], gradient[order], b[order]
        places, known = places_in(slots, self.slots)
        n = len(self.slots)
        grown = self.gradient_norm + np.bincount(places, gradient[known], n)
        grown = grown + drift * self.factor_norm
        if force:
            grown[places] = np.inf
        left = np.maximum(self.b_norm - np.bincount(places, b[known], n), 0)
        return replace(self, gradient_norm=grown, b_norm=left)

    def looked_at(
        self,
        slots: NDArray[np.int32],
        norms: Mapping[str, NDArray[np.float64]],
        solved: NDArray[np.bool_],
        again: bool,
    ) -> Page:
        """The page after a round that looked at these rows.

        Parameters
        ----------
        norms
            True gradient_norm, b_norm, factor_norm of the rows, which replace the bounds.
        solved
            Which of the rows were re-solved.
        again
            Whether the next round may look at them again.
        """
        places, known = places_in(slots, self.slots)
        arrays = {}
        for name in ("gradient_norm", "b_norm", "factor_norm"):
            arrays[name] = getattr(self, name).copy()
            arrays[name][places] = norms[name][known]
        last_round, all_solved = np.zeros(len(self.slots), np.bool_), self.solved.copy()
        last_round[places] = again
        all_solved[places] |= solved[known]
        return replace(self, **arrays, last_round=last_round, solved=all_solved)

    def chosen(self, name: str, tau: float, mark: float, floor: float) -> NDArray[np.bool_]:
        """Mask of the rows that a choice (`CHOICES`) selects."""
        if name == "over_tau":
            return self.bound(floor) > tau
        return (
            self.last_round
            if name == "last_round"
            else self.last_round | (self.bound(floor) > mark)
        )

    def summary(self, n_blocks: int, tau: float, mark: float, floor: float) -> Summary:
        """The state of the page."""
        bound, blocks = self.bound(floor), self.slots % n_blocks
        ratings: dict[str, int] = {}
        chunks: dict[str, frozenset[int] | None] = {}
        for name in CHOICES:
            rows = self.chosen(name, tau, mark, floor)
            ratings[name] = int(self.n_ratings[rows].sum())
            found = np.unique(self.chunks[rows & (self.chunks >= 0)])
            chunks[name] = frozenset(found.tolist()) if len(found) <= MOST_CHUNKS else None
        return Summary(
            int((bound > tau).sum()),
            float(bound.max(initial=0.0)),
            int(self.solved.sum()),
            frozenset(np.unique(blocks[self.solved]).tolist()),
            ratings,
            chunks,
        )

    def of(self, keep: NDArray[np.bool_]) -> Page:
        """Only the rows where `keep` is true, with their changes."""
        arrays = {name: getattr(self, name)[keep] for name in _ARRAYS}
        mine = np.isin(self.changes.rows, arrays["slots"])
        return Page(**arrays, changes=self.changes.of(mine))

    def split(self, n_parts: int) -> Iterator[tuple[int, Page]]:
        """Cut into (part, its rows); a row belongs to part `slot % n_parts`."""
        parts = self.slots % n_parts
        for part in np.unique(parts):
            yield int(part), self.of(parts == part)

    def to_binary(self) -> dict[str, memoryview]:
        """All arrays as raw little-endian bytes, by the names of `COLUMNS`."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"change_{name}": getattr(self.changes, name) for name in _CHANGES}
        return {name: raw(array, COLUMNS[name]) for name, array in arrays.items()}

    @classmethod
    def from_binary(cls, columns: Mapping[str, Any]) -> Page:
        """The page from buffers made by `to_binary`; the arrays are views."""
        arrays = {name: np.frombuffer(columns[name], kind) for name, kind in COLUMNS.items()}
        changes = RatingChanges(*(arrays.pop(f"change_{name}") for name in _CHANGES))
        return cls(**arrays, changes=changes)


_KINDS: dict[str, type[np.generic]] = {
    "slots": np.int32,
    "chunks": np.int32,
    "n_ratings": np.int32,
    "gradient_norm": np.float64,
    "b_norm": np.float64,
    "factor_norm": np.float64,
    "last_round": np.bool_,
    "solved": np.bool_,
}
_CHANGES: dict[str, type[np.generic]] = {
    "rows": np.int32,
    "others": np.int32,
    "values": np.float32,
    "signs": np.int32,
    "order": np.int64,
}
_ARRAYS = tuple(_KINDS)
COLUMNS = {**_KINDS, **{f"change_{name}": kind for name, kind in _CHANGES.items()}}
