"""Hashes of ids are Spark's, which are those of the xxHash specification."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from unlearn_spark.embedded.ids import xxhash64, xxhash64_of

xxhash = pytest.importorskip("xxhash")


def signed(digest):
    return int(np.uint64(digest).view(np.int64))


def one_by_one(values, seed=42):
    width = {int: 8, np.int32: 4}
    for value in values:
        if isinstance(value, str):
            data = value.encode()
        else:
            data = int(value).to_bytes(width[type(value)], "little", signed=True)
        seed = xxhash.xxh64_intdigest(data, seed)
    return signed(seed)


TEXTS = ["", "a", "ü€", *("x" * n + str(n) for n in range(1, 80)), "7" * 500]
NUMBERS = [0, 1, -1, 42, 2**63 - 1, -(2**63), 123456789]


@pytest.mark.parametrize("values", [TEXTS, NUMBERS, [], ["same", "same"]])
def test_hashes_of_ids(values):
    kind = pa.int64() if values == NUMBERS else pa.string()
    column = pa.array(values, kind)
    expected = [one_by_one([value]) for value in values]
    assert xxhash64(column).tolist() == expected
    assert xxhash64(pa.chunked_array([column.slice(0, 3), column.slice(3)])).tolist() == expected
    assert xxhash64(column.slice(2)).tolist() == expected[2:]


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31, -(2**40)])
def test_hashes_of_pairs_chain_their_columns(seed):
    rng = np.random.default_rng(1)
    users = [NUMBERS[n] for n in rng.integers(0, len(NUMBERS), 300)]
    items = [TEXTS[n] for n in rng.integers(0, len(TEXTS), 300)]
    last = np.int32(seed) if -(2**31) <= seed < 2**31 else seed
    for left, right in ((users, items), (items, users)):
        found = xxhash64_of([pa.chunked_array([left]), pa.array(right)], seed)
        expected = [one_by_one([u, i, last]) for u, i in zip(left, right, strict=True)]
        assert found.tolist() == expected
        alone = xxhash64_of([pa.array(left), pa.chunked_array([right])])
        assert alone.tolist() == [one_by_one([u, i]) for u, i in zip(left, right, strict=True)]
