"""Sweeps to a residual by how many earlier iterates the acceleration keeps (`als.memory`).

One process and no Spark: the sweeps are those of a training whose ratings fit one task. One of the
data sets is sparse, with most items rated once, so that many of its rows vanish from the model.

python benchmarks/memory.py --input ../shared/data/ml-latest-small/ratings.csv
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.convergence import TARGETS, first_below
from unlearn_spark.core.acceleration import Accelerator
from unlearn_spark.core.blocks import RatingBlock
from unlearn_spark.core.initial import initial_factors
from unlearn_spark.core.objective import Objective, floor_of, target_magnitudes
from unlearn_spark.core.solver import Solver
from unlearn_spark.core.sweeps import Limits, sweep_both
from unlearn_spark.evaluation import synthetic

MEMORIES = (1, 3, 5)
USERS, ITEMS, HEAD = 20_000, 100_000, 10
"""Of the sparse data set; HEAD flattens its most popular items."""

Ratings = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def sparse_ratings(seed: int = 1) -> Ratings:
    """Users with 5 to 20 items each, long-tailed; every value is 1."""
    random = np.random.default_rng(seed)
    popularity = 1.0 / (np.arange(ITEMS) + HEAD)
    counts = random.integers(5, 21, USERS)
    users = np.repeat(np.arange(USERS), counts)
    items = random.choice(ITEMS, len(users), p=popularity / popularity.sum())
    pairs = np.unique(np.stack([users, items]), axis=1)
    return pairs[0], pairs[1], np.ones(pairs.shape[1])


def generated_ratings(ratings: int) -> Ratings:
    """Generated ratings at the shape of MovieLens 1M."""
    made = synthetic.generate(6040, 3700, ratings, 1)
    return common.numbered(pa.concat_tables(made))


def sweep(ratings: Ratings, objective: Objective, rank: int, memory: int, cap: int) -> list[Any]:
    """(objective, largest residual, seconds) of every sweep."""
    users, items = (np.unique(ids, return_inverse=True)[1].astype(np.int32) for ids in ratings[:2])
    values = ratings[2].astype(np.float32)
    blocks = [RatingBlock.from_entries(*pair, values) for pair in ((users, items), (items, users))]
    anchor, other = sorted(blocks, key=lambda block: block.n_rows)
    floor = floor_of(target_magnitudes(anchor.indptr, anchor.values, objective))
    hashes = np.random.default_rng(0).integers(-(2**62), 2**62, anchor.n_rows)
    start = initial_factors(hashes, rank, 0, "item", objective.nonnegative)
    swept = sweep_both(
        Solver(objective, rank, "float32"),
        anchor,
        other,
        (anchor.n_rows, other.n_rows),
        start[None],
        Accelerator(memory),
        Limits(cap, min(TARGETS), floor),
    )
    return swept.reports


@click.command()
@click.option("--input", "path", type=click.Path(exists=True), help="MovieLens ratings.csv.")
@click.option("--cap", default=400, help="Most sweeps of a run.")
@click.option("--ratings", default=1_000_000, help="Generated ratings, beside the sparse ones.")
def main(path: str | None, cap: int, ratings: int) -> None:
    """Print the table and save the raw figures."""
    implicit = Objective(common.REG_PARAM, True, 20.0)
    sets = {"sparse, implicit": (sparse_ratings(), implicit, 32)}
    if path:
        table = pyarrow.csv.read_csv(path).rename_columns(["user_id", "item_id", "rating", "at"])
        real = common.numbered(table)
        sets["real, explicit"] = (real, Objective(common.REG_PARAM), 32)
        sets["real, implicit"] = (real, implicit, 32)
    if ratings:
        made = generated_ratings(ratings)
        sets[f"{ratings} generated, explicit"] = (made, Objective(common.REG_PARAM), 32)
    rows, raw = [], {}
    for name, (given, objective, rank) in sets.items():
        for memory in MEMORIES:
            started = time.perf_counter()
            reports = sweep(given, objective, rank, memory, cap)
            seconds = (time.perf_counter() - started) / len(reports)
            history = [
                {"sweep": number, "max_residual": worst}
                for number, (_, worst, _) in enumerate(reports, 1)
            ]
            found = [first_below(history, target) or f"over {cap}" for target in TARGETS]
            rows.append([name, memory, *found, reports[-1][1], reports[-1][0], seconds])
            print(*rows[-1], file=sys.stderr)
            raw[f"{name}, memory {memory}"] = [worst for _, worst, _ in reports]
    head = ["data", "memory", *(f"sweeps to {target:.1e}" for target in TARGETS)]
    common.table([*head, "last residual", "objective", "seconds a sweep"], rows)
    common.save("memory", {"rows": rows, "residuals": raw})


if __name__ == "__main__":
    main()
