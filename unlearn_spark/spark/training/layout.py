"""How the rows of a side are cut and placed."""

from __future__ import annotations

from dataclasses import dataclass

from unlearn_spark.spark.placement import balanced_keys


@dataclass(frozen=True)
class SideLayout:
    """How the rows of one side are cut.

    Attributes
    ----------
    side
        "user" or "item".
    n_rows
        Rows with at least one rating.
    n_blocks
        Storage blocks; `block = pmod(xxhash64(id), n_blocks)`.
    n_parts
        Tasks; divides `n_blocks`.
    n_slots
        Slots run from 0 to this, exclusive; some stay empty.
    first_place, n_places
        The parts lie in the partitions from `first_place` on, of so many in all: one exchange
        may place the parts of both sides.
    """

    side: str
    n_rows: int
    n_blocks: int
    n_parts: int
    n_slots: int
    first_place: int
    n_places: int

    @property
    def keys(self) -> tuple[int, ...]:
        """The grouping key of each part; Spark hashes these to one partition each."""
        places = balanced_keys(self.n_places)
        return places[self.first_place : self.first_place + self.n_parts]
