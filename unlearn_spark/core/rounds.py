"""The frontier loop: re-solve what a change disturbed, then what that disturbed, until quiet.

    changes --push--> ledger --rows over tau--> patch: re-solve --push--> ledger outside of it
                        ^                                                        |
                        +--------------------------------------------------------+

Every factor row carries an upper bound of its residual. When no bound exceeds tau, every row of
both sides solves its retained ratings' equations to tau, and nothing else has to be read to know
it. The idea of starting from the trained factors is Unlearn-ALS (Xu et al. 2023, arXiv
2302.06676); the bounds make it local.

This module holds the loop and its decisions; an engine does the work of a round (`Frontier`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Protocol

from unlearn_spark.core.blocks import SIDES
from unlearn_spark.core.ledger_page import Summary


@dataclass(frozen=True)
class Policy:
    """When a night works in rounds, and how much a round takes on.

    Attributes
    ----------
    large_share
        A night that changes at least this share of the ratings sweeps everything at once: its
        rounds would disturb most rows.
    most_sweeps, share_of_training
        Rounds give way to whole sweeps after this many sweeps of work, or after this share of the
        training's sweeps if that is more.
    patch_ratings
        A patch of at most this many ratings also includes the rows that the last round looked at
        and the rows over the mark, because rows of the two sides may pull at each other.
    lazy_rounds
        In this many first rounds a larger patch includes only rows over tau. Later it includes all
        rows over the mark: bounds that creep up to tau together would cause many tiny rounds.
    together_ratings
        A patch with more ratings is cut to one side: in one task it would keep the others waiting.
    spare_share, spare_ratings
        Ratings that a patch may solve again within a round: this share of a sweep's ratings, or
        this many if that is more.
    """

    large_share: float = 0.1
    most_sweeps: float = 4.0
    share_of_training: float = 0.25
    patch_ratings: int = 1_000_000
    lazy_rounds: int = 4
    together_ratings: int = 4_000_000
    spare_share: float = 0.02
    spare_ratings: int = 10_000


POLICY = Policy()


@dataclass
class Work:
    """Arithmetic done so far, and the model's size, from which follows that of a sweep."""

    rank: int
    ratings: int
    rows: int
    done: float = 0.0

    def add(self, ratings: int, rows: int, scanned: int = 0) -> None:
        """Count solves of `rows` rows with `ratings` ratings and residuals of `scanned` ratings."""
        self.done += ratings * self.rank**2 + rows * self.rank**3 + scanned * self.rank

    @property
    def sweeps(self) -> float:
        """Work in units of one full sweep: ratings on both sides x rank^2 + rows x rank^3."""
        whole = 2 * self.ratings * self.rank**2 + self.rows * self.rank**3
        return self.done / whole if whole else 0.0

    @property
    def spare(self) -> float:
        """Ratings that a patch may solve again within a round."""
        return max(POLICY.spare_ratings, POLICY.spare_share * 2 * self.ratings)


class Frontier(Protocol):
    """An engine's side of the loop: it holds a night's ledger and factors and does its rounds."""

    rounds: int
    work: Work

    def summary(self) -> Mapping[str, Summary]:
        """The state of each side."""
        ...

    def resolve(
        self, patch: Mapping[str, str], state: Mapping[str, Summary], eager: Container[str]
    ) -> None:
        """Do one round: scan the rows of a patch, re-solve those over the mark
        (`patch.solve_patch`), push what moved into the rows outside, and count round and work.

        Parameters
        ----------
        patch
            By side: which rows to look at (`ledger_page.CHOICES`).
        state, eager
            The state of each side before the round, and the sides with rows over tau.
        """
        ...


def run_rounds(
    frontier: Frontier,
    *,
    max_rounds: int,
    training_sweeps: int,
    part_ratings: int,
    progress: Callable[[str], None] = lambda message: None,
) -> Mapping[str, Summary] | None:
    """Do rounds until no bound exceeds tau; return the state of each side at the end, or None if
    whole sweeps should take over.

    Parameters
    ----------
    max_rounds, part_ratings
        The settings of these names.
    training_sweeps
        Sweeps that the model's training took; 0 if unknown.
    """
    while True:
        state = frontier.summary()
        over = {side: state[side].over for side in SIDES if state[side].over}
        if not over:
            return state
        if gives_up(frontier.rounds, max_rounds, frontier.work, training_sweeps):
            return None
        frontier.resolve(choose_patch(state, frontier.rounds, part_ratings), state, over)
        rows = " and ".join(f"{n} {side}" for side, n in over.items())
        worst = max(state[side].worst for side in SIDES)
        progress(
            f"round {frontier.rounds}: {rows} rows over tau, largest bound {worst:.1e}; "
            f"{frontier.work.sweeps:.3f} sweeps so far"
        )


def sweeps_at_once(n_changes: int, n_ratings: int) -> bool:
    """Whether a night with `n_changes` changed ratings of `n_ratings` skips the rounds."""
    return n_changes >= POLICY.large_share * n_ratings


def looks_again(ratings: int) -> bool:
    """Whether the next round may look again at the rows of a patch with this many ratings."""
    return ratings <= POLICY.patch_ratings


def gives_up(rounds: int, max_rounds: int, work: Work, training_sweeps: int) -> bool:
    """Whether a night has done so much in rounds that whole sweeps should take over."""
    most = max(POLICY.most_sweeps, POLICY.share_of_training * training_sweeps)
    return rounds >= max_rounds or work.sweeps > most


def choose_patch(state: Mapping[str, Summary], rounds: int, part_ratings: int) -> dict[str, str]:
    """Choose what the next round looks at: by side, which rows (`ledger_page.CHOICES`).

    A small patch includes the rows over the mark and those that the last round looked at, so that
    rows of the two sides that pull at each other are solved together. A large one includes at
    first the rows over tau, later those over the mark. If one task cannot hold both sides
    (`part_ratings`), the patch is one side, spread over tasks.

    Parameters
    ----------
    state, rounds
        The state of each side, at least one with a row over tau, and the number of rounds done.
    """
    over = [side for side in SIDES if state[side].over]
    patch = {side: "candidates" if side in over else "last_round" for side in SIDES}
    if _ratings(patch, state) > min(POLICY.patch_ratings, part_ratings):
        patch = dict.fromkeys(over, "over_tau" if rounds < POLICY.lazy_rounds else "candidates")
    if _ratings(patch, state) > min(POLICY.together_ratings, part_ratings):
        # The side with less to do first: its rows often quieten the other.
        side = min(over, key=lambda name: state[name].ratings[patch[name]])
        patch = {side: patch[side]}
    return {side: name for side, name in patch.items() if state[side].ratings[name]}


def _ratings(patch: Mapping[str, str], state: Mapping[str, Summary]) -> int:
    return sum(state[side].ratings[name] for side, name in patch.items())
