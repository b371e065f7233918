"""The layout of the ratings table."""

from __future__ import annotations

from unlearn_spark.tables.ratings import MAX_USER_BLOCKS, ROWS_PER_BLOCK, choose_blocks


def test_number_of_user_blocks():
    sizes = [1, ROWS_PER_BLOCK, ROWS_PER_BLOCK + 1, 3 * ROWS_PER_BLOCK, 10 * ROWS_PER_BLOCK, 10**12]
    assert [choose_blocks(n) for n in sizes] == [1, 1, 2, 4, 16, MAX_USER_BLOCKS]
