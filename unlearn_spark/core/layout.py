"""How many blocks and parts the rows of a side are cut into."""

from __future__ import annotations

import numpy as np

ROWS_PER_BLOCK = 16_384
"""Rows of a storage block if the data choose their number: a factor file of a few megabytes."""

RATINGS_PER_BLOCK = 50_000
"""Ratings that are worth another block: solving fewer takes less time than writing a file."""

MAX_BLOCKS = 4096

TASK_RATINGS = 1_000_000
"""Ratings that are worth another task: solving fewer takes less time than scheduling one."""


def choose_blocks(n_rows: int, n_ratings: int, parallelism: int, wanted: int | None) -> int:
    """Number of storage blocks of a side: `wanted`, or by default a power of two.

    A block gets about `ROWS_PER_BLOCK` rows. If each can have `RATINGS_PER_BLOCK` ratings, there
    are at least eight blocks, and one for each task slot because a task takes whole blocks.
    """
    if wanted is not None:
        return wanted
    worthwhile = max(1, n_ratings / RATINGS_PER_BLOCK)
    least = max(min(max(8, parallelism), worthwhile), n_rows / ROWS_PER_BLOCK)
    return int(min(MAX_BLOCKS, 1 << int(np.ceil(np.log2(least)))))


def choose_parts(n_ratings: int, n_blocks: int, part_ratings: int, parallelism: int) -> int:
    """Number of tasks of a half-sweep: a divisor of `n_blocks`, enough for cores and memory."""
    needed = -(-n_ratings // part_ratings)
    useful = max(1, min(parallelism, n_ratings // TASK_RATINGS))
    target = max(needed, useful)
    divisors = [d for d in range(1, n_blocks + 1) if n_blocks % d == 0]
    return next((d for d in divisors if d >= target), n_blocks)
