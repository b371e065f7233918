"""The frontier loop: re-solve what a change disturbed, then what that disturbed, until quiet.

    changes --push--> ledger --rows over tau--> patch: re-solve --push--> ledger outside of it
                        ^                                                        |
                        +--------------------------------------------------------+

Every factor row carries an upper bound of its residual. When no bound exceeds tau, every row of
both sides solves its retained ratings' equations to tau, and nothing else has to be read to know
it. The idea of starting from the trained factors is Unlearn-ALS (Xu et al. 2023, arXiv
2302.06676); the bounds make it local.

The loop and its decisions are here, once; what a round does is an engine's matter (`Frontier`).
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
    large_changes, large_share
        A night that changes so many ratings, and this share of all, sweeps everything at once: to
        put them into the ledger would take longer than to encode the ratings anew.
    most_sweeps, share_of_training
        Work in rounds, in sweeps, after which sweeping everything is thought to be cheaper: so
        many, or this share of what the training took where that is more.
    patch_ratings
        A round with no more ratings takes along what the round before looked at and what is over
        the mark: rows of the two sides may pull at each other.
    lazy_rounds
        In the first rounds with more ratings only rows over tau are looked at. Later ones take all
        that is over the mark, as bounds that creep up to tau together would cause many tiny rounds.
    together_ratings
        More ratings of both sides are too many for one task while the others wait.
    spare_share, spare_ratings
        What a patch may solve again and again within a round: this share of a sweep's ratings, or
        so many where that is more.
    """

    large_changes: int = 250_000
    large_share: float = 0.05
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
    """Arithmetic done so far, and the size of a sweep to measure it by."""

    rank: int
    ratings: int
    rows: int
    done: float = 0.0

    def add(self, ratings: int, rows: int, scanned: int = 0) -> None:
        """Solves of `rows` rows with `ratings` ratings, and residuals of `scanned` ratings."""
        self.done += ratings * self.rank**2 + rows * self.rank**3 + scanned * self.rank

    @property
    def sweeps(self) -> float:
        """In units of one full sweep: ratings on both sides x rank^2 + rows x rank^3."""
        whole = 2 * self.ratings * self.rank**2 + self.rows * self.rank**3
        return self.done / whole if whole else 0.0

    @property
    def spare(self) -> float:
        """Ratings that a patch may solve again within a round."""
        return max(POLICY.spare_ratings, POLICY.spare_share * 2 * self.ratings)


class Frontier(Protocol):
    """The ledger and the factors of a night, as an engine holds them."""

    rounds: int
    work: Work

    def summary(self) -> Mapping[str, Summary]:
        """How each side stands."""
        ...

    def resolve(
        self, patch: Mapping[str, str], state: Mapping[str, Summary], eager: Container[str]
    ) -> None:
        """A round: scan the rows of a patch, re-solve those over the mark (`patch.solve_patch`),
        and push what moved into the rows outside; count the round and its work.

        Parameters
        ----------
        patch
            By side which rows (`ledger_page.CHOICES`).
        state
            How each side stands before.
        eager
            The sides with rows over tau.
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
    """Rounds until no bound exceeds tau; returns how the sides stand then, or None when the loop is
    not the cheaper way.

    Parameters
    ----------
    max_rounds
        `unlearn.max_rounds`.
    training_sweeps
        Sweeps that the model's training took; 0 where that is not known.
    part_ratings
        Ratings that one task may hold.
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
    """Is sweeping everything the quicker way for so many changes of a model of so many ratings?"""
    return n_changes >= max(POLICY.large_changes, POLICY.large_share * n_ratings)


def looks_again(ratings: int) -> bool:
    """May the next round look again at the rows of a patch with so many ratings?"""
    return ratings <= POLICY.patch_ratings


def gives_up(rounds: int, max_rounds: int, work: Work, training_sweeps: int) -> bool:
    """Has a night done so much in rounds that it should sweep everything instead?

    Parameters
    ----------
    training_sweeps
        Sweeps that the model's training took; 0 where that is not known.
    """
    most = max(POLICY.most_sweeps, POLICY.share_of_training * training_sweeps)
    return rounds >= max_rounds or work.sweeps > most


def choose_patch(state: Mapping[str, Summary], rounds: int, part_ratings: int) -> dict[str, str]:
    """What the next round looks at: by side which rows (`ledger_page.CHOICES`).

    While that is little, the rows over the mark and those that the round before looked at, so that
    rows of the two sides that pull at each other are settled together. Else at first the rows over
    tau, later those over the mark; and where no single task can hold both sides, one of them,
    spread over tasks.

    Parameters
    ----------
    state
        How each side stands; a row of one of them is over tau.
    rounds
        Rounds done.
    part_ratings
        Ratings that one task may hold.
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
