"""Parts that workers keep beside them: used, missed, sent again, and removed."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from pyspark import SparkFiles

from unlearn_spark.als import training
from unlearn_spark.als.training import fit_factors
from unlearn_spark.config import AlsSettings, ExecutionSettings

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


def test_parts_are_sent_once_and_files_go_with_the_fit(ratings, monkeypatch):
    sent = []
    sweep = training.Sweeper._sweep
    monkeypatch.setattr(
        training.Sweeper,
        "_sweep",
        lambda self, y, iterate, all_parts: sent.append(all_parts) or sweep(
            self, y, iterate, all_parts
        ),
    )  # fmt: skip
    kept = []
    result = fit(ratings, lambda report: kept.append(files()))
    parts = sum(layout.n_parts for layout in result.encoded.layouts.values())
    assert parts > 4
    assert [len(found) for found in kept] == [parts] * 4
    assert sent == [True, False, False, False]
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
