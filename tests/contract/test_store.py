"""Which version a table has, and which one a write has made, by either engine's store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from unlearn_spark.concurrency import run_concurrently
from unlearn_spark.errors import ConflictError, InputError, SettingsError, TableMissingError
from unlearn_spark.tables.delta_rs import DeltaRsStore
from unlearn_spark.tables.store import Store, TableSpec

TABLE = "figures"
SPEC = TableSpec(pa.schema([pa.field("n", pa.int32(), metadata={"comment": "a number"})]))
ON_SPARK = pytest.mark.spark


@pytest.fixture(
    params=[
        "delta-rs",
        pytest.param("root", marks=ON_SPARK),
        pytest.param("catalog", marks=ON_SPARK),
    ]
)
def tables(request: Any, tmp_path: Path) -> Iterator[Store]:
    """A store of each kind; of Spark's, one whose log can be looked into, and one that only Spark
    knows the place of."""
    if request.param == "delta-rs":
        yield DeltaRsStore(str(tmp_path))
        return
    from unlearn_spark.tables.delta_spark import SparkStore

    spark = request.getfixturevalue("spark")
    if request.param == "root":
        yield SparkStore(spark, root=str(tmp_path))
        return
    schema = "1e5"  # a number, unless it is quoted
    spark.sql(f"CREATE SCHEMA `{schema}` LOCATION '{tmp_path}'")
    yield SparkStore(spark, catalog=f"spark_catalog.{schema}")
    spark.sql(f"DROP SCHEMA `{schema}` CASCADE")


def numbers(*values: int) -> pa.Table:
    return pa.table({"n": values}, schema=SPEC.schema)


def stored(store: Store, version: int | None = None) -> list[int]:
    return sorted(store.arrow(TABLE, version, ["n"])["n"].to_pylist())


def test_a_version_is_what_delta_says(tables: Store, tmp_path: Path) -> None:
    tables.create(TABLE, SPEC)
    assert tables.version(TABLE) == 0
    assert tables.append(TABLE, numbers(0, 1, 2)) == 1
    assert tables.overwrite(TABLE, numbers(0, 1, 2, 3, 4)) == 2
    assert tables.restore(TABLE, 1) == 3
    assert tables.restore(TABLE, 3) == 3
    log = tmp_path / TABLE / "_delta_log"
    assert len(list(log.glob("*.json"))) - 1 == tables.version(TABLE) == 3
    assert stored(tables, 3) == stored(tables) == [0, 1, 2]
    assert stored(tables, 2) == [0, 1, 2, 3, 4]


def test_small_tables_pass_as_arrow(tables: Any) -> None:
    tables.create(TABLE, SPEC)
    assert tables.append(TABLE, numbers(1, 2)) == 1
    assert tables.overwrite(TABLE, numbers(3, 4, 5)) == 2
    assert tables.insert(TABLE, numbers(5, 6), "t.n = s.n") == 1
    assert tables.insert(TABLE, numbers(5, 6), "t.n = s.n") == 0
    assert tables.rows(TABLE) == 4
    known = tables.arrow(TABLE, 1, ["n"]).sort_by("n")
    assert known.equals(numbers(1, 2).cast(SPEC.schema.remove_metadata()))
    assert tables.column_metadata(TABLE, "n")["comment"] == "a number"
    assert tables.location(TABLE) == (
        f"{tables.root}/{TABLE}" if tables.root else tables.name(TABLE)
    )


def test_writers_at_the_same_time_learn_their_own_versions(tables: Store) -> None:
    tables.create(TABLE, SPEC)
    writes = {str(n): (lambda n=n: tables.append(TABLE, numbers(n))) for n in range(4)}
    versions = run_concurrently(writes)
    assert sorted(versions.values()) == [1, 2, 3, 4]
    for n in range(4):
        mine = versions[str(n)]
        assert set(stored(tables, mine)) - set(stored(tables, mine - 1)) == {n}


@pytest.mark.parametrize(
    "kind",
    [
        "delta-rs",
        pytest.param("spark", marks=ON_SPARK),
        pytest.param("spark, file://", marks=ON_SPARK),
    ],
)
def test_a_table_is_there_once_it_has_a_commit(request: Any, tmp_path: Path, kind: str) -> None:
    """Not yet when a job has died creating it."""
    rows: Any = numbers(0, 1, 2)
    store: Any = DeltaRsStore(str(tmp_path))
    if kind != "delta-rs":
        from unlearn_spark.tables.delta_spark import SparkStore

        scheme = "file://" if kind.endswith("://") else ""
        store = SparkStore(request.getfixturevalue("spark"), root=f"{scheme}{tmp_path}")
        rows = store.frame(rows)
    log = tmp_path / TABLE / "_delta_log"
    log.mkdir(parents=True)
    (log / ".00000000000000000000.json.0.tmp").touch()
    (tmp_path / TABLE / "part-0.parquet").touch()
    assert not store.exists(TABLE)
    for ask in (store.require, store.arrow, store.version):
        with pytest.raises(TableMissingError, match=f"table {TABLE} is missing"):
            ask(TABLE)
    store.create(TABLE, SPEC)
    store.create(TABLE, SPEC)
    assert store.exists(TABLE)
    assert store.version(TABLE) == store.restore(TABLE, 0) == 0
    assert store.append(TABLE, numbers(0, 1, 2)) == 1
    with pytest.raises(ConflictError, match="run this job again"):
        store.create_with(TABLE, SPEC, rows)
    assert stored(store, 1) == [0, 1, 2]
    assert SPEC.properties["delta.checkpointInterval"] == "20"
    properties = DeltaRsStore(str(tmp_path)).open(TABLE).metadata().configuration
    assert properties == SPEC.properties


def test_a_table_outlives_its_first_commits(tmp_path: Path) -> None:
    store, log = DeltaRsStore(str(tmp_path)), tmp_path / TABLE / "_delta_log"
    store.create(TABLE, SPEC)
    for commit in range(25):
        store.append(TABLE, numbers(commit))
    assert list(log.glob("*.checkpoint*.parquet"))
    for path in sorted(log.glob("*.json"))[:20]:
        path.unlink()
    assert store.exists(TABLE)
    assert stored(store) == list(range(25))


def test_a_stale_writer_loses_and_leaves_nothing(tmp_path: Path) -> None:
    store = DeltaRsStore(str(tmp_path))
    store.create(TABLE, SPEC)
    store.append(TABLE, numbers(1))
    for write in (
        lambda: store.overwrite(TABLE, numbers(2), base=0),
        lambda: store.append_to(TABLE, numbers(2), base=0),
        lambda: store.replace_where(TABLE, numbers(1), "n = 1", base=0),
    ):
        with pytest.raises(ConflictError, match="table figures: another job"):
            write()
    assert stored(store) == [1]
    assert store.append_to(TABLE, numbers(2), base=1) == 2


def test_a_column_of_a_newer_version_is_not_emptied(tmp_path: Path) -> None:
    wider = TableSpec(SPEC.schema.append(pa.field("more", pa.string())))
    store = DeltaRsStore(str(tmp_path))
    store.create(TABLE, wider)
    for write in (
        lambda: store.append(TABLE, numbers(1)),
        lambda: store.insert(TABLE, numbers(1), "t.n = s.n"),
    ):
        with pytest.raises(InputError, match="its column more is unknown here"):
            write()
    assert store.version(TABLE) == 0


@pytest.mark.spark
@pytest.mark.parametrize("catalog", ["nowhere", "no-where.a b", "too.many.parts", "`"])
def test_a_catalog_without_that_schema_is_named(spark: Any, catalog: str) -> None:
    from unlearn_spark.tables.delta_spark import SparkStore

    with pytest.raises(SettingsError, match=f"catalog {catalog}: there is no such schema"):
        SparkStore(spark, catalog=catalog)
