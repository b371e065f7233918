"""Synthetic ratings are what they promise: exact in number, long-tailed, with a taste to learn."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from unlearn_spark.evaluation import synthetic


@pytest.mark.parametrize(
    ("users", "items", "count"),
    [
        (300, 200, 20_000),
        (50, 80, 80),
        (80, 50, 80),
        (9, 7, 63),
        (7, 9, 62),
        (40, 30, 10),
        (1, 1, 1),
    ],
)
def test_synthetic_ratings_are_distinct_exact_and_within_range(users, items, count, monkeypatch):
    monkeypatch.setattr(synthetic, "_SLICE", 3_000)
    table = pa.concat_tables(synthetic.generate(users, items, count, seed=3))
    u, i, rating = (table.column(n).to_numpy() for n in ("user_id", "item_id", "rating"))
    assert len(u) == len(set(zip(u.tolist(), i.tolist(), strict=True))) == count
    assert u.min() >= 1
    assert i.min() >= 1
    assert u.max() <= users
    assert i.max() <= items
    if count >= max(users, items):
        assert len(np.unique(u)) == users
        assert len(np.unique(i)) == items
    assert set(np.unique(rating * 2)) <= set(range(1, 11))
    again = pa.concat_tables(synthetic.generate(users, items, count, seed=3))
    assert again.equals(table)


def test_synthetic_ratings_have_a_long_tail_and_a_taste_to_learn():
    users, items = 1000, 600
    table = pa.concat_tables(synthetic.generate(users, items, 60_000, seed=1))
    u, i, rating = (table.column(n).to_numpy() for n in ("user_id", "item_id", "rating"))
    per_item = np.sort(np.bincount(i - 1, minlength=items))[::-1]
    assert per_item[: items // 10].sum() > 2.5 * len(u) / 10
    assert per_item[-1] >= 1
    # Biases and a few factors explain far more than the mean does.
    matrix = np.zeros((users, items))
    weight = np.zeros_like(matrix)
    matrix[u - 1, i - 1], weight[u - 1, i - 1] = rating - rating.mean(), 1
    rng = np.random.default_rng(0)
    held = (rng.random(matrix.shape) < 0.1) & (weight > 0)
    train = weight * ~held
    x, y = rng.standard_normal((users, 6)) / 3, rng.standard_normal((items, 6)) / 3
    for _ in range(15):
        for left, right, w, m in ((x, y, train, matrix), (y, x, train.T, matrix.T)):
            for row in range(len(left)):
                near = right[w[row] > 0]
                gram = near.T @ near + (0.1 * len(near) + 1e-3) * np.eye(6)
                left[row] = np.linalg.solve(gram, near.T @ m[row, w[row] > 0])
    error = np.sqrt(np.mean((matrix - x @ y.T)[held] ** 2))
    assert error < 0.85 * matrix[held].std()


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_generated_file(run_in_process, suffix, tmp_path):
    path = tmp_path / f"r.{suffix}"
    sizes = ("--users", 60, "--items", 40, "--ratings", 900)
    done = run_in_process("generate_ratings", *sizes, "--output", path)
    assert done.exit_code == 0, done.stderr
    assert done.json == {"users": 60, "items": 40, "ratings": 900}
    read = pyarrow.csv.read_csv if suffix == "csv" else pyarrow.parquet.read_table
    assert read(path).column_names == ["user_id", "item_id", "rating", "rated_at"]
