"""Run independent Spark actions at the same time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_concurrently(tasks: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Run each task in a thread of its own; return the results by name, or raise the first error.

    A small action mostly waits for the driver, so several overlap well.
    """
    with ThreadPoolExecutor(max_workers=max(1, len(tasks))) as pool:
        running = {name: pool.submit(task) for name, task in tasks.items()}
        return {name: future.result() for name, future in running.items()}
