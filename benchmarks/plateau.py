"""After how many sweeps does the held-out error stand still? At the shape of the Netflix prize.

    python benchmarks/plateau.py

A share of the ratings is held out, and the others are fitted leg by leg: each leg starts from the
factors of the one before it and is followed by the root of the mean squared error on both parts of
the ratings. Acceleration starts anew in each leg, so that one training of as many sweeps is
nearer to its end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from benchmarks.large import SHAPES
from unlearn_spark.spark.metrics import rmse, split_by_hash
from unlearn_spark.spark.scoring import predict_pairs
from unlearn_spark.spark.training.training import fit_factors

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

    from unlearn_spark.spark.training.training import FitResult

HELD_OUT = 0.01


def error(fitted: FitResult, pairs: DataFrame) -> float:
    """Of the predictions of these ratings, as far as the model knows their users and items."""
    users, items = fitted.user_factors, fitted.item_factors
    return rmse(predict_pairs(pairs, users, items, cold_start="drop"))


@click.command()
@click.option("--users", default=SHAPES[-1][0])
@click.option("--items", default=SHAPES[-1][1])
@click.option("--ratings", default=SHAPES[-1][2])
@click.option("--rank", default=64)
@click.option("--sweeps", default=3, help="In each leg.")
@click.option("--legs", default=6)
def main(users: int, items: int, ratings: int, rank: int, sweeps: int, legs: int) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    train, held_out = split_by_hash(common.generated(spark, users, items, ratings), HELD_OUT)
    held_out = held_out.persist()
    seen = split_by_hash(train, HELD_OUT, seed=1)[1].persist()  # as many of the fitted ones
    als = common.als_settings(rank, False, max_sweeps=sweeps, tol=1e-12)
    raw: list[dict[str, Any]] = []
    before: FitResult | None = None
    with common.PeakMemory() as memory:
        for leg in range(1, legs + 1):
            warm = None if before is None else (before.user_factors, before.item_factors)
            fitted = fit_factors(train, als, warm_start=warm)
            if before is not None:
                before.release()
            before, summary = fitted, fitted.summary
            run = {
                "sweeps": leg * sweeps,
                "objective": summary.history[-1]["objective"],
                "residual": summary.max_residual,
                "rmse": error(fitted, seen),
                "held-out rmse": error(fitted, held_out),
            }
            raw.append(run)
            print(run, flush=True)
    spark.stop()
    head = list(raw[0])
    common.table(head, [[run[name] for name in head] for run in raw])
    common.save(
        f"plateau-{ratings}-{rank}",
        {
            "data": {"users": users, "items": items, "ratings": ratings, "held out": HELD_OUT},
            "als": als.model_dump(),
            "peak memory, GiB": memory.gib,
            "raw": raw,
        },
    )


if __name__ == "__main__":
    main()
