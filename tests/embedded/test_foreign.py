"""Factors that another library trained, as they are read in one process.

Proves: every format gives the same ids and factors; ids follow the rules of ratings; each fault is
named in one line with the mend.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from contract.odd_inputs import NBSP, TAB, parquet, raw_strings

from unlearn_spark.embedded.foreign import read_factors
from unlearn_spark.errors import InputError, SettingsError

FACTORS = [[1.0, 2.0], [3.0, 4.0]]
INTEGERS = {"user": pa.int64(), "item": pa.int64()}


def model(folder, **columns):
    """Writes users that are good, and items of these columns."""
    parquet("user_factors.parquet", id=[1, 2], factors=FACTORS)(folder)
    parquet("item_factors.parquet", **columns)(folder)
    return str(folder)


def test_every_format_gives_the_same(tmp_path):
    ids, factors = np.array([7, 3, 5]), np.arange(6, dtype=np.float32).reshape(3, 2)
    lists = pa.array(factors.tolist(), pa.list_(pa.float32()))
    for side, name in (("user", "userFactors"), ("item", "itemFactors")):
        for number, rows in enumerate((slice(0, 1), slice(1, 3))):
            part = pa.table({"id": pa.array(ids[rows], pa.int32()), "features": lists[rows]})
            (tmp_path / "mllib" / name).mkdir(parents=True, exist_ok=True)
            pq.write_table(part, tmp_path / "mllib" / name / f"part-0000{number}.snappy.parquet")
        (tmp_path / "mllib" / name / "_SUCCESS").touch()
        parquet(f"{side}_factors.parquet", id=[str(id) for id in ids], factors=lists)(tmp_path)
    arrays = {f"{side}_factors": factors.astype(np.float64) for side in ("user", "item")}
    texts = ids.astype(str)
    np.savez(tmp_path / "factors.npz", user_ids=ids.astype(np.uint8), item_ids=texts, **arrays)
    for form, path in (
        ("mllib", tmp_path / "mllib"),
        ("parquet", tmp_path),
        ("npz", tmp_path),
        ("npz", tmp_path / "factors.npz"),
    ):
        for kind in (pa.int64(), pa.string()):
            read = read_factors(str(path), form, {"user": kind, "item": kind})
            assert read.rank == 2
            for side in (read.user, read.item):
                assert side.ids.equals(pa.array(ids).cast(kind))
                assert side.factors.dtype == np.float32
                np.testing.assert_array_equal(side.factors, factors)
    untouched = read_factors(str(tmp_path), "npz")
    assert (untouched.user.ids.type, untouched.item.ids.type) == (pa.int64(), pa.string())


def test_ids_have_no_white_space_around_them(tmp_path):
    path = model(tmp_path / "model [1]", id=[f"a{NBSP}", f"{TAB}b"], factors=FACTORS)
    assert read_factors(path, "parquet").item.ids.to_pylist() == ["a", "b"]


FAULTS = [
    ({"id": ["a", "a "], "factors": FACTORS}, None, "repeat an id: 1; keep one"),
    ({"id": ["a", NBSP], "factors": FACTORS}, None, "without an id: 1; remove"),
    ({"id": raw_strings(b"a", b"\xff"), "factors": FACTORS}, None, "not valid UTF-8: 1"),
    ({"id": ["007", "7"], "factors": FACTORS}, INTEGERS, "no integers, as those of the ratings"),
    ({"id": [1, 2], "factors": [[1.0], [1.0, 2.0]]}, None, "from 1 to 2 factors"),
    ({"id": [1, 2], "factors": [[1.0, 2.0], None]}, None, "without factors: 1"),
    (
        {"id": [1, 2], "factors": [[1.0, None], [float("nan"), 1e39]]},
        None,
        "null, not finite or beyond float32: 2",
    ),
    ({"id": [1], "factors": [[1.0, 2.0, 3.0]]}, None, "users have 2 factors and items 3"),
    ({"id": [1], "factors": pa.array([[]], pa.list_(pa.float32()))}, None, "rank is from 1 to"),
    ({"id": [1.0], "factors": [[1.0]]}, None, "column id has type double"),
    ({"id": [1], "factors": [1.0]}, None, "column factors has type double"),
    ({"id": [1], "factors": [["a"]]}, None, "column factors has type array<string>"),
    ({"film": [1]}, None, r"has no column id \(found: film\)"),
    ({"id": [1]}, None, r"has no column factors \(found: id\)"),
    ({"id": [1], "factors": [[1.0]], "features": [[1.0]]}, None, "both columns factors and feat"),
    (
        {"id": pa.array([], pa.int64()), "factors": pa.array([], pa.list_(pa.float32()))},
        None,
        "has no rows; give a model that was fitted",
    ),
]


@pytest.mark.parametrize(("columns", "types", "says"), FAULTS, ids=[case[2] for case in FAULTS])
def test_faults_are_named(tmp_path, columns, types, says):
    with pytest.raises(InputError, match=says) as caught:
        read_factors(model(tmp_path, **columns), "parquet", types)
    assert str(caught.value).startswith(f"--input {tmp_path}")


def test_what_is_not_there_is_named(tmp_path):
    for form, says in (
        ("mllib", "has no userFactors; give the folder that ALSModel.save"),
        ("parquet", "has no user_factors or user_factors.parquet; write one"),
        ("npz", "has no .npz file"),
    ):
        with pytest.raises(InputError, match=says):
            read_factors(str(tmp_path), form)
    with pytest.raises(InputError, match="no such file or folder"):
        read_factors(str(tmp_path / "gone"), "npz")
    with pytest.raises(SettingsError, match="--format excel: expected one of mllib"):
        read_factors(str(tmp_path), "excel")
    (tmp_path / "user_factors").write_text("no parquet")
    with pytest.raises(InputError, match="user_factors: cannot be read as parquet"):
        read_factors(str(tmp_path), "parquet")
    eye = np.eye(2)
    good = {
        "user_factors": eye,
        "item_factors": eye,
        "user_ids": np.arange(2),
        "item_ids": np.arange(2),
    }
    for changed, says in (
        ({"user_ids": np.arange(3)}, "3 user_ids name 2 rows"),
        ({"user_ids": np.array([1.0, 2.0])}, "of integers or text"),
        ({"user_ids": np.array([1, "a"], object)}, "holds Python objects"),
        ({"user_ids": np.array([1, 2**64 - 1], np.uint64)}, "integers beyond int64"),
        ({"item_factors": eye.astype(int)}, "must be floating point"),
        ({"item_factors": eye * 1e300}, "beyond float32: 2"),
        ({"item_factors": eye[:0], "item_ids": np.arange(0)}, "has no rows"),
    ):
        np.savez(tmp_path / "m.npz", **{**good, **changed})
        with pytest.raises(InputError, match=says):
            read_factors(str(tmp_path / "m.npz"), "npz")
