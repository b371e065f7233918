"""Relational steps over Arrow tables of this process, in DuckDB's SQL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import duckdb
import pyarrow as pa


@cache
def _database() -> duckdb.DuckDBPyConnection:
    """A database in memory whose times are UTC."""
    connection = duckdb.connect()
    connection.execute("SET GLOBAL TimeZone = 'UTC'")
    return connection


def connect() -> duckdb.DuckDBPyConnection:
    """A connection of its own, whose names nobody else sees."""
    return _database().cursor()


def query(sql: str, parameters: Mapping[str, Any] | None = None, **tables: Any) -> pa.Table:
    """Run one SQL statement over Arrow tables, named as in the statement; return its rows.

    `parameters` are those that the statement names as $name.
    """
    with connect() as connection:
        for name, table in tables.items():
            connection.register(name, table)
        return connection.sql(sql, params=dict(parameters or {})).to_arrow_table()
