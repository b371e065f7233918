"""Parts that workers keep beside them: used, missed, sent again, and removed."""

import shutil
import uuid
from pathlib import Path

import numpy as np
import pytest
from pyspark import SparkFiles

from unlearn_spark.config import AlsSettings, ExecutionSettings
from unlearn_spark.spark.training import encoded
from unlearn_spark.spark.training.sweeper import MOST_MISSED, Sweeper
from unlearn_spark.spark.training.training import fit_factors

ALS = AlsSettings(
    rank=3, reg_param=0.1, memory=1, max_sweeps=4, tol=1e-12, user_blocks=8, item_blocks=8
)


def files():
    """What is kept now; the workers of a local session share the driver's directory."""
    return sorted(Path(SparkFiles.getRootDirectory()).glob("unlearn-spark-*/*.arrow"))


@pytest.fixture(scope="module")
def ratings(spark):
    random = np.random.default_rng(3)
    users, items = np.nonzero(random.random((30, 20)) < 0.4)
    rows = [
        (int(u), int(i), float(u % 5 + 1), n)
        for n, (u, i) in enumerate(zip(users, items, strict=True))
    ]
    return spark.createDataFrame(rows, "user_id long, item_id long, rating float, n int")


def fit(ratings, on_sweep=None):
    return fit_factors(ratings, ALS, ExecutionSettings(part_ratings=80), on_sweep=on_sweep)


def factors(result):
    rows = {row.id: row.factors for row in result.user_factors.collect()}
    return np.array([rows[id] for id in sorted(rows)])


@pytest.fixture
def sent(monkeypatch):
    """One boolean for every attempt at a sweep: did it send the ratings?"""
    found = []
    sweep = Sweeper._sweep
    monkeypatch.setattr(
        Sweeper,
        "_sweep",
        lambda self, iterate, all_parts: found.append(all_parts) or sweep(self, iterate, all_parts),
    )
    return found


def test_no_sweep_sends_ratings_and_files_go_with_the_fit(ratings, sent):
    kept = []
    result = fit(ratings, lambda report: kept.append(files()))
    parts = sum(layout.n_parts for layout in result.encoded.layouts.values())
    assert parts > 4
    assert [len(found) for found in kept] == [parts] * 4
    assert sent == [False] * 4
    result.release()
    assert not files()


@pytest.fixture(scope="module")
def expected(ratings):
    whole = fit(ratings)
    found = factors(whole)
    whole.release()
    return found


@pytest.mark.parametrize(
    "lost",
    ["all", *(pytest.param(it, marks=pytest.mark.slow) for it in ("a user part", "an item part"))],
)
def test_parts_that_are_missing_are_sent_again(ratings, expected, lost):
    def lose(report):
        if lost == "all":
            for directory in {path.parent for path in files()}:
                shutil.rmtree(directory)
        else:
            next(path for path in files() if path.name.startswith(lost.split()[1])).unlink()

    result = fit(ratings, lose)
    np.testing.assert_array_equal(factors(result), expected)
    assert result.summary.sweeps == 4
    result.release()
    assert not files()


@pytest.mark.slow
def test_ratings_are_sent_where_no_file_can_be_kept(ratings, expected, sent, monkeypatch):
    token = uuid.uuid4()
    monkeypatch.setattr(encoded.uuid, "uuid4", lambda: token)
    in_the_way = Path(SparkFiles.getRootDirectory()) / f"unlearn-spark-{token.hex}"
    in_the_way.touch()  # instead of a directory
    result = fit(ratings)
    np.testing.assert_array_equal(factors(result), expected)
    assert sent == [False, True] * MOST_MISSED + [True]
    result.release()
    in_the_way.unlink()
