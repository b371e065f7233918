"""How many blocks and parts the rows of a side are cut into."""

from __future__ import annotations

import numpy as np

ROWS_PER_BLOCK = 16_384
"""Rows of one storage block where the number of blocks is chosen from the data: 4 MB at rank 64."""

RATINGS_PER_BLOCK = 50_000
"""Ratings for which a further block is made: to solve fewer takes less time than a file does."""

MAX_BLOCKS = 4096

TASK_RATINGS = 1_000_000
"""Fewer are not spread over several tasks."""


def choose_blocks(n_rows: int, n_ratings: int, parallelism: int, wanted: int | None) -> int:
    """Storage blocks: as told, else a power of two: about `ROWS_PER_BLOCK` rows each, at least
    eight, and at least one for each task slot, because a block is the least that a task takes;
    fewer only where each would have less than `RATINGS_PER_BLOCK` ratings."""
    if wanted is not None:
        return wanted
    worthwhile = max(1, n_ratings / RATINGS_PER_BLOCK)
    least = max(min(max(8, parallelism), worthwhile), n_rows / ROWS_PER_BLOCK)
    return int(min(MAX_BLOCKS, 1 << int(np.ceil(np.log2(least)))))


def choose_parts(n_ratings: int, n_blocks: int, part_ratings: int, parallelism: int) -> int:
    """Tasks of a half-sweep: enough for every core and for memory, a divisor of `n_blocks`."""
    needed = -(-n_ratings // part_ratings)
    # A sweep of a million ratings takes a fraction of a second: less is not worth a task.
    useful = max(1, min(parallelism, n_ratings // TASK_RATINGS))
    target = max(needed, useful)
    divisors = [d for d in range(1, n_blocks + 1) if n_blocks % d == 0]
    return next((d for d in divisors if d >= target), n_blocks)
