"""What a night's rounds look at, and when they give up: decisions that both engines share."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SWEEPS, SHARE_OF_TRAINING = 4.0, 0.25
"""Work in rounds after which sweeping everything is thought to be cheaper: so many sweeps, or this
share of what the training took, where that was more."""

PATCH_RATINGS = 1_000_000
"""Up to so many ratings a round takes what the round before looked at along with what is over the
mark: the two may pull at each other."""

LAZY_ROUNDS = 4
"""Of more ratings than that, so many rounds take what is over tau alone. Later ones take all that
is over the mark: bounds that creep up to tau together would cause many tiny rounds."""

TOGETHER_RATINGS = 4_000_000
"""More ratings of both sides are too many for one task while the others wait."""


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
