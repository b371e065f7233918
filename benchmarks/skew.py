"""One item with 2% of all ratings and one user with 20,000: what they do to a sweep and to memory.

    python benchmarks/skew.py --ratings 10000000 --rank 64

The same ratings are fitted with and without these two, alternating in one session.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common
from unlearn_spark.spark.training.training import fit_factors

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def with_hot_rows(plain: DataFrame, item_ratings: int, user_ratings: int) -> DataFrame:
    """The ratings with an item -1 that so many users rated, and a user -1 of so many items."""
    from pyspark.sql import functions as F

    spark = plain.sparkSession
    value = (F.pmod(F.xxhash64("id"), F.lit(9)) / 2 + 0.5).cast("float").alias("rating")
    number, hot = F.col("id").cast("int"), F.lit(-1)
    by_users = spark.range(item_ratings).select(
        number.alias("user_id"), hot.alias("item_id"), value
    )
    of_items = spark.range(user_ratings).select(
        hot.alias("user_id"), number.alias("item_id"), value
    )
    every = plain.select("user_id", "item_id", F.col("rating").cast("float"))
    return common.in_delta(every.unionByName(by_users).unionByName(of_items))


@click.command()
@click.option("--users", default=300_000)
@click.option("--items", default=20_000)
@click.option("--ratings", default=10_000_000)
@click.option("--rank", default=64)
@click.option("--rounds", default=3)
def main(users: int, items: int, ratings: int, rank: int, rounds: int) -> None:
    """Print the table and save the raw figures."""
    spark = common.session()
    plain = common.generated(spark, users, items, ratings)
    frames = {
        "as generated": plain,
        "with both": with_hot_rows(plain, ratings // 50, min(20_000, items)),
    }
    als = common.als_settings(rank, False, max_sweeps=4, tol=1e-12)
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in frames}
    for _ in range(rounds):
        for name, frame in frames.items():
            with common.PeakMemory() as memory:
                fitted = fit_factors(frame, als)
            summary = fitted.summary
            fitted.release()
            raw[name].append(
                {
                    "ratings": summary.ratings,
                    "preparation, s": summary.encode_seconds,
                    "sweep, s": min(report["seconds"] for report in summary.history),
                    "peak memory, GiB": memory.gib,
                }
            )
    spark.stop()
    head = list(raw["with both"][0])
    medians = {
        name: [statistics.median(run[figure] for run in runs) for figure in head]
        for name, runs in raw.items()
    }
    common.table(["ratings of", *head], [[name, *row] for name, row in medians.items()])
    common.save(f"skew-{ratings}-{rank}", {"raw": raw})


if __name__ == "__main__":
    main()
