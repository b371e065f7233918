"""Expressions over blocks and ledger rows, as Columns and as SQL by which Delta skips files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyspark.sql import functions as F

if TYPE_CHECKING:
    from pyspark.sql import Column


def block_of(id: str | Column, n_blocks: int) -> Column:
    """The storage block of an id column, which must have the type that ids are stored in."""
    return F.pmod(F.xxhash64(id), F.lit(n_blocks)).cast("int")


def one_of(column: str, numbers: Iterable[int]) -> str:
    """SQL for: an integer column has one of these values. Delta can skip files by this form."""
    listed = ", ".join(map(str, sorted(numbers)))
    return f"{column} IN ({listed})" if listed else "false"


def in_blocks(numbers: Iterable[int]) -> str:
    """SQL for: the row is in one of these blocks."""
    return one_of("block", numbers)


def bound_expression(floor: Column) -> Column:
    """`core.objective.relative_residual` of the columns gradient_norm and b_norm."""
    g, b = F.col("gradient_norm"), F.greatest("b_norm", floor)
    return F.when(b > 0, g / b).otherwise(F.when(g > 0, F.lit(float("inf"))).otherwise(F.lit(0.0)))
