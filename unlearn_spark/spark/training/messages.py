"""Row schemas of rating parts and factor parts."""

from __future__ import annotations

import pyarrow as pa

from unlearn_spark.core.blocks import RatingBlock
from unlearn_spark.spark.arrow import arrays_of

PART_SCHEMA = "key int, part int, slots binary, counts binary, others binary, values binary"
"""Pieces of rating parts: either whole rows, or loose ratings with null `counts` and in `slots` the
row of each rating (see `RatingBlock.from_pieces`)."""

FACTOR_SCHEMA = "part int, slots binary, factors binary, gram binary, scalar double, missing int"
"""Factor rows of one part: int32 slots; float32 (n, rank) rows; in implicit mode their float64 Gram
matrix; `scalar`, their share of their side's penalty; and `missing`, 1 if there are no rows because
the part's ratings were not found (see `local_parts`)."""


def part_of(pieces: pa.Table) -> tuple[int, RatingBlock]:
    """A part's number and its ratings, from its pieces (`PART_SCHEMA`)."""
    rows = arrays_of(pieces)
    return rows[0]["part"], RatingBlock.from_pieces(rows)
