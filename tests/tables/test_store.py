"""Which version a table has, and which one a write has made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql.types import IntegerType, StructField, StructType

from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.errors import ConflictError, SettingsError, TableMissingError
from unlearn_spark.tables.store import Store, TableSpec

TABLE = "figures"
SPEC = TableSpec(StructType([StructField("n", IntegerType())]))


@pytest.fixture(params=["root", "catalog"])
def tables(request: Any, spark: Any, tmp_path: Path) -> Iterator[Store]:
    """A store whose log can be looked into, and one that only Spark knows the place of."""
    if request.param == "root":
        yield Store(spark, root=str(tmp_path))
        return
    schema = "1e5"  # a number, unless it is quoted
    spark.sql(f"CREATE SCHEMA `{schema}` LOCATION '{tmp_path}'")
    yield Store(spark, catalog=f"spark_catalog.{schema}")
    spark.sql(f"DROP SCHEMA `{schema}` CASCADE")


def _numbers(store: Store, version: int) -> set[int]:
    return {row["n"] for row in store.read(TABLE, version).collect()}


def test_a_version_is_what_delta_says(tables: Store) -> None:
    tables.create(TABLE, SPEC)
    spark = tables.spark
    assert tables.version(TABLE) == 0
    assert tables.append(TABLE, spark.range(3).selectExpr("int(id) AS n")) == 1
    assert tables.overwrite(TABLE, spark.range(5).selectExpr("int(id) AS n")) == 2
    assert tables.restore(TABLE, 1) == 3
    assert tables.restore(TABLE, 3) == 3
    newest = spark.sql(f"DESCRIBE HISTORY {tables.name(TABLE)} LIMIT 1").first()
    assert tables.version(TABLE) == newest["version"] == 3
    assert _numbers(tables, 3) == {0, 1, 2}


def test_writers_at_the_same_time_learn_their_own_versions(tables: Store) -> None:
    tables.create(TABLE, SPEC)
    numbers = range(4)
    rows = {n: tables.spark.range(1).selectExpr(f"{n} AS n") for n in numbers}
    writes = {str(n): (lambda n=n: tables.append(TABLE, rows[n])) for n in numbers}
    versions = run_concurrently(writes)
    assert sorted(versions.values()) == [1, 2, 3, 4]
    for n in numbers:
        mine = versions[str(n)]
        assert _numbers(tables, mine) - _numbers(tables, mine - 1) == {n}


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_table_is_there_once_it_has_a_commit(spark: Any, tmp_path: Path, scheme: str) -> None:
    """Not yet when a job has died creating it; still when its first commits are cleaned away."""
    store = Store(spark, root=f"{scheme}{tmp_path}")
    log = tmp_path / TABLE / "_delta_log"
    log.mkdir(parents=True)
    (log / ".00000000000000000000.json.0.tmp").touch()
    (tmp_path / TABLE / "part-0.parquet").touch()
    assert not store.exists(TABLE)
    for ask in (store.require, store.read, store.version):
        with pytest.raises(TableMissingError, match=f"table {TABLE} is missing"):
            ask(TABLE)
    store.create(TABLE, SPEC)
    store.create(TABLE, SPEC)
    assert store.exists(TABLE)
    assert store.version(TABLE) == store.restore(TABLE, 0) == 0
    assert store.append(TABLE, spark.range(3).selectExpr("int(id) AS n")) == 1
    with pytest.raises(ConflictError, match="run this job again"):
        store.create_with(TABLE, SPEC, spark.range(3).selectExpr("int(id) AS n"))
    assert _numbers(store, 1) == {0, 1, 2}
    properties = spark.sql(f"SHOW TBLPROPERTIES {store.name(TABLE)}").collect()
    assert ("delta.checkpointInterval", "20") in {(row.key, row.value) for row in properties}


@pytest.mark.parametrize("catalog", ["nowhere", "no-where.a b", "too.many.parts", "`"])
def test_a_catalog_without_that_schema_is_named(spark: Any, catalog: str) -> None:
    with pytest.raises(SettingsError, match=f"catalog {catalog}: there is no such schema"):
        Store(spark, catalog=catalog)
