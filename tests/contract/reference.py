"""What tables and receipts should hold, by a plain reading of the rules in the README, and the true
residual of every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from embedded.small_root import dense_residual

from unlearn_spark.config import AlsSettings


@dataclass(frozen=True)
class Request:
    """Times are days; `user` or `item` is None where the scope has none."""

    name: str
    scope: str
    user: object
    item: object
    start: int | None
    end: int | None
    at: int


@dataclass
class Reference:
    """What the table, the requests and the receipts should be."""

    stored: dict[tuple[object, object], tuple[float, int | None]] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    receipts: dict[str, int] = field(default_factory=dict)
    in_model: dict[tuple[object, object], float] = field(default_factory=dict)

    def covers(self, request, pair, rated, *, pending):
        """Does a request cover a rating? `pending`: it was not honoured yet."""
        if request.scope == "reinstate" or (request.user or pair[0]) != pair[0]:
            return False
        if (request.item or pair[1]) != pair[1]:
            return False
        before = rated is None or rated <= request.at
        if request.scope == "rating":
            return before
        if request.scope == "window":
            return before and rated is not None and request.start <= rated < request.end
        lifted = any(
            (r.user or r.item) == (request.user or request.item) and r.at > request.at
            for r in self.asked
            if r.scope == "reinstate"
        )
        return (pending and before) if lifted else True

    def ingest(self, rows):
        """Newest of a pair wins; what a request covers is refused."""
        for user, item, value, rated in rows:
            pair, old = (user, item), self.stored.get((user, item))
            if any(self.covers(r, pair, rated, pending=False) for r in self.asked):
                continue
            later = old is not None and (
                rated is not None if old[1] is None else rated is not None and rated > old[1]
            )
            if old is None or later or (rated == old[1] and value != old[0]):
                self.stored[pair] = (value, rated)

    def remaining(self):
        """The stored ratings that no request covers."""
        return {
            pair: rating
            for pair, rating in self.stored.items()
            if not any(
                self.covers(r, pair, rating[1], pending=r.name not in self.receipts)
                for r in self.asked
            )
        }

    def train(self):
        self.in_model = {pair: value for pair, (value, _) in self.remaining().items()}

    def night(self):
        """Honour what is pending: the table and the model are what remains."""
        self.stored = self.remaining()
        self.receipts |= {r.name: 0 for r in self.asked if r.scope != "reinstate"}
        self.train()


def residuals(
    pairs: Mapping[tuple[object, object], float],
    vectors: Mapping[str, Mapping[object, np.ndarray]],
    als: AlsSettings,
    floors: Mapping[str, float],
) -> dict[tuple[str, object], float]:
    """By side and id the residual of every factor row, from the definition, in float64.

    Parameters
    ----------
    pairs
        The ratings that the model solves.
    vectors
        By side and id the factors.
    """
    found = {}
    for place, (side, other) in enumerate((("user", "item"), ("item", "user"))):
        every_other = np.array(list(vectors[other].values()), np.float64)
        mine: dict[object, list[tuple[object, float]]] = {id: [] for id in vectors[side]}
        for pair, value in pairs.items():
            mine[pair[place]].append((pair[1 - place], value))
        for id, rated in mine.items():
            others = [vectors[other][name] for name, _ in rated]
            values = np.array([value for _, value in rated], np.float32)
            found[side, id] = dense_residual(
                vectors[side][id], others, values, als, every_other, floors[side]
            )
    return found
