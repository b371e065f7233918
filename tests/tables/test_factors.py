"""The layout of a model's tables on disk: what has to be read to see little of them."""

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from unlearn_spark.errors import InputError
from unlearn_spark.tables import factors
from unlearn_spark.tables.store import Store, TableSpec


def files_of(store, table):
    return sorted(Path(store.location(table)).rglob("*.parquet"))


def test_a_chunk_of_ratings_is_read_without_its_neighbours(spark, tmp_path):
    store = Store(spark, root=str(tmp_path))
    random = np.random.default_rng(0)
    rows = [
        ("item", n % 2, n, *(random.bytes(65_536) for _ in ("slots", "counts", "others", "values")))
        for n in range(12)
    ]
    chunks = spark.createDataFrame(rows, factors.RATING_BLOCKS_SPEC.schema)
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
    store = Store(spark, root=str(tmp_path))

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
    factors.replace_ledger(store, entries(1.0), None)
    assert len(files_of(store, factors.LEDGER)) == 8
    blocks = {"user": [1], "item": [0, 3]}
    near = entries(3.0).where("(side = 'user' AND block = 1) OR (side = 'item' AND block IN (0,3))")
    version = factors.replace_ledger(store, near, blocks)
    assert len(files_of(store, factors.LEDGER)) == 8 + 3
    rows = store.read(factors.LEDGER, version).collect()
    assert len(rows) == 80
    for row in rows:
        assert row["bound"] == (1.5 if row["block"] in blocks[row["side"]] else 0.5)
        assert row["drift_mark"] == 0.0


def test_a_ledger_of_an_earlier_version_is_refused_in_one_line(spark, tmp_path):
    store = Store(spark, root=str(tmp_path))
    fields = [field for field in factors.LEDGER_SPEC.schema if field.name != "n_ratings"]
    store.create(factors.LEDGER, TableSpec(type(factors.LEDGER_SPEC.schema)(fields)))
    with pytest.raises(InputError, match="table ledger has the layout of an earlier version"):
        factors.read_ledger(store, 0)
    rows = spark.createDataFrame([], factors.LEDGER_SPEC.schema)
    with pytest.raises(InputError, match="table ledger has the layout of an earlier version"):
        factors.write_ledger(store, rows)
    assert store.version(factors.LEDGER) == 0
