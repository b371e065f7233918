"""Which pairs are held out: those whose hash falls below a threshold, on every engine the same.

A pair falls on the same side whatever else is in the table, before a deletion and after it.
"""

from __future__ import annotations

from unlearn_spark.errors import InputError

BUCKETS = 1 << 30
"""The hash `xxhash64(user, item, seed)` modulo this number is drawn for each pair."""


def threshold(fraction: float) -> int:
    """Pairs that draw less than this are held out.

    Raises
    ------
    InputError
        The fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"the held-out fraction is {fraction}; give one between 0 and 1")
    return int(fraction * BUCKETS)
