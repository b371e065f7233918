"""Small data in one process: a night against retraining, embedded.

    python benchmarks/small.py --input ../shared/data/ml-latest-small/ratings.csv --forget 7
    python benchmarks/small.py --busiest 47          # generated, of ML-100K's size: a fifth of it

Every turn trains, honours the requests of users that were not asked for before, and trains again on
what remains; all within one process, whose imports and kernels are paid for.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import unlearn_spark
from benchmarks import common
from unlearn_spark.evaluation import synthetic
from unlearn_spark.recommender import silent


def chosen(ratings: pa.Table, busiest: int | None, n: int, random: np.random.Generator) -> list:
    """Users to forget: the ones with most ratings, or some at random."""
    counts = pc.value_counts(ratings["user_id"]).to_pylist()
    by_count = sorted(counts, key=lambda row: (-row["counts"], str(row["values"])))
    users = [row["values"] for row in by_count]
    return users[:busiest] if busiest else random.choice(users, n, replace=False).tolist()


def turn(source: Path, form: str, n: int, busiest: int | None, seed: int) -> dict[str, Any]:
    """Seconds and figures of a training, a night, and a retraining."""
    root = tempfile.mkdtemp(prefix="unlearn-bench-")
    shop = unlearn_spark.open(root, "embedded", progress=silent, rank=32)
    shop.ingest_ratings(source, form)
    shop.train()
    users = chosen(shop.table("ratings"), busiest, n, np.random.default_rng(seed))
    request = {"request_id": [f"r{user}" for user in users], "scope": ["user"] * len(users)}
    shop.ingest_tombstones(pa.table({**request, "user_id": [str(user) for user in users]}))
    found: dict[str, Any] = {}
    started = time.perf_counter()
    night = shop.unlearn()
    found["night"] = time.perf_counter() - started
    assert shop.audit().holds
    started = time.perf_counter()
    trained = shop.train()
    found["retraining"] = time.perf_counter() - started
    return {
        **found,
        "ratio": found["night"] / found["retraining"],
        "ratings_removed": night.ratings_removed,
        "rounds": night.rounds,
        "sweeps": night.sweeps,
        "work_sweeps": night.work_sweeps,
        "training_sweeps": trained.sweeps,
    }


@click.command()
@click.option("--input", "source", type=click.Path(path_type=Path), help="MovieLens ratings.csv")
@click.option("--forget", default=7)
@click.option("--busiest", type=int, help="The users with most ratings instead.")
@click.option("--rounds", default=5)
def main(source: Path | None, forget: int, busiest: int | None, rounds: int) -> None:
    """Print the table and save the raw figures."""
    form = "movielens"
    if source is None:
        form = "parquet"
        source = Path(tempfile.mkdtemp(prefix="unlearn-bench-")) / "ratings.parquet"
        synthetic.write(943, 1682, 100_000, 1, str(source))
    runs = [turn(source, form, forget, busiest, seed) for seed in range(rounds + 1)][1:]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    common.table(["figure", "median"], list(medians.items()))
    name = f"small-{source.parent.name if form == 'movielens' else 'generated'}"
    common.save(f"{name}-{busiest or forget}", {"medians": medians, "runs": runs})


if __name__ == "__main__":
    main()
