"""How the rows of a side are cut into blocks and parts, and in which partitions the parts lie."""

from __future__ import annotations

from dataclasses import dataclass

from unlearn_spark.spark.placement import balanced_keys


@dataclass(frozen=True)
class SideLayout:
    """How the rows of one side are cut and placed.

    Attributes
    ----------
    n_rows
        The number of rows, each with at least one rating.
    n_blocks
        The number of storage blocks; `block = pmod(xxhash64(id), n_blocks)`.
    n_parts
        The number of parts, each for one task; divides `n_blocks`.
    n_slots
        Slots are below this; some stay empty.
    first_place, n_places
        The side's parts lie in the partitions from `first_place` on. `n_places` is the number of
        all partitions, which may be those of both sides.
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
        """The grouping key of each part; Spark hashes each to a partition of its own."""
        places = balanced_keys(self.n_places)
        return places[self.first_place : self.first_place + self.n_parts]
