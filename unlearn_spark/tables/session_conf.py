"""Settings of a Spark session, for as long as some plans are made and run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def set_if_allowed(session: SparkSession, key: str, value: str) -> bool:
    """Set a runtime setting; False where the cluster forbids to change it, or it is none."""
    try:
        session.conf.set(key, value)
    except Exception:  # classic sessions and Connect have classes of their own for it
        return False
    return True


@contextmanager
def session_conf(spark: SparkSession, conf: Mapping[str, str]) -> Iterator[None]:
    """Plans that are made and run inside have these settings, and the session its own again.

    For settings that change how long something takes and no result: those that a cluster forbids to
    change are left as they are.
    """
    before: dict[str, str | None] = {}
    try:
        for key, value in conf.items():
            old = spark.conf.get(key, None)
            if set_if_allowed(spark, key, value):
                before[key] = old
        yield
    finally:
        for key, old in before.items():
            if old is None:
                spark.conf.unset(key)
            else:
                spark.conf.set(key, old)
