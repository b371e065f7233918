"""Share work out to threads; the kernels release Python's lock while they compute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_NAME = "unlearn"


def shared_out(
    function: Callable[[Item], Answer], items: Sequence[Item], threads: int
) -> list[Answer]:
    """The answers for all items, in their order; or raise the first error.

    Work that is shared out already is not shared out again.
    """
    nested = threading.current_thread().name.startswith(_NAME)
    if threads == 1 or len(items) <= 1 or nested:
        return [function(item) for item in items]
    return list(_pool(threads).map(function, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Kept, because starting threads takes longer than many of a small model's steps.
    return ThreadPoolExecutor(threads, thread_name_prefix=_NAME)
