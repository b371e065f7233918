"""The arithmetic of audits on Spark: rows that stream by in batches, without a session."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from unlearn_spark.audit.equations import Equations
from unlearn_spark.config import AlsSettings
from unlearn_spark.spark.audit import Stream

RANK = 4
SHARED = {"rank": RANK, "reg_param": 0.3}
EXPLICIT = AlsSettings(**SHARED)
IMPLICIT = AlsSettings(**SHARED, implicit_prefs=True, alpha=2.0)


def dense_residual(x, others, values, als, every_other=None, nonnegative=False, floor=0.0):
    """||A x - b|| / max(||b||, floor) of one row with A written out: the textbook's formula."""
    m, r = np.asarray(others, np.float64), np.asarray(values, np.float64)
    if als.implicit_prefs:
        confidence, liked = als.alpha * np.abs(r), r > 0
        y = np.asarray(every_other, np.float64)
        a = y.T @ y + m.T @ np.diag(confidence) @ m + als.reg_param * liked.sum() * np.eye(len(x))
        b = m.T @ ((1 + confidence) * liked)
    else:
        a = m.T @ m + als.reg_param * len(r) * np.eye(len(x))
        b = m.T @ r
    gradient = a @ np.asarray(x, np.float64) - b
    if nonnegative:
        gradient = np.where(np.asarray(x) > 0, gradient, np.minimum(gradient, 0))
    return np.linalg.norm(gradient) / max(np.linalg.norm(b), floor)


def records(ids, is_rating, values, vectors):
    return pa.RecordBatch.from_arrays(
        [
            pa.array(ids, pa.string()),
            pa.array(is_rating, pa.bool_()),
            pa.array(values, pa.float32()),
            pa.array([None if v is None else v.tolist() for v in vectors], pa.list_(pa.float32())),
        ],
        ["id", "is_rating", "rating", "vector"],
    )


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    implicit=st.booleans(),
    nonnegative=st.booleans(),
    cuts=st.lists(st.integers(0, 60), max_size=8),
    floor=st.sampled_from([0.0, 2.0, 1e6]),
)
def test_streamed_residuals_equal_the_textbook_however_the_batches_are_cut(
    seed, sizes, implicit, nonnegative, cuts, floor
):
    rng = np.random.default_rng(seed)
    als = IMPLICIT if implicit else EXPLICIT
    others = rng.normal(size=(12, RANK)).astype(np.float32)
    ids, is_rating, values, vectors, expected = [], [], [], [], []
    for number, size in enumerate(sizes):
        x = rng.normal(size=RANK).astype(np.float32)
        if nonnegative:
            x = np.maximum(x, 0)
        rated = rng.choice(12, size, replace=False)
        r = rng.normal(size=size).astype(np.float32)
        r[0] = abs(r[0]) + 0.1  # an implicit row without a positive rating has b = 0
        ids += [f"r{number}"] * (size + 1)
        is_rating += [False] + [True] * size
        values += [None, *r]
        vectors += [x, *others[rated]]
        expected.append(dense_residual(x, others[rated], r, als, others, nonnegative, floor))
    wide = others.astype(np.float64)
    equations = Equations(
        als.reg_param,
        als.alpha if implicit else None,
        nonnegative,
        wide.T @ wide if implicit else None,
        floor,
    )
    edges = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    whole = records(ids, is_rating, values, vectors)
    batches = [whole.slice(a, b - a) for a, b in pairwise(edges)]
    batches.insert(1, whole.slice(0, 0))
    found = pa.Table.from_batches(Stream(RANK, equations).scan(batches)).to_pydict()
    assert found["id"] == [f"r{number}" for number in range(len(sizes))]
    assert found["n_ratings"] == sizes
    assert found["unmatched"] == [0] * len(sizes)
    np.testing.assert_allclose(found["residual"], expected, rtol=1e-9)


def test_rows_that_cannot_be_judged_are_never_good():
    one = np.ones(RANK, np.float32)
    broken = np.array([1, np.nan, 1, 1], np.float32)
    ids = ["alone", "broken", "broken", "negative", "negative", "orphan", "twice", "twice"]
    is_rating = [False, False, True, False, True, True, False, False]
    vectors = [one, broken, one, -one, one, one, one, one]
    values = [3.0 if rated else None for rated in is_rating]
    stream = Stream(RANK, Equations(0.1, nonnegative=True))
    found = pa.Table.from_batches(
        stream.scan([records(ids, is_rating, values, vectors)])
    ).to_pydict()
    by_id = dict(zip(found["id"], zip(*list(found.values())[1:], strict=True), strict=True))
    infinite = float("inf")
    assert by_id == {  # copies, ratings, ratings without a row, residual
        "alone": (1, 0, 0, 0.0),
        "broken": (1, 1, 0, infinite),
        "negative": (1, 1, 0, infinite),
        "orphan": (0, 1, 1, infinite),
        "twice": (2, 0, 0, infinite),
    }
