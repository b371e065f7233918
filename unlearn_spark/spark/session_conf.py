"""Change settings of a running Spark session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def set_if_allowed(session: SparkSession, key: str, value: str) -> bool:
    """Set a runtime setting; return False if Spark refuses to change it."""
    try:
        session.conf.set(key, value)
    except Exception:  # its class differs between classic sessions and Connect
        return False
    return True


@contextmanager
def session_conf(spark: SparkSession, conf: Mapping[str, str]) -> Iterator[None]:
    """Apply settings to the plans that are made and run inside; restore the session's own then.

    Only for settings that affect speed and no result, because refused ones are skipped.
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
