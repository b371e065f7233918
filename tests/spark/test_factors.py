"""The layout of a model's tables on disk: what has to be read to see little of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from chispa import assert_df_equality
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from unlearn_spark.errors import InputError
from unlearn_spark.spark import factors
from unlearn_spark.tables.delta_spark import SparkStore
from unlearn_spark.tables.store import TableSpec


def files_of(store, table):
    return sorted(Path(store.location(table)).rglob("*.parquet"))


def test_a_chunk_of_ratings_is_read_without_its_neighbours(spark, tmp_path):
    store = SparkStore(spark, root=str(tmp_path))
    random = np.random.default_rng(0)
    rows = [
        ("item", n % 2, n, *(random.bytes(65_536) for _ in ("slots", "counts", "others", "values")))
        for n in range(12)
    ]
    chunks = spark.createDataFrame(rows, from_arrow_schema(factors.RATING_BLOCKS_SPEC.schema))
    version = factors.write_rating_blocks(store, chunks)
    assert store.read(factors.RATING_BLOCKS, version).count() == len(rows)
    files = files_of(store, factors.RATING_BLOCKS)
    assert len(files) == 2
    for file in files:
        metadata = pyarrow.parquet.read_metadata(file)
        assert metadata.num_row_groups == metadata.num_rows == 6
        (column,) = [
            n for n in range(metadata.num_columns) if metadata.schema.column(n).name == "chunk"
        ]
        spans = [metadata.row_group(n).column(column).statistics for n in range(6)]
        assert [span.min for span in spans] == [span.max for span in spans]
        assert len({span.min for span in spans}) == 6


def test_a_replaced_ledger_is_one_file_a_block(spark, tmp_path):
    store = SparkStore(spark, root=str(tmp_path))

    def entries(norm):
        rows = [
            (side, f"{side}{n}", n % 4, n, 0, 3, norm, 2.0, 1.0)
            for side in ("user", "item")
            for n in range(40)
        ]
        names = "side string, id string, block int, slot int, chunk int, n_ratings int"
        norms = "gradient_norm double, b_norm double, factor_norm double"
        return spark.createDataFrame(rows, f"{names}, {norms}").repartition(3, "block")

    store.create(factors.LEDGER, factors.LEDGER_SPEC)
    floors = {"user": 0.0, "item": 4.0}
    for norm in (1.0, 3.0):
        before = set(files_of(store, factors.LEDGER))
        version = factors.replace_ledger(store, entries(norm), floors)
        assert len(set(files_of(store, factors.LEDGER)) - before) == 8
        rows = store.read(factors.LEDGER, version).collect()
        assert len(rows) == 80
        for row in rows:
            assert row["bound"] == norm / max(2.0, floors[row["side"]])


def test_a_ledger_of_an_earlier_version_is_refused_in_one_line(spark, tmp_path):
    store = SparkStore(spark, root=str(tmp_path))
    fields = [field for field in factors.LEDGER_SPEC.schema if field.name != "n_ratings"]
    store.create(factors.LEDGER, TableSpec(pa.schema(fields)))
    with pytest.raises(InputError, match="table ledger has the layout of an earlier version"):
        factors.read_ledger(store, 0)
    rows = store.frame(factors.LEDGER_SPEC.schema.empty_table())
    with pytest.raises(InputError, match="table ledger has the layout of an earlier version"):
        factors.write_ledger(store, rows)
    assert store.version(factors.LEDGER) == 0


@pytest.mark.parametrize("gathered", [True, False])
def test_replaced_factor_blocks_are_a_sorted_file_each(spark, tmp_path, gathered):
    store = SparkStore(spark, root=str(tmp_path))
    names = "id long, block int, slot int, n_ratings int, factors array<float>"
    rows = [(100 + n, n % 4, n, 3, [float(n), 0.5]) for n in reversed(range(40))]
    table = factors.factor_table("user")
    first = factors.write_factors(store, "user", spark.createDataFrame(rows, names))
    kept = files_of(store, table)
    assert len(kept) == 4

    changed = store.read(table, first).where("block IN (1, 2) AND slot <> 5")
    if not gathered:
        changed = changed.repartition(3, "slot")
    changed = changed.withColumn("n_ratings", F.lit(2))
    version = factors.replace_factor_blocks(store, "user", changed, [1, 2], gathered=gathered)

    written = set(files_of(store, table)) - set(kept)
    assert {file.parent.name for file in written} == {"block=1", "block=2"}
    assert len(written) == 2
    for file in written:
        slots = pyarrow.parquet.ParquetFile(file).read(["slot"])["slot"].to_pylist()
        assert slots == sorted(slots)
    now = [
        (id, block, slot, 2 if block in (1, 2) else 3, vector)
        for id, block, slot, _, vector in rows
        if slot != 5
    ]
    assert_df_equality(
        store.read(table, version),
        spark.createDataFrame(now, names),
        ignore_row_order=True,
        ignore_nullable=True,
    )
